"""ZAYA1's gate: an MLP on a narrow state that layers hand on, and a skip choice that puts out nothing.

ZAYA1 (Zyphra, 2511.17127; as in its released model, Hugging Face `ZayaRouter`). With P channels and h_0 = 0:

    h_l = P_l x + b_l + s_l * h_(l-1),  z = W_3 gelu(W_2 gelu(W_1 (w * h / rms(h)) + c_1) + c_2),  p = softmax(z)

over the E experts and one choice more, which is no expert: a token that picks it skips the layer. Selection: the K
largest of p + bias; weights: p as it is, 0 of the skip choice. The bias of the skip choice begins at -1 and stays; the
others move by the rule of DeepSeek-V3 (2408.15664, algorithm 1) against the experts' load, which is not ZAYA1's own.
The state crosses layers, never tokens, so that decoding needs no memory.

Cost: D * P + 2 * P^2 multiplications per token and layer beside the gate's P * (E + 1), in full float32.

Letters: B batch, T time, D model, P channels of the state, E experts, X = E + 1 choices, K choices of a token.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing import losses, rules, select, stats, zero_cost
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
    hidden: int = 256  # channels of the state
    norm_eps: float = 1e-5  # added to the mean square of the state
    update_rate: float = 1e-3  # step of the bias; 0 freezes it


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    hidden_BTP = project(clean(inputs), params["proj_DP"]) + params["proj_bias_P"]
    hidden_BTP = hidden_BTP + inputs.carry["hidden_BTP"] * params["carry_scale_P"]
    logits_BTX = _mlp(params, hidden_BTP, config.options.norm_eps)
    probs_BTX, k = jax.nn.softmax(logits_BTX, axis=-1), config.num_experts_per_token
    choice, by_score = select.top_k(probs_BTX + state["bias_X"], k), select.top_k(probs_BTX, k)
    weight_BTK = select.at(probs_BTX, choice.expert_BTK)
    loads = (stats.load_of_choices(c.expert_BTK, inputs, config.num_experts + 1) for c in (choice, by_score))
    named = dict(zip(("balanced_BX", "scored_BX"), loads))
    return zero_cost.finish(logits_BTX, choice, weight_BTK, inputs, config, **named)._replace(
        carry={"hidden_BTP": hidden_BTP}
    )


def _mlp(params: Params, hidden_BTP: Array, eps: float) -> Array:
    """The logits [B, T, X]."""
    size_BT1 = jnp.mean(jnp.square(hidden_BTP), axis=-1, keepdims=True)
    hidden_BTP = hidden_BTP * jax.lax.rsqrt(size_BT1 + eps) * params["norm_scale_P"]
    for layer in ("first", "second"):
        hidden_BTP = project(hidden_BTP, params[f"{layer}_PP"]) + params[f"{layer}_bias_P"]
        hidden_BTP = jax.nn.gelu(hidden_BTP, approximate=False)
    return project(hidden_BTP, params["kernel_PX"])


def init(key: Array, dim: int, config: MoE) -> NewParams:
    keys, hidden = jax.random.split(key, 4), config.options.hidden
    matrix = lambda key, letters, *shape: normal(key, letters, shape, shape[0] ** -0.5)
    made = {
        "proj_DP": matrix(keys[0], "DP", dim, hidden),
        "first_PP": matrix(keys[1], "PP", hidden, hidden),
        "second_PP": matrix(keys[2], "PP", hidden, hidden),
        "kernel_PX": matrix(keys[3], "PX", hidden, config.num_experts + 1),
    }
    for name in ("proj_bias_P", "first_bias_P", "second_bias_P"):
        made[name] = declare(jnp.zeros(hidden, jnp.float32), "P")
    for name in ("carry_scale_P", "norm_scale_P"):
        made[name] = declare(jnp.ones(hidden, jnp.float32), "P")
    return made


def init_carry(config: MoE, batch: int, time: int) -> Carry:
    return {"hidden_BTP": jnp.zeros((batch, time, config.options.hidden), jnp.float32)}


def init_state(dim: int, config: MoE) -> State:
    return {"bias_X": jnp.zeros(config.num_experts + 1, jnp.float32).at[-1].set(-1)}


def update(state: State, batch_stats: Mapping[str, Array], config: MoE) -> State:
    counts_E = batch_stats["counts"].astype(jnp.float32)
    step_E = config.options.update_rate * jnp.sign(counts_E.mean() - counts_E)
    return {"bias_X": state["bias_X"] + jnp.pad(step_E, (0, 1))}


def check(config: MoE) -> str | None:
    o = config.options
    return rules.first(
        rules.at_least("hidden", o.hidden, 1),
        rules.positive("norm_eps", o.norm_eps),
        rules.at_least("update_rate", o.update_rate, 0),
    )


ROUTER = Router(
    about=About(
        year=2025,
        paper="Zyphra, ZAYA1, 2511.17127; released model (Hugging Face transformers, ZayaRouter)",
        score="softmax",
        selection="K largest of probability + bias, of experts and a skip choice, by an MLP on a state over the layers",
        weights="softmax probabilities as they are",
        balance="bias, moved against the load",
        weight_sum="at_most_one",
        stateful=True,
        losses=losses.GATE_LOSSES,
    ),
    route=route,
    options=Options,
    init=init,
    init_carry=init_carry,
    init_state=init_state,
    update=update,
    # A step adds to it: the mean of replicas adds the mean step.
    merges={"bias_X": "mean"},
    check=check,
)
