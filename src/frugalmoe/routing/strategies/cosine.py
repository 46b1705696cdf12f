"""Cosine gate: an expert's logit is the cosine of the projected token and the expert's vector, over a temperature.

X-MoE (Chi et al., 2204.09179): z_e = cos(W x, v_e) / tau in a space of few dimensions, so that neither the length of a
token nor that of an expert's vector counts; tau is learned and kept above `min_temperature` (0.01 in Tutel's code,
where it starts at 0.5). Weights as those of topk_softmax (X-MoE takes one expert).

Letters: B batch, T time, D model, P projection, E experts, K choices.
"""

import dataclasses
import math

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
    clean,
    declare,
    linear_logits,
    normal,
)
from frugalmoe.schema import MoE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    projection: int = 64  # dimensions in which cosines are taken
    temperature: float = 0.5  # tau before the first step
    min_temperature: float = 0.01  # tau is kept above this
    renormalize: bool = True  # weights of the K experts sum to 1


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    options: Options = config.options
    logits_BTE = logits(params, inputs, options)
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    choice = select.top_k(logits_BTE, config.num_experts_per_token)
    weight_BTK = gate.weights(logits_BTE, probs_BTE, choice.expert_BTK, options.renormalize)
    return gate.routing(logits_BTE, probs_BTE, choice, weight_BTK, inputs, config)


def logits(params: Params, inputs: Inputs, options: Options) -> Array:
    high = jax.lax.Precision.HIGHEST
    z_BTP = jnp.einsum("btd,dp->btp", clean(inputs), params["projection_DP"], precision=high)
    inverse = jnp.exp(jnp.minimum(params["log_inverse_temperature"], -math.log(options.min_temperature)))
    kernel = {"kernel_DE": gate.on_sphere(params["expert_PE"], axis=0) * inverse}
    return linear_logits(kernel, inputs._replace(x_BTD=gate.on_sphere(z_BTP)))


def init(key: Array, dim: int, config: MoE) -> NewParams:
    options: Options = config.options
    project_key, expert_key = jax.random.split(key)
    size = options.projection
    return {
        "projection_DP": normal(project_key, "DP", (dim, size), dim**-0.5),
        "expert_PE": normal(expert_key, "PE", (size, config.num_experts), size**-0.5),
        "log_inverse_temperature": declare(jnp.full((), -math.log(options.temperature), jnp.float32), ""),
    }


def check(config: MoE) -> str | None:
    options: Options = config.options
    return rules.first(
        rules.at_least("projection", options.projection, 1),
        rules.positive("min_temperature", options.min_temperature),
        rules.at_least("temperature", options.temperature, options.min_temperature),
        rules.gradient_at_one(config, options.renormalize, "set options.renormalize=False"),
    )


ROUTER = Router(
    about=About(
        year=2022,
        paper="Chi et al., On the Representation Collapse of Sparse Mixture of Experts, 2204.09179",
        score="softmax",
        selection="K largest cosines in a projected space",
        weights="softmax of cosines over a learned temperature, renormalized or not",
        balance="auxiliary loss",
        weight_sum=lambda config: 1.0 if config.options.renormalize else "at_most_one",
        losses=losses.GATE_LOSSES,
    ),
    route=route,
    options=Options,
    init=init,
    check=check,
    cases=((1, {"projection": 4, "renormalize": False}),),
)
