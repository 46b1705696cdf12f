"""How the supervisors of one run in several processes agree, through its directory, on who starts it.

Each keeps a record of its life there, `supervisors/process-NUMBER.json`, in which a counter moves. Clocks of machines
are not compared: who sees the counter move, by its own clock, knows that the other one lives. Before a start each says
that it waits. When all do, or those that do have waited long enough and may go on alone, the lowest of them writes down
who takes part, `supervisors/start-NUMBER.json`: it is made in one moment, once, and whatever others would have decided,
they read it. Who is not in it joins at the next start. What is no record of ours is as if it were not there.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from frugalmoe.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, UserError, printable
from frugalmoe.shapes import misshapen

FOLDER = "supervisors"  # in the run directory
_SECONDS = 0.5  # between two beats, and two looks
_BEATS = 4  # that may be missed
_PATIENCE = 10.0  # seconds without one, at most
_QUIET = 5.0  # seconds for all to be there, before anything is said
_LARGEST = 2**16  # bytes of a file
_LAST = 10**6  # number of a start
_KEPT = 8  # starts
_WAITING, _RUNNING, _ENDED = "waiting", "running", "ended"
_RECORD = {"token": str, "beat": int, "start": int, "state": str, "code": int, "host": str, "address": str,
           "fits": [int], "starts": int}  # fmt: skip
_AGREED = {"members": {re.compile(r"[0-9]{1,9}"): str}, "coordinator": str, "again": bool}
_ADDRESS = re.compile(r"[\w.:\[\]%-]{1,255}:[0-9]{1,5}")


class Flags(NamedTuple):
    """The processes of a run, as its flags name them."""

    coordinator: str
    processes: int
    process: int


def check_flags(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> Flags | None:
    """Returns the processes that flags name, None where they do not. Raises `UserError` where some of the three do and
    others do not.
    """
    flags = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    given = [f"{name}={value}" for name, value in flags.items() if value is not None]
    if timeout <= 0:
        raise UserError(f"--connect-timeout={timeout}: must be positive, in seconds")
    if not given or given == ["--num-processes=1"]:
        return None
    if len(given) < len(flags):
        missing = ", ".join(name for name, value in flags.items() if value is None)
        raise UserError(f"{' '.join(given)}: needs {missing} too; --num-processes=1 trains in this process alone")
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator={coordinator}: must be HOST:PORT, the host of process 0 and a port free there")
    if num_processes < 1:
        raise UserError(f"--num-processes={num_processes}: must be at least 1")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process-id={process_id}: must be from 0 to {num_processes - 1} (--num-processes - 1)")
    return Flags(coordinator, num_processes, process_id)


class Place(NamedTuple):
    """Where a process stands in a start."""

    flags: Flags
    again: bool  # whether the run was started before
    news: str  # who takes part, for one process to tell; "": as before, or another one tells


class _Record(NamedTuple):
    token: str  # of the supervisor, drawn when it began
    beat: int
    start: int  # which it waits for, or takes part in
    state: str
    code: int  # that it ended with
    host: str
    address: str  # at which its process could be the first
    fits: list[int]  # the numbers of processes that the config goes on with; empty: not known
    starts: int  # that it has made


class _Agreed(NamedTuple):
    members: dict[int, str]  # number of a process: token of its supervisor
    coordinator: str
    again: bool


class Gathering:
    """The supervisor of one process among those of the others. While its block runs, it lives.

    workdir: of the run. flags: of all its processes. wait: seconds that the others are waited for, at least: if fewer
    than all may start. least: how many must.
    """

    def __init__(self, workdir: Path, flags: Flags, wait: float, least: int):
        self._folder, self._flags, self._wait, self._least = workdir / FOLDER, flags, wait, least
        self.number, self.of = flags.process, flags.processes
        self.shrinks = least < self.of
        self._period = _SECONDS * max(1.0, self.of / 64)
        # Seconds without a beat, after which one counts as gone; file servers may show what is new some seconds late.
        self._silence = max(_BEATS * self._period, min(wait / 2, _PATIENCE))
        self._own = _Record(secrets.token_hex(8), 0, 0, _WAITING, 0, socket.gethostname(), flags.coordinator, [], 0)
        self._start, self._members = 0, dict[int, str]()  # of its last start
        self._writing, self._over, self._replaced = threading.Lock(), threading.Event(), False

    def __enter__(self) -> "Gathering":
        folder, path = self._folder, self._path(self.number)
        try:
            if folder.is_symlink():
                raise UserError(f"{folder}: is a symbolic link; put a folder of its own in its place")
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f".{path.name}.*.tmp"):
                left.unlink(missing_ok=True)
            self._check_alone()
            self._write()
        except OSError as e:
            raise UserError(f"{folder}: cannot be written ({e.strerror})") from e
        threading.Thread(target=self._live, name="supervisor: lives", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def meet(self, asked: Sequence[int], say: Callable[[str], None]) -> Place | int:
        """Waits until it is agreed that this process starts, and returns as what; or the exit code, where the run is
        over, or `asked` holds something. say: is told, at times, what is waited for.
        """
        began, looks, said = time.monotonic(), _Looks(self), ""
        address = self._address()
        while not asked:
            if self._replaced:
                rule = "another supervisor of this process has taken its place"
                raise UserError(f"--process-id={self.number}: {rule}")
            newest = self._newest()
            agreed = _agreed(self._folder / _name(newest), self.of) if newest > self._start else None
            if agreed and agreed.members.get(self.number) == self._own.token:
                return self._take(newest, agreed)
            self._be(state=_WAITING, start=newest + 1, address=address)
            looks.look()
            if (code := self._over_by(looks, newest)) is not None:
                return code
            waited = time.monotonic() - began
            there = {self.number: self._own} | looks.alive(_WAITING, newest + 1)
            chosen = self._chosen(there, looks, waited)
            if chosen and chosen[0] == self.number:
                self._agree(newest + 1, {number: there[number] for number in chosen})
            elif waited > _QUIET and not chosen and (line := self._waits_for(there, looks, waited)) != said:
                say(line)
                said = line
            time.sleep(self._period / 2)
        return EXIT_PREEMPTED

    def knows(self, fits: Iterable[int]) -> None:
        """Is told the numbers of processes that the config goes on with."""
        self._be(fits=sorted(n for n in set(fits) if 0 < n <= self.of)[:8192])

    def ends(self, code: int) -> None:
        """Tells the others that this supervisor ends, and with which exit code. Where that is for bad input, and there
        is no run, the last one that ends takes away what they have written.
        """
        self._be(state=_ENDED, code=max(code, 0))
        self._over.set()
        workdir, others = self._folder.parent, [_record(self._path(number)) for number in range(self.of)]
        if code != EXIT_USER_ERROR or (workdir / "config.json").exists():
            return
        if all(record is None or record.state == _ENDED for record in others):
            with self._writing, contextlib.suppress(OSError):  # what is not ours stays
                for path in (*self._folder.glob("process-*.json"), *self._folder.glob("start-*.json")):
                    path.unlink(missing_ok=True)
                self._folder.rmdir()
                workdir.rmdir()

    # ------------------------------------------------------------ its own record

    def _path(self, number: int) -> Path:
        return self._folder / f"process-{number}.json"

    def _check_alone(self) -> None:
        """Raises `UserError` where another supervisor of this process is alive."""
        first = _record(self._path(self.number))
        until = time.monotonic() + _BEATS * self._period
        while first and first.state != _ENDED and time.monotonic() < until:
            time.sleep(self._period / 2)
            if (now := _record(self._path(self.number))) and now != first:
                rule = f"is supervised on {printable(now.host)[:80]} already"
                raise UserError(f"--process-id={self.number}: process {self.number} of this run {rule}")

    def _be(self, **news: Any) -> None:
        """Changes the record, and writes it at once."""
        if self._own._replace(**news) != self._own:
            with contextlib.suppress(OSError):  # the next beat tries again
                self._write(**news)

    def _live(self) -> None:
        while not self._over.wait(self._period):
            with contextlib.suppress(OSError):
                self._write()

    def _write(self, **news: Any) -> None:
        with self._writing:
            path = self._path(self.number)
            there, began = _record(path), self._own.beat > 0
            self._own = self._own._replace(**news, beat=self._own.beat + 1)
            if began and there and there.token != self._own.token:
                self._replaced = True  # this one stood still for long
            if self._replaced:
                return
            # Not flushed to the disk as others are: a record that a crash of the machine loses tells of nobody alive.
            temporary = path.with_name(f".{path.name}.{self._own.token}.tmp")
            temporary.write_text(json.dumps(self._own._asdict()))
            os.replace(temporary, path)

    def _address(self) -> str:
        """Where others would find this process if it were the first: at the port that the flags name, if it is free."""
        host, _, port = self._flags.coordinator.rpartition(":")
        return f"{host if self.number == 0 else _own_host(host)}:{_free_port(int(port))}"

    # ------------------------------------------------------------ who starts

    def _newest(self) -> int:
        """The number of the last start that was agreed on, whatever its file holds now; 0: none."""
        try:
            names = os.listdir(self._folder)
        except OSError:  # whoever deleted it; a beat does not make it anew, and others are not seen
            raise UserError(f"{self._folder}: is gone, or cannot be read") from None
        numbers = [int(found[1]) for name in names if (found := re.fullmatch(r"start-(\d{1,9})\.json", name))]
        newest = max(numbers, default=0)
        if newest >= _LAST:
            raise UserError(f"{self._folder / _name(newest)}: no supervisor has come so far; delete it")
        return newest

    def _over_by(self, looks: "_Looks", newest: int) -> int | None:
        """The exit code of the run, where another process's supervisor has ended for good; None: it is not over."""
        for number, record in looks.records.items():
            ours = self._members.get(number) == record.token and record.start >= self._start
            if record.state != _ENDED or not (ours or (number in looks.moved and record.start >= newest)):
                continue
            if record.code in (0, EXIT_USER_ERROR) or not self.shrinks:
                return record.code
        return None

    def _chosen(self, there: dict[int, _Record], looks: "_Looks", waited: float) -> list[int]:
        """The processes that start now; none where others are to be waited for."""
        if len(there) == self.of:
            return sorted(there)
        ended = {number: record.token for number, record in looks.records.items() if record.state == _ENDED}
        left = [number for number, token in ended.items() if self._members.get(number) == token]
        may_come = len(there) + len(left) < self.of and waited < max(self._wait, self._silence)
        if not self.shrinks or may_come or looks.alive(_RUNNING):
            return []
        fits = _fits(there)
        numbers = [n for n in range(len(there), self._least - 1, -1) if n in fits]
        return sorted(there)[: numbers[0]] if numbers else []

    def _agree(self, start: int, members: dict[int, _Record]) -> None:
        """Writes down who takes part in a start, unless another one has."""
        tokens = {str(number): record.token for number, record in members.items()}
        first = members[min(members)]
        again = any(record.starts for record in members.values()) or len(members) < self.of
        path = self._folder / _name(start)
        temporary = path.with_name(f".{path.name}.{self._own.token}.tmp")
        agreed = {"members": tokens, "coordinator": first.address, "again": again}
        with contextlib.suppress(OSError):  # another one was faster, or the disk is full
            with temporary.open("w") as file:
                file.write(json.dumps(agreed))
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        for old in (temporary, self._folder / _name(start - _KEPT)):
            with contextlib.suppress(OSError):
                old.unlink(missing_ok=True)

    def _take(self, start: int, agreed: _Agreed) -> Place:
        """Takes part in a start."""
        before, self._members, self._start = self._members, agreed.members, start
        self._be(state=_RUNNING, start=start, starts=self._own.starts + 1)
        numbers = sorted(agreed.members)
        flags = Flags(agreed.coordinator, len(numbers), numbers.index(self.number))
        same = before.keys() == agreed.members.keys() or (not before and len(numbers) == self.of and not agreed.again)
        news = "" if same or flags.process else self._who(numbers)
        return Place(flags, agreed.again, news)

    def _who(self, numbers: list[int]) -> str:
        if len(numbers) == self.of:
            return f"the run goes on in all {self.of} processes"
        absent = [number for number in range(self.of) if number not in numbers]
        return f"the run goes on in {_processes(numbers)} of {self.of}, without {_processes(absent)}"

    def _waits_for(self, there: dict[int, _Record], looks: "_Looks", waited: float) -> str:
        """A line on what is waited for, and what would do."""
        running = looks.alive(_RUNNING)
        absent = [number for number in range(self.of) if number not in there and number not in running]
        newest = max((record.start for record in running.values()), default=0)
        if running and newest > self._start:
            rule = f"process {self.number} joins it when it starts again"
            return f"the run goes on in {_processes(running)} of {self.of}; {rule}"
        if running:
            more = f"; {_processes(absent)} not there" if absent else ""
            return f"waiting for the run of {_processes(running)} of {self.of} to end{more}"
        line = f"waiting for {_processes(absent)} of {self.of}: no sign of life in {self._folder}"
        fits, least = _fits(there), self._least
        if not self.shrinks:
            return f"{line}; with --supervise.min-processes=N the run would go on with N that are there"
        if not fits:
            return f"{line}; with how many others it can go on is known once it has begun"
        do = ", ".join(str(n) for n in fits if n >= least)
        if any(least <= n <= len(there) for n in fits):
            return f"{line}; the run goes on without after --supervise.wait={self._wait:g} s"
        rule = f"the config goes on with {do} processes (--supervise.min-processes={least})"
        return f"{line}; {len(there)} of them would be too few, or do not fit: {rule}"


