"""The runs in a directory, side by side, from their own directories alone: no checkpoint is read."""

import collections
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from frugalmoe import metrics
from frugalmoe.analysis.stored.runs import Series, read_metrics
from frugalmoe.config import RECORD, record
from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.train import best, checkpoint, rundir

LOSS, BITS = "eval/loss/mean", "eval/bits_per_byte/mean"
_NO_DIFFERENCE = ("name", "left_open", "data.cache_dir")  # fields that say nothing of what was trained


class Listed(NamedTuple):
    """A run among others."""

    path: str  # below the directory
    status: str  # complete | training | stopped | not finite | not begun
    step: int  # the last that was logged, 0 for none
    steps: int  # that it is to have
    started: str | None  # the time (UTC) of its last start; None for runs that are older than their history
    values: dict[str, float]  # the last value of every metric
    best: dict[str, Any] | None  # metric, step and value of its best checkpoint; None for a run that keeps none
    differences: dict[str, Any]  # dotted fields of the config in which it is not as most of the others are


class Listing(NamedTuple):
    runs: list[Listed]
    unreadable: list[str]  # a line for each run that is damaged


def list_runs(directory: str | Path, by: str = LOSS) -> Listing:
    """Returns the runs below a directory, the best by a metric first and those without it last.

    Raises `UserError` for a directory without runs, and for a metric that none of them has.
    """
    directory = Path(directory)
    found, configs, unreadable = [], [], []
    for path in _run_directories(directory):
        try:
            config = record(path / RECORD)
            found.append(_listed(directory, path, config))
            configs.append(dict(_flat(config)))
        except UserError as error:
            unreadable.append(str(error))
    if not found:
        raise UserError("; ".join([f"{directory}: holds no run (no directory with a {RECORD})", *unreadable[:1]]))
    known = {name for run in found for name in run.values}
    if by not in known and by != LOSS:
        raise UserError(f"--by={by}: no metric of these runs; {did_you_mean(by, known)}")
    runs = [run._replace(differences=apart) for run, apart in zip(found, _differences(configs))]
    return Listing(sorted(runs, key=lambda run: _rank(run, by)), unreadable)


def _run_directories(directory: Path) -> Iterator[Path]:
    """Directories with a record, sorted; what is inside a run is not looked at."""
    for path, folders, files in os.walk(directory):
        folders.sort()
        if RECORD in files:
            folders.clear()
            yield Path(path)


def _listed(directory: Path, path: Path, config: Mapping[str, Any]) -> Listed:
    series = read_metrics(path / "metrics.jsonl") if (path / "metrics.jsonl").is_file() else {}
    history = path / "history.jsonl"
    starts = rundir.read_rows(history) if history.is_file() else []
    values = {name: float(of_steps.values[-1]) for name, of_steps in series.items()}
    steps, started = config["train"].get("steps"), starts[-1].get("time") if starts else None
    if type(steps) is not int:
        raise UserError(f"{path / RECORD}: a damaged config (train.steps={steps!r})")
    return Listed(
        path=path.relative_to(directory).as_posix() if path != directory else path.resolve().name,
        status=_status(path, series, values),
        step=max((int(of_steps.steps[-1]) for of_steps in series.values()), default=0),
        steps=steps,
        started=started if isinstance(started, str) else None,
        values=values,
        best=_best(path, config),
        differences={},
    )


def _best(path: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of the checkpoints that are there."""
    metric = config.get("checkpoint", {}).get("keep_best")
    found = best.find(path, metric, checkpoint.saved_steps(path)) if metric and metrics.find(metric) else None
    return None if found is None else {"metric": metric, **found._asdict()}


def _status(path: Path, series: Mapping[str, Series], values: Mapping[str, float]) -> str:
    try:
        rundir.check_idle(path)
    except rundir.Busy:
        return "training"
    if rundir.is_complete(path):
        return "complete"
    losses = ("loss/", "eval/", "validation/", "optim/")
    if any(math.isnan(value) for name, value in values.items() if name.startswith(losses)):
        return "not finite"
    return "stopped" if series else "not begun"


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif prefix + name not in _NO_DIFFERENCE:
            yield prefix + name, value


def _differences(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each config the fields that most others have otherwise; where as many have it so, the first counts as most."""
    fields = dict.fromkeys(field for config in configs for field in config)
    usual = {}
    for field in fields:
        ((most, _),) = collections.Counter(repr(config.get(field)) for config in configs).most_common(1)
        usual[field] = most
    return [{f: value for f, value in config.items() if repr(value) != usual[f]} for config in configs]


def _rank(run: Listed, by: str) -> tuple[bool, float, str]:
    """The better the lower; a metric of which neither way is better is sorted from small to large."""
    value, metric = run.values.get(by, math.nan), metrics.find(by)
    missing = math.isnan(value)
    sign = -1 if metric is not None and metric.better == metrics.MORE else 1
    return missing, 0.0 if missing else sign * value, run.path
