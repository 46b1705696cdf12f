"""Choices of a token that are no experts and cost nothing worth counting: a gate over X choices, the first E experts.

A token picks K of the X. A slot whose choice is no expert is a null slot of the plan: the executors compute no row for
it, and `active_per_token` reports the experts that tokens really got. What such choices put out is the strategy's own
`Routing.added_BTD`.

Letters: B batch, T time, D model, E experts, Z choices that are no experts, X = E + Z, K choices of a token.
"""

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing import losses, select, stats
from frugalmoe.routing.contract import Inputs, NewParams, Params, Routing, TokenPlan, clean, normal, project
from frugalmoe.routing.select import Choice
from frugalmoe.schema import MoE


def linear_init(key: Array, dim: int, num_choices: int) -> NewParams:
    """As `contract.linear_init`, over all choices."""
    return {"kernel_DX": normal(key, "DX", (dim, num_choices), dim**-0.5)}


def linear_logits(params: Params, inputs: Inputs) -> Array:
    return project(clean(inputs), params["kernel_DX"])


def plan(choice_BTK: Array, weight_BTK: Array, inputs: Inputs, num_experts: int) -> TokenPlan:
    """The experts among the choices, with their weights; null slots for the others."""
    real_BTK = choice_BTK < num_experts
    expert_BTK = jnp.where(real_BTK, choice_BTK, num_experts)
    return select.token_plan(expert_BTK, jnp.where(real_BTK, weight_BTK, 0), inputs, num_experts)


def weights(choice_BTK: Array, weight_BTK: Array, inputs: Inputs, num_experts: int, num_choices: int) -> Array:
    """The weight of each choice that is no expert [B, T, Z]; 0 where it is not chosen, and at padding."""
    hit_BTKZ = choice_BTK[..., None] == jnp.arange(num_experts, num_choices)
    hit_BTKZ &= inputs.valid_BT[..., None, None]
    return jnp.sum(jnp.where(hit_BTKZ, weight_BTK[..., None], 0), axis=-2)


def finish(
    logits_BTX: Array,
    choice: Choice,
    weight_BTK: Array,
    inputs: Inputs,
    config: MoE,
    *,
    balanced_BX: Array,
    added_BTD: Array | None = None,
    scored_BX: Array | None = None,
) -> Routing:
    """The routing; `balanced_BX` is the load as the strategy's balance losses see it, `scored_BX` that by scores alone.

    `scored_BX` is given where the choice looked at more; see `losses.sequence_balance`.
    """
    probs_BTX, num_experts = jax.nn.softmax(logits_BTX, axis=-1), config.num_experts
    experts = plan(choice.expert_BTK, weight_BTK, inputs, num_experts)
    load_BE = stats.load(experts, inputs, num_experts)
    layer = stats.of_layer(load_BE, inputs, logits_BTE=logits_BTX, probs_BTE=probs_BTX, tied_BT=choice.tied_BT)
    return Routing(
        experts,
        losses.gate_losses(logits_BTX, probs_BTX, balanced_BX, inputs, config, scored_BX),
        layer | {"prob_sum": layer["prob_sum"][:num_experts]},
        added_BTD=added_BTD,
    )
