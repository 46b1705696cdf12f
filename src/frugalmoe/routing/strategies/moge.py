"""Mixture of grouped experts: every token takes equally many experts of every group.

Pangu Pro MoE (Tang et al., 2505.21411): softmax over all experts, then the K/G most probable of each of G groups of
consecutive experts, with their probabilities as weights. One group per device makes the devices' loads equal for every
token, whatever the gate does. With G = K it is the k top-1 prototyping of M6-T (Yang et al., 2105.15082), which has a
softmax of its own in each group.

Letters: B batch, T time, E experts, K choices, G groups, g experts of a group.
"""

import dataclasses

import jax
from jax import Array

from frugalmoe.routing import gate, losses, rules, select
from frugalmoe.routing.contract import About, Inputs, Params, Router, Routing, State, linear_init, linear_logits
from frugalmoe.schema import MoE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    num_groups: int = 2  # equal groups of consecutive experts, each of which gives K / num_groups experts
    renormalize: bool = False  # weights sum to 1


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    options: Options = config.options
    logits_BTE = linear_logits(params, inputs)
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    choice = choose(logits_BTE, config.num_experts_per_token, options.num_groups)
    weight_BTK = gate.weights(logits_BTE, probs_BTE, choice.expert_BTK, options.renormalize)
    by_score = select.top_k(logits_BTE, config.num_experts_per_token)
    return gate.routing(logits_BTE, probs_BTE, choice, weight_BTK, inputs, config, by_score=by_score)


def choose(logits_BTE: Array, k: int, num_groups: int) -> select.Choice:
    """A tie in any group counts as one."""
    size, batch_time = logits_BTE.shape[-1] // num_groups, logits_BTE.shape[:2]
    inside = select.top_k(logits_BTE.reshape(*batch_time, num_groups, size), k // num_groups)
    first_G1 = size * jax.lax.iota("int32", num_groups)[:, None]
    return select.Choice((inside.expert_BTK + first_G1).reshape(*batch_time, k), inside.tied_BT.any(-1))


def check(config: MoE) -> str | None:
    options: Options = config.options
    groups, k, num_experts = options.num_groups, config.num_experts_per_token, config.num_experts
    divides = groups >= 1 and k % groups == 0 and num_experts % groups == 0
    return rules.first(
        None
        if divides
        else f"options.num_groups={groups}: must divide num_experts_per_token={k} and num_experts={num_experts}",
        rules.gradient_at_one(config, options.renormalize, "set options.renormalize=False"),
    )


ROUTER = Router(
    about=About(
        year=2025,
        paper="Tang et al., Pangu Pro MoE, 2505.21411; M6-T, 2105.15082",
        score="softmax",
        selection="K/G largest logits in each of G groups",
        weights="softmax probabilities, renormalized or not",
        balance="groups by construction; auxiliary loss inside them",
        weight_sum=lambda config: 1.0 if config.options.renormalize else "at_most_one",
        losses=losses.GATE_LOSSES,
    ),
    route=route,
    options=Options,
    init=linear_init,
    check=check,
    cases=((2, {"renormalize": True}), (4, {"num_groups": 2})),
)
