"""What strategies share in which an expert chooses tokens: its C best of a pool, or those that reach a threshold.

A threshold is the score of the C-th best token, averaged over pools and steps. It is state, so that a decision needs
no other token: the ranking of expert choice, made causal.

Letters: B batch, T time, N tokens (B*T), E experts, K slots per token, P pools, n tokens of a pool, C slots per expert
and pool.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing import select
from frugalmoe.routing.contract import Inputs, State, TokenPlan

ROUNDING = 1e-4  # a number of slots this little above an integer is that integer


def slots(size: int, share: float) -> int:
    """C = ceil(share * n) of a pool of n tokens."""
    return min(size, math.ceil(size * share - ROUNDING))


class Ranked(NamedTuple):
    """The C best tokens of every pool for every expert, best first; no gradient passes."""

    token_PEC: Array  # int32, place in the pool
    full_PEC: Array  # bool; slots beyond a pool's own number (it has padding) are empty
    cut_E: Array  # float32: the score of the last full slot, summed over the pools' tokens


def rank(score_PnE: Array, valid_Pn: Array, share: float) -> Ranked:
    """C = ceil(share * n) of a pool's n valid tokens, so that padding changes nothing."""
    size = score_PnE.shape[1]
    score_PEn = jnp.where(valid_Pn[..., None], jax.lax.stop_gradient(score_PnE), -jnp.inf).swapaxes(1, 2)
    value_PEC, token_PEC = jax.lax.top_k(score_PEn, slots(size, share))
    tokens_P11 = valid_Pn.sum(-1, dtype=jnp.int32)[:, None, None]
    slots_P11 = jnp.minimum(tokens_P11, jnp.ceil(tokens_P11 * share - ROUNDING).astype(jnp.int32))
    last_PE1 = jnp.broadcast_to(jnp.maximum(slots_P11 - 1, 0), (*value_PEC.shape[:2], 1))
    cut_PE1 = jnp.where(tokens_P11 > 0, jnp.take_along_axis(value_PEC, last_PE1, axis=-1), 0)
    full_PEC = jnp.broadcast_to(jnp.arange(value_PEC.shape[-1]) < slots_P11, value_PEC.shape)
    return Ranked(token_PEC, full_PEC, jnp.sum(cut_PE1 * tokens_P11, axis=(0, 2)))


class Active(NamedTuple):
    plan: TokenPlan
    tied_BT: Array  # bool: the last slot and the expert after it have equal margins
    overflow: Array  # int32 []: experts that a token reached beyond its slots, and did not get


def activate(score_BTE: Array, weight_BTE: Array, threshold_E: Array, slots: int, inputs: Inputs) -> Active:
    """Each token's experts whose score reaches their threshold, at most `slots`: those with the largest margins."""
    margin_BTE = jax.lax.stop_gradient(score_BTE) - threshold_E
    choice = select.top_k(margin_BTE, slots)
    active_BTK = select.at(margin_BTE, choice.expert_BTK) >= 0
    expert_BTK = jnp.where(active_BTK, choice.expert_BTK, margin_BTE.shape[-1])
    weight_BTK = jnp.where(active_BTK, select.at(weight_BTE, choice.expert_BTK), 0)
    reached_BT = jnp.sum(margin_BTE >= 0, axis=-1, dtype=jnp.int32)
    overflow = jnp.sum(jnp.maximum(reached_BT - slots, 0), where=inputs.valid_BT)
    return Active(select.token_plan(expert_BTK, weight_BTK, inputs, margin_BTE.shape[-1]), choice.tied_BT, overflow)


def initial(value: float, num_experts: int) -> State:
    return {"threshold_E": jnp.full(num_experts, value, jnp.float32), "updates_E": jnp.zeros(num_experts, jnp.float32)}


# A threshold is a mean over batches, and `updates_E` counts the batches that it remembers: the mean of replicas is at
# least as old as the oldest of them, so that a young one does not begin the average again.
MERGES = {"threshold_E": "mean", "updates_E": "maximum"}


def follow(state: State, stats: Mapping[str, Array], decay: float) -> State:
    """The exponential mean of the batches' cuts; a plain mean until there are more of them than `decay` remembers."""
    cut_E = stats["cut_sum"] / jnp.maximum(stats["tokens"], 1)
    keep = jnp.minimum(decay, state["updates_E"] / (state["updates_E"] + 1))
    return {"threshold_E": keep * state["threshold_E"] + (1 - keep) * cut_E, "updates_E": state["updates_E"] + 1}
