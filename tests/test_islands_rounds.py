"""The protocol of islands under a virtual clock, on a model of two small vectors: random schedules, exact accounts."""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from party import TOKENS_PER_ROW, Party

from frugalmoe.errors import UserError
from frugalmoe.islands import merges, records, streams, tensors
from frugalmoe.islands.directory import Rules
from frugalmoe.islands.island import Island, Work
from frugalmoe.islands.store import open_store
from frugalmoe.islands.tensors import Tensor
from frugalmoe.islands.virtual import Member, VirtualLocal, turn
from frugalmoe.schema import Islands

SIZES = {"a": 5, "b": 3, "c": 4}
ROWS = 4  # of a step


class Vectors(VirtualLocal):
    """Rows pull the vectors in directions of their own, as a gradient does; momentum is the optimizer's state."""

    tokens_per_row, not_finite = 10, FloatingPointError

    def __init__(self, seconds: float) -> None:
        self.seconds_of = lambda step: seconds
        self.values = {name: np.zeros(size, np.float32) for name, size in SIZES.items()}
        self.momentum = {name: np.zeros(size, np.float32) for name, size in SIZES.items()}
        self.state, self.step = {"bias": np.zeros(2, np.float32)}, 0
        self.drift = 0.01
        self.save()

    def tensors(self) -> dict[str, np.ndarray]:
        return dict(self.values)

    def routers(self) -> dict[str, np.ndarray]:
        return dict(self.state)

    def put(self, params: Mapping, routers: Mapping, step: int, fresh_optimizer: bool = False) -> None:
        self.values, self.state, self.step = {**self.values, **params}, {**self.state, **routers}, step

    def rows_before(self, step: int) -> int:
        return ROWS * step

    def begin(self, numbers: Sequence[int], first: int) -> None:
        self._numbers = iter(numbers)

    def train(self, end: int, enough: Callable[[], bool]) -> Iterator[None]:
        while self.step < end and not enough() and not self.stopping:
            rows = [next(self._numbers) for _ in range(ROWS)]
            for name, size in SIZES.items():
                target = np.mean([np.sin(row + np.arange(size)) for row in rows], axis=0)
                gradient = np.float32(self.values[name] - target)
                self.momentum[name] = np.float32(0.9) * self.momentum[name] + gradient
                self.values = {**self.values, name: self.values[name] - np.float32(0.1) * self.momentum[name]}
            self.state = {"bias": self.state["bias"] + np.float32(self.drift)}
            self.member.now += self.seconds_of(self.step)
            self.step += 1
            yield

    def save(self) -> None:
        self._saved = self.values, dict(self.momentum), dict(self.state), self.step

    def restore(self) -> None:
        self.values, momentum, state, self.step = self._saved
        self.momentum, self.state, self.stopping = dict(momentum), dict(state), False


def mean(states: Sequence[Mapping], weights: Sequence[float]) -> dict:
    return {name: np.float32(np.average([s[name] for s in states], axis=0, weights=weights)) for name in states[0]}


def make_rules(steps: int = 24, **fields: object) -> Rules:
    section = Islands(**{"round_steps": 4, "streams": 12, "snapshot_rounds": 3, "keep_rounds": 0} | fields)
    described = tuple(Tensor(name, size, "matrix", name, (size,)) for name, size in SIZES.items())
    fragments = tensors.fragments(described, section.fragments)
    return Rules(
        section=section, steps=steps, tokens_per_row=10, tensors=described, fragments=fragments,
        merge=merges.get(section.merge), merge_routers=mean,
    )  # fmt: skip


NUMBER = iter(range(10**9))


def make_members(rules: Rules, seconds: Sequence[float], url: str = "") -> list[Member]:
    store = open_store(url or f"memory://law-{next(NUMBER)}")
    return [Member(f"i{n}", store, rules, Vectors(s)) for n, s in enumerate(seconds)]


def together(rules: Rules, seconds: Sequence[float]) -> list[Member]:
    """Islands that begin together."""
    rules = dataclasses.replace(rules, section=dataclasses.replace(rules.section, wait_for=len(seconds)))
    members = make_members(rules, seconds)
    for member in members:
        member.start(0.25)
    turn(members)
    expected = {"joined"} | ({"left_out"} if rules.section.quorum else set())
    assert {kind for member in members for kind, _ in member.events} <= expected
    return members


