"""Records of prepared data that cannot be read and are left out: their tokens are in the rows, but nothing is predicted
there, so that all other rows stay as they are.

What a run left out is a part of it, `quarantine.jsonl`, and a copy of that a part of each checkpoint: when the run goes
on it leaves the same out, be it readable then.
"""

import contextlib
import json
import threading
from pathlib import Path

from frugalmoe.errors import UserError

FILE = "quarantine.jsonl"


class Quarantine:
    """The records that are left out, by name: the directory, the shard and the number in it. For many threads."""

    def __init__(self, limit: int):
        self._limit, self._lock, self._path = limit, threading.Lock(), None
        self._found: dict[str, str] = {}  # name -> why
        self._news: list[str] = []

    @property
    def is_on(self) -> bool:
        return self._limit > 0

    def begin(self, path: Path, of_checkpoint: Path | None = None) -> None:
        """Takes up what earlier starts of a run left out; what is found from here on is written there too.

        of_checkpoint: the file of the checkpoint that the run goes on from; what it alone has is written to `path`.
        """
        with self._lock:
            self._path = path
            self._found |= (there := _read(path))
            for name, why in (_read(of_checkpoint) if of_checkpoint else {}).items():
                if name not in there:
                    self._found[name] = why
                    self._write(name, why)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __len__(self) -> int:
        """All records of the run that were left out, by other processes too."""
        return len(self._found | (_read(self._path) if self._path else {}))

    def add(self, name: str, error: UserError) -> None:
        """Leaves one more out. Raises the error where none may be, or as many as may be are."""
        with self._lock:
            if name in self._found:
                return
            if len(self._found) >= self._limit:
                rule = f"as many records as may be left out are (data.quarantine={self._limit})"
                more = rule if self._limit else "data.quarantine=N leaves up to N such records out"
                raise UserError(f"{error}; {more}") from error
            self._found[name] = str(error)
            self._news.append(f"left out, {len(self._found)} of at most {self._limit} records: {error}")
            self._write(name, str(error))

    def _write(self, name: str, why: str) -> None:
        if self._path:
            with self._path.open("a") as file:
                file.write(json.dumps({"record": name, "why": why}) + "\n")

    def news(self) -> list[str]:
        """What to tell of records that were left out since this was asked last."""
        if not self._news:
            return []
        with self._lock:
            told, self._news = self._news, []
        return told


def _read(path: Path) -> dict[str, str]:
    """Lines that are none, as the last after a kill, are left out: the record is found again."""
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            row = json.loads(line)
            found[str(row["record"])] = str(row["why"])
    return found
