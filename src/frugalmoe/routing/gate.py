"""What token-choice gates share: weights, and a routing with the losses and statistics of any gate.

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
    *,
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


def by_scores(
    logits_BTE: Array,
    choice: select.Choice,
    inputs: Inputs,
    config: MoE,
    *,
    epsilon: float = 0.0,
    least_sum: float = 0.0,
) -> Routing:
    """The routing of experts that a bias or a price helped to choose, weighted by their scores alone.

    Of the options: `score`, a name of `select.SCORES`; `renormalize`, whether weights are the scores over their sum;
    `scale`, a factor on all weights. `epsilon`, `least_sum`: see `select.over_sum`.
    """
    options = config.options
    log_BTE = select.LOG_SCORES[options.score](logits_BTE)
    if options.renormalize:
        weight_BTK = select.over_sum(select.at(log_BTE, choice.expert_BTK), epsilon, least_sum)
    else:
        weight_BTK = select.at(select.SCORES[options.score](logits_BTE), choice.expert_BTK)
    probs_BTE, by_score = select.shares(log_BTE), select.top_k(logits_BTE, config.num_experts_per_token)
    return routing(logits_BTE, probs_BTE, choice, weight_BTK * options.scale, inputs, config, by_score=by_score)


def weight_sum(config: MoE) -> float | str:
    """What the weights of `by_scores` add up to."""
    return config.options.scale if config.options.renormalize else "free"


def on_sphere(x: Array, axis: int = -1) -> Array:
    """Vectors of length 1 along the axis; a zero vector stays zero, with a finite gradient."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=True) + EPS)