def commits(member: Member) -> list[records.Commit]:
    island = Island(member.store, "reader", "reader", member.rules, lambda: 0.0)
    found = []
    while (commit := island.commit(len(found))) is not None:
        found.append(commit)
    return found


def check_accounts(member: Member) -> list[records.Commit]:
    """No row is lost or read twice, tokens add up, and every outer state is that of its record."""
    found = commits(member)
    counters, tokens, seen = [0] * member.rules.section.streams, 0, set()
    for before, commit in itertools.pairwise(found):
        for c in commit.merged:
            count = 0
            for stream, (first, end) in c.rows.items():
                assert counters[int(stream)] == first < end
                assert int(stream) in before.members[c.island] or c.round < commit.round
                counters[int(stream)], count = end, count + end - first
            assert c.tokens == count * member.rules.tokens_per_row and (c.island, c.round) not in seen
            seen.add((c.island, c.round))
            tokens += c.tokens
        assert (list(commit.rows), commit.tokens) == (counters, tokens)
        leased = [stream for own in commit.members.values() for stream in own]
        assert sorted(leased) == list(range(member.rules.section.streams))
    fresh = Island(member.store, "replay", "replay", member.rules, lambda: 0.0)
    for commit in found:  # from the files alone, every checksum is found again
        fresh.held = None if commit.snapshot else fresh.held
        assert fresh.catch_up(commit.round).commit == commit
    return found


def test_one_island_that_takes_the_mean_with_rate_1_trains_as_if_alone() -> None:
    rules = make_rules(learning_rate=1.0, momentum=0.0)
    (member,) = together(rules, [1.0])
    alone = Vectors(1.0)
    alone.member = member
    alone.begin(streams.read(range(12), [0] * 12, 24 * ROWS), 0)
    list(alone.train(24, lambda: False))
    for name in SIZES:
        np.testing.assert_allclose(member.local.values[name], alone.values[name], atol=1e-6)
    assert len(check_accounts(member)) == 7


def test_islands_end_with_the_same_bits_whatever_their_speed() -> None:
    members = together(make_rules(), [1.0, 2.5, 4.0])
    assert {m.rows[-1]["outer_sha256"] for m in members} == {check_accounts(members[0])[-1].outer}
    for name in SIZES:
        assert len({m.local.values[name].tobytes() for m in members}) == 1
    # A round waits for the slowest: the fast island trains a quarter of the time.
    assert sum(r["seconds/trained"] for r in members[0].rows) == 24
    assert sum(r["seconds/waited"] for r in members[0].rows) >= 0.7 * members[0].now


def test_with_rounds_of_equal_time_no_island_waits() -> None:
    members = together(make_rules(round_steps=100, steps=600, round_seconds=16.0), [1.0, 2.0, 4.0, 8.0])
    for member, steps in zip(members, (16, 8, 4, 2)):
        assert [c.steps for c in commits(member)[1].merged][int(member.name[1])] == steps
        assert sum(r["seconds/trained"] for r in member.rows) / member.now > 0.95
    check_accounts(members[0])


def test_rounds_of_time_go_on_while_one_island_hands_in_slowly() -> None:
    """Each of three operations on files takes the slow one a second, 8 times as long as the fast one: with an overlap
    nobody waits for it, however many rounds there are, and all end their rounds together.
    """

    def shares(overlap: int) -> list[float]:
        fields = {"round_steps": 1000, "steps": 20_000, "round_seconds": 16.0, "overlap_steps": overlap, "wait_for": 2}
        members = make_members(make_rules(**fields), [0.25, 2.0])
        for member, seconds in zip(members, (0.125, 1.0)):
            member.start(0.25)
            member.rounds.island.store = Slow(member, seconds)
        turn(members)
        check_accounts(members[0])
        assert [row["islands"] for row in members[0].rows] == [2] * 20
        return [sum(row["seconds/trained"] for row in member.rows) / member.now for member in members]

    waiting, ahead = shares(0), shares(1)
    assert waiting[0] < 0.80 and ahead[0] > 0.95, (waiting, ahead)
    assert ahead[1] > waiting[1] - 0.02  # the slow one has as much to write and to read as before


class Slow:
    """A store in which what is written for a round takes an island a while."""

    def __init__(self, member: Member, seconds: float) -> None:
        self._member, self._seconds, self._store = member, seconds, member.store

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def write(self, key: str, data: bytes) -> None:
        self._member.now += self._seconds * key.startswith("blobs/")
        self._store.write(key, data)

    def create(self, key: str, data: bytes) -> bool:
        self._member.now += self._seconds * 2 * ("/from/" in key)
        return self._store.create(key, data)


