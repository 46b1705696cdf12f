"""`events.jsonl` of a run: what happened to it, in the order of time. Rows stay, whatever the run goes back to."""

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "events.jsonl"


class Events:
    """Writes rows of (step, kind, what, seconds since this start of the run). The file is made with the first of them.

    None is written with `quiet`, as in processes that are not the first of a run. An event that cannot be written, as
    on a full disk, must not end what goes on: it is left out.
    """

    def __init__(self, workdir: Path, quiet: bool = False):
        self._path, self._quiet, self._began = workdir / FILE, quiet, time.perf_counter()

    def write(self, step: int, kind: str, what: str) -> None:
        if not self._quiet:
            append(self._path, step, kind, what, time.perf_counter() - self._began)


def append(path: Path, step: int, kind: str, what: str, seconds: float) -> None:
    """Appends a row to a file of events."""
    append_row(path, {"step": step, "kind": kind, "what": what, "seconds": round(seconds, 3)})


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Appends a row to a file of JSON lines; where its last line was torn, as by a kill, that line goes first. A row
    that cannot be written is left out.
    """
    with contextlib.suppress(OSError), path.open("ab+") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 2**16))
        tail = file.read()
        if tail and not tail.endswith(b"\n"):
            file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")
