"""Sigmoid scores, selection steered by a balance bias that no gradient touches: DeepSeek-V3 and Ling 2.0.

Selection: the K largest of score + bias. With groups (DeepSeek-V3, 2412.19437, section 2.1.2), the experts form
`num_groups` equal groups, a group's score is the sum of its two largest biased scores, and only experts of the best
`groups_per_token` groups take part. The others are masked with -inf, not 0: biased scores can be negative.
Weights (eq. 12-16): scale * s_e / (sum over the K of s + 1e-20), from the scores without the bias.
Bias (Wang et al., 2408.15664, algorithm 1), once per optimizer step, with c the counts of the whole batch:
b += rate * sign(mean c - c); `zero_mean` subtracts the mean of that step (Ling 2.0, 2510.22115).

Letters: B batch, T time, E experts, K choices, G groups of experts.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.config.schema import MoE
from frugalmoe.routing import losses, rules, select, stats
from frugalmoe.routing.contract import About, Inputs, Params, Router, Routing, State, linear_init, linear_logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    normalize: bool = True  # weights of the K experts sum to `scale`
    scale: float = 1.0  # factor on all weights (2.5 in DeepSeek-V3 and Ling 2.0)
    num_groups: int = 1  # equal groups of consecutive experts
    groups_per_token: int = 1  # groups that a token may choose from
    update: str = "sign"  # sign | zero_mean
    update_rate: float = 1e-3  # step of the bias; 0 freezes it


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    options: Options = config.options
    logits_BTE = linear_logits(params, inputs)
    score_BTE = jax.nn.sigmoid(logits_BTE)
    probs_BTE = score_BTE / (score_BTE.sum(-1, keepdims=True) + 1e-20)
    choice = choose(score_BTE + state["bias_E"], config.num_experts_per_token, options)
    weight_BTK = select.at(score_BTE, choice.expert_BTK)
    if options.normalize:
        weight_BTK = weight_BTK / (weight_BTK.sum(-1, keepdims=True) + 1e-20)
    plan = select.token_plan(choice.expert_BTK, weight_BTK * options.scale, inputs, config.num_experts)
    load_BE = stats.load(plan, inputs, config.num_experts)
    return Routing(
        plan,
        losses.gate_losses(logits_BTE, probs_BTE, load_BE, inputs, config),
        stats.of_layer(load_BE, inputs, logits_BTE=logits_BTE, probs_BTE=probs_BTE, tied_BT=choice.tied_BT),
    )


def choose(score_BTE: Array, k: int, options: Options) -> select.Choice:
    """Top K, limited to the best groups. A tie between groups at their cut counts as a tie too."""
    if options.groups_per_token == options.num_groups:
        return select.top_k(score_BTE, k)
    score_BTGe = score_BTE.reshape(*score_BTE.shape[:-1], options.num_groups, -1)
    group_BTG = jax.lax.top_k(score_BTGe, min(2, score_BTGe.shape[-1]))[0].sum(-1)
    group = select.top_k(group_BTG, options.groups_per_token)
    open_BTG = jnp.any(group.expert_BTK[..., None] == jnp.arange(options.num_groups), axis=-2)
    choice = select.top_k(jnp.where(open_BTG[..., None], score_BTGe, -jnp.inf).reshape(score_BTE.shape), k)
    return choice._replace(tied_BT=choice.tied_BT | group.tied_BT)


def init_state(dim: int, config: MoE) -> State:
    return {"bias_E": jnp.zeros(config.num_experts, jnp.float32)}


def update(state: State, batch_stats: Mapping[str, Array], config: MoE) -> State:
    counts_E = batch_stats["counts"].astype(jnp.float32)
    step_E = config.options.update_rate * jnp.sign(counts_E.mean() - counts_E)
    if config.options.update == "zero_mean":
        step_E = step_E - step_E.mean()
    return {"bias_E": state["bias_E"] + step_E}


def check(config: MoE) -> str | None:
    o, k, num_experts = config.options, config.num_experts_per_token, config.num_experts
    rule = rules.first(
        rules.one_of("update", o.update, ("sign", "zero_mean")),
        rules.at_least("update_rate", o.update_rate, 0),
        rules.positive("scale", o.scale),
        rules.at_least("num_groups", o.num_groups, 1),
        rules.at_least("groups_per_token", o.groups_per_token, 1),
        rules.gradient_at_one(config, o.normalize, "set options.normalize=False"),
    )
    if rule:
        return rule
    if num_experts % o.num_groups:
        return f"options.num_groups={o.num_groups}: must divide num_experts={num_experts}"
    if o.groups_per_token > o.num_groups:
        return f"options.groups_per_token={o.groups_per_token}: must be at most options.num_groups={o.num_groups}"
    reach = o.groups_per_token * num_experts // o.num_groups
    return None if k <= reach else f"num_experts_per_token={k}: must be at most the {reach} experts of a token's groups"


def weight_sum(config: MoE) -> float | str:
    options: Options = config.options
    return options.scale if options.normalize else "free"


ROUTER = Router(
    about=About(
        year=2024,
        paper="DeepSeek-V3, 2412.19437, eq. 12-20; Wang et al., Auxiliary-Loss-Free Load Balancing, 2408.15664, alg. 1",
        score="sigmoid",
        selection="K largest of score + bias, in the best groups",
        weights="sigmoid scores without the bias, normalised over the K or as they are",
        balance="bias, moved by a fixed step against the load",
        weight_sum=weight_sum,
        stateful=True,
        losses=losses.GATE_LOSSES,
    ),
    route=route,
    options=Options,
    init=linear_init,
    init_state=init_state,
    update=update,
    check=check,
)
