"""Zero, copy and constant experts beside the real ones, and a gate that sees the layer before.

MoE++ (Jin et al., 2410.07348, section 3). Beside the E experts a token may pick `num_zero` choices that put out 0,
`num_copy` that put out x, and `num_constant` that put out a_1 x + a_2 v with a = softmax(x M_c) and a learned vector v.
Gate: z_l = W_l x + R_l z_{l-1} (gating residual: z of the previous MoE layer), softmax, top K, renormalized over the K
with zero's weight set to 0 before, as in the released code: one expert beside a zero has weight 1. R starts at 0 here.
Balance losses count a zero-cost choice `tau` times (eta_i in the paper), with f over the sum of these counts and not
over K tokens: larger by a factor of at most 1 / tau. The paper's capacities, split between experts
and zero-cost choices in the same proportion, have no counterpart: no token is dropped.

Letters: B batch, T time, D model, E experts, Z zero-cost choices (zero, copy, constant), X = E + Z, K choices,
2 parts of a constant expert (x, v).
"""

import dataclasses

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
    num_zero: int = 1  # choices that add nothing
    num_copy: int = 1  # choices that add the token itself
    num_constant: int = 2  # choices that add a mixture of the token and a learned vector
    tau: float = 0.75  # weight of a zero-cost choice in the balance losses; below 1, tokens pick more of them


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    num_experts, num_choices, options = config.num_experts, _num_choices(config), config.options
    residual_BTX = project(inputs.carry["logits_BTX"], params["residual_XX"])
    logits_BTX = zero_cost.linear_logits(params, inputs) + residual_BTX
    choice = select.top_k(logits_BTX, config.num_experts_per_token)
    zero_BTK = (choice.expert_BTK >= num_experts) & (choice.expert_BTK < num_experts + options.num_zero)
    weight_BTK = select.shares(select.at(logits_BTX, choice.expert_BTK), ~zero_BTK)
    g_BTZ = zero_cost.weights(choice.expert_BTK, weight_BTK, inputs, num_experts, num_choices)
    load_BX = stats.load_of_choices(choice.expert_BTK, inputs, num_choices)
    eta_X = jnp.where(jnp.arange(num_choices) < num_experts, 1.0, options.tau)
    added_BTD = added(params, clean(inputs), g_BTZ, options)
    balanced_BX = load_BX * eta_X
    routing = zero_cost.finish(
        logits_BTX, choice, weight_BTK, inputs, config, balanced_BX=balanced_BX, added_BTD=added_BTD
    )
    return routing._replace(carry={"logits_BTX": logits_BTX})


def added(params: Params, x_BTD: Array, g_BTZ: Array, options: Options) -> Array | None:
    """What copies and constants put out, weighted: (sum of the weights on x) * x + sum_c (weight on v_c) * v_c."""
    if not options.num_copy + options.num_constant:
        return None
    g_BTZ = g_BTZ[..., options.num_zero :]
    if not options.num_constant:
        return g_BTZ.sum(-1, keepdims=True) * x_BTD
    constant_BTZ = g_BTZ[..., options.num_copy :]
    mix_BTZ2 = jax.nn.softmax(jnp.einsum("btd,zdm->btzm", x_BTD, params["mix_ZD2"], precision="highest"), axis=-1)
    on_x_BT = g_BTZ[..., : options.num_copy].sum(-1) + jnp.sum(constant_BTZ * mix_BTZ2[..., 0], axis=-1)
    return on_x_BT[..., None] * x_BTD + project(constant_BTZ * mix_BTZ2[..., 1], params["constant_ZD"])


def _num_choices(config: MoE) -> int:
    o: Options = config.options
    return config.num_experts + o.num_zero + o.num_copy + o.num_constant


def init(key: Array, dim: int, config: MoE) -> NewParams:
    gate_key, mix_key, constant_key = jax.random.split(key, 3)
    num_choices, num_constant = _num_choices(config), config.options.num_constant
    params = zero_cost.linear_init(gate_key, dim, num_choices)
    params["residual_XX"] = declare(jnp.zeros((num_choices, num_choices), jnp.float32), "XX")
    if num_constant:
        params["mix_ZD2"] = normal(mix_key, "ZD2", (num_constant, dim, 2), dim**-0.5)
        params["constant_ZD"] = normal(constant_key, "ZD", (num_constant, dim), 1.0)
    return params


def init_carry(config: MoE, batch: int, time: int) -> Carry:
    return {"logits_BTX": jnp.zeros((batch, time, _num_choices(config)), jnp.float32)}


def check(config: MoE) -> str | None:
    o: Options = config.options
    none = (
        f"options.num_zero={o.num_zero}, num_copy and num_constant: one of them must be positive, or use topk_softmax"
    )
    return rules.first(
        rules.at_least("num_zero", o.num_zero, 0),
        rules.at_least("num_copy", o.num_copy, 0),
        rules.at_least("num_constant", o.num_constant, 0),
        None if o.num_zero + o.num_copy + o.num_constant else none,
        rules.positive("tau", o.tau),
        rules.gradient_at_one(config, True, "use more"),
    )


ROUTER = Router(
    about=About(
        year=2024,
        paper="Jin et al., MoE++: Accelerating Mixture-of-Experts with Zero-Computation Experts, 2410.07348, section 3",
        score="softmax",
        selection="K largest logits, of experts and zero, copy and constant choices",
        weights="softmax probabilities, renormalized over the K without the zero choices",
        balance="auxiliary loss, zero-cost choices counted tau times",
        losses=losses.GATE_LOSSES,
    ),
    route=route,
    options=Options,
    init=init,
    init_carry=init_carry,
    check=check,
    cases=((3, {"num_zero": 2, "num_constant": 0}),),
)
