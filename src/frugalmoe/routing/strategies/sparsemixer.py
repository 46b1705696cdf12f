"""SparseMixer-v2: experts are sampled in training, and the gate's gradient estimates that of the sampling.

GRIN (Liu et al., 2409.12136; public code microsoft/SparseMixer). One slot after the other, among the experts not taken
yet: those whose logit is too far below the largest, z_max - z_e > 2 eps max(|z_e|, z_max), are left out; p = softmax
over the rest; the expert s is drawn from p in training and is the largest in evaluation. Its weight is c p_s: c = 1 in
evaluation and where s is the largest; else c is 1 with probability 1/4 and 1/3 with probability 3/4.
The gradient is that of p_s, whatever c. Let g(w) be the loss as a function of the weight of s: by the quadrature
g(p) - g(0) = p (g'(p)/4 + 3 g'(p/3)/4), exact for a cubic g, its mean over draws is sum_s g_s(p_s) dp_s, the gradient
of the expected loss through the probabilities of the draw. The largest expert keeps the first-order term, and
so the weight that it has in evaluation. It is no slope of the value: `estimated_gradient`.

K slots are K softmaxes, one after the other (the paper has K = 2).

Letters: B batch, T time, E experts, K choices.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing import gate, losses, rules, select
from frugalmoe.routing.contract import About, Inputs, Params, Router, Routing, State, linear_init, linear_logits
from frugalmoe.schema import MoE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    epsilon: float = 0.1  # experts further than 2 * epsilon below the largest, as a share of it, are not drawn


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    logits_BTE = linear_logits(params, inputs)
    taken_BTE, experts, weights = jnp.zeros(logits_BTE.shape, bool), [], []
    for slot in range(config.num_experts_per_token):
        keys_BT = jax.vmap(jax.vmap(lambda key, slot=slot: jax.random.fold_in(key, slot)))(select.token_keys(inputs))
        expert_BT, weight_BT = take(logits_BTE, taken_BTE, keys_BT, config.options.epsilon, inputs.train)
        taken_BTE |= expert_BT[..., None] == jnp.arange(config.num_experts)
        experts.append(expert_BT)
        weights.append(weight_BT)
    tied_BT = select.top_k(logits_BTE, config.num_experts_per_token).tied_BT
    choice = select.Choice(jnp.stack(experts, axis=-1), tied_BT)
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    return gate.routing(logits_BTE, probs_BTE, choice, jnp.stack(weights, axis=-1), inputs, config)


def take(logits_BTE: Array, taken_BTE: Array, keys_BT: Array, epsilon: float, train: bool) -> tuple[Array, Array]:
    """One slot: (expert [B, T], weight [B, T])."""
    open_BTE = jnp.where(taken_BTE, -jnp.inf, logits_BTE)
    fixed_BTE = jax.lax.stop_gradient(logits_BTE)
    top_BT1 = jnp.max(jax.lax.stop_gradient(open_BTE), axis=-1, keepdims=True)
    far_BTE = top_BT1 - fixed_BTE > 2 * epsilon * jnp.maximum(jnp.abs(fixed_BTE), top_BT1)
    near_BTE = jnp.where(far_BTE, -jnp.inf, open_BTE)
    probs_BTE = jax.nn.softmax(near_BTE, axis=-1)
    largest_BT1 = select.top_k(near_BTE, 1).expert_BTK
    if not train:
        return largest_BT1[..., 0], select.at(probs_BTE, largest_BT1)[..., 0]
    drawn_BT1, coin_BT1 = _draw(near_BTE, keys_BT)
    prob_BT1 = select.at(probs_BTE, drawn_BT1)
    factor_BT1 = jnp.where((drawn_BT1 == largest_BT1) | coin_BT1, 1.0, 1 / 3)
    weight_BT1 = prob_BT1 + jax.lax.stop_gradient((factor_BT1 - 1) * prob_BT1)
    return drawn_BT1[..., 0], weight_BT1[..., 0]


def _draw(logits_BTE: Array, keys_BT: Array) -> tuple[Array, Array]:
    """An expert drawn from softmax(logits), the largest after Gumbel noise; a coin that is true one time in four."""
    num_experts = logits_BTE.shape[-1]
    numbers = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (num_experts + 1,), minval=1e-7)))(keys_BT)
    gumbel_BTE = -jnp.log(-jnp.log(numbers[..., :num_experts]))
    return select.top_k(logits_BTE + gumbel_BTE, 1).expert_BTK, numbers[..., num_experts:] > 0.75


ROUTER = Router(
    about=About(
        year=2024,
        paper="Liu et al., GRIN: GRadient-INformed MoE, 2409.12136",
        score="softmax",
        selection="drawn one by one from the softmax of the nearly largest; the largest in evaluation",
        weights="probability in the draw, a third of it at random",
        balance="auxiliary loss",
        random=True,
        estimated_gradient=True,
        losses=losses.GATE_LOSSES,
    ),
    route=route,
    options=Options,
    init=linear_init,
    check=lambda config: rules.positive("epsilon", config.options.epsilon),
    cases=((1, {"epsilon": 10.0}),),
)
