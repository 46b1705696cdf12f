"""Files that a crash or a second process never leaves half-written."""

import contextlib
import fcntl
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from frugalmoe.errors import UserError

LONGEST_NAME = 128  # bytes; a file name has 255, and temporary files add to it
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"


def check_name(what: str, name: object) -> None:
    """Refuses a name that could not be one folder in the place meant for it: of a study, an arm, a part of a run's.

    Raises `UserError` beginning with `what` for a separator, a leading dot or dash, nothing, or more than fits.
    """
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
        rule = "a name holds letters, digits and _ . + -, and begins with a letter, a digit or _"
        raise UserError(f"{what}={name!r}: {rule}")
    if len(name.encode(errors="replace")) > LONGEST_NAME:
        raise UserError(f"{what}={name[:40] + '...'!r}: a name has at most {LONGEST_NAME} bytes")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time builds `path`; the others wait. The kernel frees the lock of a process that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_atomically(path: Path, content: bytes) -> None:
    """After a crash `path` holds the old content or the new one, never a part. Processes may write it at one time."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        error.filename = error.filename or str(path)
        raise
    os.replace(temporary, path)


def is_temporary(name: str) -> bool:
    """Whether a file of that name is what `write_atomically` writes before it has the name that was asked for."""
    return name.startswith(".") and name.endswith(".tmp")


def remove_leftovers(folder: Path) -> None:
    """Deletes what `write_atomically` left in a folder when its process was killed."""
    for path in folder.glob(".*.tmp"):
        number = path.name.split(".")[-2]
        if number.isdecimal() and not _is_alive(int(number)):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def check_writable(path: Path, what: str) -> None:
    """Raises `UserError` that begins with `what` where `write_atomically` could not write, before there is anything."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.open("wb").close()
        temporary.unlink()
    except OSError as e:
        raise UserError(f"{what}: cannot be written there: {e.strerror}") from e


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: a number that is not finite is null, since JSON has no other word for it."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (to_json(value, indent=1) + "\n").encode())


def write_generated(page: Path, text: str) -> None:
    """Replaces what stands between the markers of a markdown page, or begins the page with it; the rest is kept."""
    old = page.read_text() if page.is_file() else ""
    before, _, rest = old.partition(BEGIN) if BEGIN in old else ("", "", old)
    after = rest.partition(END)[2] if END in rest else f"\n{rest}"
    write_atomically(page, f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}".encode())


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `object_pairs_hook` of JSON. Raises ValueError where a name stands twice, so that a reader must choose."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises `UserError` for one that is missing or damaged, or no file: a pipe would never
    end.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not valid JSON ({' '.join(str(e).split())[:200]})") from e
