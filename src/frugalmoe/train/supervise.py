"""`frugalmoe train --supervise`: starts a run again when it dies or no longer moves.

The supervisor imports no JAX: it holds no device and little memory. The run is a process of its own, which tells each
step through a pipe. Of several processes each has a supervisor: where one dies the others end too, and those that are
there start again (`train.gathering`).
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from frugalmoe.errors import EXIT_PREEMPTED, EXIT_STUCK, EXIT_USER_ERROR, UserError
from frugalmoe.train import events
from frugalmoe.train.gathering import Gathering, Place

PIPE = "FRUGALMOE_SUPERVISED"  # in the environment of the run: the number of the pipe's end
AGAIN = "FRUGALMOE_STARTED_AGAIN"  # likewise: that the run was started before, in several processes
MOST = "FRUGALMOE_PROCESSES"  # likewise: of how many it may be one
BEGAN = "FRUGALMOE_BEGAN"  # likewise, of the first start: the supervisor's beginning, by the monotonic clock
LONGEST_PAUSE = 60.0  # seconds before a start; 1, 2, 4, ... up to this
_FITS = b"fits "  # begins a line in the pipe that holds the numbers of processes
_LOOK = 0.2  # seconds between two looks at the run


class Limits(NamedTuple):
    """When a supervisor acts."""

    restarts: int = 5  # in a row without a step that is further than any before
    hang: float = 600.0  # seconds without a step, after which a run counts as stuck; compiling takes its share of them
    grace: float = 300.0  # seconds in which a run that was asked to stop may save
    wait: float = 60.0  # seconds that several processes wait for others, before fewer start


def check(limits: Limits) -> None:
    """Raises `UserError` for limits that are none."""
    for name, value in limits._asdict().items():
        if not 0 <= value < 2**31 or (name != "restarts" and value == 0):
            rule = "must not be negative" if name == "restarts" else "must be positive, in seconds"
            raise UserError(f"--supervise.{name}={value:g}: {rule}")


class _Ended(NamedTuple):
    code: int  # as of `subprocess`: minus the number of the signal that ended it
    step: int  # the last one that it told; -1: none
    stuck: bool
    seconds: float
    fits: list[int]  # the numbers of processes that it could go on with, as it told


def supervise(
    command: Sequence[str],
    again: Sequence[str],
    workdir: Path,
    limits: Limits,
    began: float | None = None,
    others: Gathering | None = None,
) -> int:
    """Runs a command, and then `again` as often as it takes until it ends for good; returns the last exit code.

    For good is an end with 0, with 2 (bad input: the same command would fail again) and with 75 (it was asked to stop
    and saved). After any other end it is started again, with pauses that grow, until `limits.restarts` starts in a row
    have come no further. Each start is told on stderr and in the run's `events.jsonl`. began: a reading of
    `time.perf_counter` at which the supervisor began; its start is a part of the run's first. others: of a run in
    several processes, whose flags then are added to the commands at each start. Where fewer than all may go on, a run
    that was asked to stop in another process is started again too.
    """
    check(limits)
    since = {} if began is None else {BEGAN: repr(began)}
    with _requests() as asked, others or contextlib.nullcontext():
        code = _supervised(command, again, workdir, limits, since=since, asked=asked, others=others)
        if others:
            others.ends(code)
    return code


def _supervised(
    command: Sequence[str],
    again: Sequence[str],
    workdir: Path,
    limits: Limits,
    *,
    since: Mapping[str, str],
    asked: list[int],
    others: Gathering | None,
) -> int:
    best, starts = -1, 0
    while True:
        place = others.meet(asked, _say) if others else None
        if isinstance(place, int):
            return place
        if place and place.news:
            _say(place.news)
            _record(workdir, place.news, 0.0)
        flags, told = _of_place(place, others)
        ended, since = _watched([*command, *flags], limits, asked, since | told), {}
        if others and ended.fits:
            others.knows(ended.fits)
        if ended.code in (0, EXIT_USER_ERROR) or (ended.code == EXIT_PREEMPTED and (asked or not _shrinks(others))):
            return ended.code
        if asked and ended.code > 0:
            return ended.code
        if asked:
            _say(f"the run did not save within {limits.grace:g} s of being asked to stop, and was killed")
            return EXIT_PREEMPTED
        starts = 1 if ended.step > best else starts + 1
        best = max(best, ended.step)
        what = _what(ended, limits)
        if starts > limits.restarts:
            _say(f"{what}; not started again: {limits.restarts} starts have come no further (--supervise.restarts)")
            return 1
        pause = min(2.0 ** (starts - 1), LONGEST_PAUSE)
        _say(f"{what}; starting again in {pause:g} s ({starts} of {limits.restarts})")
        _record(workdir, what, ended.seconds)
        _wait(pause, asked)
        if asked:
            return EXIT_PREEMPTED
        command = again


def _shrinks(others: Gathering | None) -> bool:
    return others is not None and others.shrinks


def _of_place(place: Place | None, others: Gathering | None) -> tuple[list[str], dict[str, str]]:
    """What a start is told by flags, and what by its environment."""
    if not (place and others):
        return [], {}
    coordinator, processes, process = place.flags
    flags = [f"--coordinator={coordinator}", f"--num-processes={processes}", f"--process-id={process}"]
    return flags, {MOST: str(others.of)} | ({AGAIN: "1"} if place.again else {})


def _watched(command: Sequence[str], limits: Limits, asked: list[int], variables: Mapping[str, str]) -> _Ended:
    """Runs the command once; kills it where it is stuck, and hands on a request to stop."""
    variables = os.environ | variables
    reader, writer = os.pipe()
    began = moved = time.monotonic()
    # A session of its own: Ctrl-C of the terminal comes through the supervisor, once.
    process = subprocess.Popen(command, env=variables | {PIPE: str(writer)}, pass_fds=[writer], start_new_session=True)
    os.close(writer)
    os.set_blocking(reader, False)
    stuck, told, heard = False, 0.0, _Heard(reader)
    while process.poll() is None:
        select.select([reader] if heard.open else [], [], [], _LOOK)
        if heard.more():
            moved = time.monotonic()
        if asked and not told:
            told = time.monotonic()
            process.send_signal(asked[0])
        stuck = time.monotonic() - moved > limits.hang
        if stuck or (told and time.monotonic() - told > limits.grace):
            process.kill()
            process.wait()
    heard.more()  # what it said last
    os.close(reader)
    return _Ended(process.returncode, heard.step, stuck, time.monotonic() - began, heard.fits)


class _Heard:
    """What a run has told through its pipe."""

    def __init__(self, pipe: int) -> None:
        self._pipe, self._text, self.step, self.open = pipe, b"", -1, True
        self.fits: list[int] = []

    def more(self) -> bool:
        """Reads what is there; returns whether that was something."""
        found = b""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._pipe, 65536):
                found += data
            self.open = False  # the run has closed its end
        *lines, self._text = (self._text + found).split(b"\n")
        self.step = max([self.step, *_numbers(lines)])
        for line in lines:
            if line.startswith(_FITS):
                self.fits = _numbers(line.removeprefix(_FITS).split())
        return bool(found)


def _numbers(texts: Sequence[bytes]) -> list[int]:
    return [int(text) for text in texts if text.isdigit() and len(text) < 10]


@contextlib.contextmanager
def _requests() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT."""
    asked: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, lambda number, frame: asked.append(number)) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(seconds: float, asked: list[int]) -> None:
    end = time.monotonic() + seconds
    while not asked and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _LOOK))


