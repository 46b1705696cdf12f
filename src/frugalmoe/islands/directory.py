"""What stands in the directory, as one island reads and writes it: records, blobs, whole outer states."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from frugalmoe.islands import blobs, outer, packing, records
from frugalmoe.islands.contract import Merge
from frugalmoe.islands.outer import Outer
from frugalmoe.islands.records import Commit, Damaged, Presence
from frugalmoe.islands.store import Store
from frugalmoe.islands.tensors import Tensor
from frugalmoe.schema import Islands

Arrays = Mapping[str, np.ndarray]
PACKING = {bits: name for name, bits in packing.BITS.items()}


class Mismatch(Exception):
    """What was computed here has not the checksum that the record of the round has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """What all islands of a directory do alike."""

    section: Islands
    steps: int  # of the schedule
    tokens_per_row: int  # of the data
    tensors: tuple[Tensor, ...]
    fragments: tuple[tuple[str, ...], ...]  # names of tensors; round r merges number (r - 1) % P
    merge: Merge
    merge_routers: Callable[[Sequence[Arrays], Sequence[float]], dict[str, np.ndarray]]  # states, weights -> state

    @property
    def rounds(self) -> int:
        """How many there are; the last one may be shorter."""
        return -(-self.steps // self.section.round_steps)

    def names(self, round: int) -> tuple[str, ...]:
        """Of the tensors that a round merges."""
        return self.fragments[(round - 1) % len(self.fragments)]


class Held(NamedTuple):
    """The outer state after a round: what the next one starts from."""

    commit: Commit
    outer: Outer
    routers: Arrays

    @property
    def round(self) -> int:
        return self.commit.round


class Directory:
    """The files of a directory. Methods raise `store.StoreError` where it cannot be reached, `records.Damaged` for
    files that are gone or changed; calling them again is safe at any time.
    """

    def __init__(self, store: Store, rules: Rules) -> None:
        self.store, self.rules = store, rules
        self.bytes_read = self.bytes_written = 0
        self._own = "", b""  # the last contribution, which need not be read: sha256, blob

    # Records.

    def commit(self, round: int) -> Commit | None:
        """The record of a round; None where there is none yet."""
        found = self.record(Commit, records.path_of_commit(round))
        if found is not None and (found.format, found.round) != (records.FORMAT, round):
            raise Damaged(f"{records.path_of_commit(round)}: of format {found.format}, round {found.round}")
        return found

    def known_commit(self, round: int) -> Commit:
        found = self.commit(round)
        if found is None:
            raise Damaged(f"{self.store.place}: {records.path_of_commit(round)} is gone")
        return found

    def presence(self, name: str) -> Presence | None:
        """What an island says of itself; None for nothing, or something damaged."""
        return self.record(Presence, records.path_of_presence(name), quiet=True)

    def handed_in(self, round: int) -> dict[str, str]:
        """Island -> key of what it handed in for a round."""
        prefix = records.path_of_contribution(round, "").removesuffix(".json")
        keys = [key for key in self.store.list(prefix) if key.endswith(".json")]
        return {key.removeprefix(prefix).removesuffix(".json"): key for key in keys}

    def record(self, cls: type, key: str, quiet: bool = False) -> Any:
        data = self.store.read(key)
        if data is None:
            return None
        try:
            return records.from_bytes(cls, data, key)
        except Damaged:
            if quiet:
                return None
            raise

    # Blobs.

    def write_blob(self, arrays: Arrays) -> str:
        data = blobs.to_bytes(arrays)
        self.bytes_written += len(data)
        sha256 = blobs.sha256(data)
        self.store.write(records.path_of_blob(sha256), data)
        return sha256

    def read_blob(self, sha256: str) -> dict[str, np.ndarray]:
        key, own = records.path_of_blob(sha256), sha256 == self._own[0]
        data = self._own[1] if own else self.store.read(key)
        if data is None:
            raise Damaged(f"{key}: is not there")
        self.bytes_read += 0 if own else len(data)
        try:
            return blobs.from_bytes(data, sha256)
        except blobs.BadBlob as e:
            raise Damaged(f"{key}: {e}") from e

    def delta(self, blob: Arrays, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
        wanted = {name: shapes[name] for name in names}
        return packing.unpack(without_prefix(blob, "delta/"), wanted, PACKING[self.rules.section.bits])

    # Outer states.

    def is_whole(self, round: int) -> bool:
        """Whether the record of a round names the whole outer state."""
        return round % self.rules.section.snapshot_rounds == 0 or round == self.rules.rounds

    def write_snapshot(self, state: Outer, routers: Arrays) -> str:
        params, momentum = prefixed("params/", state.params), prefixed("momentum/", state.momentum)
        return self.write_blob(params | momentum | prefixed("routers/", routers))

    def read_snapshot(self, commit: Commit) -> Held:
        found = self.read_blob(commit.snapshot)
        state = Outer(without_prefix(found, "params/"), without_prefix(found, "momentum/"))
        self.check(state, commit)
        return Held(commit, state, without_prefix(found, "routers/"))

    def check(self, state: Outer, commit: Commit) -> None:
        if outer.sha256(state.params) != commit.outer:
            raise Mismatch(
                f"round {commit.round}: outer parameters of another checksum than in the record of {commit.by}"
            )

    def step(self, state: Outer, deltas: Sequence[Arrays], coefficients: np.ndarray, names: Sequence[str]) -> Outer:
        """The outer step; a round that merged nothing changes nothing."""
        if not len(deltas):
            return state
        section = self.rules.section
        return outer.step(state, deltas, coefficients, names, section.learning_rate, section.momentum)

    def after(self, held: Held, commit: Commit) -> Held:
        """The outer state after a round, from that before and what its record names."""
        names, shapes = self.rules.names(commit.round), {t.name: t.shape for t in self.rules.tensors}
        deltas = [self.delta(self.read_blob(c.blob), self.rules.names(c.round), shapes) for c in commit.merged]
        coefficients = np.array(commit.coefficients, np.float32).reshape(len(deltas), len(names))
        state = self.step(held.outer, deltas, coefficients, names)
        self.check(state, commit)
        return Held(commit, state, self.read_blob(commit.routers))

    def clean(self, commit: Commit) -> None:
        """Deletes blobs of rounds that nobody needs any more to catch up."""
        keep = self.rules.section.keep_rounds
        if not keep or not commit.snapshot:
            return
        whole = commit.round - commit.round % self.rules.section.snapshot_rounds
        last = min(commit.round - keep, whole - self.rules.section.snapshot_rounds)
        if last <= 0:
            return
        # One blob may be of many rounds, as that of routers without a state.
        needed = {sha256 for round in range(last, commit.round + 1) for sha256 in _blobs_of(self.commit(round))}
        for round in range(max(last - 2 * self.rules.section.snapshot_rounds, 0), last):
            for sha256 in _blobs_of(self.commit(round)) - needed:
                self.store.delete(records.path_of_blob(sha256))


def _blobs_of(commit: Commit | None) -> set[str]:
    found = [c.blob for c in commit.merged] + [commit.snapshot, commit.routers] if commit else []
    return {sha256 for sha256 in found if sha256}


def prefixed(prefix: str, arrays: Arrays) -> dict[str, np.ndarray]:
    return {prefix + name: value for name, value in arrays.items()}


def without_prefix(arrays: Arrays, prefix: str) -> dict[str, np.ndarray]:
    """Those whose names begin with it."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
