"""Expert choice: each expert takes the C tokens of a sequence that it scores highest.

Zhou et al. (2202.09368, section 3.2), with the sequence as the pool of tokens and C = capacity_factor * n * K / E for a
sequence of n valid tokens. The load is balanced by construction. A token's place in the ranking depends on later
tokens, so the training loss of a language model reads the future: a reference for leakage studies, not for
generation, where each call ranks only the tokens it is given.

Letters: B batch, T time, N tokens (B*T), E experts, K choices, C slots per expert and sequence.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.config.schema import MoE
from frugalmoe.routing import losses, rules, stats
from frugalmoe.routing.contract import (
    About,
    ExpertPlan,
    Inputs,
    Params,
    Router,
    Routing,
    State,
    linear_init,
    linear_logits,
)

ROUNDING = 1e-4  # a capacity this little above an integer is that integer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    capacity_factor: float = 1.0  # experts per token, on average, over num_experts_per_token


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    logits_BTE = linear_logits(params, inputs)
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    plan = choose(probs_BTE, inputs.valid_BT, config)
    load_BE = stats.load(plan, inputs, config.num_experts)
    return Routing(
        plan,
        {"z": losses.z(logits_BTE, inputs)},
        stats.of_layer(load_BE, inputs, logits_BTE=logits_BTE, probs_BTE=probs_BTE),
    )


def choose(probs_BTE: Array, valid_BT: Array, config: MoE) -> ExpertPlan:
    """Slots beyond a sequence's own capacity (it has padding) are empty, so that padding changes nothing."""
    batch, time, num_experts = probs_BTE.shape
    ratio = config.options.capacity_factor * config.num_experts_per_token / num_experts
    slots = min(time, math.ceil(time * ratio - ROUNDING))
    rank_BET = jnp.where(valid_BT[..., None], jax.lax.stop_gradient(probs_BTE), -1).swapaxes(1, 2)
    _, t_BEC = jax.lax.top_k(rank_BET, slots)
    weight_BEC = jnp.take_along_axis(probs_BTE.swapaxes(1, 2), t_BEC, axis=-1)
    tokens_B = valid_BT.sum(-1)
    slots_B = jnp.minimum(tokens_B, jnp.ceil(tokens_B * ratio - ROUNDING))
    full_BEC = jnp.broadcast_to(jnp.arange(slots) < slots_B[:, None, None], t_BEC.shape)
    n_BEC = jnp.where(full_BEC, t_BEC + time * jnp.arange(batch)[:, None, None], batch * time).astype(jnp.int32)
    return ExpertPlan(_by_expert(n_BEC), _by_expert(jnp.where(full_BEC, weight_BEC, 0)))


def _by_expert(x_BEC: Array) -> Array:
    """[B, E, C] -> [E, B*C]."""
    return x_BEC.swapaxes(0, 1).reshape(x_BEC.shape[1], -1)


ROUTER = Router(
    about=About(
        year=2022,
        paper="Zhou et al., Mixture-of-Experts with Expert Choice Routing, 2202.09368, section 3.2",
        score="softmax",
        selection="each expert's C best tokens of the sequence",
        weights="softmax probability as it is",
        balance="by construction",
        causal="leak",
        form="expert",
        losses=("z",),
    ),
    route=route,
    options=Options,
    init=linear_init,
    check=lambda config: rules.positive("capacity_factor", config.options.capacity_factor),
)
