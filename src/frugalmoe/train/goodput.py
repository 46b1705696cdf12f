"""Where the wall time of a run went, over all its starts: what the rows of `goodput.jsonl` say.

A row holds, of one start of the run, the `step`, the number of the `start`, the wall clock's `time`, the seconds
`elapsed` since the start began (of the monotonic clock), and `seconds`: by kind, since the start began. It may hold
`first_step` (the seconds elapsed at the end of the start's first step), `back_to` (the step that the run goes on from,
so that what it did after that step is made again) and `ended` (how the start ended, where it was not killed).
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

FILE = "goodput.jsonl"

# Kind -> what it is. Each second of a run is of one kind.
KINDS = {
    "step": "training steps that the run still has",
    "imports": "the program's start and its imports",
    "setup": "checks, restoring a checkpoint, writing of records",
    "tracing": "tracing and lowering of programs",
    "compiling": "compiling programs, or reading them from the cache",
    "data": "opening data, and waiting for batches while no step was under way",
    "evaluation": "held-out and validation losses",
    "checkpoint": "what the loop waits for a save",
    "exchange": "reading, writing and merging of an island",
    "report": "probe, sample, summary and report",
    "idle": "an island that waits for others",
    "lost": "what was done after the checkpoint that the run went back to",
    "restart": "from a death to the end of the first step after it",
    "stopped": "from a stop to the next start",
}
AGAIN = ("step", "data", "evaluation", "checkpoint", "exchange", "idle")  # what a run that goes back does again
DONE = ("complete", "stopped")


class Row(NamedTuple):
    step: int
    start: int
    time: float
    elapsed: float
    seconds: Mapping[str, float]
    first_step: float | None = None
    back_to: int | None = None
    ended: str = ""


def read(path: Path) -> list[Row]:
    """Returns the rows of a file, none where it is not there. Lines that are no rows are left out, as a torn one is."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [row for row in map(_row, text.splitlines()) if row is not None]


def _row(line: str) -> Row | None:
    try:
        found = json.loads(line)
        row = Row(**found)
        numbers = [row.time, row.elapsed, *row.seconds.values()]
        numbers += [] if row.first_step is None else [row.first_step]
        counts = [row.step, row.start, *([] if row.back_to is None else [row.back_to])]
        whole = all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return None
    whole = whole and all(type(n) is int for n in counts) and row.seconds.keys() <= KINDS.keys()
    return row if whole and isinstance(row.ended, str) else None


class _Part(NamedTuple):
    """Seconds of one kind, between two rows."""

    step: float  # of the later row
    kind: str
    seconds: float


class Goodput(NamedTuple):
    """What became of a run's wall time."""

    seconds: dict[str, float]  # by kind; their sum is the wall time
    by_start: list[dict[str, float]]  # the same of each start, with the time between it and the one before
    recoveries: list[float]  # of each death after which a step was made: the seconds until then

    @property
    def wall(self) -> float:
        return sum(self.seconds.values())

    @property
    def useful(self) -> float:
        """The share of training steps that the run still has in the wall time."""
        return self.seconds.get("step", 0.0) / self.wall if self.wall else 0.0

    def summary(self) -> dict[str, Any]:
        """As `summary.json` has it."""
        middle = {"median": statistics.median, "mean": statistics.fmean}
        recovered = {name: f(self.recoveries) for name, f in middle.items()} if self.recoveries else {}
        return {
            "useful": self.useful,
            "wall_seconds": self.wall,
            "seconds": self.seconds,
            "starts": len(self.by_start),
            "recoveries": {"count": len(self.recoveries), **recovered},
        }


def account(rows: Iterable[Row]) -> Goodput:
    """Returns what became of the wall time from the beginning of the first start to the last row.

    Inside a start the seconds are those of its rows. Between two starts there is only the wall clock: from the last row
    of one to the beginning of the next, and no less than nothing where it was set back meanwhile. That time is
    `stopped` after a start that ended in order, and `restart` after one that died, as is all of the next start until
    its first step has ended. A kill is noticed by the next start: what happened between the last row and the kill
    counts as `restart` too.
    """
    by_start: list[list[_Part]] = []
    recoveries, before, away = [], None, 0.0
    for _, of_start in groupby(rows, key=lambda row: row.start):
        group = list(of_start)
        parts: list[_Part] = []
        died = before is not None and before.ended not in DONE
        if before is not None:
            gap = max(0.0, group[0].time - group[0].elapsed - before.time)
            parts.append(_Part(group[0].step, "restart" if died else "stopped", gap))
            away += gap if died else 0.0
        by_start.append(parts)
        begun: Mapping[str, float] = {}
        recovering = died
        for row in group:
            # What a run did since its last row, before it went back, is of steps that it has no more.
            step = row.step if row.back_to is None or row is group[0] else math.inf
            for kind in row.seconds:
                seconds = row.seconds[kind] - begun.get(kind, 0.0)
                parts.append(_Part(step, "restart" if recovering else kind, seconds))
            if row.back_to is not None:
                _give_up(by_start, row.back_to)
            begun, recovering = row.seconds, recovering and row.first_step is None
        first = next((row.first_step for row in group if row.first_step is not None), None)
        if died and first is not None:
            recoveries.append(away + first)
            away = 0.0
        elif died:  # it died again before a step
            away += group[-1].elapsed
        before = group[-1]
    sums = [_sums(parts) for parts in by_start]
    return Goodput(_sums([part for parts in by_start for part in parts]), sums, recoveries)


def _give_up(by_start: Sequence[list[_Part]], step: int) -> None:
    """Counts as lost what was done after a step and will be done again."""
    for parts in by_start:
        for i, part in enumerate(parts):
            if part.step > step and part.kind in AGAIN:
                parts[i] = part._replace(kind="lost")


def _sums(parts: Iterable[_Part]) -> dict[str, float]:
    found = dict.fromkeys(KINDS, 0.0)
    for part in parts:
        found[part.kind] += part.seconds
    return {kind: seconds for kind, seconds in found.items() if seconds > 0}


def table(found: Goodput) -> list[tuple[str, str, str, str]]:
    """Returns (kind, what it is, seconds, share of the wall time), the largest first, and their sum."""
    ranked = sorted(found.seconds.items(), key=lambda item: -item[1])
    rows = [(kind, KINDS[kind], f"{s:,.1f}", f"{100 * s / found.wall:.1f}%") for kind, s in ranked]
    return [*rows, ("all", "wall time", f"{found.wall:,.1f}", "100%")]