def test_one_island_writes_the_whole_outer_state() -> None:
    """While it does, the others make no record; one of them does when that island shows no more signs of life."""
    for gone in (False, True):
        party = Party(
            f"memory://law-{next(NUMBER)}", "ab", Islands(streams=8, lapse_seconds=3.0, wait_for=2, snapshot_rounds=1)
        )
        for island in party.islands.values():
            numbers = list(island.held.commit.members[island.name])
            island.contribute(party.values(1), party.routers(), {}, Work(numbers, TOKENS_PER_ROW * 4, 2, 1.0))
        a, b = party.islands.values()
        party.announce("waiting")
        before = party.store.list("blobs/")
        assert a._makes(1) and a._makes(1) and not b._makes(1)
        for _ in range(3):
            assert b.poll(1) is None and party.store.list("blobs/") == before
            party.time += 1
            party.announce("waiting", *("b" if gone else "ab"))
        assert (commit := b.poll(1) if gone else a.poll(1)) is not None
        assert commit.by == ("b" if gone else "a") and [c.island for c in commit.merged] == ["a", "b"]
        assert b.take(commit).commit == a.take(commit).commit == commit


WAYS = [
    {"overlap_steps": 2},
    {"overlap_steps": 3, "overlap_mixing": 0.5, "fragments": 3},
    {"fragments": 2},
    {"bits": 8},
    {"bits": 4, "fragments": 3, "overlap_steps": 1},
]


@pytest.mark.parametrize("fields", WAYS)
def test_fragments_overlap_and_few_bits_keep_the_accounts(fields: dict) -> None:
    members = together(make_rules(steps=36, **fields), [1.0, 1.5])
    found = check_accounts(members[0])
    assert len(found) == 10 and all(len(commit.merged) == 2 for commit in found[1:])
    for name in SIZES:
        assert members[0].local.values[name].tobytes() == members[1].local.values[name].tobytes()


