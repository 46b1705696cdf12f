"""Fuzzes every parser of outside bytes: `make fuzz`, or `python tests/faults/fuzz.py [--cases=N] [--only=NAME]`.

A case takes the files of something good, changes one or some of them (`mutations`) and reads them as the product does.
It may be accepted or refused, and nothing else:

- only the errors that the parser's row names, with a message of one line and less than `LONGEST` characters;
- within `SECONDS` of computing, and `WAIT` of waiting;
- with less than `MEMORY` more than before;
- no file is written or deleted, except those that the row names; no pickle is loaded, no process started, no connection
  made. Python tells of each of these, whoever asks for it (`sys.addaudithook`).

`PARSERS` is the table: a parser more is a row more.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import mutations
import parsers
import pyarrow
import zstandard
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from mutations import Choices, Seeded
from parsers import CHANGES, LONGEST, PARSERS, Parser

from frugalmoe import found

SECONDS, WAIT = 5, 60  # of a case: of computing, of the clock
MEMORY = 1 << 30  # bytes that a case may take
ROOM = 8 << 30  # bytes of addresses that the long form may take beside what it has after its imports

Files = Mapping[str, bytes]


class Finding(Exception):
    """What must not be."""


# ---------------------------------------------------------------- the guard around a case

_watched: dict[str, Any] = {"on": False}
_WRITES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod",
           "shutil.rmtree", "shutil.move"}  # fmt: skip
_NEVER = {"pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty",
          "socket.connect", "marshal.loads"}  # fmt: skip


def _hook(event: str, arguments: tuple) -> None:
    if not _watched["on"]:
        return
    if event in _NEVER and not _is_import():
        _watched["seen"].append(f"{event} {arguments!r:.200}")
    elif event == "open":
        path, mode, flags = arguments
        wants = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & _WRITING)
        if wants and isinstance(path, str | bytes | os.PathLike):
            _written(path)
    elif event in _WRITES:
        if event == "os.mkdir" and os.path.isdir(arguments[0]):
            return  # it is there already
        for path in arguments[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1]:
            if isinstance(path, str | bytes | os.PathLike):
                _written(path)


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _is_import() -> bool:
    """Whether a module is being imported: its code is marshalled, and a library may ask a program for its version."""
    frame = sys._getframe()
    while frame := frame.f_back:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
    return False


def _written(path: Any) -> None:
    path = os.path.abspath(os.fsdecode(path))
    folder, allowed = _watched["folder"], _watched["writes"]
    inside = os.path.relpath(path, folder)
    if path == os.devnull or path.endswith(".pyc") or "__pycache__" in path or _is_import():
        return
    if not any(inside == name or inside.startswith(f".{name}.") or inside.startswith(f"{name}/") for name in allowed):
        _watched["seen"].append(f"writes {path}")


sys.addaudithook(_hook)


class _Late(BaseException):
    """A case that goes on for too long."""


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        where = "".join(traceback.format_stack(frame)[-4:])
        _watched["seen"].append(f"takes more than {SECONDS} s of computing or {WAIT} s of the clock\n{where}")
        raise _Late

    before = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, SECONDS, 1)
    signal.setitimer(signal.ITIMER_REAL, WAIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _memory(what: bytes) -> int:
    """Bytes, by /proc: VmHWM is the most since `_forget`."""
    for line in Path("/proc/self/status").read_bytes().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    return 0


def _forget() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def case(parser: Parser, folder: Path, changed: Sequence[str] = ()) -> str:
    """Reads a folder, of which some files are changed; "" where it is accepted, else the message. Raises `Finding`."""
    found._READ.clear()
    _forget()
    before, files, refused = _memory(b"VmRSS"), _memory(b"RssFile"), ""
    _watched.update(folder=str(folder), writes=parser.writes, seen=[])
    try:
        with _in_time():
            _watched["on"] = True
            try:
                parser.read(folder, changed)
            except parser.errors as error:
                refused = str(error) or "(nothing)"
            finally:
                _watched["on"] = False
    except _Late:
        pass
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in where if "/frugalmoe/" in frame.filename]
        last = (ours or where)[-1]
        name = f"{type(error).__name__} at {last.filename.rpartition('/frugalmoe/')[2]}:{last.lineno}"
        raise Finding(f"{name}: {error!s:.300}") from error
    if _watched["seen"]:
        raise Finding(_watched["seen"][0])
    if len(refused) >= LONGEST or not refused.isprintable():
        raise Finding(f"a message of {len(refused)} characters, or of several lines: {refused[:200]!r}")
    # Where memory is short a process loses pages of files, as of libraries: that makes no room for a case.
    taken_away = max(0, files - _memory(b"RssFile"))
    if (taken := _memory(b"VmHWM") + taken_away - before) > MEMORY:
        raise Finding(f"takes {taken / 1e9:.1f} GB")
    return refused


# ---------------------------------------------------------------- a parser's cases


_OF_NO_KIND = (ValueError, RecursionError, LookupError, EOFError, OSError, AttributeError, TypeError, OverflowError,
               MemoryError, zstandard.ZstdError, zipfile.BadZipFile, zlib.error, pyarrow.ArrowException)  # fmt: skip


class Bench:
    """A parser with its folder. The folder's neighbours are watched too."""

    def __init__(self, parser: Parser, root: Path):
        self.parser, self.folder = parser, root / "watched" / "case"
        self.folder.mkdir(parents=True)
        self.how = parser.seeds(self.folder)
        self.good = {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in _files(self.folder)}
        if refused := case(parser, self.folder, list(self.how)):
            raise AssertionError(f"{parser.name}: what is good is refused: {refused}")

    def changed(self, pick: Choices) -> Files:
        """Changed files: one of them mostly, and up to three changes."""
        names, made = sorted(self.how), {}
        for _ in range(pick.one([1, 1, 1, 2, 3])):
            name = pick.one(names)
            content = made.get(name, self.good[name])
            try:
                made[name] = CHANGES[self.how[name]](pick, content)
            except _OF_NO_KIND:  # what was changed already
                made[name] = mutations.of_bytes(pick, content)
        return made

    def run(self, files: Files) -> str:
        """One case; see `case`."""
        for name, content in files.items():
            (self.folder / name).write_bytes(content)
        try:
            refused = case(self.parser, self.folder, list(files))
            if sorted(os.listdir(self.folder.parent)) != ["case"]:
                raise Finding("something lies beside its folder")
            return refused
        finally:
            for name in {*files, *self.parser.writes}:
                if name in self.good:
                    (self.folder / name).write_bytes(self.good[name])
                else:
                    (self.folder / name).unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def prepared(root: Path) -> None:
    """Fills a folder with what the rows begin from, unless this process has one."""
    if "root" not in parsers.MADE:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            parsers.MADE["root"] = parsers.made(root)


