"""A study made ready to run: which runs, at what budget, in which directories."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from frugalmoe.ablate import suite
from frugalmoe.ablate.results import known_metrics
from frugalmoe.ablate.study import Arm, Study, arms_of, check_arm, check_seeds, choose
from frugalmoe.config import Config, settle
from frugalmoe.config.checks import decaying_updates
from frugalmoe.cost import forward_flops
from frugalmoe.data import open_data, ramp
from frugalmoe.data.look import look
from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.fields import to_dict
from frugalmoe.files import check_name, read_json, write_json
from frugalmoe.model.transformer import count_parameters
from frugalmoe.shapes import is_integer, is_number
from frugalmoe.train.origin import Origin
from frugalmoe.train.weights import run_and_step


class Pair(NamedTuple):
    """One run of a study."""

    arm: str
    seed: int

    def directory(self, workdir: Path) -> Path:
        return workdir / self.arm / f"seed_{self.seed}"


@dataclasses.dataclass(frozen=True)
class Plan:
    study: Study
    overrides: Mapping[str, Any] | Sequence[str]  # of the base, beside the study's own
    arms: Mapping[str, Arm]  # all that are declared
    pairs: tuple[Pair, ...]  # those to run, seed after seed, so that an unfinished study can be compared
    flops: Mapping[str, Mapping[str, float]]  # arm -> part of the model -> forward FLOPs per token
    parameters: Mapping[str, Mapping[str, int]]
    vocabulary: int  # tokens that the data has
    notes: tuple[str, ...] = ()  # what has still to be done before a step

    def config(self, pair: Pair) -> Config:
        return self.arms[pair.arm].with_seed(self.study, pair.seed)

    def origin(self, pair: Pair) -> Origin | None:
        """The run with whose weights a run begins; None for one that begins anew."""
        run = self.study.origins.get(pair.arm)
        return None if run is None else Origin(*run_and_step(run.format(seed=pair.seed)))

    @property
    def steps(self) -> int:
        return self.arms[self.study.baseline].config.train.steps


def make_plan(
    study: Study,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    dry: bool = False,
) -> Plan:
    """Returns the plan of a study with all checked that can be before a step; prepares the data unless `dry`."""
    all_arms = {arm.name: arm for arm in arms_of(study, overrides)}
    chosen = choose("--arms", arms, list(all_arms))
    if seeds is not None:
        check_seeds("--seeds", seeds)
    config = all_arms[study.baseline].config
    for arm in all_arms.values():
        settle(arm.config, None, jax.device_count())
    if not dry:
        open_data(config.data, batch_size=config.train.batch_size, seed=config.train.seed)
    data = look(config.data, batch_size=config.train.batch_size, seed=config.train.seed)
    known = known_metrics(data.domains or ())
    for metric in study.metrics:
        if metric not in known and not (data.domains is None and metric.startswith("eval/")):
            raise UserError(f"{study.name}: metrics={metric!r}: unknown metric; {did_you_mean(metric, known)}")
    if not study.metrics or not study.metrics[0].startswith("eval/"):
        raise UserError(f"{study.name}: metrics={study.metrics}: the first one decides and must be one of eval/...")
    suite.check({name: arm.config for name, arm in all_arms.items()}, study.metrics)
    models = {name: settle(arm.config, data.vocabulary, None).model for name, arm in all_arms.items()}
    flops = {name: forward_flops(model, config.data.sequence_length) for name, model in models.items()}
    check_budgets(study, flops)
    return Plan(
        study=study,
        overrides=overrides,
        arms=all_arms,
        pairs=tuple(Pair(arm, seed) for seed in (seeds or study.seeds) for arm in chosen),
        flops=flops,
        parameters={name: count_parameters(model) for name, model in models.items()},
        vocabulary=data.vocabulary,
        notes=data.notes,
    )


def budget_ratios(study: Study, flops: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns active FLOPs per token of each arm over the baseline's."""
    total = {name: sum(parts.values()) for name, parts in flops.items()}
    return {name: value / total[study.baseline] for name, value in total.items()}


def check_budgets(study: Study, flops: Mapping[str, Mapping[str, float]]) -> None:
    """Refuses arms of unequal active FLOPs in a study that does not declare them."""
    for name, ratio in budget_ratios(study, flops).items():
        if study.equal_flops and abs(ratio - 1) > study.tolerance:
            raise UserError(
                f"{study.name}: arm {name!r}: {ratio:.3f} times the active FLOPs per token of the baseline "
                f"{study.baseline!r}; equal to within tolerance={study.tolerance}, or equal_flops=False, is the rule"
            )


# ---------------------------------------------------------------- the study's directory


