"""A gate that remembers earlier layers: a GRU runs over the layers of each token, and its state makes the logits.

RMoE (Qiu et al., 2408.06793, eq. 4-6): x' = P_l x, h_l = GRU(x', h_{l-1}), z = W_l h_l, then softmax and top K with
renormalized weights. The projection P_l and the gate W_l are the layer's own, the GRU is shared by all layers, h_0 = 0.
The recurrence crosses layers, never tokens, so that decoding needs no memory. The GRU (Cho et al., 1406.1078, with the
reset gate after the product, as in the released code), with x' and h of P channels:

    r = sigmoid(A_r x' + B_r h + b_r),  u = sigmoid(A_u x' + B_u h + b_u),  n = tanh(A_n x' + b_n + r * (B_n h + c_n))
    h_l = (1 - u) * n + u * h

Cost: D * P + 6 * P^2 multiplications per token and layer beside the gate's P * E, in full float32: at D = P = 128 a
train step took 1.18 times the CPU time of `topk_softmax`; the share falls as D grows with P fixed.

Letters: B batch, T time, D model, P channels of the GRU, W its gates (reset, update, new: 3P), E experts.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing import gate, losses, rules, select
from frugalmoe.routing.contract import (
    About,
    Carry,
    Inputs,
    NewParams,
    Params,
    Router,
    Routing,
    State,
    clean,
    declare,
    normal,
    project,
)
from frugalmoe.schema import MoE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    hidden: int = 128  # channels of the GRU


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    hidden_BTP = gru(params, project(clean(inputs), params["proj_DP"]), inputs.carry["hidden_BTP"])
    logits_BTE = project(hidden_BTP, params["kernel_PE"])
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    choice = select.top_k(logits_BTE, config.num_experts_per_token)
    weight_BTK = jax.nn.softmax(select.at(logits_BTE, choice.expert_BTK), axis=-1)
    routing = gate.routing(logits_BTE, probs_BTE, choice, weight_BTK, inputs, config)
    return routing._replace(carry={"hidden_BTP": hidden_BTP})


def gru(params: Params, x_BTP: Array, h_BTP: Array) -> Array:
    """The next state [B, T, P] of every token."""
    xr, xu, xn = jnp.split(project(x_BTP, params["input_PW"]) + params["input_bias_W"], 3, axis=-1)
    hr, hu, hn = jnp.split(project(h_BTP, params["state_PW"]), 3, axis=-1)
    update_BTP = jax.nn.sigmoid(xu + hu)
    new_BTP = jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * (hn + params["new_bias_P"]))
    return (1 - update_BTP) * new_BTP + update_BTP * h_BTP


def init(key: Array, dim: int, config: MoE) -> NewParams:
    proj_key, gate_key = jax.random.split(key)
    hidden = config.options.hidden
    return {
        "proj_DP": normal(proj_key, "DP", (dim, hidden), dim**-0.5),
        "kernel_PE": normal(gate_key, "PE", (hidden, config.num_experts), hidden**-0.5),
    }


def init_shared(key: Array, dim: int, config: MoE) -> NewParams:
    input_key, state_key = jax.random.split(key)
    hidden = config.options.hidden
    return {
        "input_PW": normal(input_key, "PW", (hidden, 3 * hidden), hidden**-0.5),
        "state_PW": normal(state_key, "PW", (hidden, 3 * hidden), hidden**-0.5),
        "input_bias_W": declare(jnp.zeros(3 * hidden, jnp.float32), "W"),
        "new_bias_P": declare(jnp.zeros(hidden, jnp.float32), "P"),
    }


def init_carry(config: MoE, batch: int, time: int) -> Carry:
    return {"hidden_BTP": jnp.zeros((batch, time, config.options.hidden), jnp.float32)}


def check(config: MoE) -> str | None:
    return rules.first(
        rules.at_least("hidden", config.options.hidden, 1),
        rules.gradient_at_one(config, True, "use more, or switch_top1"),
    )


ROUTER = Router(
    about=About(
        year=2024,
        paper="Qiu et al., Layerwise Recurrent Router for Mixture-of-Experts, 2408.06793, eq. 4-6",
        score="softmax",
        selection="K largest logits of a GRU over the layers",
        weights="softmax over the K",
        balance="auxiliary loss",
        weight_sum=1.0,
        losses=losses.GATE_LOSSES,
    ),
    route=route,
    options=Options,
    init=init,
    init_shared=init_shared,
    init_carry=init_carry,
    check=check,
)
