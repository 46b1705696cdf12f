"""Top-p: as many experts as it takes for their probabilities to add up to p.

Huang et al. (2403.07652): with p = softmax(z) sorted, a token's experts are the smallest prefix whose sum reaches
`threshold`; a token of which the gate is sure has one, an undecided one has many. `token_entropy` is the paper's loss
against a gate that is never sure (1e-4 there, beside load_balance 1e-2): name it in `model.moe.losses`.
`num_experts_per_token` is only nominal; the metric `active_per_token` says what a token costs, up to `max_experts`.
A token has at most `max_experts` slots (none are spared in the paper); the metric `overflow_rate` says what that cuts.

Letters: B batch, T time, E experts, K slots per token.
"""

import dataclasses

import jax
import jax.numpy as jnp

from frugalmoe.routing import dynamic, losses, rules, select, stats
from frugalmoe.routing.contract import About, Inputs, Params, Router, Routing, State, linear_init, linear_logits
from frugalmoe.schema import MoE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    threshold: float = 0.4  # p: the probability that a token's experts hold together
    max_experts: int = 0  # slots per token; 0: 4 * num_experts_per_token
    renormalize: bool = False  # weights sum to 1


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    options: Options = config.options
    logits_BTE = linear_logits(params, inputs)
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    ranked_BTE = select.top_k(logits_BTE, config.num_experts).expert_BTK
    sorted_BTE = select.at(probs_BTE, ranked_BTE)
    before_BTE = jnp.cumsum(sorted_BTE[..., :-1], axis=-1)  # what the better experts hold together
    wanted_BT = 1 + jnp.sum(before_BTE < options.threshold, axis=-1, dtype=jnp.int32)
    slots = dynamic.fill(ranked_BTE, select.at(logits_BTE, ranked_BTE), wanted_BT, inputs, config)
    full_BTK, ranked_BTK = slots.expert_BTK < config.num_experts, ranked_BTE[..., : slots.expert_BTK.shape[-1]]
    if options.renormalize:
        weight_BTK = select.shares(select.at(logits_BTE, ranked_BTK), full_BTK)
    else:
        weight_BTK = jnp.where(full_BTK, select.at(probs_BTE, ranked_BTK), 0)
    plan = select.token_plan(slots.expert_BTK, weight_BTK, inputs, config.num_experts)
    load_BE = stats.load(plan, inputs, config.num_experts)
    return Routing(
        plan,
        losses.gate_losses(logits_BTE, probs_BTE, load_BE, inputs, config),
        stats.of_layer(load_BE, inputs, logits_BTE=logits_BTE, probs_BTE=probs_BTE, tied_BT=slots.tied_BT)
        | {"overflow": slots.overflow},
    )


def check(config: MoE) -> str | None:
    options: Options = config.options
    in_range = 0 < options.threshold <= 1
    return rules.first(
        None if in_range else f"options.threshold={options.threshold!r}: must be in (0, 1]",
        dynamic.check(config),
        "options.renormalize=True with one slot per token gives the router no gradient; set options.renormalize=False"
        if options.renormalize and dynamic.num_slots(config) == 1
        else None,
    )


ROUTER = Router(
    about=About(
        year=2024,
        paper="Huang et al., Harder Tasks Need More Experts: Dynamic Routing in MoE Models, 2403.07652",
        score="softmax",
        selection="smallest set whose probabilities reach a threshold",
        weights="softmax probabilities, renormalized or not",
        balance="auxiliary loss; entropy loss against large sets",
        weight_sum=lambda config: 1.0 if config.options.renormalize else "at_most_one",
        losses=losses.GATE_LOSSES,
    ),
    route=route,
    options=Options,
    init=linear_init,
    check=check,
    cases=((2, {"threshold": 0.7, "max_experts": 3, "renormalize": True}),),
)