def check_claim(workdir: Path, plan: Plan) -> None:
    """Refuses a directory that holds something else than this study."""
    path = workdir / "study.json"
    if path.is_file():
        check_same_study(workdir, plan)
    elif workdir.is_dir() and any(workdir.iterdir()):
        raise UserError(f"--workdir={workdir}: holds files but no study.json; give an empty or new directory")


def claim(workdir: Path, plan: Plan, command: Sequence[str]) -> None:
    """Writes study.json, which marks the directory as this study's; refuses one that holds something else."""
    check_claim(workdir, plan)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--workdir={workdir}: cannot be written ({e.strerror})") from e
    write_json(workdir / "study.json", describe(plan, command))


def check_same_study(workdir: Path, plan: Plan) -> None:
    """Refuses the directory of another study."""
    if (name := read_study(workdir)["name"]) != plan.study.name:
        raise UserError(f"--workdir={workdir}: holds the study {name!r}, not {plan.study.name!r}; give another")


def describe(plan: Plan, command: Sequence[str]) -> dict[str, Any]:
    """Returns the content of study.json: all that the report needs beside the runs."""
    study = plan.study
    overrides = plan.overrides if isinstance(plan.overrides, Mapping) else list(plan.overrides)
    train, data = plan.arms[study.baseline].config.train, plan.arms[study.baseline].config.data
    return {
        "name": study.name,
        "question": study.question,
        "expectation": study.expectation,
        "arms": {name: to_dict(changes) for name, changes in study.arms.items()},
        "origins": dict(study.origins),
        "baseline": study.baseline,
        "varies": list(study.varies),
        "metrics": list(study.metrics),
        "base": study.base if isinstance(study.base, str) else study.base.__name__,
        "overrides": to_dict(study.overrides),
        "command_overrides": to_dict(overrides),
        "equal_flops": study.equal_flops,
        "tolerance": study.tolerance,
        "seeds": sorted({pair.seed for pair in plan.pairs} | set(study.seeds)),
        "steps": train.steps,
        "tokens_per_step": ramp.of(to_dict(train)).before(train.steps) * data.sequence_length // train.steps,
        "constant_rate": not any(decaying_updates(arm.config) for arm in plan.arms.values()),
        "forward_flops": plan.flops,
        "experts_per_token": {n: arm.config.model.moe.num_experts_per_token for n, arm in plan.arms.items()},
        "parameters": plan.parameters,
        "command": list(command),
    }


def read_study(workdir: Path) -> dict[str, Any]:
    """Returns the content of study.json of a study's directory. Raises `UserError` naming what is not as `describe`
    writes it.
    """
    path = workdir / "study.json"
    if not path.is_file():
        raise UserError(f"{workdir}: not a study (no study.json)")
    described = read_json(path)
    if not isinstance(described, dict) or "baseline" not in described:
        raise UserError(f"{path}: not a study's description")
    for field, (rule, holds) in _DESCRIBED.items():
        if field not in described or not holds(described[field]):
            there = repr(described[field])[:60] if field in described else "missing"
            raise UserError(f"{path}: {field}={there}: must be {rule}")
    check_name(f"{path}: name", described["name"])
    for arm in described["arms"]:
        check_arm(f"{path}: arm", arm)
    if described["baseline"] not in described["arms"]:
        raise UserError(f"{path}: baseline={described['baseline']!r}: no such arm")
    for arm in described["arms"]:
        flops, active = described["forward_flops"].get(arm), described["experts_per_token"].get(arm)
        whole = isinstance(flops, dict) and any(map(_positive, flops.values())) and "routed experts" in flops
        if not (whole and all(map(_positive_or_zero, flops.values())) and _positive(active)):
            raise UserError(f"{path}: forward_flops, experts_per_token: must hold the numbers of arm {arm!r}")
    return described


def _positive(value: object) -> bool:
    return is_number(value) and 0 < value < float("inf")


def _positive_or_zero(value: object) -> bool:
    return value == 0 or _positive(value)


def _list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


_text = ("text", lambda value: isinstance(value, str))
_mapping = ("a mapping", lambda value: isinstance(value, dict))
_count = ("a positive integer", lambda value: is_integer(value) and _positive(value))
# What the report reads of study.json: the rule, and whether a value keeps it.
_DESCRIBED = {
    **dict.fromkeys(("name", "question", "expectation", "baseline"), _text),
    **dict.fromkeys(("arms", "forward_flops", "experts_per_token"), _mapping),
    **dict.fromkeys(("steps", "tokens_per_step"), _count),
    "metrics": ("a list of names, at least one", lambda value: _list_of(str, value) and bool(value)),
    "seeds": ("a list of integers", lambda value: _list_of(int, value)),
    "command": ("a list of words", lambda value: _list_of(str, value)),
}
