"""The size and SHA-256 of each file of a saved step, in a file of ours inside the step.

Orbax has no checksums: a bit that flips in an array is a wrong value that nobody sees. `write` is called once all
processes have written and before the step gets its name, so that a step with a name has all its files and this one.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from frugalmoe.errors import UserError

NAME = "checksums.json"
_THREADS = min(8, os.cpu_count() or 1)  # hashing lets other threads run


class Fault(NamedTuple):
    """What is wrong with a file of a step."""

    file: str  # relative to the step
    what: str  # missing | cut off | changed | cannot be read (...)

    def __str__(self) -> str:
        return str(UserError(f"{self.file}: {self.what}"))  # names may be anybody's


def write(step: Path) -> None:
    """Writes the checksums of the files that are in a step's directory. Cost: one pass over them, in threads."""
    files = [path for path in sorted(step.rglob("*")) if path.is_file() and path != step / NAME]
    with ThreadPoolExecutor(_THREADS) as threads:
        sums = [(path.stat().st_size, digest) for path, digest in zip(files, threads.map(_sha256, files))]
    content = _content({path.relative_to(step).as_posix(): known for path, known in zip(files, sums)})
    with open(step / NAME, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def are_there(step: Path) -> bool:
    """Whether a step has checksums; those that older versions saved have none."""
    return os.path.lexists(step / NAME)


def faults(step: Path, largest: int | None = None) -> list[Fault]:
    """Returns what is wrong with the files of a step that has checksums, in their order; files that it did not save
    are not looked at. Cost: one pass over them, in threads; over those of at most `largest` bytes, where it is given.
    """
    try:
        known = _read(step / NAME)
    except OSError as e:
        return [Fault(NAME, f"cannot be read ({e.strerror})")]
    except ValueError:
        return [Fault(NAME, "changed")]
    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(lambda entry: _fault(step, *entry, largest), known.items())
        return [fault for fault in found if fault]


def _fault(step: Path, name: str, known: tuple[int, str], largest: int | None) -> Fault | None:
    size, digest = known
    try:
        there = (step / name).lstat()
        if not stat.S_ISREG(there.st_mode):
            return Fault(name, "changed into what is no file")
        if there.st_size != size:
            return Fault(name, "cut off" if there.st_size < size else "changed")
        if (largest is None or size <= largest) and _sha256(step / name) != digest:
            return Fault(name, "changed")
    except FileNotFoundError:
        return Fault(name, "missing")
    except OSError as e:
        return Fault(name, f"cannot be read ({e.strerror})")
    return None


def _read(path: Path) -> Mapping[str, tuple[int, str]]:
    """{file: (size, digest)}. Raises ValueError for another content than `write` gave it, in any byte."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("no file")
    content = path.read_bytes()
    try:
        files = {name: (size, digest) for name, (size, digest) in json.loads(content)["files"].items()}
    except (AttributeError, KeyError, TypeError, RecursionError) as e:
        raise ValueError("another form") from e
    if not all(type(size) is int and type(digest) is str for size, digest in files.values()):
        raise ValueError("another form")
    if _content(files) != content or not all(map(_is_inside, files)):
        raise ValueError("another content")
    return files


def _content(files: Mapping[str, tuple[int, str]]) -> bytes:
    """The file as it must be, byte for byte: its last entry is the digest of the others."""
    own = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return (json.dumps({"files": files, "sha256": own}) + "\n").encode()


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