class _Looks:
    """What a supervisor sees of the others."""

    def __init__(self, own: Gathering):
        self._own, self.records = own, dict[int, _Record]()
        self.moved: dict[int, float] = {}  # when it was last seen that a counter had changed

    def look(self) -> None:
        for number in range(self._own.of):
            if number == self._own.number or not (record := _record(self._own._path(number))):
                continue
            before = self.records.get(number)
            if before and (before.token, before.beat) != (record.token, record.beat):
                self.moved[number] = time.monotonic()
            self.records[number] = record

    def alive(self, state: str, start: int | None = None) -> dict[int, _Record]:
        """The records of those that live and are in a state; of one start, or of any."""
        since = time.monotonic() - self._own._silence
        living = {number: self.records[number] for number, at in sorted(self.moved.items()) if at >= since}
        return {n: r for n, r in living.items() if r.state == state and start in (None, r.start)}


def _fits(there: dict[int, _Record]) -> list[int]:
    """With how many processes the run can go on, as one of those that are there has heard from it."""
    return next((record.fits for _, record in sorted(there.items()) if record.fits), [])


def _name(start: int) -> str:
    return f"start-{start}.json"


def _processes(numbers: Iterable[int]) -> str:
    numbers = sorted(numbers)
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"process{'es' if len(numbers) > 1 else ''} {shown}"


