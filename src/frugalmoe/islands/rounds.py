"""What an island does from its first round to its last: it trains, hands in, waits, takes, and goes on.

`Rounds.go` is a generator: it gives the seconds after which it wants to go on, so that a process sleeps and a virtual
clock turns forward. What it trains is behind `Local`; what it remembers over a restart is behind `Memory`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from frugalmoe.errors import UserError
from frugalmoe.islands import packing, streams
from frugalmoe.islands.directory import Mismatch
from frugalmoe.islands.island import Island, Work
from frugalmoe.islands.records import Commit, Contribution, Damaged
from frugalmoe.islands.store import StoreError
from frugalmoe.schema import FrozenDict

Arrays = Mapping[str, np.ndarray]
_MOST_NOT_FINITE = 3  # times in a row, after which the run ends


class Local(Protocol):
    """A model that an island trains by itself, at a step of the schedule."""

    step: int
    tokens_per_row: int
    not_finite: type[Exception]  # what `train` raises of a loss or a state that is not finite

    def rows_before(self, step: int) -> int:
        """The rows that an island reads in all steps of the schedule before one, if it makes them all."""

    def tensors(self) -> dict[str, np.ndarray]:
        """The parameters, as `tensors.flatten` names them."""

    def routers(self) -> dict[str, np.ndarray]:
        """The state of routers, as `routers.flatten` names it."""

    def put(self, params: Arrays, routers: Arrays, step: int, fresh_optimizer: bool = False) -> None:
        """Goes on from these parameters, which may be some of all, and from these states unless empty, at a step."""

    def begin(self, numbers: Sequence[int], first: int) -> None:
        """The rows that the steps from `first` on read."""

    def train(self, end: int, enough: Callable[[], bool]) -> Iterator[None]:
        """Makes steps up to `end`, or until there is enough, or somebody asks to stop."""

    def loads(self) -> Sequence[Sequence[int]]:
        """Of each MoE layer, the slots of tokens that named each expert since `begin`; empty where nobody counts."""
        return ()

    def stop_requested(self) -> bool: ...

    def save(self) -> None:
        """Begins to save the state, at its step."""


class Found(NamedTuple):
    """What an island handed in, or was about to, when it saved its state at the end of a round."""

    round: int
    step: int
    numbers: tuple[int, ...]  # of the rows that it read
    seconds: float
    leaving: bool
    loads: tuple[tuple[int, ...], ...] = ()  # of experts, as `Local.loads`


class Memory(Protocol):
    """What an island keeps in its own run directory, beside the checkpoint of a step."""

    def write(self, found: Found) -> None: ...

    def read(self, step: int) -> Found | None: ...

    def first(self) -> int | None:
        """The first round that is remembered."""

    def keep_residual(self, round: int, residual: Arrays) -> None: ...

    def residual(self, round: int) -> dict[str, np.ndarray]:
        """After the last round before this one in which something was handed in; empty where there is none."""


@dataclasses.dataclass
class Timing:
    """Where the time of a round went, in seconds, and what travelled."""

    trained: float = 0.0
    waited: float = 0.0  # in which it wrote, read and looked too
    bytes_written: int = 0
    bytes_read: int = 0


Tell = Callable[[str, str], None]  # (kind, what): an event
Row = Callable[[Mapping[str, Any]], None]  # what is logged of a round


class Rounds:
    """One island's way through the rounds of a directory."""

    def __init__(
        self,
        island: Island,
        local: Local,
        memory: Memory,
        *,
        tell: Tell,
        row: Row,
        about: Mapping[str, Any] = FrozenDict(),
        pause: float,
    ) -> None:
        """tell: hears of events; row: logs a round; about: what the island says of itself; pause: seconds between two
        looks at the directory.
        """
        self.island, self.local, self.memory, self.tell, self.row, self.about = island, local, memory, tell, row, about
        self.rules, self.section, self.clock, self.pause = island.rules, island.rules.section, island.clock, pause
        self.pending: Contribution | None = None
        self.stopped = False
        self.status, self.speed = "joining", 0.0
        self.leased: tuple[int, ...] = ()
        self.counters: tuple[int, ...] = ()
        self.plan: list[int] = []  # rows of the round that is trained
        self.timing = self._handed_in = Timing()  # of the round that is trained, and of the one before
        self._began = self._last_beat = self.touched = island.clock()  # touched: something moved
        self._broken = 0  # times in a row that something was not finite

    # The way.

    def go(self) -> Iterator[float]:
        """Goes through all rounds; ends after the last one, or when a stop was requested (`stopped`)."""
        try:
            yield from self._all()
        except StoreError:
            if not self.local.stop_requested():
                raise
            self.stopped = True  # what was found is saved, and handed in when the island goes on

    def _all(self) -> Iterator[float]:
        yield from self._join()
        while not self.stopped and self.round <= self.rules.rounds:
            yield from self._round()
        while not self.stopped and self.pending is not None:
            yield from self._result()
        if not self.stopped:
            held = self.island.held
            self.local.put(held.outer.params, held.routers, self.rules.steps)
            yield from self._safely(lambda: self._show("complete"))

    @property
    def round(self) -> int:
        """The round that is trained, or would be next."""
        return self.island.held.round + (2 if self.pending is not None else 1)

    def begin_of(self, round: int) -> int:
        """The step of the schedule at which a round begins; the last one ends with the schedule."""
        return min((round - 1) * self.section.round_steps, self.rules.steps)

    def _round(self) -> Iterator[float]:
        """Trains a round and hands in what was found; before, or after a few steps, takes what the last one gave."""
        if not self.plan and (self.pending is None or self.section.overlap_steps):
            self._begin(self.round)
        if self.pending is not None:
            if self.section.overlap_steps:
                yield from self._ahead()
            if self.pending is not None and not self.stopped:
                yield from self._result()
            if self.round <= self.rules.rounds and not (self.plan or self.stopped):
                self._begin(self.round)
        round = self.round
        if round <= self.rules.rounds and not self.stopped:
            yield from self._train(round, self.section.round_steps)
            yield from self._hand_in(round)
        if self.stopped:
            yield from self._safely(lambda: self._show("left"))

    def _ahead(self) -> Iterator[float]:
        """Trains while the last round is decided. In rounds of time nobody waits: once the steps of the overlap are
        made, more of them follow until the record is there, and the time of the round counts from then on, so that
        islands end their rounds at about one time however far ahead one of them was.
        """
        yield from self._train(self.round, self.section.overlap_steps)
        if self.section.round_seconds and self.pending is not None and not self.stopped:
            yield from self._train(self.round, self.section.round_steps - 1, self._decided())

    def _decided(self) -> Callable[[], bool]:
        """What looks from time to time whether there is the record of the round whose contribution is pending."""
        looked = self.clock()

        def decided() -> bool:
            nonlocal looked
            if self.clock() - looked < self.pause:
                return False
            with self._waiting(self._handed_in), contextlib.suppress(StoreError):  # `_result` tells of that
                if self.island.poll(self.pending.round) is not None:
                    return True
            looked = self.clock()
            return False

        return decided

    @contextlib.contextmanager
    def _waiting(self, timing: Timing) -> Iterator[None]:
        """Counts the seconds and bytes of what is done meanwhile."""
        began, written, read = self.clock(), self.island.bytes_written, self.island.bytes_read
        yield
        timing.waited += self.clock() - began
        timing.bytes_written += self.island.bytes_written - written
        timing.bytes_read += self.island.bytes_read - read

    def _begin(self, round: int) -> None:
        first = self.begin_of(round)
        self.plan = streams.read(self.leased, self.counters, self._rows(first, self._end_of(round)))
        self._began, self.timing = self.clock(), Timing()
        self.local.begin(self.plan, first)
        if self.local.step != first:
            self.local.put({}, {}, first)

    def _end_of(self, round: int, steps: int | None = None) -> int:
        return min(self.begin_of(round) + (steps or self.section.round_steps), self.rules.steps)

    def _rows(self, first: int, end: int) -> int:
        """The rows of the steps from one of the schedule up to another."""
        return self.local.rows_before(end) - self.local.rows_before(first)

    def _train(self, round: int, steps: int, until: Callable[[], bool] | None = None) -> Iterator[float]:
        """Trains up to so many steps of a round, or until its time is over; given `until`, only until that holds."""
        limit, began, first = self.section.round_seconds, self.clock(), self.local.step
        waited = self._handed_in.waited
        over = lambda: self.clock() - self._began >= limit and self.local.step > self.begin_of(round)

        def enough() -> bool:
            self.touched = self.clock()
            return until() if until else bool(limit) and over()

        self.status = "training"
        try:
            for _ in self.local.train(self._end_of(round, steps), enough):
                yield from self._beat()
                yield 0.0
        except self.local.not_finite as error:
            yield from self._recover(str(error))
            return
        self.stopped = self.stopped or self.local.stop_requested()
        spent = self.clock() - began - (self._handed_in.waited - waited)
        self.timing.trained += spent
        if spent > 0 and self.local.step > first:
            self.speed = self._rows(first, self.local.step) * self.local.tokens_per_row / spent

    def _recover(self, why: str) -> Iterator[float]:
        """Takes the outer state where this island's own is not finite."""
        self._broken += 1
        if self._broken > _MOST_NOT_FINITE:
            raise UserError(f"islands: {why}, {self._broken} times in a row from the outer state")
        self.tell("not_finite", f"{why}; the outer state of round {self.island.held.round} is taken again")
        if self.pending is not None:
            yield from self._result()
        if not self.stopped and self.round <= self.rules.rounds:
            self._restart(fresh_optimizer=True)

    # Handing in and taking.

    def _hand_in(self, round: int) -> Iterator[float]:
        """Saves the state and hands in what was found since the round began."""
        first = self.begin_of(round)
        if self.local.step <= first:
            return
        numbers = tuple(self.plan[: self._rows(first, self.local.step)])
        loads = tuple(map(tuple, self.local.loads()))
        found = Found(round, self.local.step, numbers, self.timing.trained, self.stopped, loads)
        try:
            with self._waiting(self.timing):
                self.memory.write(found)
                self.local.save()
            yield from self._contribute(found)
        except (self.local.not_finite, packing.NotFinite) as error:
            yield from self._recover(str(error))

    def _contribute(self, found: Found) -> Iterator[float]:
        steps, count = found.step - self.begin_of(found.round), len(found.numbers)
        work = Work(found.numbers, count * self.local.tokens_per_row, steps, found.seconds, found.leaving, found.loads)
        self._handed_in = self.timing
        with self._waiting(self._handed_in):
            local, routers, before = self.local.tensors(), self.local.routers(), self.memory.residual(found.round)
            hand_in = lambda: self.island.contribute(local, routers, before, work)
            self.pending, residual = yield from self._safely(hand_in)
            self.memory.keep_residual(found.round, residual)
        self._broken = 0
        self.counters = streams.after(self.counters, streams.used(found.numbers, self.section.streams))
        self.plan = []

    def _result(self) -> Iterator[float]:
        """Waits for what the round of the pending contribution gives, and takes it."""
        self.status = "waiting"
        with self._waiting(self._handed_in):
            while (commit := (yield from self._safely(lambda: self.island.poll(self.pending.round)))) is None:
                if self.local.stop_requested():
                    self.stopped = True
                    yield from self._safely(lambda: self._show("left"))
                    return
                yield from self._beat()
                yield self.pause
            ahead = bool(self.plan)  # steps of the next round were made meanwhile
            mine = self._mine(commit)
            regular = yield from self._take(commit)
        self._log(commit, mine)
        self.pending = None
        if not mine:
            self.tell("left_out", f"round {commit.round}: {self._why(commit)}; the outer state is taken")
        late = not mine and self.island.name not in commit.left_out
        behind = (yield from self._advance()) or not regular
        lease = self.island.held.commit.members.get(self.island.name, ())
        if not lease:
            yield from self._become_member()
        elif behind or not mine or (ahead and lease != self.leased):
            self._restart(late=late)
        else:
            self._mix(commit.round)
            self.leased, self._began = lease, self.clock()
            if not ahead:
                self.counters, self.plan = commit.rows, []

    def _advance(self) -> Iterator[float]:
        """Takes the rounds that were decided without this island; returns how many. One that merged what it handed in
        before it was killed is trained again instead, from where it was: so its optimizer comes to the same state.
        """
        count = 0
        following = lambda: self.island.commit(self.island.held.round + 1)
        while (commit := (yield from self._safely(following))) is not None and not self._mine(commit):
            yield from self._take(commit)
            count += 1
        return count

    def _mine(self, commit: Commit) -> bool:
        """Whether a round merged this island's contribution."""
        own = self.island.name, self.island.run, commit.round
        return any((c.island, c.run, c.round) == own for c in commit.merged)

    def _why(self, commit: Commit) -> str:
        return commit.left_out.get(self.island.name, "it came too late")

    def _take(self, commit: Commit) -> Iterator[float]:
        """Takes a round's outer state; where that has another checksum than all others found, or a file of it is gone,
        the newest one of the directory. Returns whether it was the round's.
        """
        try:
            yield from self._safely(lambda: self.island.take(commit))
        except (Mismatch, Damaged) as error:
            self.tell("mismatch", f"{error}; the outer state is read again")
            yield from self._again()
            return False
        return True

    def _again(self) -> Iterator[float]:
        self.island.held = None
        try:
            yield from self._safely(self.island.catch_up)
        except (Mismatch, Damaged) as error:
            raise UserError(f"--islands={self.island.store.place}: {error}") from error

    def _mix(self, round: int) -> None:
        """Goes on with the outer tensors of the fragment that the round merged, and the state of all routers."""
        held, share = self.island.held, np.float32(self.section.overlap_mixing)
        names = self.rules.names(round)
        new = {name: held.outer.params[name] for name in names}
        if share:
            local = self.local.tensors()
            new = {name: share * local[name] + (np.float32(1) - share) * new[name] for name in names}
        step = self.local.step if self.plan else self.begin_of(round + 1)
        self.local.put(new, held.routers, step)

    def _restart(self, fresh_optimizer: bool = False, late: bool = False) -> None:
        """Begins the next round with all of the outer state."""
        held = self.island.held
        self.local.put(held.outer.params, held.routers, self.begin_of(held.round + 1), fresh_optimizer)
        self.leased = held.commit.members.get(self.island.name, ())
        # What came late may still be merged: its rows count as read.
        if not (late and self.section.late == "weigh"):
            self.counters = held.commit.rows
        self.plan = []
        if self.round <= self.rules.rounds:
            self._begin(self.round)

    # Joining.

    def _join(self) -> Iterator[float]:
        island = self.island
        while (taken := (yield from self._safely(island.name_is_taken))) is None:
            yield self.pause
        if taken:
            rule = "another run shows signs of life under this name; give another --island"
            raise UserError(f"--island={island.name}: {rule}")
        begin = lambda: island.begin(self.local.tensors, self.local.routers)
        yield from self._safely(lambda: self._show("joining"))
        while not (yield from self._safely(begin)):
            if self.local.stop_requested():
                self.stopped = True
                return
            yield self.pause
            yield from self._safely(lambda: self._show("joining"))
        found = self.memory.read(self.local.step)
        if found is not None and (yield from self._resume(found)):
            return
        # Killed before any state of it was on the disk, it trains its first round again.
        first = self.memory.first() if self.local.step == 0 else None
        yield from self._catch_up(None if first is None else first - 1)
        yield from self._become_member()

    def _catch_up(self, round: int | None) -> Iterator[float]:
        try:
            yield from self._safely(lambda: self.island.catch_up(round))
        except (Mismatch, Damaged) as error:
            self.tell("damaged", str(error))
            yield from self._again()

    def _resume(self, found: Found) -> Iterator[float]:
        """Whether this island can go on where it saved its state: at the end of a round, before it took the result."""
        try:
            yield from self._safely(lambda: self.island.catch_up(found.round - 1))
        except (Mismatch, Damaged):
            self.island.held = None
            return False
        held = self.island.held
        self.leased, self.counters = held.commit.members.get(self.island.name, ()), held.commit.rows
        self.plan = list(found.numbers)
        yield from self._contribute(found)
        return True

    def _become_member(self) -> Iterator[float]:
        """Waits for streams to read, then begins with the outer state."""
        self.status, began = "joining", self.clock()
        while not self.island.is_member() and self.island.held.round < self.rules.rounds:
            if self.local.stop_requested():
                self.stopped = True
                yield from self._safely(lambda: self._show("left"))
                return
            commit = yield from self._safely(lambda: self.island.poll(self.island.held.round + 1))
            if commit is None:
                yield from self._safely(lambda: self._show("joining"))
                yield self.pause
            else:
                yield from self._take(commit)
        if self.island.is_member():
            self.tell("joined", f"after round {self.island.held.round}, {self.clock() - began:.1f} s after it asked")
        self._restart()

    # Small things.

    def _safely(self, operation: Callable[[], Any]) -> Iterator[float]:
        """Returns what an operation on the directory gives; where that cannot be reached, tries until it can."""
        told = False
        while True:
            try:
                return operation()
            except StoreError as error:
                if not told:
                    self.tell("store", str(error))
                    told = True
                if self.local.stop_requested():
                    raise
            yield 10 * self.pause

    def show_again(self) -> None:
        """Shows a sign of life; may be called from another thread."""
        self._last_beat = self.clock()
        self.island.announce(self.status, self.local.step, self.speed, self.about)

    def _show(self, status: str) -> None:
        self.status = status
        self.show_again()

    def _beat(self) -> Iterator[float]:
        """Shows a sign of life when the last one is some time ago."""
        self.touched = self.clock()
        if self.clock() - self._last_beat >= self.section.lapse_seconds / 6:
            yield from self._safely(lambda: self._show(self.status))

    def _log(self, commit: Commit, mine: bool) -> None:
        own = next((c for c in commit.merged if mine and c.island == self.island.name), self.pending)
        self.row(
            {
                "step": self.begin_of(commit.round + 1),
                "round": commit.round,
                "merged": mine,
                "islands": len(commit.merged),
                "tokens": own.tokens,
                "steps": own.steps,
                "tokens_of_all": commit.tokens,
                "outer_sha256": commit.outer,
                **{f"seconds/{name}": getattr(self._handed_in, name) for name in ("trained", "waited")},
                "bytes/written": self._handed_in.bytes_written,
                "bytes/read": self._handed_in.bytes_read,
                "loads": [(c.island, c.loads) for c in commit.merged if c.loads],
            }
        )
