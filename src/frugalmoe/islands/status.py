"""What a directory of islands shows to whoever looks at it: nothing is written, and only the newest rounds are read."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from frugalmoe.islands import records
from frugalmoe.islands.records import Agreement, Commit, Damaged, Presence
from frugalmoe.islands.store import Store, StoreError

ROUNDS = 20  # the newest, which are looked at
LAPSED = "lapsed"  # says that it trains, but the others have seen no sign of life and go on without it
UNKNOWN = "unknown"  # takes part, but what it says of itself is not there or damaged


class Row(NamedTuple):
    """An island."""

    island: str
    status: str  # what it said last: joining | training | waiting | left | complete; or lapsed | unknown
    round: int | None  # the newest that it has taken; None where it says nothing of itself
    behind: int | None  # rounds that are newer
    tokens: int  # of its contributions that are in the outer parameters
    tokens_per_second: float | None
    merged: float | None  # share of the newest rounds that it was a member of; None where there is none
    left_out: str  # the last time and why; empty: never in the newest rounds
    note: str  # the last one that it was told, as that a part of it was not merged
    bytes: int | None  # of a contribution, mean of those that were merged in the newest rounds
    streams: int  # of the data, that it reads now
    device: str
    software: str
    beat: int | None  # grows while it lives
    outer_sha256: str | None  # of the round that it has taken, where that is among the newest


class Directory(NamedTuple):
    """All islands of a directory, and what they have together."""

    outer_sha256: str | None  # of the newest round; None where there is none yet
    round: int | None  # the newest that is decided; 0 is the beginning
    rounds: int | None  # that there will be
    tokens: int  # in the outer parameters
    merge: str | None
    bits: int | None
    members: tuple[str, ...]  # of the round that is under way
    lapse_seconds: float | None
    damaged: tuple[str, ...]  # a line for each file that is none of ours
    islands: tuple[Row, ...]  # sorted by name


class _Reader:
    """Reads records; what is damaged becomes a line."""

    def __init__(self, store: Store):
        self._store, self.damaged = store, []

    def read(self, cls: type, key: str) -> Any:
        try:
            data = self._store.read(key)
            return None if data is None else records.from_bytes(cls, data, key)
        except (Damaged, StoreError) as error:
            self.damaged.append(str(error))
            return None

    def presences(self) -> dict[str, Presence]:
        found = {}
        for key in self._store.list("islands/"):
            there = self.read(Presence, key)
            if there is not None and key != records.path_of_presence(there.island):
                self.damaged.append(f"{key}: says that it is of island {there.island}")
            elif there is not None:
                found[there.island] = there
        return found

    def newest(self, presences: dict[str, Presence]) -> int | None:
        """The newest round with a record: at or shortly after the newest that an island speaks of."""
        spoken_of = sorted({there.round for there in presences.values() if there.round}, reverse=True)
        newest = next(filter(self._is_there, spoken_of), None)
        if newest is None:
            keys = [key for key in self._store.list("rounds/") if key.endswith("/commit.json")]
            newest = max((round for key in keys if (round := records.round_of(key)) is not None), default=None)
        while newest is not None and self._is_there(newest + 1):
            newest += 1
        return newest

    def _is_there(self, round: int) -> bool:
        try:
            return self._store.read(records.path_of_commit(round)) is not None
        except StoreError as error:
            self.damaged.append(str(error))
            return False

    def commits(self, newest: int | None) -> dict[int, Commit]:
        """The newest records by round."""
        found = {}
        for round in range(max((newest or 0) - ROUNDS, 0), -1 if newest is None else newest + 1):
            key = records.path_of_commit(round)
            commit = self.read(Commit, key)
            if commit is not None and (commit.format, commit.round) != (records.FORMAT, round):
                self.damaged.append(f"{key}: of format {commit.format} and round {commit.round}")
            elif commit is not None:
                found[round] = commit
        return found


def look(store: Store) -> Directory:
    """Returns what a directory shows. Raises `StoreError` where it cannot be read at all."""
    reader = _Reader(store)
    agreement = reader.read(Agreement, records.AGREEMENT)
    presences = reader.presences()
    commits = reader.commits(reader.newest(presences))
    last = commits[max(commits)] if commits else None
    section = agreement.islands if agreement else {}
    return Directory(
        outer_sha256=last.outer if last else None,
        round=last.round if last else None,
        rounds=_rounds(agreement),
        tokens=last.tokens if last else 0,
        merge=_of(section, "merge", str),
        bits=_of(section, "bits", int),
        members=tuple(sorted(last.members)) if last else (),
        lapse_seconds=_of(section, "lapse_seconds", float),
        damaged=tuple(reader.damaged),
        islands=tuple(_row(name, presences.get(name), commits, last) for name in _names(presences, commits)),
    )


def _rounds(agreement: Agreement | None) -> int | None:
    length = _of(agreement.islands, "round_steps", int) if agreement else None
    return -(-agreement.steps // length) if length and length > 0 else None


def _of(values: Any, name: str, kind: type) -> Any:
    """A value of a mapping that may hold anything; None where it is none."""
    value = values.get(name)
    return value if type(value) is kind else None


def _names(presences: dict[str, Presence], commits: dict[int, Commit]) -> Sequence[str]:
    names = set(presences)
    for commit in commits.values():
        names |= {*commit.members, *(c.island for c in commit.merged), *map(_island, commit.left_out)}
    return sorted(names)


def _island(label: str) -> str:
    """The island that a label of a contribution names: NAME, or NAME@ROUND of a late one."""
    return label.partition("@")[0]


def _row(name: str, there: Presence | None, commits: dict[int, Commit], last: Commit | None) -> Row:
    own = [c for commit in commits.values() for c in commit.merged if c.island == name]
    took_part = {round for round in commits if round - 1 in commits and name in commits[round - 1].members}
    about = there.about if there else {}
    held = commits.get(there.round) if there else None
    return Row(
        island=name,
        status=_status(name, there, last),
        round=there.round if there else None,
        behind=max(last.round - there.round, 0) if there and last else None,
        tokens=last.tokens_of.get(name, 0) if last else 0,
        tokens_per_second=there.tokens_per_second if there else None,
        merged=len(took_part & {c.round for c in own}) / len(took_part) if took_part else None,
        left_out=_newest([commit.left_out for commit in commits.values()], list(commits), name),
        note=_newest([commit.notes for commit in commits.values()], list(commits), name),
        bytes=round(sum(c.bytes for c in own) / len(own)) if own else None,
        streams=len(last.members.get(name, ())) if last else 0,
        device=_device(about),
        software=", ".join(
            [f"{what} {about[what]}" for what in ("python", "jax") if what in about]
            + [str(about[what]) for what in ("compute_dtype",) if what in about]
        ),
        beat=there.beat if there else None,
        outer_sha256=held.outer if held else None,
    )


def _status(name: str, there: Presence | None, last: Commit | None) -> str:
    if there is None:
        return UNKNOWN
    without = last is not None and name not in last.members
    return LAPSED if without and there.status in ("training", "waiting") else there.status


def _newest(told: Sequence[Any], rounds: Sequence[int], name: str) -> str:
    """What an island was told last, with the round that it was told of."""
    for said, round in reversed(list(zip(told, rounds))):
        for label, why in said.items():
            if _island(label) == name:
                return f"round {label.partition('@')[2] or round}: {why}"
    return ""


def _device(about: Any) -> str:
    count = about.get("devices", 1)
    device = str(about.get("device", ""))
    return f"{count} x {device}" if device and count != 1 else device
