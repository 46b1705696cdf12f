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
    on a full disk, must not end what goes on: it waits for the next one, or for `flush`.
    """

    def __init__(self, workdir: Path, quiet: bool = False):
        self._path, self._quiet, self._began = workdir / FILE, quiet, time.perf_counter()
        self._waiting: list[tuple[int, str, str, float]] = []

    def write(self, step: int, kind: str, what: str) -> None:
        if not self._quiet:
            self._waiting.append((step, kind, what, time.perf_counter() - self._began))
            self.flush()

    def flush(self) -> None:
        """Writes the events that wait, as far as it can."""
        while self._waiting and append(self._path, *self._waiting[0]):
            self._waiting.pop(0)


def append(path: Path, step: int, kind: str, what: str, seconds: float) -> bool:
    """Appends a row to a file of events; returns whether it could be written."""
    return append_row(path, {"step": step, "kind": kind, "what": what, "seconds": round(seconds, 3)})


def append_row(path: Path, row: Mapping[str, Any]) -> bool:
    """Appends a row to a file of JSON lines; where its last line was torn, as by a kill, that line goes first. Returns
    whether it could be written.
    """
    with contextlib.suppress(OSError), path.open("ab+") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 2**16))
        tail = file.read()
        if tail and not tail.endswith(b"\n"):
            file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        return True
    return False
