"""The contract between a routing plan and what executes it: y_n = sum_e G[n, e] * expert_e(x_n), expert_e a SwiGLU.

An executor is one file in `executors/` that ends with `EXECUTOR = Executor(...)`. Its `run` is a pure function

    run(plan, x_ND, gate_up_ED2F, down_EFD, call) -> (y[N, D] in x's dtype, int32 [] rows that were dropped)

with gradients for the plan's weights, x and both weights, which are float32 or of x's dtype. Both forms of a plan may
come. One table holds all executors to the dense oracle, in value and in every gradient (`frugalmoe.laws.executors`).

Letters: N tokens, D model, E experts, F expert hidden; 2 = (gate, up).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import Array

from frugalmoe.routing.contract import ExpertPlan, Plan, TokenPlan
from frugalmoe.schema import MoE


class Call(NamedTuple):
    """What an executor may look at beside its arrays; all of it is static."""

    config: MoE
    num_sequences: int = 1  # equal parts of the N tokens
    room: int | None = None  # the most rows of a token-major plan that it holds, the first ones by expert; None: all


Run = Callable[[Plan, Array, Array, Array, Call], tuple[Array, Array]]


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
    keeps_room: bool = True  # whether it keeps to `Call.room`
    drops: Drops | None = None  # None: it computes every row
    interpreted: Run | None = None  # the same on any platform, slowly, for tests; needed where `platforms` are named
    name: str = ""  # set by `executors.get` to what the config says


def swiglu(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up
