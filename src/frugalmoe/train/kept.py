"""The checkpoints that a run has kept: what they are, whether they are whole and finite, and fewer of them."""

import datetime
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from frugalmoe.config import RECORD, record
from frugalmoe.errors import UserError
from frugalmoe.fields import check_integer
from frugalmoe.train import best, checkpoint, checksums, rundir, saved
from frugalmoe.train.saved import Skipped

WHOLE, DAMAGED, UNKNOWN = "whole", "damaged", "no checksums"


class Kept(NamedTuple):
    """A checkpoint; the fields are the columns of its table."""

    step: int
    bytes: int
    saved: str  # when, UTC
    metric: float | None  # of the best one, where the run keeps one
    state: str  # whole | damaged | no checksums
    fault: str  # what is wrong with it


def listed(run: Path) -> list[Kept]:
    """Returns a run's checkpoints, oldest first. Each file is read, to compare it with its checksum."""
    chosen = best_of(run)
    return [_kept(run, step, chosen) for step in saved.entries(run)]


def _kept(run: Path, step: int, chosen: best.Best | None) -> Kept:
    path, why = saved.place(run, step), saved.fault(run, step)
    size = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0
    when = datetime.datetime.fromtimestamp(path.lstat().st_mtime, datetime.UTC).isoformat(timespec="seconds")
    state = DAMAGED if why else WHOLE if checksums.are_there(path) else UNKNOWN
    return Kept(step, size, when, chosen.value if chosen and chosen.step == step else None, state, why)


def metric(run: Path) -> str:
    """Returns the metric whose best checkpoint a run keeps; "" for none."""
    return record(run / RECORD)["checkpoint"]["keep_best"]


def best_of(run: Path) -> best.Best | None:
    """Returns the best checkpoint of a run that keeps one."""
    return best.find(run, metric(run), saved.saved_steps(run)) if metric(run) else None


def faults(run: Path) -> Iterator[Skipped]:
    """Yields what keeps a checkpoint from being known as whole and finite, oldest first."""
    for step in saved.entries(run):
        if why := _fault(run, step) or ("" if checksums.are_there(saved.place(run, step)) else "no checksums"):
            yield Skipped(step, why)


def _fault(run: Path, step: int) -> str:
    return saved.fault(run, step) or checkpoint.not_finite(run, step)


def prune(run: Path, *, keep_last: int | None, keep: Collection[int] = (), dry_run: bool = False) -> list[int]:
    """Deletes the checkpoints but the last so many and those of some steps; returns the steps of those deleted.

    The best one and the newest that is whole and finite always stay, and what is damaged, which is no checkpoint, is
    neither counted nor deleted. The run is locked meanwhile: `rundir.Busy` where a process is training.
    """
    if keep_last is not None:
        check_integer("--keep-last", keep_last, least=0)
    if keep_last is None and not keep:
        raise UserError("--keep-last=N or --keep=STEP,STEP must say which checkpoints stay")
    with rundir.locked(run):
        steps, chosen = saved.saved_steps(run), best_of(run)
        if unknown := [step for step in keep if step not in steps]:
            raise UserError(f"--keep={','.join(map(str, keep))}: no checkpoint of step {unknown[0]}; valid: {steps}")
        damaged = {step for step in steps if saved.fault(run, step)}
        whole = [step for step in steps if step not in damaged]
        good = next((step for step in reversed(whole) if not checkpoint.not_finite(run, step)), None)
        last = whole[len(whole) - keep_last :] if keep_last else []
        stay = {*last, *keep, *damaged, good, chosen and chosen.step}
        found = [step for step in steps if step not in stay] if good is not None else []
        for step in [] if dry_run else found:
            saved.delete(run, step)
    return found
