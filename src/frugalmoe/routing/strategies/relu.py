"""ReLU routing: a token's experts are those with a positive logit, and a penalty that adapts sets how many they are.

ReMoE (Wang et al., 2412.14711, section 3): weights R = ReLU(z), not normalized, a continuous function of the
parameters. The loss `l1` is lambda * E * sum_e f_e mean_t R_te over each group of `model.moe.load_balance_scope`, an L1
norm that weighs busy experts more, and after each step lambda *= alpha^sign(active - K), active being the mean number
of positive logits per token: dense at first, then ever sparser, until a token has K = num_experts_per_token experts on
average. `rms_norm` divides R by its root mean square over experts and multiplies by a learned scale per expert
(BlockFFN, Song et al., 2507.08771); zeros stay zero. The penalty is on R before it.

What differs from the paper: lambda is each layer's own, with K experts per token in each layer, and never below its
first value, from where it could not come back soon; f_e, a share of the slots, sums to 1 over experts (in the paper to
active/K: lambda absorbs it); a token has at most `max_experts` slots from the start, best first, and the metric
`overflow_rate` says what that cuts. Cost: a random gate has half of its logits positive, so that the first steps
compute as many experts as there are slots, up to `max_experts` / K times the work of topk_softmax, until the penalty
has bitten (a train step of a small model with 2 of 16 experts took 1.9 times as long).

Letters: B batch, T time, E experts, K slots per token.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing import dynamic, losses, rules, select, stats
from frugalmoe.routing.contract import (
    About,
    Inputs,
    Loss,
    NewParams,
    Params,
    Router,
    Routing,
    State,
    declare,
    linear_init,
    linear_logits,
)
from frugalmoe.schema import MoE

EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    initial: float = 1e-8  # lambda before the first step
    alpha: float = 1.2  # factor on lambda per step
    max_experts: int = 0  # slots per token; 0: 4 * num_experts_per_token
    rms_norm: bool = False  # gates are divided by their root mean square, and scaled per expert (BlockFFN)


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    logits_BTE = linear_logits(params, inputs)
    gate_BTE = jax.nn.relu(logits_BTE)
    ranked_BTE = select.top_k(logits_BTE, config.num_experts).expert_BTK
    wanted_BT = jnp.sum(logits_BTE > 0, axis=-1, dtype=jnp.int32)
    slots = dynamic.fill(ranked_BTE, select.at(logits_BTE, ranked_BTE), wanted_BT, inputs, config)
    score_BTE = _rms_normed(gate_BTE) * params["scale_E"] if config.options.rms_norm else gate_BTE
    ranked_BTK = ranked_BTE[..., : slots.expert_BTK.shape[-1]]
    weight_BTK = jnp.where(slots.expert_BTK < config.num_experts, select.at(score_BTE, ranked_BTK), 0)
    plan = select.token_plan(slots.expert_BTK, weight_BTK, inputs, config.num_experts)
    load_BE = stats.load(plan, inputs, config.num_experts)
    l1 = losses.load_balance(gate_BTE, load_BE, inputs, config)
    tied_BT = slots.tied_BT | jnp.any(logits_BTE == 0, axis=-1)
    return Routing(
        plan,
        {"l1": Loss(jnp.exp(jax.lax.stop_gradient(state["log_lambda"])) * l1.sum, l1.per)},
        stats.of_layer(load_BE, inputs, tied_BT=tied_BT) | {"overflow": slots.overflow},
    )


def _rms_normed(gate_BTE: Array) -> Array:
    return gate_BTE * jax.lax.rsqrt(jnp.mean(jnp.square(gate_BTE), axis=-1, keepdims=True) + EPS)


def init(key: Array, dim: int, config: MoE) -> NewParams:
    scale = {"scale_E": declare(jnp.ones(config.num_experts, jnp.float32), "E")} if config.options.rms_norm else {}
    return {**linear_init(key, dim, config), **scale}


def init_state(dim: int, config: MoE) -> State:
    return {"log_lambda": jnp.log(jnp.full((), config.options.initial, jnp.float32))}


def update(state: State, batch_stats: Mapping[str, Array], config: MoE) -> State:
    options: Options = config.options
    wanted = (batch_stats["assigned"] + batch_stats["overflow"]).astype(jnp.float32)
    excess = wanted - config.num_experts_per_token * batch_stats["tokens"].astype(jnp.float32)
    moved = state["log_lambda"] + math.log(options.alpha) * jnp.sign(excess)
    return {"log_lambda": jnp.maximum(moved, math.log(options.initial))}


def check(config: MoE) -> str | None:
    options: Options = config.options
    return rules.first(
        rules.positive("initial", options.initial),
        rules.at_least("alpha", options.alpha, 1),
        dynamic.check(config),
        None if config.losses.get("l1", 0) > 0 else "needs model.moe.losses.l1=1.0: nothing else makes the gate sparse",
    )


ROUTER = Router(
    about=About(
        year=2024,
        paper="Wang et al., ReMoE, 2412.14711, section 3; BlockFFN, 2507.08771 (rms_norm)",
        score="relu",
        selection="positive logits",
        weights="the logits, or the logits RMS-normalized",
        balance="L1 penalty weighted by load, adapted to K active experts",
        stateful=True,
        losses=("l1",),
    ),
    route=route,
    options=Options,
    init=init,
    init_state=init_state,
    update=update,
    # Steps are factors on lambda: its geometric mean.
    merges={"log_lambda": "mean"},
    check=check,
    cases=((2, {}), (2, {"max_experts": 3, "rms_norm": True})),
)
