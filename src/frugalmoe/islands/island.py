"""The protocol of one island: how it joins, hands in what it found, and takes what a round gave.

Nothing here trains, waits or looks at the time of day: `poll` looks at the directory once, and elapsed time is that of
the clock that the island is given. So the same code runs in a process of its own and, with others, under one virtual
clock (`virtual.py`).

A round goes so. Each member trains on its own rows, writes a blob and then its contribution, and polls. Whoever finds
that all have contributed who still show signs of life (or that there are enough: see `schema.Islands`) asks the merge
rule, forms the outer step, and creates the commit record; the first one makes the round. All others read it and form
the same outer step, whose checksum it holds. Letters: M contributions, Q tensors.
"""

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from frugalmoe.errors import UserError
from frugalmoe.islands import agreements, blobs, outer, packing, records, streams
from frugalmoe.islands.contract import Merge, Offered
from frugalmoe.islands.outer import Outer
from frugalmoe.islands.records import Agreement, Commit, Contribution, Damaged, Maker, Presence
from frugalmoe.islands.store import Store
from frugalmoe.islands.tensors import Tensor
from frugalmoe.islands.watch import Watch
from frugalmoe.schema import FrozenDict, Islands

Arrays = Mapping[str, np.ndarray]
MOST_ROWS = 1 << 20  # of a step
MOST_LATE = 4  # rounds after which a late contribution is not looked for any more
_PACKING = {bits: name for name, bits in packing.BITS.items()}


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


class Work(NamedTuple):
    """What an island did in a round."""

    numbers: Sequence[int]  # of the rows that it read since the counters of the round began
    tokens: int
    steps: int  # updates
    seconds: float  # that it trained
    leaving: bool = False  # it returns its streams
    loads: tuple[tuple[int, ...], ...] = ()  # of each MoE layer: the slots of tokens that named each expert


class _Offer(NamedTuple):
    label: str  # its island, with the round where it is late
    contribution: Contribution
    delta: Arrays
    routers: Arrays