def _read(path: Path, shape: Any) -> Any:
    """The content of a small JSON file of a shape; None for everything else."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        # Neither a link is followed nor a pipe waited for.
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            content = os.read(file, _LARGEST + 1) if stat.S_ISREG(os.fstat(file).st_mode) else b""
        finally:
            os.close(file)
        found = json.loads(content) if len(content) <= _LARGEST else None
        if isinstance(found, dict) and not any(misshapen(found, shape)):
            return found
    return None


def _record(path: Path) -> _Record | None:
    if not (found := _read(path, _RECORD)):
        return None
    record = _Record(**{name: found[name] for name in _Record._fields})
    whole = record.state in (_WAITING, _RUNNING, _ENDED) and 0 <= record.start <= _LAST and 0 <= record.code < 256
    return record if whole and _is_address(record.address) and min(record.fits, default=1) > 0 else None


def _agreed(path: Path, of: int) -> _Agreed | None:
    if not (found := _read(path, _AGREED)):
        return None
    agreed = _Agreed(**{name: found[name] for name in _AGREED})
    members = {int(number): token for number, token in agreed.members.items()}
    whole = members and max(members) < of and len(members) == len(agreed.members) and _is_address(agreed.coordinator)
    return agreed._replace(members=members) if whole else None


def _is_address(text: str) -> bool:
    return bool(_ADDRESS.fullmatch(text)) and 0 < int(text.rpartition(":")[2]) < 2**16


def _own_host(peer: str) -> str:
    """The address of this host on the way to a peer's; its name where there is no way. Nothing is sent."""
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(peer.strip("[]"), 9, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as way:
                way.connect(address)
                own = way.getsockname()[0]
                return f"[{own}]" if family == socket.AF_INET6 else own
    return socket.gethostname()


def _free_port(wanted: int) -> int:
    for port in (wanted, 0):
        with contextlib.suppress(OSError), socket.create_server(("", port)) as server:
            return server.getsockname()[1]
    return wanted
