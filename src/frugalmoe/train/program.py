"""The compiled step of one run, or of several at once.

Letters: A micro-batches of a step, B sequences, T time; '.' the runs.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from frugalmoe.data.batches import Batch
from frugalmoe.train.evaluate import put_batch
from frugalmoe.train.step import make_train_step


class Program:
    """Steps `loop.Run`s that differ in `Knobs` alone. Several are one vmapped program: their states, batches and knobs
    are stacked along a new first axis.
    """

    def __init__(self, runs: Sequence[Any]):
        self.runs, self.together = runs, len(runs) > 1
        step = make_train_step(runs[0].config)
        self.train_step = jax.jit(jax.vmap(step) if self.together else step, donate_argnums=0)
        self.state, self.knobs = runs[0].state, runs[0].knobs
        if self.together:
            names = {name for run in runs for name in run.knobs.losses}
            filled = [run.knobs._replace(losses={n: run.knobs.losses.get(n, 0.0) for n in names}) for run in runs]
            stack = lambda *leaves: jnp.stack(leaves)
            self.state = jax.tree.map(stack, *(run.state for run in runs))
            self.knobs = jax.tree.map(stack, *filled)

    def next_batch(self) -> Batch:
        batches = [run.next_batch() for run in self.runs]
        if self.together:
            return put_batch(self.runs[0].mesh, Batch(*map(np.stack, zip(*batches))), ".ABT")
        return put_batch(self.runs[0].mesh, batches[0], "ABT")

    def step(self, batch: Batch) -> dict[str, jax.Array]:
        self.state, metrics = self.train_step(self.state, batch, self.knobs)
        return metrics

    def of_each_run(self, values: Any) -> list[Any]:
        if not self.together:
            return [values]
        return [jax.tree.map(lambda a, i=i: a[i], values) for i in range(len(self.runs))]

    def settle(self, step: int) -> None:
        """Hands each run its state."""
        for run, state in zip(self.runs, self.of_each_run(self.state)):
            run.state, run.step = state, step

    def check_compiled_once(self) -> None:
        if self.train_step._cache_size() > 1:
            raise RuntimeError("the train step was compiled more than once: its argument types changed between steps")
