"""Normalized gating logits and a balance loss as strong as the drops demand: Skywork-MoE.

Wei et al. (2406.06563). The softmax is over lambda * (z - mean z) / std z, mean and std over the experts of
one token: how sharp the gate is no longer depends on the size of its weights. (The variance has 1e-6 added, so that
equal logits stay equal: logits of a deviation near 1e-3 and below are not scaled up to lambda.)

The balance loss of a layer has the strength alpha, an average over steps of what the drop rate d asks for:
alpha <- decay * alpha + (1 - decay) * min(xi * d, alpha_max), with xi = 1/5, alpha_max = 0.01, decay = 0.99. Here
alpha / alpha_max is state, `gain` is xi / alpha_max, and alpha_max is the coefficient of the loss `adaptive_balance`:
the paper's recipe is `model.moe.losses.adaptive_balance=0.01 model.moe.losses.load_balance=0`. The average starts at 0.

d is the share of slots that `executor=capacity` dropped. Other executors drop none; then it is what a capacity of
`model.moe.capacity_factor` * mean load would drop, were the whole batch one queue per expert. Rows that a limited
`exchange_room` loses do not count.

Letters: B batch, T time, E experts, K choices.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing import gate, losses, rules, select
from frugalmoe.routing.contract import About, Inputs, Params, Router, Routing, State, linear_init, linear_logits
from frugalmoe.schema import MoE

EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    logit_std: float = 1.0  # lambda, the standard deviation of the normalized logits
    renormalize: bool = True  # weights of the K experts sum to 1
    gain: float = 20.0  # the balance loss has its full strength from a drop rate of 1 / gain
    decay: float = 0.99  # of the average over steps


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    options: Options = config.options
    raw_BTE = linear_logits(params, inputs)
    logits_BTE = options.logit_std * standardized(raw_BTE)
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    choice = select.top_k(logits_BTE, config.num_experts_per_token)
    weight_BTK = gate.weights(logits_BTE, probs_BTE, choice.expert_BTK, options.renormalize)
    routing = gate.routing(raw_BTE, probs_BTE, choice, weight_BTK, inputs, config)
    balance, strength = routing.losses["load_balance"], jax.lax.stop_gradient(state["strength_1"][0])
    adaptive = dataclasses.replace(balance, sum=strength * balance.sum)
    return routing._replace(losses={**routing.losses, "adaptive_balance": adaptive})


def standardized(z_BTE: Array) -> Array:
    """(z - mean) / std over the last axis, the variance from the differences: a common offset loses no digit of it."""
    apart_BTE = z_BTE - z_BTE.mean(-1, keepdims=True)
    return apart_BTE * jax.lax.rsqrt(jnp.mean(jnp.square(apart_BTE), axis=-1, keepdims=True) + EPS)


def init_state(dim: int, config: MoE) -> State:
    """alpha / alpha_max, in [0, 1]; an array of one entry, as checkpoints have it."""
    return {"strength_1": jnp.zeros(1, jnp.float32)}


def update(state: State, batch_stats: Mapping[str, Array], config: MoE) -> State:
    wanted = jnp.minimum(config.options.gain * drop_rate(batch_stats, config), 1)
    return {"strength_1": config.options.decay * state["strength_1"] + (1 - config.options.decay) * wanted}


def drop_rate(batch_stats: Mapping[str, Array], config: MoE) -> Array:
    counts_E = batch_stats["counts"].astype(jnp.float32)
    if config.executor == "capacity":
        dropped = batch_stats["dropped"]
    else:
        dropped = jnp.maximum(counts_E - config.capacity_factor * counts_E.mean(), 0).sum()
    return dropped / jnp.maximum(counts_E.sum(), 1)


def check(config: MoE) -> str | None:
    o = config.options
    return rules.first(
        rules.positive("logit_std", o.logit_std),
        rules.at_least("gain", o.gain, 0),
        rules.decay("decay", o.decay),
        rules.gradient_at_one(config, o.renormalize, "set options.renormalize=False"),
    )


ROUTER = Router(
    about=About(
        year=2024,
        paper="Wei et al., Skywork-MoE, 2406.06563",
        score="softmax",
        selection="K largest logits",
        weights="softmax probabilities of normalized logits, renormalized over the K or as they are",
        balance="auxiliary loss, its strength from the drop rate",
        weight_sum=lambda config: 1.0 if config.options.renormalize else "at_most_one",
        stateful=True,
        losses=(*losses.GATE_LOSSES, "adaptive_balance"),
    ),
    route=route,
    options=Options,
    init=linear_init,
    init_state=init_state,
    update=update,
    # An average over steps of what the drop rate asks for.
    merges={"strength_1": "mean"},
    check=check,
    cases=((1, {"renormalize": False, "logit_std": 2.0}),),
)
