"""The checkpoints of a run as they lie on disk: which there are, and what is wrong with one.

A name of digits means a step. What has such a name and is no whole checkpoint (a file that was cut off, a bit that
flipped, an empty folder) is never read: readers pass it over and say so, and a run that goes on moves it aside.
"""

import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from frugalmoe.errors import UserError, printable
from frugalmoe.train import checksums

FOLDER = "checkpoints"
UNFINISHED = ".orbax-checkpoint-tmp"  # in names of what is no step yet, or none any more
DAMAGED = ".damaged"
_OF_ALL = ("params", "step")  # items that no checkpoint is without
_SMALL = 2**20  # bytes


class Skipped(NamedTuple):
    """A step that was passed over."""

    step: int
    why: str


class Damaged(UserError):
    """A checkpoint is not whole, or not finite; or none of a run's is whole and finite. `why` says what is wrong."""

    def __init__(self, message: str, why: str):
        super().__init__(message)
        self.why = why


def entries(workdir: Path) -> list[int]:
    """Returns the steps that names in `checkpoints/` stand for, in order, whatever has the name."""
    folder = workdir / FOLDER
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(name) for name in names if is_step(name))


def is_step(name: str) -> bool:
    """Whether a name means a step."""
    return bool(re.fullmatch("0|[1-9][0-9]{0,99}", name))


def saved_steps(workdir: Path) -> list[int]:
    """Returns the steps of checkpoints, in order; those still being written have other names."""
    return [step for step in entries(workdir) if not _junk(place(workdir, step))]


def place(workdir: Path, step: int) -> Path:
    return workdir / FOLDER / str(step)


def fault(workdir: Path, step: int, quick: bool = False) -> str:
    """Returns what is wrong with a checkpoint, naming the file; "" for nothing. What is not finite is not seen.

    Of one without checksums it is only seen that it is no checkpoint. quick: large files are not read, only measured.
    """
    path = place(workdir, step)
    if why := _junk(path):
        return why
    found = checksums.faults(path, _SMALL if quick else None) if checksums.are_there(path) else []
    return str(found[0]) + (f", and {len(found) - 1} other files" if len(found) > 1 else "") if found else ""


def check(workdir: Path, step: int) -> None:
    """Raises `Damaged` for a checkpoint with a fault, and `UserError` for one that is not there."""
    if step not in (there := entries(workdir)):
        raise UserError(f"{workdir}: no checkpoint of step {step}; valid: {there}")
    if why := fault(workdir, step):
        raise damaged(workdir, Skipped(step, why))


def damaged(workdir: Path, *skipped: Skipped) -> Damaged:
    """Returns what to raise where one checkpoint was asked for, or none of those that are there can be taken."""
    if len(skipped) == 1:
        (step, why), *_ = skipped
        return Damaged(f"{place(workdir, step)}: a damaged checkpoint ({why})", why)
    why = "; ".join(f"{step}: {why}" for step, why in skipped)
    return Damaged(f"{workdir / FOLDER}: no checkpoint is whole and finite ({why})", why)


def lines(workdir: Path, skipped: Iterable[Skipped], taken: int | None) -> list[str]:
    """Returns what to tell of checkpoints that were passed over, and of one that was taken without checksums."""
    instead = "" if taken is None else f"; step {taken} is taken"
    found = [f"{place(workdir, step)}: a damaged checkpoint ({why}){instead}" for step, why in skipped]
    if taken is not None and not checksums.are_there(place(workdir, taken)):
        rule = "carries no checksums, for it is older than they are: whether a value has changed cannot be told"
        found.append(f"{place(workdir, taken)}: {rule}")
    return [printable(line) for line in found]


def clear(workdir: Path, skipped: Iterable[Skipped], taken: int | None) -> list[str]:
    """Moves checkpoints that were passed over aside, so that the run can save those steps anew, and with them what else
    is seen at a glance to be damaged, which would count as one that is kept. Returns what to tell of it.
    """
    known = {step: why for step, why in skipped}
    known |= {step: why for step in entries(workdir) if step not in known and (why := fault(workdir, step, quick=True))}
    told = lines(workdir, map(Skipped._make, known.items()), taken)
    names = [_move_aside(workdir, step) for step in known]
    return [f"{line}; is {name} now" for line, name in zip(told, names)] + told[len(names) :]


def tell(lines: Iterable[str]) -> None:
    """Prints lines for a user whose command goes on."""
    for line in lines:
        print(f"frugalmoe: {line}", file=sys.stderr)


def delete(workdir: Path, step: int) -> None:
    """Deletes a checkpoint, which loses its name first: a kill leaves what the run's next start removes, and no part
    that looks like a checkpoint.
    """
    path = place(workdir, step)
    nameless = path.with_name(f"{step}{UNFINISHED}-deleted")
    shutil.rmtree(nameless, ignore_errors=True)
    path.rename(nameless)
    shutil.rmtree(nameless)


def _move_aside(workdir: Path, step: int) -> str:
    path = place(workdir, step)
    names = (f"{step}{DAMAGED}" + (f".{number}" if number > 1 else "") for number in itertools.count(1))
    name = next(name for name in names if not os.path.lexists(path.with_name(name)))
    path.rename(path.with_name(name))
    return name


def _junk(path: Path) -> str:
    """Why what has the name of a step is no checkpoint; "" for one that may be one."""
    if path.is_symlink():
        return "is a symbolic link"
    if not path.is_dir():
        return "is no folder"
    missing = [item for item in _OF_ALL if not (path / item).is_dir()]
    return f"{', '.join(missing)}: missing" if missing else ""
