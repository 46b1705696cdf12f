"""What strategies share: scores, choosing K experts per token, their weights, making a plan, and per-token keys.

Letters: B batch, T time, N tokens (B*T), E experts, K choices.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from frugalmoe.routing.contract import Inputs, TokenPlan

FAR_BELOW = -15.0  # below it softplus(z) is e^z (1 - e^z / 2) to the last bit of float32


def sqrt_softplus(logits_BTE: Array) -> Array:
    """sqrt(log(1 + e^z)): positive, about e^(z/2) for z << 0 and sqrt(z) for z >> 0 (DeepSeek-V4)."""
    near_BTE = jnp.sqrt(jax.nn.softplus(jnp.maximum(logits_BTE, FAR_BELOW)))
    return jnp.where(logits_BTE < FAR_BELOW, jnp.exp(log_sqrt_softplus(logits_BTE)), near_BTE)


def log_sqrt_softplus(logits_BTE: Array) -> Array:
    """log(log(1 + e^z)) / 2, about z / 2 for z << 0, where float32 has no e^z."""
    below_BTE = jnp.minimum(logits_BTE, FAR_BELOW)
    far_BTE = below_BTE - jnp.exp(below_BTE) / 2
    near_BTE = jnp.log(jax.nn.softplus(jnp.maximum(logits_BTE, FAR_BELOW)))
    return jnp.where(logits_BTE < FAR_BELOW, far_BTE, near_BTE) / 2


SCORES = {"sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax, "sqrt_softplus": sqrt_softplus}
LOG_SCORES = {"sigmoid": jax.nn.log_sigmoid, "softmax": jax.nn.log_softmax, "sqrt_softplus": log_sqrt_softplus}


class Choice(NamedTuple):
    """K distinct experts per token, best first."""

    expert_BTK: Array  # int32
    tied_BT: Array  # bool: score k equals score k+1, so the lower expert id won by its id alone


def top_k(score_BTE: Array, k: int) -> Choice:
    """The exact k largest scores, compared in float32; no gradient passes. Ties go to the lower id and are reported.

    The indices carry the name `routing_plan`: a remat policy that saves it cannot re-route near-ties in the recompute.
    """
    score_BTE = jax.lax.stop_gradient(score_BTE.astype(jnp.float32))
    num_experts = score_BTE.shape[-1]
    value, expert = jax.lax.top_k(score_BTE, min(k + 1, num_experts))
    tied_BT = value[..., k - 1] == value[..., k] if k < num_experts else jnp.zeros(value.shape[:-1], bool)
    return Choice(checkpoint_name(expert[..., :k], "routing_plan"), tied_BT)


def at(score_BTE: Array, expert_BTK: Array) -> Array:
    """The scores of the chosen experts [B, T, K]; gradients pass."""
    return jnp.take_along_axis(score_BTE, expert_BTK, axis=-1)


def shares(log_score_BTE: Array, among_BTE: Array | None = None) -> Array:
    """Positive scores over their sum along the last axis, from their logarithms (of a softmax, the logits will do).

    So scores that float32 does not have, e^-90, have shares and gradients. `among`: those that take part; the others
    get 0, and where there is none, so do all.
    """
    if among_BTE is None:
        return jax.nn.softmax(log_score_BTE, axis=-1)
    nobody_BT1 = ~jnp.any(among_BTE, axis=-1, keepdims=True)
    share_BTE = jax.nn.softmax(jnp.where(among_BTE | nobody_BT1, log_score_BTE, -jnp.inf), axis=-1)
    return jnp.where(among_BTE, share_BTE, 0)


def over_sum(log_score_BTK: Array, epsilon: float = 0.0, least: float = 0.0) -> Array:
    """Positive scores over (their sum + `epsilon`), and over `least` where that is more, from their logarithms."""
    if epsilon:
        further_BT1 = jnp.full_like(log_score_BTK[..., :1], math.log(epsilon))
        share_BTK = shares(jnp.concatenate([log_score_BTK, further_BT1], axis=-1))[..., :-1]
    else:
        share_BTK = shares(log_score_BTK)
    if not least:
        return share_BTK
    log_sum_BT1 = jax.nn.logsumexp(log_score_BTK, axis=-1, keepdims=True)
    return share_BTK * jnp.exp(jnp.minimum(log_sum_BT1 - math.log(least), 0))


def token_plan(expert_BTK: Array, weight_BTK: Array, inputs: Inputs, num_experts: int) -> TokenPlan:
    """The token-major plan. Padding gets the null expert with weight 0."""
    valid_BT1, k = inputs.valid_BT[..., None], expert_BTK.shape[-1]
    expert_BTK = jnp.where(valid_BT1, expert_BTK, num_experts).astype(jnp.int32)
    weight_BTK = jnp.where(valid_BT1, weight_BTK, 0).astype(jnp.float32)
    return TokenPlan(expert_BTK.reshape(-1, k), weight_BTK.reshape(-1, k))


def token_keys(inputs: Inputs) -> Array:
    """One key per token [B, T], a function of (sequence key, layer, segment, position) alone.

    So the noise of a token is the same in a whole sequence as when decoding token by token, and under any padding.
    """

    def fold(key: Array, *data: Array) -> Array:
        for number in data:
            key = jax.random.fold_in(key, number)
        return key

    keys_B = jax.vmap(lambda key: fold(key, inputs.layer))(inputs.keys_B)
    over_time = jax.vmap(fold, in_axes=(None, 0, 0))
    return jax.vmap(over_time)(keys_B, inputs.segment_ids_BT, inputs.positions_BT)


def noise(inputs: Inputs, draw: Callable[[Array], Array]) -> Array:
    """What `draw` makes of each token's key [B, T, ...]."""
    return jax.vmap(jax.vmap(draw))(token_keys(inputs))
