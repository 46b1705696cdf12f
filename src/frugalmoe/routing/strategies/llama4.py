"""Llama 4's gate: the expert of the largest logit z, fed with sigmoid(z) * x instead of weighted by it.

Meta's Llama 4 (2025; no paper; as in its released model, Hugging Face `Llama4TextMoe`): y = f_e(sigmoid(z_e) * x). An
expert is not linear, so that this is not sigmoid(z_e) * f_e(x): SwiGLU's output shrinks about as the square of a small
score. The scale carries the router's only gradient from the language model.

Letters: B batch, T time, E experts.
"""

import jax
import jax.numpy as jnp

from frugalmoe.routing import gate, losses, select
from frugalmoe.routing.contract import About, Inputs, Params, Router, Routing, State, linear_init, linear_logits
from frugalmoe.schema import MoE


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    logits_BTE = linear_logits(params, inputs)
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    choice = select.top_k(logits_BTE, 1)
    routing = gate.routing(logits_BTE, probs_BTE, choice, jnp.ones(choice.expert_BTK.shape), inputs, config)
    return routing._replace(input_scale_BT=jax.nn.sigmoid(select.at(logits_BTE, choice.expert_BTK)[..., 0]))


def check(config: MoE) -> str | None:
    k = config.num_experts_per_token
    return None if k == 1 else f"num_experts_per_token={k}: must be 1, because a token has one input scale"


ROUTER = Router(
    about=About(
        year=2025,
        paper="Meta, Llama 4, released model (Hugging Face transformers, Llama4TextMoe)",
        score="sigmoid",
        selection="largest logit",
        weights="1; the sigmoid of the logit scales the expert's input",
        balance="auxiliary loss",
        weight_sum=1.0,
        losses=losses.GATE_LOSSES,
    ),
    route=route,
    init=linear_init,
    check=check,
)
