"""What strategies share that give a token as many experts as it wants: a fixed number of slots, and what overflows.

Letters: B batch, T time, E experts, K slots per token.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from frugalmoe.routing.contract import Inputs
from frugalmoe.schema import MoE

FAN_OUT = 4  # slots of a token over num_experts_per_token, where the option does not say


class Slots(NamedTuple):
    """The experts that a token gets, best first."""

    expert_BTK: Array  # int32; the null expert E in an empty slot
    tied_BT: Array  # bool: the last expert that it gets and the next have equal scores
    overflow: Array  # int32 []: experts that valid tokens want beyond their slots


def num_slots(config: MoE) -> int:
    """Of one token: `options.max_experts`, or FAN_OUT times the nominal number where that is 0; at most E."""
    return min(config.options.max_experts or FAN_OUT * config.num_experts_per_token, config.num_experts)


def fill(ranked_BTE: Array, score_BTE: Array, wanted_BT: Array, inputs: Inputs, config: MoE) -> Slots:
    """The first `wanted` of the ranked experts, as far as the slots reach. `score` is in the order of the ranking."""
    slots, num_experts = num_slots(config), ranked_BTE.shape[-1]
    rank_E, size_BT1 = jnp.arange(num_experts), jnp.minimum(wanted_BT, slots)[..., None]
    expert_BTE = jnp.where(rank_E < size_BT1, ranked_BTE, num_experts)
    last_BTE = rank_E[1:] == size_BT1
    tied_BT = jnp.any(last_BTE & (score_BTE[..., 1:] == score_BTE[..., :-1]), axis=-1)
    overflow = jnp.sum(jnp.maximum(wanted_BT - slots, 0), where=inputs.valid_BT, dtype=jnp.int32)
    return Slots(expert_BTE[..., :slots], tied_BT, overflow)


def check(config: MoE) -> str | None:
    most, k = config.options.max_experts, config.num_experts_per_token
    if most == 0 or k <= most <= config.num_experts:
        return None
    return (
        f"options.max_experts={most}: must be 0 ({FAN_OUT} * num_experts_per_token), or from num_experts_per_token={k} "
        f"to num_experts={config.num_experts}"
    )
