"""Identity choices whose share a bias controls: LongCat-Flash.

LongCat-Flash (2509.01322, section 2.1): Z choices that put out x join the E experts. Selection: the K largest of
p + b with p the softmax over all; weights: scale * p, not renormalized. The bias moves once per optimizer step, for
experts alone (eq. 3): b_i += mu * (K_e / (K * E) - T_i / (K * T)), with T_i the tokens that picked expert i, T all
tokens and K_e the wanted mean number of experts per token. Identity choices keep b = 0, so that an excess of experts
lowers all their biases. Its loss over groups of devices, in which the identity choices are a group of their own, is
not here: `device_balance` sees experts alone, the other losses count all choices alike.

Letters: B batch, T time, E experts, Z identity choices, X = E + Z, K choices.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing import losses, rules, select, stats, zero_cost
from frugalmoe.routing.contract import About, Inputs, Params, Router, Routing, State, clean
from frugalmoe.schema import MoE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    num_identity: int = 4  # identity choices; half the experts in LongCat-Flash
    mean_experts: float = 0.0  # K_e, experts per token on average; 0: their share of the choices, K * E / (E + Z)
    scale: float = 1.0  # factor on all weights
    update_rate: float = 1e-3  # mu; 0 freezes the bias


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    num_experts, options = config.num_experts, config.options
    num_choices = num_experts + options.num_identity
    logits_BTX = zero_cost.linear_logits(params, inputs)
    probs_BTX = jax.nn.softmax(logits_BTX, axis=-1)
    bias_X = jnp.pad(jax.lax.stop_gradient(state["bias_E"]), (0, options.num_identity))
    choice = select.top_k(probs_BTX + bias_X, config.num_experts_per_token)
    weight_BTK = options.scale * select.at(probs_BTX, choice.expert_BTK)
    g_BTZ = zero_cost.weights(choice.expert_BTK, weight_BTK, inputs, num_experts, num_choices)
    added_BTD = g_BTZ.sum(-1, keepdims=True) * clean(inputs)
    load_BX = stats.load_of_choices(choice.expert_BTK, inputs, num_choices)
    by_score = select.top_k(probs_BTX, config.num_experts_per_token)
    scored_BX = stats.load_of_choices(by_score.expert_BTK, inputs, num_choices)
    named = {"balanced_BX": load_BX, "added_BTD": added_BTD, "scored_BX": scored_BX}
    return zero_cost.finish(logits_BTX, choice, weight_BTK, inputs, config, **named)


def mean_experts(config: MoE) -> float:
    """K_e, as given or in proportion."""
    share = config.num_experts / (config.num_experts + config.options.num_identity)
    return config.options.mean_experts or config.num_experts_per_token * share


def update(state: State, batch_stats: Mapping[str, Array], config: MoE) -> State:
    k, tokens = config.num_experts_per_token, jnp.maximum(batch_stats["tokens"], 1).astype(jnp.float32)
    wanted = mean_experts(config) / (k * config.num_experts)
    share_E = batch_stats["counts"].astype(jnp.float32) / (k * tokens)
    return {"bias_E": state["bias_E"] + config.options.update_rate * (wanted - share_E)}


def check(config: MoE) -> str | None:
    o, k = config.options, config.num_experts_per_token
    few = f"options.mean_experts={o.mean_experts}: must be at most num_experts_per_token={k}"
    return rules.first(
        rules.at_least("num_identity", o.num_identity, 1),
        rules.at_least("mean_experts", o.mean_experts, 0),
        None if o.mean_experts <= k else few,
        rules.positive("scale", o.scale),
        rules.at_least("update_rate", o.update_rate, 0),
    )


ROUTER = Router(
    about=About(
        year=2025,
        paper="Meituan LongCat, LongCat-Flash Technical Report, 2509.01322, section 2.1, eq. 1-3",
        score="softmax",
        selection="K largest of probability + bias, of experts and identity choices",
        weights="softmax probabilities times a scale, as they are",
        balance="bias of the experts, moved in proportion to the error of their share",
        stateful=True,
        losses=losses.GATE_LOSSES,
    ),
    route=route,
    options=Options,
    init=lambda key, dim, config: zero_cost.linear_init(key, dim, config.num_experts + config.options.num_identity),
    init_state=lambda dim, config: {"bias_E": jnp.zeros(config.num_experts, jnp.float32)},
    update=update,
    # A step adds to it: the mean of replicas adds the mean step.
    merges={"bias_E": "mean"},
    check=check,
    cases=((3, {"num_identity": 6, "mean_experts": 1.5, "scale": 2.0}),),
)
