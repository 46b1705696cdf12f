"""Where built data lives, and how it is written so that a crash or a second process never leaves half of it."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from frugalmoe.config.schema import Data
from frugalmoe.errors import UserError


def cache_root(data: Data) -> Path:
    """`data.cache_dir`, else $FRUGALMOE_CACHE, else ~/.cache/frugalmoe; created if absent."""
    root = Path(data.cache_dir or os.environ.get("FRUGALMOE_CACHE") or "~/.cache/frugalmoe").expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache_dir={str(root)!r}: cannot be created ({error.strerror})") from error
    if not os.access(root, os.W_OK):
        raise UserError(f"data.cache_dir={str(root)!r}: must be writable; name another or set FRUGALMOE_CACHE")
    return root


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time builds `path`; the others wait. The kernel frees the lock of a process that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_atomically(path: Path, content: bytes) -> None:
    """After a crash `path` holds the old content or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def digest(value: Any) -> str:
    """A short name for a JSON-able value, the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
