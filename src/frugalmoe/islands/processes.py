"""An island of several processes: the first one speaks with the directory, and tells the others what all do next.

What all processes must do at one time are the methods of `rounds.Local`: each begins with a message of the leader.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from frugalmoe.islands.rounds import Local
from frugalmoe.train import distributed

_END = "end"


class Leader(Local):
    """The local of the first process. Its methods are those of `local` in all processes together."""

    def __init__(self, local: Local, timed: bool) -> None:
        self.local, self._timed = local, timed
        self.tokens_per_row, self.not_finite = local.tokens_per_row, local.not_finite

    @property
    def step(self) -> int:
        return self.local.step

    def rows_before(self, step: int) -> int:
        return self.local.rows_before(step)

    def tensors(self) -> dict[str, np.ndarray]:
        _say("tensors")
        return self.local.tensors()

    def routers(self) -> dict[str, np.ndarray]:
        _say("routers")
        return self.local.routers()

    def put(
        self,
        params: Mapping[str, np.ndarray],
        routers: Mapping[str, np.ndarray],
        step: int,
        fresh_optimizer: bool = False,
    ) -> None:
        shapes = [{name: np.shape(value) for name, value in arrays.items()} for arrays in (params, routers)]
        _say("put", shapes, step, fresh_optimizer)
        self.local.put(*(_sent(arrays) for arrays in (params, routers)), step, fresh_optimizer)

    def begin(self, numbers: Sequence[int], first: int) -> None:
        _say("begin", [int(number) for number in numbers], first)
        self.local.begin(numbers, first)

    def train(self, end: int, enough: Callable[[], bool]) -> Iterator[None]:
        _say("train", end)
        return self.local.train(end, _agreed(enough, self._timed))

    def loads(self) -> Sequence[Sequence[int]]:
        return self.local.loads()  # those of all processes

    def stop_requested(self) -> bool:
        _say("stop_requested")
        return self.local.stop_requested()

    def save(self) -> None:
        _say("save")
        self.local.save()

    def end(self, stopped: bool) -> None:
        """Sends the others to the end of the run."""
        _say(_END, stopped)

    def idle(self) -> None:
        """Tells the others that there is nothing to do yet: nobody waits for a message for long."""
        _say("idle")


def follow(local: Local, timed: bool) -> bool:
    """Does what the leader says until the end of the run; returns whether it was stopped."""
    while True:
        what, *given = distributed.exchange(None)[0]
        if what == _END:
            return bool(given[0])
        if what == "put":
            shapes, step, fresh_optimizer = given
            local.put(*(_received(by_name) for by_name in shapes), step, fresh_optimizer)
        elif what == "train":
            with contextlib.suppress(local.not_finite):  # the leader has it too, and says what comes next
                list(local.train(given[0], _agreed(lambda: False, timed)))
        elif what != "idle":
            getattr(local, what)(*given)


def _say(*message: Any) -> None:
    distributed.exchange(list(message))


def _agreed(enough: Callable[[], bool], timed: bool) -> Callable[[], bool]:
    """Whether the leader has enough; where rounds have no given time that is never, and nobody has to ask."""
    return (lambda: bool(distributed.exchange(enough())[0])) if timed else enough


def _sent(arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    if arrays:
        multihost_utils.broadcast_one_to_all({name: np.asarray(a, np.float32) for name, a in arrays.items()})
    return arrays


def _received(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    if not shapes:
        return {}
    empty = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    return {name: np.asarray(a) for name, a in multihost_utils.broadcast_one_to_all(empty).items()}
