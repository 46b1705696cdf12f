"""A gate that remembers earlier layers: a GRU runs over the layers of each token, and its state makes the logits.

RMoE (Qiu et al., 2408.06793, eq. 4-6): x' = P_l x, h_l = GRU(x', h_{l-1}), z = W_l h_l, then softmax and top K with
renormalised weights. The projection P_l and the gate W_l are the layer's own, the GRU is shared by all layers, h_0 = 0.
The recurrence crosses layers, never tokens, so that decoding needs no memory. The GRU (Cho et al., 1406.1078, with the
reset gate after the product, as in the released code), with x' and h of H channels:

    r = sigmoid(A_r x' + B_r h + b_r),  u = sigmoid(A_u x' + B_u h + b_u),  n = tanh(A_n x' + b_n + r * (B_n h + c_n))
    h_l = (1 - u) * n + u * h

Cost: D * H + 6 * H^2 multiplications per token and layer beside the gate's H * E, in full float32: at D = H = 128 a
train step took 1.18 times the CPU time of `topk_softmax`; the share falls as D grows with H fixed.

Letters: B batch, T time, D model, H channels of the GRU, G = 3H (reset, update, new), E experts.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
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
    project,
)
from frugalmoe.schema import MoE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    hidden: int = 128  # channels of the GRU


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    hidden_BTH = gru(params, project(clean(inputs), params["proj_DH"]), inputs.carry["hidden_BTH"])
    logits_BTE = project(hidden_BTH, params["kernel_HE"])
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    choice = select.top_k(logits_BTE, config.num_experts_per_token)
    weight_BTK = jax.nn.softmax(select.at(logits_BTE, choice.expert_BTK), axis=-1)
    routing = gate.routing(logits_BTE, probs_BTE, choice, weight_BTK, inputs, config)
    return routing._replace(carry={"hidden_BTH": hidden_BTH})


def gru(params: Params, x_BTH: Array, h_BTH: Array) -> Array:
    """The next state [B, T, H] of every token."""
    xr, xu, xn = jnp.split(project(x_BTH, params["input_HG"]) + params["input_bias_G"], 3, axis=-1)
    hr, hu, hn = jnp.split(project(h_BTH, params["state_HG"]), 3, axis=-1)
    update_BTH = jax.nn.sigmoid(xu + hu)
    new_BTH = jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * (hn + params["new_bias_H"]))
    return (1 - update_BTH) * new_BTH + update_BTH * h_BTH


def init(key: Array, dim: int, config: MoE) -> NewParams:
    proj_key, gate_key = jax.random.split(key)
    hidden = config.options.hidden
    return {
        "proj_DH": _normal(proj_key, "DR", (dim, hidden)),
        "kernel_HE": _normal(gate_key, "RE", (hidden, config.num_experts)),
    }


def init_shared(key: Array, dim: int, config: MoE) -> NewParams:
    input_key, state_key = jax.random.split(key)
    hidden = config.options.hidden
    return {
        "input_HG": _normal(input_key, "RG", (hidden, 3 * hidden)),
        "state_HG": _normal(state_key, "RG", (hidden, 3 * hidden)),
        "input_bias_G": declare(jnp.zeros(3 * hidden, jnp.float32), "G"),
        "new_bias_H": declare(jnp.zeros(hidden, jnp.float32), "R"),
    }


def _normal(key: Array, letters: str, shape: tuple[int, int]) -> nnx.Param:
    return declare(jax.random.normal(key, shape, jnp.float32) * shape[0] ** -0.5, letters)


def init_carry(config: MoE, batch: int, time: int) -> Carry:
    return {"hidden_BTH": jnp.zeros((batch, time, config.options.hidden), jnp.float32)}


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
