"""Recycle routing: top-k with a limited number of tokens per expert; what overflows goes to a random expert with room.

Sun et al. (Hunyuan-Large, 2411.02265). In training an expert has C = ceil(capacity_factor * n * K / E) slots for the n
valid tokens of a sequence. Tokens queue in the order of their documents and positions, each with all
its K choices: where a chosen expert is full, an expert that has room, and that the token does not have yet, is drawn
uniformly in its place. So a token's experts depend on earlier tokens and on its own key, never on later ones. In
evaluation nothing is limited: plain top-k, as decoding has no queue. The report leaves the order open; drops by
probability would leak.

Weights: the softmax probability of the expert that got the token, as it is. The balance loss counts the token's own
choices.

The queue is a loop over time in steps of E*K numbers each: nothing beside the experts on a CPU (T = D = 256, E = 8),
but T steps that cannot overlap on an accelerator, where it has not been measured.

Letters: B batch, T time, E experts, K choices, C slots of an expert in a sequence.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing import losses, rules, select, stats
from frugalmoe.routing.contract import About, Inputs, Params, Router, Routing, State, linear_init, linear_logits
from frugalmoe.routing.threshold import ROUNDING
from frugalmoe.schema import MoE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    capacity_factor: float = 1.0  # slots of an expert over its fair share of the sequence


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    num_experts, logits_BTE = config.num_experts, linear_logits(params, inputs)
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    choice = select.top_k(logits_BTE, config.num_experts_per_token)
    own = select.token_plan(choice.expert_BTK, select.at(probs_BTE, choice.expert_BTK), inputs, num_experts)
    own_BE = load_BE = stats.load(own, inputs, num_experts)
    plan = own
    if inputs.train:
        expert_BTK = recycled(logits_BTE, inputs, config)
        weight_BTK = select.at(jnp.pad(probs_BTE, ((0, 0), (0, 0), (0, 1))), expert_BTK)
        plan = select.token_plan(expert_BTK, weight_BTK, inputs, num_experts)
        load_BE = stats.load(plan, inputs, num_experts)
    return Routing(
        plan,
        losses.gate_losses(logits_BTE, probs_BTE, own_BE, inputs, config),
        stats.of_layer(load_BE, inputs, logits_BTE=logits_BTE, probs_BTE=probs_BTE, tied_BT=choice.tied_BT),
    )


def recycled(logits_BTE: Array, inputs: Inputs, config: MoE) -> Array:
    """The experts after the queue [B, T, K]; E where no expert has room that the token does not have yet."""
    k, num_experts, (batch, time) = config.num_experts_per_token, config.num_experts, inputs.valid_BT.shape
    fair_B = config.options.capacity_factor * k / num_experts * inputs.valid_BT.sum(-1)
    slots_B = jnp.ceil(fair_B - ROUNDING).astype(jnp.int32)
    ranked_BTE = select.top_k(logits_BTE, num_experts).expert_BTK
    draw_BTK = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (k,))))(select.token_keys(inputs))
    # By segment and position; a packed sequence has its tokens in this order already.
    place_BT = inputs.segment_ids_BT * time + jnp.minimum(inputs.positions_BT, time - 1)
    iota_BT = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time))
    _, order_BT = jax.lax.sort((place_BT, iota_BT), dimension=1, num_keys=1)
    return jax.vmap(_queue)(ranked_BTE, draw_BTK, order_BT, inputs.valid_BT, slots_B)


def _queue(ranked_TE: Array, draw_TK: Array, order_T: Array, valid_T: Array, slots: Array) -> Array:
    """One sequence, token after token. A draw in [0, 1) is a place among the experts with room, best first."""
    num_experts, num_choices = ranked_TE.shape[1], draw_TK.shape[1]

    def token(load_E: Array, t: Array) -> tuple[Array, Array]:
        ranked_E, expert_K = ranked_TE[t], ranked_TE[t, :num_choices]
        for k in range(num_choices):
            open_E = (load_E[ranked_E] < slots) & ~jnp.any(expert_K[:, None] == ranked_E, axis=0)
            drawn = (draw_TK[t, k] * open_E.sum()).astype(jnp.int32)
            other = jnp.sum(jnp.where(open_E & (jnp.cumsum(open_E) == drawn + 1), ranked_E, 0))
            other = jnp.where(jnp.any(open_E), other, num_experts)
            expert_K = expert_K.at[k].set(jnp.where(load_E[expert_K[k]] < slots, expert_K[k], other))
        return load_E.at[expert_K].add(valid_T[t].astype(jnp.int32), mode="drop"), expert_K

    _, expert_OK = jax.lax.scan(token, jnp.zeros(num_experts, jnp.int32), order_T)
    return jnp.zeros_like(expert_OK).at[order_T].set(expert_OK)


ROUTER = Router(
    about=About(
        year=2024,
        paper="Sun et al., Hunyuan-Large, 2411.02265",
        score="softmax",
        selection="K largest logits; where an expert is full, a random one with room; no limit in evaluation",
        weights="softmax probability as it is",
        balance="slots in the order of tokens, auxiliary loss",
        weight_sum="at_most_one",
        random=True,
        losses=losses.GATE_LOSSES,
    ),
    route=route,
    options=Options,
    init=linear_init,
    check=lambda config: rules.at_least("capacity_factor", config.options.capacity_factor, 1),
    cases=((1, {"capacity_factor": 1.3}),),
)
