"""Latent prototype routing: a non-linear encoder, one prototype per expert in its latent space, cosine similarity.

LPR (Yang, 2506.21328; public code RANDO11199/LatentPrototypeRouter): latent mu = W SiLU(LayerNorm(x)) + b of few
dimensions, the K prototypes with the largest cosine to it, weights softmax of the K cosines over `temperature` (1 in
the code). Balance comes from three losses that shape the space; name them in `model.moe.losses`:

| loss | what it is |
|---|---|
| prototype_diversity | mean over pairs of experts of (cosine of their prototypes - [same expert])^2 |
| prototype_alignment | weighted mean of |prototype - latent|^2 over a token's experts, on the sphere |
| latent_kl | KL divergence of N(mu, 1) from N(0, 1): |mu|^2 / 2 |

What differs from the code, all of it:

- its experts see x plus a learned projection of the prototypes' mean, weighted by softmax of all E cosines; here x;
- its LayerNorm has a learned scale and offset; here none, since the layer's own norm has a scale;
- its encoder gives a variance too: the mean chooses, the mean plus noise is what prototypes are aligned to, and the KL
  term has the variance; here nothing but that term would train one, so there is none, and no noise;
- its prototypes start as normal vectors, on the sphere by an option only; here on the sphere;
- diversity: its sum has the same term of the latents of all pairs of tokens, which couples a batch; here left out;
- alignment: its term is the mean absolute difference, off the sphere, between a prototype and the sum (not the mean) of
  all tokens' latents, weighted by softmax over all E with cosine 0 for those not chosen, and it moves prototypes alone;
- its losses have the fixed factors 1 (diversity), 0.05 to 0.1 (alignment) and 0.01 (KL), times 0.01, and its balance
  loss the coefficient 0; here the config says;
- left out: other similarities, distances between distributions, and the moving average of prototypes, which the code
  has and does not call.

Letters: B batch, T time, D model, P latent, E experts (i, j two of them), K choices.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing import gate, losses, rules, select
from frugalmoe.routing.contract import (
    About,
    Inputs,
    Loss,
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

EPS = 1e-6
LOSSES = ("prototype_diversity", "prototype_alignment", "latent_kl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    latent: int = 16  # dimensions of the latent space
    temperature: float = 1.0  # of the cosines


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    latent_BTP = encode(params, inputs)
    prototype_PE = gate.on_sphere(params["prototype_PE"], axis=0)
    unit = inputs._replace(x_BTD=gate.on_sphere(latent_BTP))
    logits_BTE = linear_logits({"kernel_DE": prototype_PE / config.options.temperature}, unit)
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    choice = select.top_k(logits_BTE, config.num_experts_per_token)
    weight_BTK = gate.weights(logits_BTE, probs_BTE, choice.expert_BTK, renormalize=True)
    routing = gate.routing(logits_BTE, probs_BTE, choice, weight_BTK, inputs, config)
    shape = {
        "prototype_diversity": diversity(prototype_PE, inputs),
        "prototype_alignment": alignment(unit.x_BTD, prototype_PE, choice.expert_BTK, weight_BTK, inputs),
        "latent_kl": _per_token(jnp.sum(jnp.square(latent_BTP), axis=-1) / 2, inputs),
    }
    return routing._replace(losses={**routing.losses, **shape})


def encode(params: Params, inputs: Inputs) -> Array:
    x_BTD = clean(inputs)
    x_BTD = x_BTD - x_BTD.mean(-1, keepdims=True)
    x_BTD = x_BTD * jax.lax.rsqrt(jnp.mean(jnp.square(x_BTD), axis=-1, keepdims=True) + EPS)
    high = jax.lax.Precision.HIGHEST
    return jnp.einsum("btd,dp->btp", jax.nn.silu(x_BTD), params["encoder_DP"], precision=high) + params["bias_P"]


def diversity(prototype_PE: Array, inputs: Inputs) -> Loss:
    """One number for the layer, as a mean over tokens: so it counts once whatever the shards and micro-batches."""
    cosine_ij = jnp.einsum("pi,pj->ij", prototype_PE, prototype_PE, precision=jax.lax.Precision.HIGHEST)
    value = jnp.mean(jnp.square(cosine_ij - jnp.eye(cosine_ij.shape[0])))
    return _per_token(jnp.broadcast_to(value, inputs.valid_BT.shape), inputs)


def alignment(unit_BTP: Array, prototype_PE: Array, expert_BTK: Array, weight_BTK: Array, inputs: Inputs) -> Loss:
    """|a - b|^2 = 2 - 2 cosine for vectors of length 1."""
    cosine_BTE = jnp.einsum("btp,pe->bte", unit_BTP, prototype_PE, precision=jax.lax.Precision.HIGHEST)
    return _per_token(jnp.sum(weight_BTK * (2 - 2 * select.at(cosine_BTE, expert_BTK)), axis=-1), inputs)


def _per_token(value_BT: Array, inputs: Inputs) -> Loss:
    return Loss(jnp.sum(value_BT, where=inputs.valid_BT), "token")


def init(key: Array, dim: int, config: MoE) -> NewParams:
    """Prototypes at random on the sphere."""
    encoder_key, prototype_key = jax.random.split(key)
    size = config.options.latent
    return {
        "encoder_DP": normal(encoder_key, "DP", (dim, size), dim**-0.5),
        "bias_P": declare(jnp.zeros(size, jnp.float32), "P"),
        "prototype_PE": declare(gate.on_sphere(jax.random.normal(prototype_key, (size, config.num_experts)), 0), "PE"),
    }


def check(config: MoE) -> str | None:
    options: Options = config.options
    return rules.first(
        rules.at_least("latent", options.latent, 2),
        rules.positive("temperature", options.temperature),
        rules.gradient_at_one(config, True, "use cosine with options.renormalize=False"),
    )


ROUTER = Router(
    about=About(
        year=2025,
        paper="Yang, Latent Prototype Routing, 2506.21328",
        score="softmax",
        selection="K prototypes nearest to the encoded token",
        weights="softmax of the K cosines",
        balance="diversity, alignment and KL losses of the latent space",
        weight_sum=1.0,
        losses=(*losses.GATE_LOSSES, *LOSSES),
    ),
    route=route,
    options=Options,
    init=init,
    check=check,
    cases=((3, {"latent": 4, "temperature": 0.1}),),
)
