"""What a study is, and the configs of its arms. `experiments/NAME.py` ends with `STUDY = Study(...)`."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from frugalmoe.config import Config, override, python_file, read, resolve, with_mode
from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.fields import check_seed, to_dict
from frugalmoe.files import check_name
from frugalmoe.shipped import STUDIES

# What every arm shares, so that seed s means the same start and the same batches in each of them.
SHARED = ("name", "data", "mesh", "checkpoint", "train")
LAPTOP_STEPS = 100
BESIDE_ARMS = ("report", "slurm", "study.json", "fit.json", "results.parquet", "results.parquet.lock",
               "goodput.json", "goodput.json.lock")  # fmt: skip
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
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # dotted fields of every arm
    # arm -> RUN or RUN@STEP with whose weights its runs begin; {seed} in it stands for the seed
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict)
    equal_flops: bool = True  # refuse arms whose active FLOPs per token differ by more than `tolerance`
    tolerance: float = 0.03
    evaluate_with: bool = False  # also evaluate each run under the routers of the other arms
    keep_checkpoints: bool = False  # of complete runs, so that they can be sampled and traced
    name: str = ""  # the file's name


@dataclasses.dataclass(frozen=True)
class Arm:
    name: str
    config: Config  # its seed is the base's

    def with_seed(self, study: Study, seed: int) -> Config:
        train = dataclasses.replace(self.config.train, seed=seed)
        return dataclasses.replace(self.config, name=f"{study.name}/{self.name}/{seed}", train=train)


def load_study(path: str | Path) -> Study:
    """Returns the `STUDY` of a file, or of the study shipped by that name. Raises `UserError` where it is none."""
    study = python_file(STUDIES, str(path), str(path), "STUDY")
    if not isinstance(study, Study):
        raise UserError(f"{path}: STUDY={study!r}: a study's file ends with STUDY = Study(...)")
    return dataclasses.replace(study, name=study.name or Path(path).stem)


def arms_of(study: Study, overrides: Mapping[str, Any] | Sequence[str] = ()) -> list[Arm]:
    """Returns the arms with checked configs. `overrides` change the base, as on the command line."""
    _check_declaration(study)
    base = override(override(_base(study), study.overrides), overrides)
    arms = [Arm(name, _resolve(base, study, name)) for name in study.arms]
    baseline = next(arm for arm in arms if arm.name == study.baseline)
    for arm in arms:
        _check_differences(study, baseline, arm)
    return arms


def _base(study: Study) -> ConfigDict:
    return read(study.base) if isinstance(study.base, str) else study.base()


def shrunk(study: Study, *, steps: int | None = None, laptop: bool = False) -> Study:
    """Returns the study at a fraction of its cost, under another name: its results are not those of the whole one.

    `steps` trains each run so long; whatever counts steps (warmup, evaluations, logs, checkpoints) shrinks with them.
    `laptop` puts the base in its laptop mode and takes the first two seeds. A study that sets sizes of the model keeps
    its model and its tokens, and is smaller in training only: its arms stand in proportion to the base that it names.
    """
    if steps is None and not laptop:
        return study
    if steps is not None and steps < 1:
        raise UserError(f"--steps={steps}: must be at least 1")
    base = override(_base(study), study.overrides)
    fields = _laptop_fields(study) if laptop else {}
    in_steps = _in_steps(base, steps or min(base.train.steps, LAPTOP_STEPS))
    name = study.name + "-laptop" * laptop + (f"-{steps}-steps" if steps else "")
    seeds = study.seeds[:2] if laptop else study.seeds
    return dataclasses.replace(study, name=name, seeds=seeds, overrides={**fields, **study.overrides, **in_steps})


def _laptop_fields(study: Study) -> dict[str, Any]:
    """Returns the fields that the laptop mode of the base sets, without those that the study sets itself."""
    full, small = (flatten(c.to_dict()) for c in (_base(study), with_mode(_base(study), "laptop")))
    changed = {field for field, value in small.items() if value != full.get(field)} - {"name"}
    own = {field for changes in (study.overrides, *study.arms.values()) for field in flatten(changes)}
    if any(re.fullmatch(r"model\.(moe\.)?(num_\w+|\w*dim)", field) for field in own):
        changed = {field for field in changed if field.startswith("train.")}
    return {field: small[field] for field in sorted(changed - own)}


_COUNT_STEPS = (
    "optim.warmup_steps",
    "train.log_every",
    "train.eval_every",
    "checkpoint.every_steps",
    "checkpoint.keep_every_steps",
)


def _in_steps(base: ConfigDict, steps: int) -> dict[str, int]:
    fields = flatten(base.to_dict())
    shrink = lambda count: max(1, round(count * steps / base.train.steps)) if count else 0
    found = {"train.steps": steps} | {name: shrink(fields[name]) for name in _COUNT_STEPS}
    return found | {"optim.warmup_steps": min(found["optim.warmup_steps"], steps - 1)}


def choose(what: str, wanted: Sequence[Any] | None, declared: Sequence[Any]) -> list[Any]:
    """Returns the wanted ones in the declared order; all if none are named."""
    for name in wanted or ():
        if name not in declared:
            raise UserError(f"{what}={name}: no such arm; {did_you_mean(str(name), declared)}")
    return [name for name in declared if not wanted or name in wanted]


def check_arm(what: str, name: object) -> None:
    """Raises `UserError` for a name that no folder for an arm's runs can have, or that the study uses for its own."""
    check_name(what, name)
    if name in BESIDE_ARMS or name.startswith("worker_"):
        raise UserError(f"{what}={name!r}: the study has a file or folder of this name; choose another")


def _check_declaration(study: Study) -> None:
    check_name("name", study.name)
    for name in study.arms:
        check_arm(f"{study.name}: arm", name)
    for name, run in study.origins.items():
        if name not in study.arms:
            raise UserError(f"{study.name}: origins={name!r}: no such arm; {did_you_mean(name, study.arms)}")
        try:
            run.format(seed=0)
        except (LookupError, ValueError, AttributeError):
            rule = "must be RUN or RUN@STEP, in which {seed} may stand"
            raise UserError(f"{study.name}: origins: {name}={run!r}: {rule}") from None
    if study.baseline not in study.arms:
        raise UserError(
            f"{study.name}: baseline={study.baseline!r}: no such arm; {did_you_mean(study.baseline, study.arms)}"
        )
    check_seeds(f"{study.name}: seeds", study.seeds)
    for field in study.varies:
        if field.partition(".")[0] in SHARED:
            rule = "arms share data, batches, steps and seeds"
            raise UserError(f"{study.name}: varies={field!r}: {rule}; only model, optim and islands may vary")


def check_seeds(path: str, seeds: Sequence[int]) -> None:
    """Raises `UserError` unless these are seeds, at least one, and no two are equal."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"{path}={seeds}: must be different integers, at least one")
    for seed in seeds:
        check_seed(path, seed)


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
    """Returns nested mappings as one with dotted keys: {"a": {"b": 1}} becomes {"a.b": 1}."""
    if not isinstance(values, Mapping):
        return {path: values}
    prefix = f"{path}." if path else ""
    return {k: v for name, value in values.items() for k, v in flatten(value, prefix + name).items()}
