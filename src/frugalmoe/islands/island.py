"""The protocol of one island: how it joins, hands in what it found, and takes what a round gave.

Nothing here trains, waits or looks at the time of day: `poll` looks at the directory once, and elapsed time is that of
the clock that the island is given. So the same code runs in a process of its own and, with others, under one virtual
clock (`virtual.py`).

A round goes so. Each member trains on its own rows, writes a blob and then its contribution, and polls. Whoever finds
that all have contributed who still show signs of life (or that there are enough: see `schema.Islands`) asks the merge
rule, forms the outer step, and creates the commit record; the first one makes the round. All others read it and form
the same outer step, whose checksum it holds. Letters: M contributions, Q tensors.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from frugalmoe.islands import agreements, blobs, outer, packing, records, streams
from frugalmoe.islands.deciding import propose
from frugalmoe.islands.directory import PACKING, Arrays, Directory, Held, Rules, prefixed
from frugalmoe.islands.outer import Outer
from frugalmoe.islands.records import Agreement, Commit, Contribution, Damaged, Maker, Presence
from frugalmoe.islands.store import Store
from frugalmoe.islands.watch import Watch
from frugalmoe.schema import FrozenDict


class Work(NamedTuple):
    """What an island did in a round."""

    numbers: Sequence[int]  # of the rows that it read since the counters of the round began
    tokens: int
    steps: int  # updates
    seconds: float  # that it trained
    leaving: bool = False  # it returns its streams
    loads: tuple[tuple[int, ...], ...] = ()  # of each MoE layer: the slots of tokens that named each expert


class Island(Directory):
    """One island of a directory, under a name that is its own."""

    def __init__(self, store: Store, name: str, run: str, rules: Rules, clock: Callable[[], float]) -> None:
        super().__init__(store, rules)
        self.name, self.run, self.clock = name, run, clock
        self.held: Held | None = None
        self._presence: Presence | None = None
        self._announcing = threading.Lock()
        self._watch = Watch(clock, rules.section.lapse_seconds)
        self._enough_since: tuple[int, float] | None = None  # round, time
        self._next: Held | None = None  # what this island would commit

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
            routers=self.write_blob(state), snapshot=self.write_snapshot(first, state), rows=(0,) * count,
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
            commit = self.known_commit(number)
            if commit.snapshot and (self.held is None or number > self.held.round or self.held.round > last):
                found = self.read_snapshot(commit)
                break
            wanted.append(commit)
        if found is None:
            raise Damaged(f"{self.store.place}: no whole outer state before round {last}")
        for commit in reversed(wanted):
            found = self.after(found, commit)
        self.held = found
        return found

    def _announced(self) -> list[str]:
        """The names of islands that want to join, all of which are looked at."""
        names = []
        for key in self.store.list("islands/"):
            there = self.record(Presence, key, quiet=True)
            if there is not None and key == records.path_of_presence(there.island):
                self._watch.look(there.island, (there.run, there.beat))
                names += [there.island] if there.status == "joining" else []
        return names

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
        packed, left = packing.pack(delta, PACKING[self.rules.section.bits], residual)
        data = blobs.to_bytes(prefixed("delta/", packed) | prefixed("routers/", routers))
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
            made = self.record(Contribution, key) or made
        return made, left

    def poll(self, round: int) -> Commit | None:
        """Returns the record of the round after the one held; makes it where it is due; None while it is not."""
        assert self.held is not None and round == self.held.round + 1
        commit = self.commit(round)
        if commit is None and self._is_due(round) and self._makes(round):
            self._next = propose(self, self.held, self.name, self._next_members)
            self.store.create(records.path_of_commit(round), records.to_bytes(self._next.commit))
            commit = self.commit(round)
            if commit is not None and commit.by == self.name:
                self.clean(commit)
        return commit

    def take(self, commit: Commit) -> Held:
        """Returns the outer state after the round that follows the one held."""
        assert self.held is not None and commit.round == self.held.round + 1
        mine, self._next = self._next, None
        same = mine is not None and _gives(mine.commit) == _gives(commit)
        self.held = mine._replace(commit=commit) if same else self.after(self.held, commit)
        return self.held

    # How a round is decided.

    def _is_due(self, round: int) -> bool:
        """Whether all have contributed that are alive, or enough have."""
        missing = self.held.commit.members.keys() - self.handed_in(round).keys()
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
        if not self.is_whole(round) or self.store.create(key, records.to_bytes(Maker(island=self.name, run=self.run))):
            return True
        maker = self.record(Maker, key, quiet=True)
        if maker is None or maker.island == self.name or self._is_gone(maker.island):
            return True
        there = self.presence(maker.island)
        return there is not None and there.run != maker.run

    def _is_gone(self, name: str) -> bool:
        """Whether an island will not contribute: it says so, or shows no signs of life."""
        if name == self.name:
            return not self.is_member()
        there = self.presence(name)
        if there is not None and there.status in ("left", "complete"):
            return True
        self._watch.look(name, (there.run, there.beat) if there else None)
        return self._watch.lapsed(name)

    def _next_members(self) -> dict[str, tuple[int, ...]]:
        """Who reads which streams next: those that are still there, and those that want to join."""
        before, handed_in = self.held.commit.members, self.handed_in(self.held.round + 1)
        leaving = {
            name
            for name in handed_in
            if (found := self.record(Contribution, handed_in[name], quiet=True)) and found.leaving
        }
        stay = [name for name in before if (name in handed_in or not self._is_gone(name)) and name not in leaving]
        new = [name for name in self._announced() if name == self.name or self._watch.moves(name)]
        names = {*stay, *(name for name in new if name not in before)} or set(before) & handed_in.keys() or {self.name}
        return streams.lease(names, before, self.rules.section.streams)


def _gives(commit: Commit) -> tuple[Any, ...]:
    """What the outer state after a round follows from."""
    return commit.merged, commit.coefficients, commit.outer, commit.routers
