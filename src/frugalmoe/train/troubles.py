"""The host's part of `train.guard`: which batch is the next, what is kept, and the way back to a checkpoint.

`Run` is `run.Run`, which makes the steps.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from frugalmoe import sharding
from frugalmoe.train import checkpoint, distributed, guard, rollbacks, saved
from frugalmoe.train.guard import NotFinite
from frugalmoe.train.objective import StepReport
from frugalmoe.train.step import State, abstract


class Tried(NamedTuple):
    """The batch of a step."""

    position: int
    again: bool  # for the second time


class Queue:
    """Which batch is the next: that at the next position of the data, or one that was skipped and comes again."""

    def __init__(self, state: State, retry_after: int):
        self.position, self._retry_after = int(state.position), retry_after
        waiting = np.asarray(jax.device_get(state.guard.waiting))
        self.waiting = [int(position) for position in waiting if position != guard.EMPTY]
        self.tried = Tried(self.position, again=False)

    def next(self) -> Tried:
        """Returns the next batch, `tried` from here on. Those that wait come when `retry_after` batches were well."""
        if self.waiting and self.waiting[-1] + self._retry_after < self.position:
            self.tried = Tried(self.waiting.pop(0), again=True)
        else:
            self.tried = Tried(self.position, again=False)
            self.position += 1
        return self.tried

    def put_back(self, before: Tried) -> None:
        """Takes back a `next`, if there was one after `before`: no step was made of its batch."""
        if self.tried is before:
            return
        if self.tried.again:
            self.waiting.insert(0, self.tried.position)
        else:
            self.position -= 1
        self.tried = before

    def keep(self, tried: Tried) -> bool:
        """Keeps a batch for later, unless that was its second try or there is no room; returns whether it did."""
        kept = not tried.again and len(self.waiting) < guard.ROOM
        if kept:
            self.waiting.append(tried.position)
        return kept

    def written_into(self, state: State, mesh: jax.sharding.Mesh) -> State:
        """Returns the state with what waits, as it is saved."""
        waiting = np.full(guard.ROOM, guard.EMPTY, np.int32)
        waiting[: len(self.waiting)] = self.waiting
        return state._replace(guard=state.guard._replace(waiting=sharding.put(mesh, waiting, ".")))


def skip(run: Any, tried: Tried, report: StepReport) -> None:
    """Keeps the batch of an update that was skipped, and tells of it."""
    section, kept = run.config.guard, run.queue.keep(tried)
    why = guard.why(report.verdict, report.metrics)
    run.tell("skipped" if kept else "dropped", f"the batch at position {tried.position}: {why}")
    if report.verdict.lowered:
        until = run.step + section.lowered_steps
        run.tell("rate_lowered", f"times {section.lower} until step {until}, after {section.patience} skips")


def before_trouble(state: State, steps: Iterable[int]) -> set[int]:
    """Returns the newest of some steps from before the present trouble, which a rollback may want; empty without."""
    since = int(state.guard.since)
    return set(sorted(step for step in steps if step <= since)[-1:])


def roll_back(run: Any, report: StepReport, let_go: Callable[[], None]) -> State | None:
    """Returns the state to go on with, of the newest checkpoint from before the trouble began, as the lineage says.

    None where there is none, or the run went back as often as it may: it goes on with the losses as they are. Raises
    `NotFinite` where they are not finite. let_go: gives the memory of the state free, before that one is read.
    """
    section, since, done = run.config.guard, int(report.verdict.since), len(rollbacks.read(run.workdir))
    why = f"trouble since step {since} ({guard.why(report.verdict, report.metrics)})"
    run.manager.wait_until_finished()
    there = [step for step in run.manager.all_steps() if step <= since]
    if done >= section.rollbacks or not there:
        limit = f"guard.rollbacks={done}" if done >= section.rollbacks else "there is no checkpoint before it"
        if not report.verdict.is_finite:
            raise NotFinite(f"{why} does not end, and {limit}; {run.what_to_do()}")
        run.tell("accepted", f"{why} does not end, and {limit}: the run goes on with the losses as they now are")
        return None
    let_go()
    state, to, skipped = checkpoint.restore_newest(run.manager, abstract(run.config), until=since)
    if state is None:
        raise NotFinite(f"{why} does not end, and {saved.damaged(run.workdir, *skipped)}")
    leave = section.rollback_batches == "skip"
    record = rollbacks.Rollback(
        number=done + 1,
        from_step=run.step,
        to_step=to,
        position=int(report.position) if leave else None,
        lowered_until=None if leave else run.step,
        watched_until=to + section.lowered_steps,
        why=why,
    )
    with distributed.together():
        if distributed.is_main():
            rollbacks.add(run.workdir, record)  # from here on it has happened, whatever is killed
    state = gone_back(run.manager, record, state, run.mesh)
    run.tell("rolled_back", f"{why}: to step {to}; {record.batches}")
    return state


def gone_back(manager: Any, record: rollbacks.Rollback, state: State, mesh: jax.sharding.Mesh) -> State:
    """Returns the state after a rollback, from that of the checkpoint. The checkpoints after it are deleted."""
    forget(manager, record.to_step)
    return record.applied(state, lambda number: sharding.put(mesh, np.int32(number), ""))


def forget(manager: Any, after: int) -> None:
    """Deletes the checkpoints after a step: they are of a branch that the run left."""
    for step in manager.all_steps():
        if step > after:
            manager.delete(step)


def finished(
    run: Any, reader: Any, state: State, skipped: list[saved.Skipped]
) -> tuple[State | None, int | None, list[saved.Skipped]]:
    """Returns (the state to go on with, its step, what was passed over), from the newest saved one and what was passed
    over for it: another one where a kill came into a rollback, which is then brought to its end.
    """
    record = rollbacks.unfinished(run.workdir, state)
    if record is None:
        return state, int(state.step), skipped
    back, step, more = checkpoint.restore_newest(reader, abstract(run.config), until=record.to_step)
    left = [*(each for each in skipped if each.step <= record.to_step and each not in more), *more]
    if step == record.to_step:
        return gone_back(reader, record, back, run.mesh), step, left
    forget(reader, record.to_step)
    return back, step, left
