"""All islands of a run in one process, under a virtual clock: for studies, and for laws over random schedules.

The protocol is the one of real processes, `island.Island` and `rounds.Rounds`; only time is made up. Each island has a
clock of its own, which a step moves on by the seconds that the island takes for one, and whoever is earliest goes next.
"""

import dataclasses
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from frugalmoe.data import ramp
from frugalmoe.errors import UserError
from frugalmoe.fields import to_dict
from frugalmoe.islands import agreements
from frugalmoe.islands.directory import Rules
from frugalmoe.islands.island import Island
from frugalmoe.islands.rounds import Found, Local, Rounds
from frugalmoe.islands.store import Store, open_store
from frugalmoe.islands.training import OfState, advice, rules_of
from frugalmoe.schema import Config
from frugalmoe.train import distributed
from frugalmoe.train.placing import micro_batch, put_rows
from frugalmoe.train.program import compiled_train_step, of_micro_batches
from frugalmoe.train.run import Run
from frugalmoe.train.step import State, init


class Held:
    """`rounds.Memory` of an island that lives in this process, and outlives its `Rounds`."""

    def __init__(self) -> None:
        self._found: dict[int, Found] = {}
        self._residuals: dict[int, dict[str, np.ndarray]] = {}

    def write(self, found: Found) -> None:
        self._found[found.step] = found

    def read(self, step: int) -> Found | None:
        return self._found.get(step)

    def first(self) -> int | None:
        return min((found.round for found in self._found.values()), default=None)

    def keep_residual(self, round: int, residual: Mapping[str, np.ndarray]) -> None:
        self._residuals[round] = dict(residual)

    def residual(self, round: int) -> dict[str, np.ndarray]:
        before = [kept for kept in self._residuals if kept < round]
        return self._residuals[max(before)] if before else {}


class Member:
    """One island under the virtual clock. It can be killed and started again: `memory` and what `local` saved stay."""

    def __init__(self, name: str, store: Store, rules: Rules, local: "VirtualLocal", now: float = 0.0) -> None:
        self.name, self.store, self.rules, self.local, self.now = name, store, rules, local, now
        self.memory, self.run = Held(), f"run-{name}"
        self.events: list[tuple[str, str]] = []
        self.rows: list[Mapping[str, Any]] = []
        self.rounds: Rounds | None = None
        self._way: Iterator[float] | None = None
        local.member = self

    @property
    def alive(self) -> bool:
        return self._way is not None

    def start(self, pause: float) -> None:
        """Starts, or starts again from what was saved."""
        self.local.restore()
        island = Island(self.store, self.name, self.run, self.rules, lambda: self.now)
        tell = lambda kind, what: self.events.append((kind, what))
        self.rounds = Rounds(island, self.local, self.memory, tell=tell, row=self.rows.append, pause=pause)
        self._way = self.rounds.go()

    def kill(self) -> None:
        self._way = None

    def go_on(self) -> None:
        """Goes to the next place where it waits, or makes one step."""
        assert self._way is not None
        try:
            pause = next(self._way)  # a step moves the clock on meanwhile
            self.now += pause
        except StopIteration:
            self._way = None


class VirtualLocal(Local):
    """What all locals of virtual islands have: the clock of their member, and a request to stop."""

    member: Member
    stopping = False

    def restore(self) -> None:
        """Goes back to what was saved last, or to the beginning."""

    def stop_requested(self) -> bool:
        return self.stopping


def turn(members: Sequence[Member], until: Callable[[], bool] = lambda: False) -> None:
    """Turns the clock until all members that live have ended, or until there is enough."""
    while (living := [member for member in members if member.alive]) and not until():
        min(living, key=lambda member: (member.now, member.name)).go_on()


class StateLocal(VirtualLocal, OfState):
    """The model of a run's config, as one island among several of a process."""

    def __init__(
        self, run: Run, config: Config, seconds: float, shown: Callable[[int, Any], None] = lambda step, report: None
    ) -> None:
        self.run, self.config, self.seconds, self._shown = run, config, seconds, shown
        self.ramp, self.tokens_per_row = ramp.of(to_dict(config.train)), config.data.sequence_length
        self._state = _copy(run.state) if run.start == 0 else init(run.config)
        self._saved = _copy(self.state)

    @property
    def step(self) -> int:
        return int(self.state.step)

    @property
    def state(self) -> State:
        return self._state

    def go_on(self, state: State) -> None:
        self._state = state

    def begin(self, numbers: Sequence[int], first: int) -> None:
        config = self.config
        self._batches = (self.run.data.rows(rows) for rows in self.ramp.cut(first, numbers))
        self._counts_LE = np.zeros((len(self.run.trained_layers), config.model.moe.num_experts), np.int64)

    def train(self, end: int, enough: Callable[[], bool]) -> Iterator[None]:
        run = self.run
        while self.step < end and not enough() and not self.stopping:
            batch = next(self._batches)
            cut = type(batch)(*(x.reshape(-1, micro_batch(self.config), *x.shape[1:]) for x in batch))
            step = compiled_train_step(of_micro_batches(self.config, len(cut.tokens_BT)))
            self._state, report = step(self.state, put_rows(run.mesh, cut, "ABT", self.config), run.knobs)
            report = jax.device_get(report)
            run.check(self.step, report)
            self._shown(self.step, report)
            self._counts_LE = self._counts_LE + (0 if report.counts_LE is None else report.counts_LE)
            self.member.now += self.seconds
            yield

    def loads(self) -> Sequence[Sequence[int]]:
        return self._counts_LE.tolist()

    def save(self) -> None:
        self._saved = _copy(self.state)

    def restore(self) -> None:
        self._state = _copy(self._saved)


