"""Gemma 4's gate: the input's direction alone chooses, and every expert has a learned scale of its own.

With r = x / rms(x) / sqrt(D) * s for a learned scale s per channel: z = r W, p = softmax(z), the K largest, weights
a_e * p_e / sum_K p, with a learned scale a_e per expert after the renormalization (public code of google-deepmind/gemma
and of Hugging Face's gemma4).

What differs: Gemma's gate sees the residual stream before the norm that its experts see, ours the layer's normed input,
whose learned channel scale is then part of the gate's. Gemma takes an approximate top K on accelerators.

Letters: B batch, T time, D model, E experts, K choices.
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
    clean,
    declare,
    linear_logits,
    normal,
)
from frugalmoe.schema import MoE


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    direction_BTD = gate.on_sphere(clean(inputs))  # x / rms(x) / sqrt(D)
    logits_BTE = linear_logits(params, inputs._replace(x_BTD=direction_BTD * params["scale_D"]))
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    choice = select.top_k(logits_BTE, config.num_experts_per_token)
    weight_BTK = gate.weights(logits_BTE, probs_BTE, choice.expert_BTK, renormalize=True)
    weight_BTK = weight_BTK * params["output_scale_E"][choice.expert_BTK]
    return gate.routing(logits_BTE, probs_BTE, choice, weight_BTK, inputs, config)


def init(key: Array, dim: int, config: MoE) -> NewParams:
    """Logits of about unit variance: the gate's inputs have length 1, so its kernel has std 1."""
    return {
        "kernel_DE": normal(key, "DE", (dim, config.num_experts), 1.0),
        "scale_D": declare(jnp.ones(dim, jnp.float32), "D"),
        "output_scale_E": declare(jnp.ones(config.num_experts, jnp.float32), "E"),
    }


ROUTER = Router(
    about=About(
        year=2026,
        paper="Gemma 4 (public code: google-deepmind/gemma, transformers)",
        score="softmax",
        selection="K largest logits of the RMS-normalized input",
        weights="softmax over the K, times a learned scale per expert",
        balance="auxiliary loss",
        losses=losses.GATE_LOSSES,
    ),
    route=route,
    init=init,
    check=lambda config: rules.gradient_at_one(config, True, "use topk_softmax with options.renormalize=False"),
)