def trials(bench: Bench, cases: int) -> list[str]:
    """Returns what was said of so many cases that hypothesis chooses; raises the first `Finding`, made small."""
    said = []

    @seed(0)
    @settings(max_examples=cases, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.composite(lambda draw: bench.changed(Choices(draw)))())
    def go(files: Files) -> None:
        said.append(bench.run(files))

    go()
    return said


# ---------------------------------------------------------------- the long form


class Row(NamedTuple):
    """A parser's figures."""

    parser: str
    cases: int
    refused: int
    seconds: float
    findings: Mapping[str, str]  # what must not be -> the smallest input that shows it


def long(parser: Parser, cases: int, first: int) -> Row:
    """The cases of one parser, in a folder of their own; a finding does not stop them."""
    began, refused = time.monotonic(), 0
    findings: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(parser, Path(place))
        # What only the limit of addresses stops ends in MemoryError, and is a finding.
        resource.setrlimit(resource.RLIMIT_AS, (_memory(b"VmSize") + ROOM, resource.RLIM_INFINITY))

        for number in range(cases):
            files = bench.changed(Seeded(first * 10**9 + number))
            try:
                refused += bool(bench.run(files))
            except Finding as finding:
                what, text = str(finding).partition(": ")[0], f"{finding!s:.400} with {files!r:.400}"
                if what not in findings or len(text) < len(findings[what]):
                    findings[what] = text
    return Row(parser.name, cases, refused, time.monotonic() - began, findings)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=120_000, help="of all parsers together (default: 120,000)")
    parser.add_argument("--only", help="a part of a parser's name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--made", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("error")
    named = [row for row in PARSERS if row.name == args.only]
    rows = named or [row for row in PARSERS if not args.only or args.only in row.name]
    shares = sum(row.share for row in rows)
    if args.made:  # a process of its own for each parser: one that dies is a finding
        parsers.MADE["root"] = Path(args.made)
        (row,) = rows
        json.dump(long(row, args.cases, args.seed)._asdict(), sys.stdout)
        return 0
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        prepared(Path(place))
        for row in rows:
            cases = -(-args.cases * row.share // shares)
            argv = [
                sys.executable,
                __file__,
                f"--cases={cases}",
                f"--only={row.name}",
                f"--seed={args.seed}",
                f"--made={place}",
            ]
            began = time.monotonic()
            ended = subprocess.run(argv, capture_output=True, text=True)
            if ended.returncode:
                dead = {f"the process ended with {ended.returncode}": ended.stderr[-2000:]}
                found.append(Row(row.name, cases, 0, time.monotonic() - began, dead))
            else:
                found.append(Row(**json.loads(ended.stdout.splitlines()[-1])))
            _say(found[-1])
    total = collections.Counter()
    for row in found:
        total.update(cases=row.cases, findings=len(row.findings), refused=row.refused)
    seconds = sum(row.seconds for row in found)
    print(f"| all | {total['cases']:,} | {total['refused']:,} | {total['findings']} | {seconds:.0f} |")
    return 1 if total["findings"] else 0


def _say(row: Row) -> None:
    if not _watched.get("headed"):
        print("| parser | cases | refused | findings | seconds |\n|---|---|---|---|---|")
        _watched["headed"] = True
    print(f"| {row.parser} | {row.cases:,} | {row.refused:,} | {len(row.findings)} | {row.seconds:.0f} |", flush=True)
    for text in row.findings.values():
        print(f"    {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
