"""What a study is, and the configs of its arms. `experiments/NAME.py` ends with `STUDY = Study(...)`."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from frugalmoe.config import Config, override, python_file, read, resolve, to_dict
from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.shipped import STUDIES

# What every arm shares, so that seed s means the same start and the same batches in each of them.
SHARED = ("name", "data", "mesh", "checkpoint", "train")
DIRECTION = {"speed/tokens_per_second": 1}  # metrics of which more is better; of the others less is
METRICS = ("eval/loss/mean", "eval/bits_per_byte/mean", "router/max_violation", "router/entropy", "router/drop_rate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """One question, answered by runs that differ in declared fields only."""

    question: str
    expectation: str  # what the literature lets one expect, with its figures
    base: str | Callable[[], ConfigDict]  # FILE[:ARG] of a config, or its get_config
    arms: Mapping[str, Mapping[str, Any]]  # name -> what it changes in the base: dotted field -> value
    baseline: str  # the arm that the others are compared with
    varies: tuple[str, ...]  # fields or sections in which arms may differ; a router brings its own options
    seeds: tuple[int, ...] = (0, 1, 2)
    metrics: tuple[str, ...] = METRICS  # the columns of the report; the first one, a loss, decides
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of every arm
    equal_flops: bool = True  # refuse arms whose active FLOPs per token differ by more than `tolerance`
    tolerance: float = 0.03
    evaluate_with: bool = False  # also evaluate each run under the routers of the other arms
    name: str = ""  # the file's name


@dataclasses.dataclass(frozen=True)
class Arm:
    name: str
    config: Config  # its seed is the base's

    def with_seed(self, study: Study, seed: int) -> Config:
        train = dataclasses.replace(self.config.train, seed=seed)
        return dataclasses.replace(self.config, name=f"{study.name}/{self.name}/{seed}", train=train)


def load_study(path: str | Path) -> Study:
    """The `STUDY` of a file, or of the study shipped by that name. Raises `UserError` naming what is wrong with it."""
    study = python_file(STUDIES, str(path), str(path), "STUDY")
    if not isinstance(study, Study):
        raise UserError(f"{path}: STUDY={study!r}: a study's file ends with STUDY = Study(...)")
    return dataclasses.replace(study, name=study.name or Path(path).stem)


def arms_of(study: Study, overrides: Mapping[str, Any] | Sequence[str] = ()) -> list[Arm]:
    """The arms' checked configs. `overrides` change the base, as on the command line."""
    _check_declaration(study)
    base = read(study.base) if isinstance(study.base, str) else study.base()
    base = override(override(base, study.overrides), overrides)
    arms = [Arm(name, _resolve(base, study, name)) for name in study.arms]
    baseline = next(arm for arm in arms if arm.name == study.baseline)
    for arm in arms:
        _check_differences(study, baseline, arm)
    return arms


def choose(what: str, wanted: Sequence[Any] | None, declared: Sequence[Any]) -> list[Any]:
    """The wanted ones in the declared order; all of them without a wish."""
    for name in wanted or ():
        if name not in declared:
            raise UserError(f"{what}={name}: no such arm; {did_you_mean(str(name), declared)}")
    return [name for name in declared if wanted is None or name in wanted]


def _check_declaration(study: Study) -> None:
    if not re.fullmatch(r"[\w.+-]+", study.name):
        raise UserError(f"name={study.name!r}: a study needs a name of letters, digits and _ . + -")
    for name in study.arms:
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise UserError(f"{study.name}: arm {name!r}: a name is made of letters, digits and _ . + -")
    if study.baseline not in study.arms:
        raise UserError(
            f"{study.name}: baseline={study.baseline!r}: no such arm; {did_you_mean(study.baseline, study.arms)}"
        )
    if not study.seeds or len(set(study.seeds)) < len(study.seeds) or not all(type(s) is int for s in study.seeds):
        raise UserError(f"{study.name}: seeds={study.seeds}: must be different integers, at least one")
    for field in study.varies:
        if field.partition(".")[0] in SHARED:
            rule = "arms share data, batches, steps and seeds"
            raise UserError(f"{study.name}: varies={field!r}: {rule}; only model and optim may vary")


def _resolve(base: ConfigDict, study: Study, name: str) -> Config:
    try:
        return resolve(override(base, study.arms[name]))
    except UserError as e:
        raise UserError(f"{study.name}: arm {name!r}: {e}") from e


def _check_differences(study: Study, baseline: Arm, arm: Arm) -> None:
    ours, theirs = flatten(to_dict(arm.config)), flatten(to_dict(baseline.config))
    another_router = ours["model.moe.router"] != theirs["model.moe.router"]
    allowed = [*study.varies, *(["model.moe.options"] if another_router else [])]
    for field in sorted(ours.keys() | theirs.keys()):
        same = ours.get(field) == theirs.get(field)
        if not same and not any(field == a or field.startswith(a + ".") for a in allowed):
            raise UserError(
                f"{study.name}: arm {arm.name!r}: {field}={ours.get(field)!r} where the baseline {baseline.name!r} has "
                f"{theirs.get(field)!r}: undeclared difference; varies={', '.join(study.varies) or 'nothing'}"
            )


def flatten(values: Any, path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    if not isinstance(values, Mapping):
        return {path: values}
    prefix = f"{path}." if path else ""
    return {k: v for name, value in values.items() for k, v in flatten(value, prefix + name).items()}
