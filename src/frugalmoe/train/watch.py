"""Ends a process of a run that no longer moves. It says what it waited for, writes down where its threads stand, and
leaves with `EXIT_STUCK`, so that a supervisor, or whoever else looks after it, starts it again.

The loop says what it does, `doing`. Each time the count begins anew, with a limit of its own: a batch may take
`train.stuck_seconds`, or ten times what a step takes in the median where that is longer; a step twice as long, so that
of several processes the one whose loader sleeps speaks first; compiling, evaluating and saving far longer, as
long as all other processes can still be heard. Time is counted by a thread in its own ticks: while the whole process is
stopped, as on a laptop that sleeps, none passes, and clocks that are set do not matter.
"""

import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from frugalmoe.errors import EXIT_STUCK
from frugalmoe.interrupts import may_speak
from frugalmoe.train import events

FILE = "stuck-{process}.txt"  # in the run directory: the stacks of a process's threads
_TICK = 0.5  # seconds
_MEDIANS = 10  # steps of the usual length that may pass
_LAST_WORDS = 2.0  # seconds for the others to speak, which end when process 0 does


class Phase(NamedTuple):
    what: str
    times: float  # as long as a batch


BATCH = Phase("the batch of step {step}", 1)
STEP = Phase("step {step} to end", 2)
COMPILE = Phase("step {step}, the first, which compiles", 60)
EVALUATION = Phase("the evaluation after step {step}", 30)
SAVE = Phase("the save of step {step}", 30)


class _Now(NamedTuple):
    phase: Phase
    step: int

    def __str__(self) -> str:
        return self.phase.what.format(step=self.step)


class _Watch:
    def __init__(self, seconds: float, workdir: Path):
        self._seconds, self._workdir = seconds, workdir
        self._now: _Now | None = None
        self._steps: deque[float] = deque(maxlen=32)
        self._began, self._over = time.monotonic(), threading.Event()
        self._voices = _Voices(lambda: str(self._now), seconds / 4) if jax.process_count() > 1 else None
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def doing(self, phase: Phase | None, step: int) -> None:
        self._now = None if phase is None else _Now(phase, step)

    def stepped(self, seconds: float) -> None:
        if seconds:
            self._steps.append(seconds)

    def close(self) -> None:
        self._over.set()
        if self._voices:
            self._voices.over.set()

    def _limit(self, phase: Phase) -> float:
        usual = statistics.median(self._steps) if self._steps else 0.0
        return phase.times * max(self._seconds, _MEDIANS * usual)

    def _look(self) -> None:
        seen, waited, last, heard = None, 0.0, time.monotonic(), 0.0
        while not self._over.wait(_TICK):
            now, at = self._now, time.monotonic()
            tick, last = min(at - last, 2 * _TICK), at
            waited = waited + tick if now is seen and now is not None else 0.0
            seen, heard = now, heard if waited else 0.0
            if now is None:
                continue
            # What takes long may wait for a process that will not come any more.
            over = waited > self._limit(now.phase)
            if over or (self._voices and waited - heard > self._limit(STEP)):
                asks = self._voices and now.phase is not BATCH  # whose batch does not come need not ask why
                others, frozen = self._voices.told() if asks else ("", False)
                heard = waited
                if over or frozen:
                    self._end(now, waited, others)

    def _end(self, now: _Now, waited: float, others: str) -> None:
        """Ends the process, unless it has moved meanwhile."""
        if self._now is not now or self._over.is_set() or not may_speak():
            return
        who = f"process {jax.process_index()}: " if self._voices else ""
        path = self._workdir / FILE.format(process=jax.process_index())
        with contextlib.suppress(OSError), path.open("a") as file:
            file.write(f"waited {waited:.0f} s for {now}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        what = f"{who}stuck: waited {waited:.0f} s for {now}{others}"
        events.append(self._workdir / events.FILE, max(now.step - 1, 0), "stuck", what, time.monotonic() - self._began)
        rule = f"where its threads stood is in {path}; the same command goes on from the last checkpoint"
        with contextlib.suppress(OSError):
            os.write(2, f"frugalmoe: {what}; {rule}\n".encode())
        if self._voices and jax.process_index() == 0:
            time.sleep(_LAST_WORDS)
        leave(EXIT_STUCK)


class _Voices:
    """What each process of a run does, told now and then through JAX's coordination service."""

    _KEY, _PERIOD = "frugalmoe/watch/", 1.0

    def __init__(self, what: Callable[[], str], silence: float):
        from jax._src import distributed  # there is no public way to its store

        self._client, self.over = distributed.global_state.client, threading.Event()
        self._period = self._PERIOD * max(1.0, jax.process_count() / 64)
        self._silence = max(silence, 4 * self._period)  # seconds without a word
        threading.Thread(target=self._say, args=(what,), name="watch: tells", daemon=True).start()

    def _say(self, what: Callable[[], str]) -> None:
        count = 0
        while not self.over.wait(self._period):
            with contextlib.suppress(Exception):  # of many kinds; it only helps to say who is stuck
                self._client.key_value_set(
                    f"{self._KEY}{jax.process_index()}", f"{count} {what()}", allow_overwrite=True
                )
            count += 1

    def told(self) -> tuple[str, bool]:
        """(What is known of the others: who no longer says anything, or what they wait for; whether one is silent.)"""
        found: list[Mapping[str, str]] = []

        def ask() -> None:
            with contextlib.suppress(Exception):
                for pause in (self._silence, 0):
                    found.append(dict(self._client.key_value_dir_get(self._KEY)))
                    time.sleep(pause)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(self._silence + 10)
        if len(found) < 2:
            return "; process 0 does not answer: it is frozen, or its host cannot be reached", True
        return self.compared(*found, own=jax.process_index(), processes=jax.process_count())

    @classmethod
    def compared(
        cls, before: Mapping[str, str], after: Mapping[str, str], own: int, processes: int
    ) -> tuple[str, bool]:
        """What two looks at the store tell, as `told`."""
        silent, waiting = [], []
        for process in (i for i in range(processes) if i != own):
            key = f"{cls._KEY}{process}"
            if after.get(key) is None or before.get(key) == after[key]:
                silent.append(process)
            elif "the batch" in after[key]:
                waiting.append(f"process {process} waits for {after[key].partition(' ')[2]}")
        if silent:
            names = ", ".join(map(str, silent))
            return f"; process {names} does not answer: it is frozen, or its host cannot be reached", True
        return (f"; {', '.join(waiting)}" if waiting else ""), False


_current: _Watch | None = None


@contextlib.contextmanager
def watching(seconds: float, workdir: Path) -> Iterator[None]:
    """Watches the process while the block runs, which holds one run; 0 seconds: it does not."""
    global _current
    _current = _Watch(seconds, workdir) if seconds else None
    try:
        yield
    finally:
        if _current:
            _current.close()
        _current = None


def is_on() -> bool:
    """Whether the process holds a run that is watched."""
    return _current is not None


def doing(phase: Phase | None, step: int = 0) -> None:
    """Says what the process begins to do now, at which step; None: what may take any time. Only one that is watched
    hears it.
    """
    if _current:
        _current.doing(phase, step)


def stepped(seconds: float) -> None:
    """Says how long a step took."""
    if _current:
        _current.stepped(seconds)


def leave(code: int) -> None:
    """Ends the process without waiting for its other threads."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def leave_within(seconds: float, code: int) -> None:
    """Ends the process with a code if it has not ended by itself by then, as where a thread that reads data sleeps."""
    timer = threading.Timer(seconds, leave, (code,))
    timer.daemon = True
    timer.start()
