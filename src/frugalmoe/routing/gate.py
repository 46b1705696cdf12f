"""What token-choice gates share: features, weights, and a routing with the losses and statistics of any gate.

Letters: B batch, T time, E experts, K choices.
"""

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing import losses, select, stats
from frugalmoe.routing.contract import Inputs, Routing
from frugalmoe.schema import MoE

EPS = 1e-12  # added to the square of a length


def weights(logits_BTE: Array, probs_BTE: Array, expert_BTK: Array, renormalize: bool) -> Array:
    """The softmax probabilities of the chosen experts [B, T, K], as they are or over their sum."""
    if renormalize:
        return select.shares(select.at(logits_BTE, expert_BTK))
    return select.at(probs_BTE, expert_BTK)


def routing(
    logits_BTE: Array,
    probs_BTE: Array,
    choice: select.Choice,
    weight_BTK: Array,
    inputs: Inputs,
    config: MoE,
    by_score: select.Choice | None = None,
) -> Routing:
    """The plan of these experts and weights, with `losses.GATE_LOSSES` and all statistics.

    `by_score`: the K largest scores, where the choice looked at more than scores; see `losses.sequence_balance`.
    """
    scored_BE = by_score and stats.load_of_choices(by_score.expert_BTK, inputs, config.num_experts)
    plan = select.token_plan(choice.expert_BTK, weight_BTK, inputs, config.num_experts)
    load_BE = stats.load(plan, inputs, config.num_experts)
    return Routing(
        plan,
        losses.gate_losses(logits_BTE, probs_BTE, load_BE, inputs, config, scored_BE),
        stats.of_layer(load_BE, inputs, logits_BTE=logits_BTE, probs_BTE=probs_BTE, tied_BT=choice.tied_BT),
    )


def features(inputs: Inputs) -> Array:
    """The layer's input in float32, zeros at padding, so that garbage there reaches no gradient."""
    return jnp.where(inputs.valid_BT[..., None], inputs.x_BTD, 0).astype(jnp.float32)


def on_sphere(x: Array, axis: int = -1) -> Array:
    """Vectors of length 1 along the axis; a zero vector stays zero, with a finite gradient."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=True) + EPS)