def _copy(state: State) -> State:
    return jax.tree.map(jnp.copy, state)  # a step writes over the state that it is given


def of_island(config: Config) -> Config:
    """Returns the config of one virtual island: its share of each batch."""
    train, count = config.train, config.islands.virtual
    shares = {"batch_size": train.batch_size // count, "ramp_from": train.ramp_from // count}
    return dataclasses.replace(config, train=dataclasses.replace(train, **shares))


def check(config: Config) -> None:
    """Raises `UserError` for a run that cannot be made of virtual islands."""
    rules_of(config)
    if jax.process_count() > 1:
        raise UserError(f"islands.virtual={config.islands.virtual}: all are in one process, and there are several")


def drive(runs: Sequence[Run], progress: Callable[[Config, int], Any], sample: Any = None) -> list[dict[str, Any]]:
    """Trains an opened run as `islands.virtual` islands under a virtual clock, in place of `train.loop.train_runs`.

    The islands share the batch of a step, so that a run reads as many tokens as one without islands, in as many steps.
    The run's parameters are the outer ones after the last round. Its log is that of the first island. Interrupted, it
    begins anew.
    """
    (run,) = runs
    began, config = time.perf_counter(), run.config
    store = open_store(f"memory://virtual-{secrets.token_hex(8)}")
    rules, seconds = _all_at_once(rules_of(config)), speeds(config)
    run.stop_where_not_finite()  # an island then takes the outer state
    with ExitStack() as held:
        shown = held.enter_context(progress(config, 0))
        run.show(shown)
        stop = held.enter_context(distributed.stop_requests())
        for note in advice(config):
            shown.say(note)

        def show(step: int, report: Any) -> None:
            spent = (time.perf_counter() - began) / max(step, 1)
            shown.update(step, float(report.metrics["loss/ce"]), float(report.tokens), spent)
            run.log(step, report, 0.0)

        locals = [StateLocal(run, of_island(config), s, *([show] if i == 0 else [])) for i, s in enumerate(seconds)]
        members = [Member(f"island-{i:02}", store, rules, local) for i, local in enumerate(locals)]
        agreement = agreements.of(config, run.data.fingerprint, run.data.tokenizer.fingerprint)
        Island(store, "first", "first", rules, lambda: 0.0).agree(agreement)
        for member in members:
            member.start(pause=min(seconds) / 4)
        with run.ledger.phase("step"):
            turn(members, lambda: stop(run.step))
        described = _described(members)
        for key in store.list(""):
            store.delete(key)
        if any(member.alive for member in members):
            run.ledger.write(0, ended="stopped")
            return [{"status": "stopped", "step": 0, "steps": config.train.steps}]
        run.state, run.step = locals[0].state, locals[0].step
        shown.say("evaluating on held-out documents")
        return [run.finish(False, time.perf_counter() - began, sample, {"islands": described})]


def _all_at_once(rules: Rules) -> Rules:
    """All islands are there in the first round."""
    section = rules.section
    return dataclasses.replace(rules, section=dataclasses.replace(section, wait_for=section.virtual))


def _described(members: Sequence[Member]) -> dict[str, Any]:
    """What a study wants to know of the rounds: virtual seconds, and what each island spent them on."""
    trained = [sum(row["seconds/trained"] for row in member.rows) for member in members]
    return {
        "count": len(members),
        "outer_sha256": members[0].rows[-1]["outer_sha256"] if members[0].rows else "",
        "tokens": members[0].rows[-1]["tokens_of_all"] if members[0].rows else 0,
        "seconds": max(member.now for member in members),
        "share_trained": [t / member.now if member.now else 0.0 for t, member in zip(trained, members)],
        "left_out": sum(not row["merged"] for member in members for row in member.rows),
        "bytes_written": sum(row["bytes/written"] for member in members for row in member.rows),
    }


def speeds(config: Config) -> list[float]:
    """Returns the virtual seconds of a step of each island."""
    given = [float(value) for value in config.islands.virtual_seconds.split(",") if value.strip()] or [1.0]
    return [given[i % len(given)] for i in range(config.islands.virtual)]
