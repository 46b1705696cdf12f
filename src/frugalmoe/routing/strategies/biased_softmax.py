"""gpt-oss's gate: `topk_softmax` of logits z = x W + b with a learned bias b per expert.

gpt-oss (2508.10925, section 2; as in its released model, Hugging Face `GptOssTopKRouter`): the K largest z, weights
softmax over the K. Options are those of `topk_softmax`; OpenAI's privacy filter, of the same make, has scale = 1 / K.
The bias is trained by the loss, unlike that of `sigmoid_bias`, and takes part in the weights.

Letters: D model, E experts.
"""

import jax.numpy as jnp
from jax import Array

from frugalmoe.routing import losses
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
)
from frugalmoe.routing.strategies import topk_softmax
from frugalmoe.schema import MoE


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    biased = inputs._replace(logit_map=lambda logits_BTE: logits_BTE + params["bias_E"])
    return topk_softmax.route(params, state, biased, config)


def init(key: Array, dim: int, config: MoE) -> NewParams:
    bias_E = declare(jnp.zeros(config.num_experts, jnp.float32), "E")
    return {**linear_init(key, dim, config), "bias_E": bias_E}


ROUTER = Router(
    about=About(
        year=2025,
        paper="OpenAI, gpt-oss-120b & gpt-oss-20b Model Card, 2508.10925, section 2; released model",
        score="softmax",
        selection="K largest logits, with a learned bias per expert",
        weights="softmax probabilities, renormalised over the K or as they are",
        balance="auxiliary loss",
        weight_sum=topk_softmax.weight_sum,
        losses=losses.GATE_LOSSES,
    ),
    route=route,
    options=topk_softmax.Options,
    init=init,
    check=topk_softmax.check,
)
