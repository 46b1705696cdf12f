"""Softmax over experts, the K most probable experts per token: the gate of most open models.

Shazeer et al. (1701.06538, eq. 3-5, without noise). With z the logits, S the K largest and p = softmax(z):

| softmax | renormalize | weight of expert e in S | used by |
|---|---|---|---|
| before | False | scale * p_e | OLMoE (2409.02060), DeepSeekMoE (2401.06066) |
| before | True | scale * p_e / sum_S p | Qwen3 (2505.09388), Ling 1 (2503.05139) |
| after | True | scale * softmax(z over S)_e | Mixtral (2401.04088); is the row above |

With `num_groups`, S lies in the groups with the largest logits (DeepSeek-V2, 2405.04434; see `groups.py`).

Letters: B batch, T time, E experts, K choices.
"""

import dataclasses

import jax

from frugalmoe.routing import gate, groups, losses, rules, select
from frugalmoe.routing.contract import (
    About,
    Inputs,
    Params,
    Router,
    Routing,
    State,
    linear_init_with_bias,
    linear_logits,
)
from frugalmoe.schema import MoE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    softmax: str = "before"  # before | after the selection
    renormalize: bool = True  # weights of the K experts sum to `scale`
    scale: float = 1.0  # factor on all weights
    logit_bias: bool = False  # a learned bias on the logits (gpt-oss)
    num_groups: int = 1  # equal groups of consecutive experts
    groups_per_token: int = 1  # groups that a token may choose from: those with the largest logits


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    options: Options = config.options
    logits_BTE = linear_logits(params, inputs)
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    k = config.num_experts_per_token
    choice = groups.top_k(logits_BTE, k, options.num_groups, options.groups_per_token, best=1)
    weight_BTK = gate.weights(logits_BTE, probs_BTE, choice.expert_BTK, options.renormalize)
    by_score = select.top_k(logits_BTE, k) if options.groups_per_token < options.num_groups else None
    return gate.routing(logits_BTE, probs_BTE, choice, weight_BTK * options.scale, inputs, config, by_score=by_score)


def weight_sum(config: MoE) -> float | str:
    options: Options = config.options
    if options.renormalize:
        return options.scale
    return "at_most_one" if options.scale <= 1 else "free"


def check(config: MoE) -> str | None:
    options: Options = config.options
    contradiction = (
        "options.renormalize=False: weights of softmax='after' sum to the scale always; use softmax='before'"
    )
    return rules.first(
        rules.one_of("softmax", options.softmax, ("before", "after")),
        rules.positive("scale", options.scale),
        contradiction if options.softmax == "after" and not options.renormalize else None,
        rules.gradient_at_one(
            config,
            options.renormalize,
            "set options.softmax='before' and options.renormalize=False, or use switch_top1",
        ),
        groups.check(config),
    )


ROUTER = Router(
    about=About(
        year=2017,
        paper="Shazeer et al., Outrageously Large Neural Networks, 1701.06538, eq. 3-5; Mixtral, 2401.04088",
        score="softmax",
        selection="K largest logits, in the best groups",
        weights="softmax probabilities, renormalized over the K or as they are",
        balance="auxiliary loss",
        weight_sum=weight_sum,
        losses=losses.GATE_LOSSES,
    ),
    route=route,
    options=Options,
    init=linear_init_with_bias,
    check=check,
    cases=(
        (3, {"softmax": "after", "scale": 2.5}),
        (1, {"renormalize": False}),
        (2, {"num_groups": 4, "groups_per_token": 2, "logit_bias": True}),
    ),
)
