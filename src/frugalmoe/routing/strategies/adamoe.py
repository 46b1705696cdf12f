"""Null experts: a token that picks one of them pays for one expert less.

AdaMoE (Zeng et al., 2406.13233, section 3): `num_null` choices that put out nothing join the E experts, each token
picks K of them all by softmax, and the weights are renormalized over the experts picked; a token without any gets
nothing but the residual stream. Raise num_experts_per_token with num_null: at balance a token has
K * E / (E + num_null) experts. The balance losses count each null expert at the mean load of all null experts: how a
token's nulls are spread over them is nobody's concern.

Letters: B batch, T time, E experts, X = E + null experts, K choices.
"""

import dataclasses

import jax.numpy as jnp

from frugalmoe.routing import losses, rules, select, stats, zero_cost
from frugalmoe.routing.contract import About, Inputs, Params, Router, Routing, State
from frugalmoe.schema import MoE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    num_null: int = 8  # null experts


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    num_experts, num_null = config.num_experts, config.options.num_null
    logits_BTX = zero_cost.linear_logits(params, inputs)
    choice = select.top_k(logits_BTX, config.num_experts_per_token)
    weight_BTK = select.shares(select.at(logits_BTX, choice.expert_BTK), choice.expert_BTK < num_experts)
    load_BX = stats.load_of_choices(choice.expert_BTK, inputs, num_experts + num_null).astype(jnp.float32)
    nulls_BX = jnp.broadcast_to(load_BX[:, num_experts:].mean(-1, keepdims=True), load_BX.shape)
    balanced_BX = jnp.where(jnp.arange(load_BX.shape[1]) < num_experts, load_BX, nulls_BX)
    return zero_cost.finish(logits_BTX, choice, weight_BTK, inputs, config, balanced_BX=balanced_BX)


def check(config: MoE) -> str | None:
    return rules.first(
        rules.at_least("num_null", config.options.num_null, 1),
        rules.gradient_at_one(config, True, "use more"),
    )


ROUTER = Router(
    about=About(
        year=2024,
        paper="Zeng et al., AdaMoE: Token-Adaptive Routing with Null Experts, 2406.13233, section 3",
        score="softmax",
        selection="K largest logits, of experts and null experts",
        weights="softmax probabilities, renormalized over the experts picked",
        balance="auxiliary loss, null experts counted at their mean load",
        losses=losses.GATE_LOSSES,
    ),
    route=route,
    options=Options,
    init=lambda key, dim, config: zero_cost.linear_init(key, dim, config.num_experts + config.options.num_null),
    check=check,
)