def test_overlap_hides_waiting_for_who_is_slower_now_and_then() -> None:
    """Two islands take turns at a slow round, of 8 seconds beside 4: the fast one waits for 4 of each 8, and for less
    where it may make two steps of the next round meanwhile.
    """

    def waited(overlap: int) -> float:
        rules = make_rules(steps=40, wait_for=2, overlap_steps=overlap)
        members = make_members(rules, [1.0, 1.0])
        for number, member in enumerate(members):
            local = member.local
            local.seconds_of = lambda step, n=number: 2.0 if (step // 4 + n) % 2 else 1.0
            member.start(0.25)
        turn(members)
        check_accounts(members[0])
        return sum(row["seconds/waited"] for member in members for row in member.rows)

    assert waited(0) == pytest.approx(10 * 4.0, abs=3)
    assert waited(2) < 0.7 * waited(0)


def test_old_rounds_are_cleaned_away_and_who_comes_late_still_finds_the_way() -> None:
    """The state of routers stays the same here, so that one blob is of all rounds."""
    rules = make_rules(steps=160, wait_for=2, keep_rounds=2, snapshot_rounds=3)
    members = make_members(rules, [1.0, 1.0, 1.0])
    for member in members:
        member.local.drift = 0.0
    for member in members[:2]:
        member.start(0.25)
    turn(members, lambda: members[0].now > 100)
    members[2].now = members[0].now
    members[2].start(0.25)
    turn(members)
    assert all(member.rounds.status == "complete" for member in members) and len(members[2].rows) > 5
    assert {kind for member in members for kind, _ in member.events} == {"joined"}
    kept = [key for key in members[0].store.list("blobs/")]
    assert len(kept) < 40 < len(members[0].store.list("rounds/"))  # of 40 rounds


def test_what_is_not_finite_is_not_handed_in_but_trained_again() -> None:
    """As where a bit of the memory flips after the last step; three times in a row, and the island gives up."""
    for times in (1, 4):
        members = make_members(make_rules(wait_for=2), [1.0, 1.0])
        local, left = members[0].local, [times]

        def tensors_of(local: Vectors = local, left: list[int] = left) -> dict[str, np.ndarray]:
            left[0] -= local.step == 12
            return {
                k: np.full_like(v, np.nan) if local.step == 12 and left[0] >= 0 else v for k, v in local.values.items()
            }

        local.tensors = tensors_of
        for member in members:
            member.start(0.25)
        if times > 3:
            with pytest.raises(UserError, match="tensor 'a': holds a value that is not finite, 4 times in a row"):
                turn(members)
            continue
        turn(members)
        assert [kind for kind, _ in members[0].events] == ["joined", "not_finite"]
        assert all(len(commit.merged) == 2 for commit in check_accounts(members[0])[1:])


def test_what_comes_late_is_weighed_down_or_dropped() -> None:
    for late in ("drop", "weigh"):
        members = together(make_rules(steps=40, quorum=2, late=late), [1.0, 1.0, 2.6])
        found = check_accounts(members[0])
        late_ones = [c for commit in found[1:] for c in commit.merged if c.round < commit.round]
        assert bool(late_ones) == (late == "weigh")


def disturbed(seed: int, fields: dict, kinds: Sequence[str]) -> list[Member]:
    """Random kills, starts, leaves, freezes and joins while four islands train; in the end all that live go on."""
    chance = random.Random(seed)
    rules = make_rules(steps=60, **fields)
    members = make_members(rules, [chance.choice([1.0, 1.3, 2.0, 3.7]) for _ in range(4)])
    started = members[: chance.randint(1, 3)]
    for member in started:
        member.start(0.25)
    events = 25
    while events and any(member.alive for member in members):
        steps = chance.randint(1, 60)
        count = iter(range(steps))
        turn(members, lambda count=count: next(count, None) is None)
        member, kind = chance.choice(members), chance.choice(kinds)
        now = max(m.now for m in members)
        if kind == "kill":
            member.kill()
        elif kind == "leave" and member.alive:
            member.local.stopping = True
        elif kind == "freeze" and member.alive:
            member.now += chance.choice([5.0, 80.0])
        elif kind == "start" and not member.alive:
            member.now = max(member.now, now)
            member.start(0.25)
        events -= 1
    while unfinished := [m for m in members if m.rounds is None or m.rounds.status != "complete"]:
        for member in unfinished:
            if not member.alive:
                member.now = max(m.now for m in members)
                member.start(0.25)
        turn(members)
    return members


MODES = [
    {},
    {"round_seconds": 6.0, "round_steps": 10},
    {"quorum": 2, "grace_seconds": 1.0},
    {"quorum": 1, "late": "weigh"},
    {"overlap_steps": 2, "fragments": 2, "overlap_mixing": 0.25},
    {"bits": 8, "merge": "tokens"},
]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(MODES))
def test_no_row_is_lost_or_read_twice_whoever_joins_leaves_or_dies(seed: int, fields: dict) -> None:
    kinds = ("kill", "kill", "leave", "freeze", "start", "start", "start")
    members = disturbed(seed, {"lapse_seconds": 20.0, **fields}, kinds)
    found = check_accounts(members[0])
    assert len(found) == members[0].rules.rounds + 1
    for name in SIZES:
        assert len({m.local.values[name].tobytes() for m in members}) == 1


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([{}, {"overlap_steps": 2, "fragments": 2}, {"bits": 4}]))
def test_killed_and_started_again_they_end_bit_for_bit_as_undisturbed(seed: int, fields: dict) -> None:
    """Where nobody is given up, kills at any moment change nothing."""
    chance, fields = random.Random(seed), {"lapse_seconds": math.inf, "wait_for": 3} | fields
    rules, speeds = make_rules(steps=30, **fields), [1.0, 1.4, 2.0]
    calm, members = together(rules, speeds), make_members(rules, speeds)
    for member in members:
        member.start(0.25)
    for _ in range(20):
        count = iter(range(chance.randint(1, 25)))
        turn(members, lambda count=count: next(count, None) is None)
        member = chance.choice(members)
        if member.alive:
            member.kill()
            member.start(0.25)
    turn(members)
    assert [c.outer for c in check_accounts(members[0])] == [c.outer for c in commits(calm[0])]


def test_leases_move_as_little_as_they_can() -> None:
    first = streams.lease(["a", "b"], {}, 7)
    assert {name: len(own) for name, own in first.items()} == {"a": 4, "b": 3}
    second = streams.lease(["a", "b", "c"], first, 7)
    assert all(set(second[name]) <= set(first[name]) for name in "ab") and len(second["c"]) == 2
    third = streams.lease(["b", "c"], second, 7)
    assert all(set(second[name]) <= set(third[name]) for name in "bc") and sorted(map(len, third.values())) == [3, 4]
    assert streams.lease(list("abc"), {}, 2) == {"a": (0,), "b": (1,), "c": ()}
