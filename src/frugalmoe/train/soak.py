"""A run under faults at random, by real processes: what `frugalmoe soak` injects, and how the run comes back.

Nothing here imports JAX: the processes that train are others.
"""

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from frugalmoe.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_STUCK, UserError
from frugalmoe.train import goodput, saved

KINDS = {  # of faults
    "kill": "SIGKILL",
    "term": "SIGTERM, after which the run saves and ends with 75, or ends at once before its first step",
    "freeze": "SIGSTOP, and SIGCONT some seconds later",
    "damage": "SIGKILL, and a flipped bit or a cut in a file of the newest checkpoint, where there is an older one",
    "tear": "SIGKILL, and a torn last line in each log",
}
LOGS = ("metrics.jsonl", "expert_load.jsonl", "goodput.jsonl", "events.jsonl")
SECONDS_BETWEEN_LINES = 15.0
_LOOK = 0.05  # seconds between two looks at the run
LONGEST_DELAY = 2.0  # seconds from the step that a fault waits for to the fault, so that it may hit anything
LONGEST_FREEZE = 4.0
# By SIGKILL; by SIGTERM: after saving, before there is a handler, while it saved; by the watch, as after a freeze.
EXPLAINED = (-signal.SIGKILL, EXIT_PREEMPTED, -signal.SIGTERM, 128 + signal.SIGTERM, EXIT_STUCK)
MOST_STARTS = 3  # in a row that end by themselves and not with 0: the run cannot go on


class Fault(NamedTuple):
    """What is planned."""

    step: int  # that the run has reached by then
    delay: float  # seconds later
    kind: str
    seed: int  # of what is drawn when it happens


class Injected(NamedTuple):
    """What was done."""

    kind: str
    step: int  # that the run was known to have reached
    at: float  # wall clock
    what: str
    recovered: float | None  # seconds until the end of the first step after it; None where the run had no more to make


class Ended(NamedTuple):
    seconds: float
    faults: list[Injected]
    starts: int  # processes that were started


