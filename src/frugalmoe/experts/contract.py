"""The contract between a routing plan and what executes it: y_n = sum_e G[n, e] * expert_e(x_n), where

    expert_e(x) = activation(x @ gate_e + gate_bias_e, x @ up_e + up_bias_e) @ down_e + down_bias_e

with SwiGLU for activation and no biases, unless the executor declares `every_form`.

An executor is one file in `executors/` that ends with `EXECUTOR = Executor(...)`. Its `run` is a pure function

    run(plan, x_ND, gate_up_ED2F, down_EFD, call) -> (y[N, D] in x's dtype, int32 [] rows that were dropped)

with gradients for the plan's weights, x, both weights and `call.biases`, which are float32 or of x's dtype. Both forms
of a plan may come. One table holds all executors to the dense oracle, in value and in every gradient
(`frugalmoe.laws.executors`).

Letters: N tokens, D model, E experts, F expert hidden; 2 = (gate, up).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from jax import Array

from frugalmoe.experts.activations import ACTIVATIONS, SWIGLU, Activation, swiglu
from frugalmoe.routing.contract import ExpertPlan, Plan, TokenPlan
from frugalmoe.schema import MoE


class Biases(NamedTuple):
    """What experts add to their products; float32 or of x's dtype."""

    gate_up_E2F: Array
    down_ED: Array


class Stack(NamedTuple):
    """The weights of a layer's experts among those of all layers, which nobody has to copy a layer out of.

    The gradient, too, is never a layer's own. `sums` are the weights again, as a value that every layer hands on as it
    is: what comes back to a layer as its gradient is that of all layers behind it, and the layer puts its own there, in
    place. The weights that are read have no gradient.
    """

    gate_up_LED2F: Array
    down_LEFD: Array
    sums: tuple[Array, Array]
    layer: Array  # int32 []: no other layer of the same sums has it

    def of_layer(self) -> tuple[Array, Array]:
        """The layer's own weights, a copy, without gradients."""
        return self.gate_up_LED2F[self.layer], self.down_LEFD[self.layer]


class Call(NamedTuple):
    """What an executor may look at beside plan, rows and weights; all but the biases is static."""

    config: MoE
    num_sequences: int = 1  # equal parts of the N tokens
    room: int | None = None  # the most rows of a token-major plan that it holds, the first ones by expert; None: all
    biases: Biases | None = None  # of experts that have some

    @property
    def activation(self) -> Activation:
        """What an expert makes of gate and up."""
        return ACTIVATIONS[self.config.activation]


Run = Callable[[Plan, Array, Array, Array, Call], tuple[Array, Array]]
RunInStack = Callable[[Plan, Array, Stack, Call], tuple[Array, Array, tuple[Array, Array]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drops:
    """Which rows of a plan an executor leaves out."""

    # (plan, config, number of sequences) -> the plan without these rows (null expert, weight 0), int32 [] how many
    limit: Callable[[TokenPlan, MoE, int], tuple[TokenPlan, Array]]
    # The same with experts naming tokens: the form in which rows travel between devices.
    slots: Callable[[TokenPlan, MoE, int], tuple[ExpertPlan, Array]]
    may: Callable[[MoE], str | None]  # why a config may drop rows, naming its fields; None: it never does
    causality: Callable[[Plan, MoE], str]  # what is added to a router's claim: safe | batch | leak
    fields: tuple[str, ...]  # of `model.moe`, that say whose rows are dropped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Executor:
    """What computes the experts of a plan."""

    run: Run
    work: str  # what it computes over what is useful, one line
    purpose: str  # one line
    platforms: tuple[str, ...] = ()  # where it runs; empty: everywhere
    default_on: tuple[str, ...] = ()  # platforms where `auto` and `grouped` mean it; "*": where they mean no other
    casts: bool = False  # whether it takes float32 weights with rows of x's dtype; else they come in that
    keeps_room: bool = True  # whether it keeps to `Call.room`
    in_stack: RunInStack | None = None  # the same, and `Stack.sums`, of weights of all layers; float32 whatever x is
    every_form: bool = False  # whether it adds `Call.biases` and computes every `Call.activation`; else it gets none
    drops: Drops | None = None  # None: it computes every row
    interpreted: Run | None = None  # the same on any platform, slowly, for tests; needed where `platforms` are named
    name: str = ""  # set by `executors.get` to what the config says


def refusal(executor: Executor, config: MoE) -> str | None:
    """Why an executor cannot compute the experts of a config, naming its fields, or None."""
    asked = {"activation": config.activation != SWIGLU, "expert_bias": config.expert_bias}
    fields = [f"model.moe.{name}={getattr(config, name)!r}" for name, more in asked.items() if more]
    if executor.every_form or not fields:
        return None
    return f"computes SwiGLU without biases alone (its EXECUTOR declares no every_form), not {', '.join(fields)}"


__all__ = ["Biases", "Call", "Drops", "Executor", "Run", "RunInStack", "Stack", "refusal", "swiglu"]