class Island:
    """One island of a directory, under a name that is its own. Methods raise `store.StoreError` where the directory
    cannot be reached; calling them again is safe at any time.
    """

    def __init__(self, store: Store, name: str, run: str, rules: Rules, clock: Callable[[], float]) -> None:
        self.store, self.name, self.run, self.rules, self.clock = store, name, run, rules, clock
        self.held: Held | None = None
        self.bytes_read = self.bytes_written = 0
        self._presence: Presence | None = None
        self._announcing = threading.Lock()
        self._watch = Watch(clock, rules.section.lapse_seconds)
        self._enough_since: tuple[int, float] | None = None  # round, time
        self._next: Held | None = None  # what this island would commit
        self._own = "", b""  # its last contribution, which it need not read: sha256, blob

    # What it says of itself.

    def announce(self, status: str, step: int, speed: float, about: Mapping[str, Any]) -> None:
        """Writes a sign of life. A first one may find another island of this name: see `name_is_taken`."""
        fields = dict(status=status, step=step, tokens_per_second=speed, about=FrozenDict(about))
        with self._announcing:
            beat = self._presence.beat + 1 if self._presence else self._last_beat() + 1
            round = self.held.round if self.held else 0
            self._presence = Presence(island=self.name, run=self.run, beat=beat, round=round, **fields)
            self.store.write(records.path_of_presence(self.name), records.to_bytes(self._presence))

    def _last_beat(self) -> int:
        there = self.presence(self.name)
        return there.beat if there else 0

    def presence(self, name: str) -> Presence | None:
        """What an island says of itself; None for nothing, or something damaged."""
        return self._record(Presence, records.path_of_presence(name), quiet=True)

    def name_is_taken(self) -> bool | None:
        """Whether another run shows signs of life under this name; None while it is not known."""
        there = self.presence(self.name)
        if there is None or there.run == self.run or there.status not in records.LIVE:
            return False
        self._watch.look(self.name, (there.run, there.beat))
        return True if self._watch.moves(self.name) else False if self._watch.lapsed(self.name) else None

    # How it begins.

    def agree(self, agreement: Agreement) -> None:
        """Makes the directory's agreement, or raises `UserError` that names in what this island differs from it."""
        self.store.create(records.AGREEMENT, records.to_bytes(agreement))
        agreements.check(self.store, agreement)

    def begin(self, params: Callable[[], Arrays], routers: Callable[[], Arrays]) -> bool:
        """Whether the directory has begun. Makes its first record when as many islands are there as wanted."""
        if self.commit(0) is not None:
            return True
        names = [name for name in self._announced() if name == self.name or self._watch.moves(name)]
        if len(names) < self.rules.section.wait_for:
            return False
        first = Outer({name: np.asarray(value, np.float32) for name, value in params().items()}, {})
        state = {name: np.asarray(value, np.float32) for name, value in routers().items()}
        count = self.rules.section.streams
        commit = Commit(
            format=records.FORMAT, round=0, by=self.name, merged=(), coefficients=(), left_out=FrozenDict(),
            notes=FrozenDict(), history=FrozenDict(), outer=outer.sha256(first.params),
            routers=self._write_blob(state), snapshot=self._write_snapshot(first, state), rows=(0,) * count,
            members=FrozenDict(streams.lease(names, {}, count)), tokens=0, tokens_of=FrozenDict(),
        )  # fmt: skip
        self.store.create(records.path_of_commit(0), records.to_bytes(commit))
        return True

    def catch_up(self, round: int | None = None) -> Held:
        """Returns the outer state of the newest round, or of one that was asked for; rounds that it has not seen are
        computed from the newest whole state before.

        Raises `Mismatch` where that has not the checksum of its record, `Damaged` for files that are gone or changed.
        """
        last = self.newest() if round is None else round
        wanted, found = [], None
        for number in range(last, -1, -1):
            if self.held is not None and self.held.round == number:
                found = self.held
                break
            commit = self._known_commit(number)
            if commit.snapshot and (self.held is None or number > self.held.round or self.held.round > last):
                found = self._read_snapshot(commit)
                break
            wanted.append(commit)
        if found is None:
            raise Damaged(f"{self.store.place}: no whole outer state before round {last}")
        for commit in reversed(wanted):
            found = self._after(found, commit)
        self.held = found
        return found

    def newest(self) -> int:
        """The newest round that has a commit record."""
        known = self.held.round if self.held else 0
        if self.held is None:
            keys = [key for key in self.store.list("rounds/") if key.endswith("/commit.json")]
            known = max((records.round_of(key) or 0 for key in keys), default=0)
        while self.commit(known + 1) is not None:
            known += 1
        return known

    def is_member(self) -> bool:
        """Whether it has streams to read in the next round."""
        return bool(self.held and self.held.commit.members.get(self.name))

    # A round.

    def contribute(
        self, local: Arrays, routers: Arrays, residual: Arrays, work: "Work"
    ) -> tuple[Contribution, dict[str, np.ndarray]]:
        """Hands in what was found in the round after the one held; returns it, and the residual of its packing.

        local: parameters by name; routers: the state of routers; residual: of the contribution before. What was handed
        in before, by a process that was killed then, stays.
        """
        assert self.held is not None
        round, names, before = self.held.round + 1, self.rules.names(self.held.round + 1), self.held.outer.params
        delta = {name: before[name] - np.asarray(local[name], np.float32) for name in names}
        packed, left = packing.pack(delta, _PACKING[self.rules.section.bits], residual)
        data = blobs.to_bytes(_prefixed("delta/", packed) | _prefixed("routers/", routers))
        rows = FrozenDict(streams.used(work.numbers, self.rules.section.streams))
        did = {name: getattr(work, name) for name in ("tokens", "steps", "seconds", "leaving", "loads")}
        made = Contribution(
            island=self.name, run=self.run, round=round, base=self.held.commit.outer, blob=blobs.sha256(data),
            bytes=len(data), rows=rows, **did,
        )  # fmt: skip
        self.bytes_written += len(data)
        self.store.write(records.path_of_blob(made.blob), data)
        self._own = made.blob, data
        key = records.path_of_contribution(round, self.name)
        if not self.store.create(key, records.to_bytes(made)):
            made = self._record(Contribution, key) or made
        return made, left

    def poll(self, round: int) -> Commit | None:
        """Returns the record of the round after the one held; makes it where it is due; None while it is not."""
        assert self.held is not None and round == self.held.round + 1
        commit = self.commit(round)
        if commit is None and self._is_due(round) and self._makes(round):
            self._next = self._proposal(round)
            self.store.create(records.path_of_commit(round), records.to_bytes(self._next.commit))
            commit = self.commit(round)
            if commit is not None and commit.by == self.name:
                self._clean(commit)
        return commit

    def take(self, commit: Commit) -> Held:
        """Returns the outer state after the round that follows the one held."""
        assert self.held is not None and commit.round == self.held.round + 1
        mine, self._next = self._next, None
        same = mine is not None and _gives(mine.commit) == _gives(commit)
        self.held = mine._replace(commit=commit) if same else self._after(self.held, commit)
        return self.held

    # The directory.

    def commit(self, round: int) -> Commit | None:
        """The record of a round; None where there is none yet."""
        found = self._record(Commit, records.path_of_commit(round))
        if found is not None and (found.format, found.round) != (records.FORMAT, round):
            raise Damaged(f"{records.path_of_commit(round)}: of format {found.format}, round {found.round}")
        return found

    def _known_commit(self, round: int) -> Commit:
        found = self.commit(round)
        if found is None:
            raise Damaged(f"{self.store.place}: {records.path_of_commit(round)} is gone")
        return found

    def _record(self, cls: type, key: str, quiet: bool = False) -> Any:
        data = self.store.read(key)
        if data is None:
            return None
        try:
            return records.from_bytes(cls, data, key)
        except Damaged:
            if quiet:
                return None
            raise

    def _write_blob(self, arrays: Arrays) -> str:
        data = blobs.to_bytes(arrays)
        self.bytes_written += len(data)
        sha256 = blobs.sha256(data)
        self.store.write(records.path_of_blob(sha256), data)
        return sha256

    def _read_blob(self, sha256: str) -> dict[str, np.ndarray]:
        key, own = records.path_of_blob(sha256), sha256 == self._own[0]
        data = self._own[1] if own else self.store.read(key)
        if data is None:
            raise Damaged(f"{key}: is not there")
        self.bytes_read += 0 if own else len(data)
        try:
            return blobs.from_bytes(data, sha256)
        except blobs.BadBlob as e:
            raise Damaged(f"{key}: {e}") from e

    def _write_snapshot(self, state: Outer, routers: Arrays) -> str:
        params, momentum = _prefixed("params/", state.params), _prefixed("momentum/", state.momentum)
        return self._write_blob(params | momentum | _prefixed("routers/", routers))

    def _read_snapshot(self, commit: Commit) -> Held:
        found = self._read_blob(commit.snapshot)
        state = Outer(_of(found, "params/"), _of(found, "momentum/"))
        self._check(state, commit)
        return Held(commit, state, _of(found, "routers/"))

    def _check(self, state: Outer, commit: Commit) -> None:
        if outer.sha256(state.params) != commit.outer:
            raise Mismatch(
                f"round {commit.round}: outer parameters of another checksum than in the record of {commit.by}"
            )

    def _announced(self) -> list[str]:
        """The names of islands that want to join, all of which are looked at."""
        names = []
        for key in self.store.list("islands/"):
            there = self._record(Presence, key, quiet=True)
            if there is not None and key == records.path_of_presence(there.island):
                self._watch.look(there.island, (there.run, there.beat))
                names += [there.island] if there.status == "joining" else []
        return names

    # How a round is decided.

    def _is_due(self, round: int) -> bool:
        """Whether all have contributed that are alive, or enough have."""
        missing = self.held.commit.members.keys() - self._handed_in(round).keys()
        waited_for = [name for name in sorted(missing) if not self._is_gone(name)]
        if not waited_for:
            return True
        section, count = self.rules.section, len(self.held.commit.members) - len(missing)
        if not section.quorum or count < section.quorum:
            return False
        if self._enough_since is None or self._enough_since[0] != round:
            self._enough_since = round, self.clock()
        return self.clock() - self._enough_since[1] >= section.grace_seconds

    def _makes(self, round: int) -> bool:
        """Whether this island makes the record of a round. One with a whole outer state, which is much to write, is
        made by whoever says so first, and by others when that one is gone.
        """
        key = records.path_of_maker(round)
        if not self._is_whole(round) or self.store.create(key, records.to_bytes(Maker(island=self.name, run=self.run))):
            return True
        maker = self._record(Maker, key, quiet=True)
        if maker is None or maker.island == self.name or self._is_gone(maker.island):
            return True
        there = self.presence(maker.island)
        return there is not None and there.run != maker.run

    def _is_whole(self, round: int) -> bool:
        """Whether the record of a round names the whole outer state."""
        return round % self.rules.section.snapshot_rounds == 0 or round == self.rules.rounds

    def _is_gone(self, name: str) -> bool:
        """Whether an island will not contribute: it says so, or shows no signs of life."""
        if name == self.name:
            return not self.is_member()
        there = self.presence(name)
        if there is not None and there.status in ("left", "complete"):
            return True
        self._watch.look(name, (there.run, there.beat) if there else None)
        return self._watch.lapsed(name)

    def _handed_in(self, round: int) -> dict[str, str]:
        """Island -> key of what it handed in for a round."""
        prefix = records.path_of_contribution(round, "").removesuffix(".json")
        keys = [key for key in self.store.list(prefix) if key.endswith(".json")]
        return {key.removeprefix(prefix).removesuffix(".json"): key for key in keys}

    def _proposal(self, round: int) -> Held:
        """The outer state after a round, with the record that this island would make of it."""
        self._check(self.held.outer, self.held.commit)  # memory is not believed either
        before, names = self.held.commit, self.rules.names(round)
        offers, left_out = self._offers(round)
        deltas = [offer.delta for offer in offers]
        offered = Offered(
            tuple(offer.label for offer in offers),
            outer.gram(deltas, names),
            tuple(tensor for name in names for tensor in self.rules.tensors if tensor.name == name),
            *(np.array([getattr(o.contribution, field) for o in offers], np.int64) for field in ("tokens", "steps")),
            np.array([round - offer.contribution.round for offer in offers], np.int64),
        )
        merged = self.rules.merge.merge(offered, before.history, self.rules.section.merge_options)
        left_out |= merged.left_out
        chosen = [i for i, offer in enumerate(offers) if offer.label not in left_out]
        # A late contribution whose rows follow those of one that was left out would leave a hole.
        rows, kept = before.rows, []
        for i in chosen:
            if why := streams.why_not(offers[i].contribution.rows, rows, before.members[offers[i].contribution.island]):
                left_out[offers[i].label] = why
                continue
            rows = streams.after(rows, offers[i].contribution.rows)
            kept.append(i)
        coefficients = merged.coefficients_MQ[kept]
        found = [offers[i].contribution for i in kept]
        routers = self._merged_routers([offers[i].routers for i in kept], [c.tokens for c in found])
        state = self._step(self.held.outer, [deltas[i] for i in kept], coefficients, names)
        whole = self._is_whole(round)
        commit = Commit(
            format=records.FORMAT, round=round, by=self.name, merged=tuple(found),
            coefficients=tuple(tuple(map(float, row)) for row in coefficients), left_out=FrozenDict(left_out),
            notes=FrozenDict(merged.notes), history=FrozenDict(merged.history), outer=outer.sha256(state.params),
            routers=self._write_blob(routers), snapshot=self._write_snapshot(state, routers) if whole else "",
            rows=rows, members=FrozenDict(self._next_members(round)),
            tokens=before.tokens + sum(c.tokens for c in found), tokens_of=FrozenDict(_tokens(before, found)),
        )  # fmt: skip
        return Held(commit, state, routers)

    def _step(self, state: Outer, deltas: list[Arrays], coefficients: np.ndarray, names: Sequence[str]) -> Outer:
        """The outer step; a round that merged nothing changes nothing."""
        if not len(deltas):
            return state
        section = self.rules.section
        return outer.step(state, deltas, coefficients, names, section.learning_rate, section.momentum)

    def _merged_routers(self, states: list[Arrays], weights: list[int]) -> Arrays:
        return self.rules.merge_routers(states, weights) if states else self.held.routers

    def _after(self, held: Held, commit: Commit) -> Held:
        """The outer state after a round, from that before and what its record names."""
        names, shapes = self.rules.names(commit.round), {t.name: t.shape for t in self.rules.tensors}
        deltas = [self._delta(self._read_blob(c.blob), self.rules.names(c.round), shapes) for c in commit.merged]
        coefficients = np.array(commit.coefficients, np.float32).reshape(len(deltas), len(names))
        state = self._step(held.outer, deltas, coefficients, names)
        self._check(state, commit)
        return Held(commit, state, self._read_blob(commit.routers))

    def _delta(self, blob: Arrays, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
        wanted = {name: shapes[name] for name in names}
        return packing.unpack(_of(blob, "delta/"), wanted, _PACKING[self.rules.section.bits])

    def _offers(self, round: int) -> tuple[list[_Offer], dict[str, str]]:
        """What can be merged, sorted by island and round, and why the rest cannot."""
        rows, offers, left_out = self.held.commit.rows, [], {}
        for label, key in self._candidates(round):
            try:
                found = self._record(Contribution, key)
                offer = self._offer(label, found, round, key)
                why = streams.why_not(found.rows, rows, self.held.commit.members.get(found.island, ()))
            except (Damaged, UserError) as e:
                why = str(e)
            if why:
                left_out[label] = why[:300]
            else:
                rows = streams.after(rows, found.rows)
                offers.append(offer)
        return offers, left_out

    def _candidates(self, round: int) -> list[tuple[str, str]]:
        """(label, key) of the contributions to a round, and of late ones where they are wanted, in order."""
        found = [((name, round), name, key) for name, key in self._handed_in(round).items()]
        first = round - MOST_LATE if self.rules.section.late == "weigh" else round
        decided: set[str] = set()
        for late in range(max(first, 1), round):
            commit = self._known_commit(late)
            decided |= {f"{c.island}@{c.round}" for c in commit.merged}
            decided |= {label if "@" in label else f"{label}@{late}" for label in commit.left_out}
        for late in range(max(first, 1), round):
            rows = [((name, late), f"{name}@{late}", key) for name, key in self._handed_in(late).items()]
            found += [row for row in rows if row[1] not in decided]
        return [(label, key) for _, label, key in sorted(found)]

    def _offer(self, label: str, found: Contribution, round: int, key: str) -> _Offer:
        """A contribution with its arrays; raises `Damaged` or `UserError` for what cannot be merged."""
        late = records.round_of(key)
        if key != records.path_of_contribution(found.round, found.island) or found.round != late:
            raise Damaged(f"{key}: says that it is of round {found.round} and island {found.island}")
        base = self.held.commit if late == round else self._known_commit(late - 1)
        if why := self._unlikely(found):
            raise Damaged(why)
        if found.base != base.outer:
            raise Damaged(f"started from other outer parameters ({found.base[:12]}) than those of round {late - 1}")
        blob = self._read_blob(found.blob)
        shapes = {t.name: t.shape for t in self.rules.tensors}
        delta = self._delta(blob, self.rules.names(found.round), shapes)
        routers, known = _of(blob, "routers/"), self.held.routers
        if {k: v.shape for k, v in routers.items()} != {k: v.shape for k, v in known.items()}:
            raise Damaged("its state of routers has other arrays or shapes")
        if not all(v.dtype == np.float32 and np.isfinite(v).all() for v in routers.values()):
            raise Damaged("its state of routers is not finite, or no float32")
        return _Offer(label, found, delta, routers)

    def _unlikely(self, found: Contribution) -> str:
        """Says what of an island's work cannot be true; empty where it can."""
        count = sum(end - begin for begin, end in found.rows.values())
        if found.tokens != count * self.rules.tokens_per_row:
            return f"says {found.tokens} tokens of {count} rows, which have {self.rules.tokens_per_row} each"
        if not 0 < found.steps <= self.rules.section.round_steps or count > found.steps * MOST_ROWS:
            return f"says {count} rows in {found.steps} steps; a round has {self.rules.section.round_steps} at most"
        return ""

    def _next_members(self, round: int) -> dict[str, tuple[int, ...]]:
        """Who reads which streams next: those that are still there, and those that want to join."""
        before, handed_in = self.held.commit.members, self._handed_in(round)
        leaving = {
            name
            for name in handed_in
            if (found := self._record(Contribution, handed_in[name], quiet=True)) and found.leaving
        }
        stay = [name for name in before if (name in handed_in or not self._is_gone(name)) and name not in leaving]
        new = [name for name in self._announced() if name == self.name or self._watch.moves(name)]
        names = {*stay, *(name for name in new if name not in before)} or set(before) & handed_in.keys() or {self.name}
        return streams.lease(names, before, self.rules.section.streams)

    def _clean(self, commit: Commit) -> None:
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


def _gives(commit: Commit) -> tuple[Any, ...]:
    """What the outer state after a round follows from."""
    return commit.merged, commit.coefficients, commit.outer, commit.routers


def _tokens(before: Commit, found: Sequence[Contribution]) -> dict[str, int]:
    """Of each island, when these contributions are merged too."""
    tokens = dict(before.tokens_of)
    for contribution in found:
        tokens[contribution.island] = tokens.get(contribution.island, 0) + contribution.tokens
    return tokens


def _prefixed(prefix: str, arrays: Arrays) -> dict[str, np.ndarray]:
    return {prefix + name: value for name, value in arrays.items()}


def _of(arrays: Arrays, prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
