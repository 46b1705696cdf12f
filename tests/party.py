"""Islands that hand in arrays without training, in one process, under a clock that is turned by hand."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from frugalmoe.islands import merges
from frugalmoe.islands.directory import Rules
from frugalmoe.islands.island import Island, Work
from frugalmoe.islands.records import FORMAT, Agreement
from frugalmoe.islands.store import open_store
from frugalmoe.islands.tensors import Tensor, fragments
from frugalmoe.schema import FrozenDict, Islands

SECTION = Islands(round_steps=2, streams=8, lapse_seconds=3.0, wait_for=2)
STEPS, TOKENS_PER_ROW = 60, 10
ABOUT = {"device": "toaster", "devices": 2, "python": "3.12.1", "jax": "0.12.0", "compute_dtype": "bfloat16"}


class Party:
    """Islands named by letters, which all join at the beginning. sizes: values of tensors; state: of the routers."""

    def __init__(self, url: str, names: str, section: Islands = SECTION, sizes: Mapping = {"w": 3}, state: int = 2):
        self.time, self.store, self.section, self.state = 0.0, open_store(url), section, state
        tensors = tuple(Tensor(name, size, "matrix", name, (size,)) for name, size in sizes.items())
        self.rules = Rules(
            section=section,
            steps=STEPS,
            tokens_per_row=TOKENS_PER_ROW,
            tensors=tensors,
            fragments=fragments(tensors, section.fragments),
            merge=merges.get(section.merge),
            merge_routers=lambda states, weights: {"bias": np.float32(sum(state["bias"] for state in states))},
        )
        clock = lambda: self.time
        self.islands = {name: Island(self.store, name, f"run-{name}", self.rules, clock) for name in names}
        plain = FrozenDict(dataclasses.asdict(section) | {"merge_options": FrozenDict()})
        agreement = {"model": FrozenDict(), "data": "d", "tokenizer": "t", "seed": 0, "steps": STEPS, "islands": plain}
        next(iter(self.islands.values())).agree(Agreement(format=FORMAT, **agreement))
        for _ in range(2):  # the second sign of life says that they move
            self.announce("joining")
            [island._announced() for island in self.islands.values()]
        for island in self.islands.values():
            assert island.begin(lambda: self.values(0), self.routers)
            island.catch_up()

    def values(self, value: float) -> dict[str, np.ndarray]:
        return {tensor.name: np.full(tensor.shape, value, np.float32) for tensor in self.rules.tensors}

    def routers(self) -> dict[str, np.ndarray]:
        return {"bias": np.zeros(self.state, np.float32)}

    def announce(self, said: str, *names: str) -> None:
        for name in names or self.islands:
            self.islands[name].announce(said, 0, 1234.5, ABOUT)

    def round(self, *, broken: str = "", absent: str = "") -> None:
        """All hand in but who is absent; what somebody broken says that it read cannot be."""
        there = [island for name, island in self.islands.items() if name not in absent]
        for number, island in enumerate(there, 1):
            streams = self.section.streams
            rows = [island.held.commit.rows[s] * streams + s for s in island.held.commit.members[island.name]]
            numbers = [n + 100 * streams for n in rows] if island.name in broken else rows
            island.contribute(
                self.values(number), self.routers(), {}, Work(numbers, TOKENS_PER_ROW * len(rows), 2, 1.0)
            )
        self.announce("waiting", *(island.name for island in there))
        [island.poll(island.held.round + 1) for island in there]
        self.time += self.section.lapse_seconds
        for island in there:
            island.take(island.poll(island.held.round + 1))
        self.announce("training", *(island.name for island in there))
