"""Noisy top-K gating: the first sparsely-gated layer, with noise whose size is learned.

Shazeer et al. (1701.06538, eq. 3-5; importance, eq. 6-7; load, appendix A, eq. 8-11). In training, with eps normal
noise per token and expert,

    h = x W_g + eps * (softplus(x W_n) + 0.01),  weights = softmax over the K largest of h;

in evaluation h = x W_g. The 0.01 is not in the paper: no gate can turn its noise off, and `load` stays smooth. W_n
starts at zero as in the paper; W_g does not, since equal logits would all go to the lowest expert ids.

Losses, of each group of `model.moe.load_balance_scope` (the paper's is the batch: `global`), with the squared
coefficient of variation over experts CV^2 = variance / mean^2:

- importance: CV^2 of the summed weights;
- load: CV^2 of the summed P(e), the probability that e is chosen if only its own noise is drawn again:
  Phi((x W_g - kth largest of the other h) / noise size). It has a gradient where the counts have none.

The paper weighs each by 0.1: `model.moe.losses.importance=0.1 model.moe.losses.load=0.1`.

Letters: B batch, T time, D model, E experts, K choices, G groups of sequences.
"""

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing import gate, losses, rules, select
from frugalmoe.routing.contract import (
    About,
    Inputs,
    NewParams,
    Params,
    Router,
    Routing,
    State,
    declare,
    linear_init,
    linear_logits,
)
from frugalmoe.schema import MoE

LEAST_NOISE = 0.01


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    num_experts, k = config.num_experts, config.num_experts_per_token
    clean_BTE = linear_logits(params, inputs)
    size_BTE = jax.nn.softplus(linear_logits({"kernel_DE": params["noise_DE"]}, inputs)) + LEAST_NOISE
    noisy_BTE = clean_BTE
    if inputs.train:
        noisy_BTE += size_BTE * select.noise(inputs, lambda key: jax.random.normal(key, (num_experts,)))
    choice = select.top_k(noisy_BTE, k)
    weight_BTK = jax.nn.softmax(select.at(noisy_BTE, choice.expert_BTK), axis=-1)
    probs_BTE = jax.nn.softmax(clean_BTE, axis=-1)
    routing = gate.routing(clean_BTE, probs_BTE, choice, weight_BTK, inputs, config)
    weight_BTE = jnp.sum(jax.nn.one_hot(choice.expert_BTK, num_experts) * weight_BTK[..., None], axis=-2)
    chance_BTE = chances(clean_BTE, noisy_BTE, size_BTE, k)
    variations = {
        "importance": losses.variation(weight_BTE, inputs, config),
        "load": losses.variation(chance_BTE, inputs, config),
    }
    return routing._replace(losses={**routing.losses, **variations})


def chances(clean_BTE: Array, noisy_BTE: Array, size_BTE: Array, k: int) -> Array:
    """P(e is among the k largest) over e's own noise, that of the others as drawn (appendix A, eq. 8-9)."""
    best = jax.lax.top_k(noisy_BTE, k + 1)[0]
    last_in_BT1, first_out_BT1 = best[..., k - 1 : k], best[..., k:]
    bar_BTE = jnp.where(noisy_BTE > first_out_BT1, first_out_BT1, last_in_BT1)  # the k-th largest of the others
    return jax.scipy.stats.norm.cdf((clean_BTE - bar_BTE) / size_BTE)


def init(key: Array, dim: int, config: MoE) -> NewParams:
    gate = linear_init(key, dim, config)
    return {**gate, "noise_DE": declare(jnp.zeros((dim, config.num_experts), jnp.float32), "DE")}


def check(config: MoE) -> str | None:
    k, num_experts = config.num_experts_per_token, config.num_experts
    return rules.first(
        rules.gradient_at_one(config, True, "use switch_top1"),
        None if k < num_experts else f"num_experts_per_token={k}: must be less than num_experts={num_experts}",
    )


ROUTER = Router(
    about=About(
        year=2017,
        paper="Shazeer et al., Outrageously Large Neural Networks, 1701.06538, eq. 3-11",
        score="softmax",
        selection="K largest logits with noise of learned size",
        weights="softmax over the K noisy logits",
        balance="losses on importance and on a smooth load",
        weight_sum=1.0,
        random=True,
        losses=(*losses.GATE_LOSSES, "load"),
    ),
    route=route,
    init=init,
    check=check,
)
