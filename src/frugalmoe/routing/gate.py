"""What most token-choice gates end in: weights, and a routing with the losses and statistics of any gate.

Letters: B batch, T time, E experts, K choices.
"""

from jax import Array

from frugalmoe.config.schema import MoE
from frugalmoe.routing import losses, select, stats
from frugalmoe.routing.contract import Inputs, Routing


def weights(probs_BTE: Array, expert_BTK: Array, renormalize: bool) -> Array:
    """The probabilities of the chosen experts [B, T, K], as they are or over their sum."""
    weight_BTK = select.at(probs_BTE, expert_BTK)
    return weight_BTK / weight_BTK.sum(-1, keepdims=True) if renormalize else weight_BTK


def routing(
    logits_BTE: Array, probs_BTE: Array, choice: select.Choice, weight_BTK: Array, inputs: Inputs, config: MoE
) -> Routing:
    """The plan of these experts and weights, with `losses.GATE_LOSSES` and all statistics."""
    plan = select.token_plan(choice.expert_BTK, weight_BTK, inputs, config.num_experts)
    load_BE = stats.load(plan, inputs, config.num_experts)
    return Routing(
        plan,
        losses.gate_losses(logits_BTE, probs_BTE, load_BE, inputs, config),
        stats.of_layer(load_BE, inputs, logits_BTE=logits_BTE, probs_BTE=probs_BTE, tied_BT=choice.tied_BT),
    )
