"""What strategies share: scores, choosing K experts per token, their weights, making a plan, and per-token keys.

Letters: B batch, T time, N tokens (B*T), E experts, K choices.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from frugalmoe.routing.contract import Inputs, TokenPlan


def sqrt_softplus(logits_BTE: Array) -> Array:
    """sqrt(log(1 + e^z)): positive, about e^(z/2) for z << 0 and sqrt(z) for z >> 0 (DeepSeek-V4)."""
    return jnp.sqrt(jax.nn.softplus(jnp.maximum(logits_BTE, -80)))  # float32 has no e^-90, and sqrt no slope at 0


SCORES = {"sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax, "sqrt_softplus": sqrt_softplus}


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


def shares(score_BTE: Array) -> Array:
    """Positive scores over their sum along the last axis."""
    return score_BTE / (score_BTE.sum(-1, keepdims=True) + 1e-20)


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