def _what(ended: _Ended, limits: Limits) -> str:
    where = f"after step {ended.step}" if ended.step >= 0 else "before its first step"
    if ended.stuck:
        return f"the run made no step for {limits.hang:g} s {where} (--supervise.hang), and was killed"
    if ended.code == EXIT_STUCK:
        return f"the run was stuck {where}, and ended itself"
    if ended.code == EXIT_PREEMPTED:
        return f"the run was asked to stop in another process {where}, and saved"
    if ended.code < 0:
        with contextlib.suppress(ValueError):
            return f"the run was ended by {signal.Signals(-ended.code).name} {where}"
    return f"the run ended with {ended.code} {where}"


def _say(line: str) -> None:
    print(f"frugalmoe: {line}", file=sys.stderr, flush=True)


def _record(workdir: Path, what: str, seconds: float) -> None:
    """A row of the run's events, at the step from which it will go on."""
    folder = workdir / "checkpoints"
    saved = [int(path.name) for path in folder.glob("[0-9]*") if path.name.isdecimal()] if folder.is_dir() else []
    events.append(workdir / events.FILE, max(saved, default=0), "restart", what, seconds)


def beginning(began: float) -> float:
    """The beginning of the supervisor whose first start this program is; else that of this program, `began`."""
    with contextlib.suppress(ValueError):
        return min(began, float(os.environ.pop(BEGAN, began)))
    return began


def tell_what_fits(fits: Callable[[int], bool]) -> None:
    """Tells a supervisor, where there is one of several processes, with how many of them the run could go on."""
    most = os.environ.pop(MOST, "")
    if PIPE in os.environ and most.isdecimal():
        found = " ".join(str(number) for number in range(1, int(most) + 1) if fits(number))
        with contextlib.suppress(OSError):
            os.write(int(os.environ[PIPE]), _FITS + f"{found}\n".encode())


def telling(progress: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a `progress` for `train` that also tells a supervisor each step, where there is one.

    Where the supervisor is gone the run stops as after SIGTERM: nobody would start it again.
    """
    if PIPE not in os.environ:
        return progress
    pipe = int(os.environ.pop(PIPE))  # no process that this one starts shall have it
    os.set_inheritable(pipe, False)

    def tell(step: int) -> None:
        nonlocal pipe
        if pipe < 0:
            return
        try:
            os.write(pipe, f"{step}\n".encode())
        except BrokenPipeError:
            pipe = -1
            signal.raise_signal(signal.SIGTERM)

    class Telling(progress):
        def __init__(self, config: Any, start: int):
            super().__init__(config, start)
            tell(start)

        def update(self, step: int, *rest: float) -> None:
            super().update(step, *rest)
            tell(step)

        def say(self, text: str) -> None:
            super().say(text)
            tell(0)

        def idle(self) -> None:
            super().idle()
            tell(0)

    return Telling
