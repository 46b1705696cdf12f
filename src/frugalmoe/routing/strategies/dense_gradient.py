"""Top K forwards, all experts backwards: the router's gradient is that of the dense mixture.

DenseMixer (Yao et al., 2025, a straight-through estimator): the output is sum over the K largest of p_e f_e(x), with p
the softmax over all experts; the gradient of p is taken as if y were sum over all experts of p_e f_e(x). Experts, and
x through them, get the gradient of the output as it is.

In training every expert runs on every token: E / K times the layer's work on top of it (a train step of a small model
with K = 2 of 16 experts took 2.0 to 2.4 times as long as `topk_softmax`). Evaluation costs nothing more.

Letters: B batch, T time, N tokens (B*T), D model, E experts, K choices.
"""

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing import gate, losses, select
from frugalmoe.routing.contract import (
    About,
    ExpertPlan,
    Inputs,
    Params,
    Router,
    Routing,
    State,
    clean,
    linear_init,
    linear_logits,
)
from frugalmoe.schema import MoE


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    logits_BTE = linear_logits(params, inputs)
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    choice = select.top_k(logits_BTE, config.num_experts_per_token)
    weight_BTK = jax.lax.stop_gradient(select.at(probs_BTE, choice.expert_BTK))
    routing = gate.routing(logits_BTE, probs_BTE, choice, weight_BTK, inputs, config)
    return routing._replace(added_BTD=gradient_alone(dense(probs_BTE, inputs))) if inputs.train else routing


def dense(probs_BTE: Array, inputs: Inputs) -> Array:
    """sum over all experts of p_e f_e(x), with a gradient for p alone."""
    x_ND = jax.lax.stop_gradient(clean(inputs)).reshape(-1, inputs.x_BTD.shape[-1])
    p_NE = jnp.where(inputs.valid_BT[..., None], probs_BTE, 0).reshape(x_ND.shape[0], -1)
    n_N = jnp.where(inputs.valid_BT.reshape(-1), jnp.arange(x_ND.shape[0], dtype=jnp.int32), x_ND.shape[0])
    plan = ExpertPlan(jnp.broadcast_to(n_N, p_NE.T.shape), p_NE.T)
    return inputs.run_experts(plan, x_ND).astype(jnp.float32).reshape(inputs.x_BTD.shape)


def gradient_alone(x: Array) -> Array:
    """Zeros that have the gradient of x."""
    return x - jax.lax.stop_gradient(x)


ROUTER = Router(
    about=About(
        year=2025,
        paper="Yao et al., DenseMixer: Improving MoE Post-Training with Precise Router Gradient, 2025",
        score="softmax",
        selection="K largest logits",
        weights="softmax probabilities as they are",
        balance="auxiliary loss",
        weight_sum="at_most_one",
        estimated_gradient=True,
        losses=losses.GATE_LOSSES,
    ),
    route=route,
    init=linear_init,
)
