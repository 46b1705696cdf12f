"""Where the wall time of a study's processes went: `goodput.json` in its directory, and what a report says of it.

Each process that trains runs adds up the ledgers of its runs (`train.ledger`) and what it does between them, from its
start to its end. Of `--jobs=N` the time of the process that waits for the N others counts N times while none of them is
there, and a process that ended earlier than the last one is `idle` until then: so N processes have N times the seconds
on the clock. What a process did after its last run, or in a run in which it was killed, is not known.
"""

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path

from frugalmoe.analysis.wording import number, percent
from frugalmoe.errors import UserError
from frugalmoe.files import locked, read_json, write_json
from frugalmoe.shapes import is_number
from frugalmoe.train.goodput import KINDS
from frugalmoe.train.ledger import Ledger

FILE = "goodput.json"
_SHOWN = 4  # kinds beside the steps that a line names


class WorkTime:
    """The stopwatch of one process of a study. times: began when the process did."""

    def __init__(self, workdir: Path, times: Ledger):
        self.times, self._workdir = times, workdir
        self._name = f"{platform.node()}-{os.getpid()}-{time.time():.0f}"
        self._before = set(processes(workdir))

    def write(self) -> None:
        """Writes what the time of this process went to until now, if it has trained something."""
        if (own := self.times.seconds()).get("step"):
            self._write(own)

    def write_lead(self, jobs: int) -> None:
        """The same of a process that started so many others, and was in the phase `idle` while they were there."""
        own = self.times.seconds()
        waited = own.pop("idle", 0.0)
        others = {name: of for name, of in processes(self._workdir).items() if name not in {*self._before, self._name}}
        if not others:
            return
        worked = sum(sum(of.values()) for of in others.values())
        self._write({kind: jobs * s for kind, s in own.items()} | {"idle": max(0.0, jobs * waited - worked)})

    def _write(self, seconds: Mapping[str, float]) -> None:
        path = self._workdir / FILE
        with locked(path):
            write_json(path, processes(self._workdir) | {self._name: {k: round(s, 3) for k, s in seconds.items()}})


def processes(workdir: Path) -> dict[str, dict[str, float]]:
    """Returns the seconds of each process by kind; what is none is left out, as all of a damaged file."""
    path = workdir / FILE
    try:
        found = read_json(path) if path.is_file() else {}
    except UserError:
        return {}
    whole = lambda of: isinstance(of, dict) and of.keys() <= KINDS.keys() and all(map(_is_time, of.values()))
    return {name: of for name, of in found.items() if whole(of)} if isinstance(found, dict) else {}


def _is_time(seconds: object) -> bool:
    return is_number(seconds) and 0 <= seconds < 1e12


def line(workdir: Path) -> str:
    """Returns how much of the wall time was training steps, and what else there was; empty where it is not known."""
    total: dict[str, float] = {}
    for of in processes(workdir).values():
        for kind, seconds in of.items():
            total[kind] = total.get(kind, 0.0) + seconds
    wall = sum(total.values())
    if not wall:
        return ""
    rest = sorted(((s, kind) for kind, s in total.items() if kind != "step"), reverse=True)[:_SHOWN]
    others = ", ".join(f"{kind} {percent(s / wall)}" for s, kind in rest if s > 0)
    share = f"{percent(total.get('step', 0.0) / wall)} of {number(wall / 60)} minutes of wall time"
    return f"{share}, added up over processes, was training steps" + (f"; {others}" if others else "")
