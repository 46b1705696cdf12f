"""The best checkpoint of a run: of those that an evaluation was logged at, the one whose metric is best.

Which it is follows from metrics.jsonl and from the checkpoints that are there, so that a run that goes on after a kill
knows what it knew before, and all processes of a run know the same.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from frugalmoe import metrics
from frugalmoe.config import RECORD, Config, record
from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.train import checkpoint, rundir

NAME = "best"  # in the place of a step


class Best(NamedTuple):
    step: int
    value: float


def is_better(metric: str, value: Any, than: Best | None) -> bool:
    """Whether a value is finite and better than the best before; an equal one is not."""
    if type(value) not in (int, float) or not math.isfinite(value):
        return False
    sign = -1 if metrics.find(metric).better == metrics.MORE else 1
    return than is None or sign * value < sign * than.value


def find(workdir: Path, metric: str, steps: Collection[int]) -> Best | None:
    """Returns the best of some steps by the metric that was logged there, the first among equals; None for none."""
    path, best = workdir / "metrics.jsonl", None
    for row in rundir.read_rows(path) if path.is_file() else []:
        if row.get("step") in steps and is_better(metric, row.get(metric), best):
            best = Best(row["step"], float(row[metric]))
    return best


def step_of(run: Path) -> int:
    """Returns the step of a run's best checkpoint. Raises `UserError` for a run that keeps none."""
    metric = record(run / RECORD)["checkpoint"]["keep_best"]
    if not metric:
        raise UserError(f"{run}@{NAME}: the run kept no best checkpoint (checkpoint.keep_best is empty)")
    steps = checkpoint.saved_steps(run)
    best = find(run, metric, steps)
    if best is None:
        raise UserError(f"{run}@{NAME}: no checkpoint with {metric} yet; it has {steps or 'none'}")
    return best.step


def check_metric(config: Config, domains: Mapping[str, Collection[str] | None]) -> None:
    """Raises `UserError` where the metric of `checkpoint.keep_best` will not be measured.

    domains: of `eval` and of `validation`, None where they are not known yet; a part that is not there is not measured.
    """
    metric = config.checkpoint.keep_best
    if not metric or domains.get(metric.partition("/")[0], ()) is None:
        return
    kinds = ("loss", "bits_per_byte")
    known = {part: names for part, names in domains.items() if names is not None}
    valid = [f"{part}/{kind}/{d}" for part, names in known.items() for kind in kinds for d in (*names, "mean")]
    if metric not in valid:
        raise UserError(f"checkpoint.keep_best={metric!r}: not measured; {did_you_mean(metric, valid)}")
