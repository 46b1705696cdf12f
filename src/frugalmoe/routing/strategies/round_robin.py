"""Experts in turn, by position in the document, with weight 1/K: the control with a perfect balance and no routing.

The token at position t of its document gets the experts t*K, t*K + 1, ..., t*K + K - 1, modulo E. Any E consecutive
tokens load every expert K times.

Letters: B batch, T time, E experts, K choices.
"""

import jax.numpy as jnp

from frugalmoe.routing import select, stats
from frugalmoe.routing.contract import About, Inputs, Params, Router, Routing, State
from frugalmoe.schema import MoE


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    k = config.num_experts_per_token
    expert_BTK = (inputs.positions_BT[..., None] * k + jnp.arange(k)) % config.num_experts
    plan = select.token_plan(expert_BTK, jnp.full(expert_BTK.shape, 1 / k), inputs, config.num_experts)
    return Routing(plan, {}, stats.of_layer(stats.load(plan, inputs, config.num_experts), inputs))


ROUTER = Router(
    about=About(
        year=2025,
        paper="Control; as the debugging option of torchtitan that forces a balanced load",
        score="none",
        selection="the next K experts, by position in the document",
        weights="1/K",
        balance="by construction",
        weight_sum=1.0,
        learned=False,
    ),
    route=route,
)