def plan(seed: int, faults: int, steps: int, kinds: Sequence[str]) -> list[Fault]:
    """Returns so many faults at random steps, the same for the same arguments; each kind comes before any does again.

    Raises `UserError` for a kind that is none.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"--kinds={','.join(kinds)}: no fault is called {kind!r}; valid: {', '.join(KINDS)}")
    draw = random.Random(seed)
    bag: list[str] = []
    while len(bag) < faults:
        bag += draw.sample(list(kinds), len(kinds))
    steps_of = sorted(draw.randrange(steps) for _ in range(faults))
    return [
        Fault(step, draw.uniform(0, LONGEST_DELAY), kind, draw.randrange(2**32)) for step, kind in zip(steps_of, bag)
    ]


class Soak:
    """Runs a command to its end, in `workdir`, under faults; starts it again whenever one ended it.

    steps: of the run. tell: is told what happens, and when it is expected to end. supervised: the command has a
    supervisor, which restarts it after a kill itself.
    """

    def __init__(
        self, command: Sequence[str], workdir: Path, tell: Callable[[str], None], steps: int, supervised: bool = False
    ) -> None:
        self._steps, self._lines = steps, 0
        self._command, self._workdir, self._tell, self._supervised = list(command), workdir, tell, supervised
        self._process: subprocess.Popen | None = None
        self._starts, self._failed = 0, 0
        self._output = workdir.with_name(f"{workdir.name}.log")

    def run(self, faults: Sequence[Fault] = ()) -> Ended:
        """Raises `UserError` where the run ends by itself again and again, or as after bad input. A signal that ends
        this program ends the run with it.
        """
        began, waiting = time.monotonic(), list(faults)
        done: list[tuple[Fault, int, float, str]] = []
        ready: float | None = None  # since the step that the next fault waits for was seen
        with self._ending():
            self._start()
            while (code := self._process.poll()) is None or not self._is_over(code):
                if code is not None:
                    self._start()
                reached = self.reached()
                self._tell_progress(reached, time.monotonic() - began)
                if waiting and reached >= waiting[0].step:
                    ready = ready or time.monotonic()
                    if time.monotonic() - ready >= waiting[0].delay and (target := self._target()):
                        fault, ready = waiting.pop(0), None
                        at, what = time.time(), self._inject(fault, target)
                        done.append((fault, reached, at, what))
                        self._tell(f"fault {len(done)} of {len(faults)} at step {reached}: {what}")
                time.sleep(_LOOK)
        rows = goodput.read(self._workdir / goodput.FILE)
        injected = [Injected(f.kind, step, at, what, _recovery(rows, f.kind, at)) for f, step, at, what in done]
        return Ended(time.monotonic() - began, injected, self._starts)

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """Whatever ends the block, no process of the run outlives it."""

        def leave(number: int, frame: object) -> None:
            raise SystemExit(EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED)

        main = threading.current_thread() is threading.main_thread()  # which alone hears signals
        numbers = (signal.SIGTERM, signal.SIGINT) if main else ()
        previous = {number: signal.signal(number, leave) for number in numbers}
        try:
            yield
        finally:
            if self._process is not None and self._process.poll() is None:
                children = _children(self._process.pid)
                self._process.kill()
                self._process.wait()
                for child in children:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def reached(self) -> int:
        """The last step that the run has told of, in any start."""
        return max((row.step for row in goodput.read(self._workdir / goodput.FILE)), default=-1)

    def _tell_progress(self, reached: int, seconds: float) -> None:
        if seconds > SECONDS_BETWEEN_LINES * (self._lines + 1):
            self._lines = int(seconds / SECONDS_BETWEEN_LINES)
            left = timedelta(seconds=round(seconds * (self._steps - reached) / max(reached, 1)))
            self._tell(f"step {reached} of {self._steps}" + (f", ETA {left}" if 0 < reached < self._steps else ""))

    def _start(self) -> None:
        self._starts += 1
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(self._command, stdout=output, stderr=output)

    def _is_over(self, code: int) -> bool:
        """Whether an end is the last one. Raises `UserError` for one that no fault explains, if it is not the first."""
        if code == 0:
            return True
        explained = code in EXPLAINED
        self._failed = 0 if explained else self._failed + 1
        if self._failed and (code == 2 or self._failed == MOST_STARTS):
            last = self._output.read_text(errors="replace").strip().rpartition("\n")[2]
            raise UserError(f"{self._workdir}: the run ended with {code}: {last}; see {self._output}")
        return False

    def _target(self) -> int | None:
        """The process that trains, where there is one at the moment."""
        if self._process.poll() is not None:
            return None
        if not self._supervised:
            return self._process.pid
        return next(iter(_children(self._process.pid)), None)

    def _inject(self, fault: Fault, target: int) -> str:
        draw = random.Random(fault.seed)
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            return getattr(self, f"_{fault.kind}")(target, draw)
        return f"{fault.kind}: the process had just ended"

    def _kill(self, target: int, draw: random.Random) -> str:
        os.kill(target, signal.SIGKILL)
        if not self._supervised:
            self._process.wait()
        return "kill"

    def _term(self, target: int, draw: random.Random) -> str:
        self._process.send_signal(signal.SIGTERM)  # a supervisor hands it on
        return "term"

    def _freeze(self, target: int, draw: random.Random) -> str:
        seconds = draw.uniform(0.5, LONGEST_FREEZE)
        os.kill(target, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(target, signal.SIGCONT)
        return f"freeze for {seconds:.1f} s"

    def _damage(self, target: int, draw: random.Random) -> str:
        self._kill(target, draw)
        steps = [step for step in saved.saved_steps(self._workdir) if not saved.fault(self._workdir, step)]
        if len(steps) < 2:
            return "kill (there were not yet two checkpoints to damage one of)"
        files = sorted(path for path in saved.place(self._workdir, steps[-1]).rglob("*") if path.is_file())
        path = draw.choice([path for path in files if path.stat().st_size])
        content = bytearray(path.read_bytes())
        if draw.random() < 0.5:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        else:
            del content[draw.randrange(len(content)) :]
        path.write_bytes(content)
        return f"kill, and damage to {path.relative_to(self._workdir)}"

    def _tear(self, target: int, draw: random.Random) -> str:
        self._kill(target, draw)
        for path in (self._workdir / name for name in LOGS):
            if path.is_file() and (content := path.read_bytes().rstrip(b"\n")):
                last = content.rfind(b"\n") + 1
                path.write_bytes(content[: draw.randrange(last, len(content))])
        return "kill, and torn logs"


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    with contextlib.suppress(OSError):
        return [int(child) for child in path.read_text().split()]
    return []


def _recovery(rows: Sequence[goodput.Row], kind: str, at: float) -> float | None:
    """Seconds from a fault to the end of the first step after it."""
    for row in rows:
        if kind == "freeze":  # the process is the same
            if row.time > at and row.first_step is not None:
                return row.time - at
        elif row.first_step is not None and row.time - row.elapsed > at:
            return row.time - row.elapsed + row.first_step - at
    return None


def ways(rows: Sequence[Injected]) -> Iterator[tuple[str, int]]:
    """(kind, how many were injected) of each kind of fault."""
    for kind in KINDS:
        if number := sum(row.kind == kind for row in rows):
            yield kind, number
