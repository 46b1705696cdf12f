"""The stopwatch of a run: each second of a start is of one kind of `goodput.KINDS`, and rows of them are on disk."""

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax.monitoring

from frugalmoe.files import read_json, write_json
from frugalmoe.train import events, goodput

SHORTEST = 1.0  # seconds between two rows that nothing but time asks for
FINEST = 1 / 500  # of the time since the start, so that a month makes no more than thousands of rows

_EVENTS = {  # of jax.monitoring -> kind
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "tracing",
    "/jax/core/compile/backend_compile_duration": "compiling",  # or reading from the persistent cache
}


class Ledger:
    """Measures one start of a run, from its creation, or from `began`, in the thread that makes it.

    At any moment one phase is open, and its kind gets the seconds: so they add up to the time elapsed, and none counts
    twice. What JAX reports of tracing and compiling is taken from the phase that is open then. The clock is monotonic;
    the wall clock is only noted in the rows.

    began: a reading of `time.perf_counter` at which the program began, to be imported. A context, after which JAX is
    not listened to any more.
    """

    def __init__(self, began: float | None = None) -> None:
        self._since = time.perf_counter()
        self._began = self._since if began is None else began
        self._kind = "setup"
        self._seconds = {"imports": self._since - self._began} if began is not None else {}
        self._traced: list[tuple[float, float]] = []  # (beginning, seconds) of what JAX reported
        self._thread = threading.get_ident()
        self._path: Path | None = None
        self._rows: list[goodput.Row] = []
        self._start = 0
        self._written = -SHORTEST
        self._first_step: float | None = None
        self._taken = 0.0  # seconds of the open phase, since it was opened or written, that are another kind's
        self._ended = ""

    def __enter__(self) -> "Ledger":
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)

    def attach(self, workdir: Path, step: int, quiet: bool = False) -> None:
        """Begins to write into a run directory, whose run goes on from a step; with `quiet` nothing is written, as in
        processes that are not the first of a run.
        """
        if not quiet:
            self._path = workdir / goodput.FILE
            self._rows = goodput.read(self._path)
        self._start = max((row.start for row in self._rows), default=-1) + 1
        self.write(step, back_to=step)

    @contextmanager
    def phase(self, kind: str) -> Iterator[None]:
        """While the block runs, seconds are of this kind."""
        outer = self._kind
        self._switch(kind)
        try:
            yield
        finally:
            self._switch(outer)

    def take(self, seconds: Mapping[str, float]) -> None:
        """Moves seconds from the open phase to their kinds, as those of a ledger that was at work in it."""
        for kind, spent in seconds.items():
            self._add(kind, spent)
            self._taken += spent

    def seconds(self) -> dict[str, float]:
        """Returns the seconds until now by kind."""
        self._switch(self._kind)
        return {kind: max(0.0, spent) for kind, spent in self._seconds.items()}

    def rather(self, kind: str) -> None:
        """Makes the phase that is open one of another kind, from its beginning or from its last row on."""
        self._kind = kind

    def stepped(self, step: int) -> None:
        """Hears of a step that has ended."""
        now = time.perf_counter() - self._began
        if self._first_step is None:
            self._switch(self._kind)
            self._first_step = self._since - self._began
            self.write(step)
        elif now - self._written > max(SHORTEST, FINEST * now):
            self.write(step)

    def write(self, step: int, back_to: int | None = None, ended: str = "") -> None:
        """Writes a row. One that cannot be written, as on a full disk, costs nothing: the next one has its seconds too.

        back_to: the step that the run goes on from. ended: how the start ended, which its later rows say too.
        """
        self._switch(self._kind)
        self._written = self._since - self._began
        self._ended = ended or self._ended
        times = time.time(), self._written, dict(self._seconds)
        row = goodput.Row(step, self._start, *times, self._first_step, back_to, self._ended)
        self._rows.append(row)
        if self._path is not None:
            events.append_row(self._path, _short(row))

    def died(self, step: int) -> None:
        """Writes the last row of a start that ends by an error; nothing where it has ended in order."""
        if not self._ended:
            self.write(step)

    def amend(self, workdir: Path, step: int) -> None:
        """Adds what came after a complete run's summary, as its report, to the rows and to the summary."""
        self.write(step)
        path = workdir / "summary.json"
        write_json(path, read_json(path) | {"goodput": self.account().summary()})

    def account(self) -> goodput.Goodput:
        """What became of the wall time of all starts until the last row."""
        return goodput.account(self._rows)

    def account_of_start(self) -> goodput.Goodput:
        """The same of this start alone."""
        return goodput.account(row for row in self._rows if row.start == self._start)

    def _switch(self, kind: str) -> None:
        now = time.perf_counter()
        self._add(self._kind, now - self._since - self._taken)
        self._since, self._taken, self._kind = now, 0.0, kind
        self._traced.clear()

    def _heard(self, event: str, seconds: float, **about: object) -> None:
        """Moves seconds of tracing or compiling from the open phase to their kind. A report comes at the end of what it
        is about, and may include what was reported before; JAX measures with the wall clock, which may be set.
        """
        kind = _EVENTS.get(event)
        if kind is None or threading.get_ident() != self._thread:
            return
        now = time.perf_counter()
        began = max(now - max(seconds, 0.0), self._since)
        inner = 0.0
        while self._traced and self._traced[-1][0] >= began:
            inner += self._traced.pop()[1]
        self._traced.append((began, now - began))
        own = max(0.0, now - began - inner)
        self._add(kind, own)
        self._taken += own

    def _add(self, kind: str, seconds: float) -> None:
        self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds


def _short(row: goodput.Row) -> dict[str, Any]:
    seconds = {kind: round(value, 4) for kind, value in row.seconds.items()}
    rounded = row._replace(time=round(row.time, 3), elapsed=round(row.elapsed, 4), seconds=seconds)
    if row.first_step is not None:
        rounded = rounded._replace(first_step=round(row.first_step, 4))
    return {name: value for name, value in rounded._asdict().items() if value is not None and value != ""}


@contextmanager
def phase(runs: Iterable[Any], kind: str) -> Iterator[None]:
    """A phase in the ledgers of all runs that one loop trains: each has the whole time, not its part of it."""
    with ExitStack() as held:
        for run in runs:
            held.enter_context(run.ledger.phase(kind))
        yield


def hidden(runs: Iterable[Any]) -> None:
    """Counts the open phase as steps: the devices were at work meanwhile, and nobody waited."""
    for run in runs:
        run.ledger.rather("step")
