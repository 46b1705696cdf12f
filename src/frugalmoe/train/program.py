"""The compiled step of one run, or of several at once.

Letters: A micro-batches of a step, B sequences, T time; '.' any axis (that of the runs).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from frugalmoe.data.batches import Batch
from frugalmoe.schema import Config
from frugalmoe.sharding import AXES, GPUS, axis_size, platform
from frugalmoe.train.objective import StepReport, without_knobs
from frugalmoe.train.placing import put_rows
from frugalmoe.train.step import State, make_eval_step, make_train_step

# The most programs of each kind that are kept. On CPUs one takes thousands of memory maps, and Linux gives a process
# 65,530 of them.
PROGRAMS_KEPT = 4


# Without this, XLA orders GPU programs for little memory, and runs shared experts before the exchange of rows instead
# of meanwhile.
_OVERLAP = (("xla_gpu_enable_latency_hiding_scheduler", True),)
# Without this, XLA for CPUs copies both moments of every parameter before an update that could be made in place.
_IN_PLACE = (("xla_cpu_copy_insertion_use_region_analysis", True),)


@functools.lru_cache(PROGRAMS_KEPT)
def _compiled_train_step(config: Config, together: bool, options: tuple) -> Callable:
    step = make_train_step(config, together)
    return jax.jit(jax.vmap(step) if together else step, donate_argnums=0, compiler_options=dict(options))


@functools.lru_cache(PROGRAMS_KEPT)
def _compiled_eval_step(config: Config, trace: bool, vocabulary: int | None) -> Callable:
    return jax.jit(make_eval_step(config, trace, vocabulary=vocabulary))


def compiled_eval_step(config: Config, trace: bool = False, vocabulary: int | None = None) -> Callable:
    """Returns the jitted `make_eval_step`, one for all runs of a process that differ in name and knobs only."""
    return _compiled_eval_step(without_knobs(config), trace, vocabulary)


def compiled_train_step(config: Config, together: bool = False) -> Callable:
    """Returns the jitted `make_train_step` for the mesh in context, shared by runs in the same way.

    With `together` it steps several runs, whose arguments are stacked along a first axis.
    """
    return _compiled_train_step(without_knobs(config), together, _options())


def _options() -> tuple:
    """What the compiler is told of the mesh in context."""
    if platform() == "cpu":
        return _IN_PLACE
    return _OVERLAP if platform() in GPUS and axis_size(*AXES) > 1 else ()


def of_micro_batches(config: Config, count: int) -> Config:
    """Returns the config of a step of so many micro-batches: in a ramp there are several, and each is a program."""
    train = config.train
    size = train.batch_size // train.accumulate_steps * count
    of_step = {"batch_size": size, "accumulate_steps": count, "ramp_from": 0, "ramp_batches": 0}
    return dataclasses.replace(config, train=dataclasses.replace(train, **of_step))


def _stack(*leaves: Any) -> Any:
    return jnp.stack(leaves)


class Program:
    """Steps `run.Run`s that differ in `Knobs` alone. Several are one vmapped program: their states, batches and knobs
    are stacked along a new first axis. Raises `ValueError` for runs that differ in more, as in their optimizers.
    """

    def __init__(self, runs: Sequence[Any]):
        self.runs, self.together = runs, len(runs) > 1
        if len({without_knobs(run.config) for run in runs}) > 1:
            raise ValueError("runs of several programs cannot be trained as one; see ablate.together.groups")
        self._steps: dict[int, tuple[Callable, int]] = {}  # micro-batches -> step, and programs that it had before
        self.knobs = runs[0].knobs
        if self.together:
            names = {name for run in runs for name in run.knobs.losses}
            filled = [run.knobs._replace(losses={n: run.knobs.losses.get(n, 0.0) for n in names}) for run in runs]
            self.knobs = jax.tree.map(_stack, *filled)
        self.knobs_again = self.knobs._replace(taken=jnp.zeros_like(self.knobs.taken))
        self.read_states()

    def read_states(self) -> None:
        """Takes the states that the runs have now."""
        self.state = self.runs[0].state
        if self.together:
            self.state = jax.tree.map(_stack, *(run.state for run in self.runs))

    def next_batch(self) -> Batch:
        run, batches = self.runs[0], [run.next_batch() for run in self.runs]
        if self.together:
            return put_rows(run.mesh, Batch(*map(np.stack, zip(*batches))), ".ABT", run.config)
        return put_rows(run.mesh, batches[0], "ABT", run.config)

    def step(self, batch: Batch, again: bool = False) -> StepReport:
        """Makes a step; `again`: the batch has been taken before."""
        self.state, report = self.again(self.state, batch, again)
        return report

    def again(self, state: State, batch: Batch, again: bool) -> tuple[State, StepReport]:
        """Makes a step from a state, which is donated."""
        return self._train_step(batch.tokens_BT.shape[-3])(state, batch, self.knobs_again if again else self.knobs)

    def _train_step(self, micro_batches: int) -> Callable:
        """The step of batches of so many micro-batches."""
        if micro_batches not in self._steps:
            step = compiled_train_step(of_micro_batches(self.runs[0].config, micro_batches), self.together)
            self._steps[micro_batches] = step, step._cache_size()
        return self._steps[micro_batches][0]

    def of_each_run(self, values: Any) -> list[Any]:
        """Returns the values of each run, from what the program gave for all."""
        if not self.together:
            return [values]
        return [jax.tree.map(lambda a, i=i: a[i], values) for i in range(len(self.runs))]

    def settle(self, step: int) -> None:
        """Hands each run its state after a step."""
        for run, state in zip(self.runs, self.of_each_run(self.state)):
            run.state, run.step = state, step

    def check_compiled_once(self) -> None:
        if any(step._cache_size() > before + 1 for step, before in self._steps.values()):
            raise RuntimeError("the train step was compiled more than once: its argument types changed between steps")
