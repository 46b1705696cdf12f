"""Expert threshold: every expert whose logit reaches its own threshold is active; a token has as many as that is.

Sun et al. (2603.11535): expert choice over the population of tokens in place of a batch, so that a decision needs no
other token. K is the mean number of experts per token. Weights are sigmoid(logit). A token may have no expert.

The threshold is state, and moves once per step by one of two rules (c_e: tokens of expert e, N: all tokens):

| update | rule |
|---|---|
| quantile | exponential mean of the logit of the C-th best token, C = N*K/E, here per sequence and averaged by tokens |
| sign | += rate * (s_e - mean of s + sign(sum c / N - K)) with s_e = sign(c_e / sum c - 1/E) |

`quantile` with decay 0.999 is Sun et al.'s, with 0.9 the dynamic form of quantile balancing (Su, kexue.fm 11626);
`sign` is loss-free balancing for a number of experts that varies (Su, kexue.fm 10815).

Departures from Sun et al.: no first phase of expert choice (a leak) and no limits on an expert's load (they rank tokens
of a batch, a leak too). In place of the first: the thresholds start where logits of unit variance have K experts per
token, and the mean is a plain one until there are more steps than the decay remembers. A token has at most
`max_experts` slots, those of its largest margins; what is beyond them is counted (`overflow`).

Letters: B batch, T time, E experts, K choices.
"""

import dataclasses
from collections.abc import Mapping
from statistics import NormalDist

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing import losses, rules, stats, threshold
from frugalmoe.routing.contract import About, Inputs, Params, Router, Routing, State, linear_init, linear_logits
from frugalmoe.schema import MoE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    max_experts: int = 0  # slots of a token; 0: 2 * num_experts_per_token
    update: str = "quantile"  # quantile | sign
    decay: float = 0.999  # update=quantile: memory of the threshold
    rate: float = 1e-3  # update=sign: step of the threshold


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    logits_BTE = linear_logits(params, inputs)
    active = threshold.activate(logits_BTE, jax.nn.sigmoid(logits_BTE), state["threshold_E"], slots(config), inputs)
    load_BE = stats.load(active.plan, inputs, config.num_experts)
    extra = {"overflow": active.overflow}
    if config.options.update == "quantile":
        share = config.num_experts_per_token / config.num_experts
        extra["cut_sum"] = threshold.rank(logits_BTE, inputs.valid_BT, share).cut_E
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    return Routing(
        active.plan,
        {"z": losses.z(logits_BTE, inputs)},
        stats.of_layer(load_BE, inputs, logits_BTE=logits_BTE, probs_BTE=probs_BTE, tied_BT=active.tied_BT) | extra,
    )


def slots(config: MoE) -> int:
    return config.options.max_experts or min(2 * config.num_experts_per_token, config.num_experts)


def init_state(dim: int, config: MoE) -> State:
    """Where K of E standard normal logits lie above."""
    k, num_experts = config.num_experts_per_token, config.num_experts
    return threshold.initial(NormalDist().inv_cdf(1 - k / num_experts), num_experts)


def update(state: State, batch_stats: Mapping[str, Array], config: MoE) -> State:
    options: Options = config.options
    if options.update == "quantile":
        return threshold.follow(state, batch_stats, options.decay)
    counts_E = batch_stats["counts"].astype(jnp.float32)
    relative_E = jnp.sign(counts_E - counts_E.mean())
    total = jnp.sign(counts_E.sum() - config.num_experts_per_token * batch_stats["tokens"])
    step_E = options.rate * (relative_E - relative_E.mean() + total)
    return {"threshold_E": state["threshold_E"] + step_E, "updates_E": state["updates_E"] + 1}


def check(config: MoE) -> str | None:
    options, k, num_experts = config.options, config.num_experts_per_token, config.num_experts
    most = options.max_experts
    return rules.first(
        None
        if most == 0 or k <= most <= num_experts
        else f"options.max_experts={most}: must be 0 or from num_experts_per_token={k} to num_experts={num_experts}",
        None if k < num_experts else f"num_experts_per_token={k}: must be less than num_experts={num_experts}",
        rules.one_of("update", options.update, ("quantile", "sign")),
        rules.decay("decay", options.decay),
        rules.at_least("rate", options.rate, 0),
    )


ROUTER = Router(
    about=About(
        year=2026,
        paper="Sun et al., Expert Threshold Routing, 2603.11535; Su, kexue.fm 10815 and 11626",
        score="sigmoid",
        selection="every expert whose logit reaches its threshold, K on average",
        weights="sigmoid as it is",
        balance="thresholds that follow a quantile, or the load",
        stateful=True,
        losses=("z",),
    ),
    route=route,
    options=Options,
    init=linear_init,
    init_state=init_state,
    update=update,
    merges=threshold.MERGES,
    check=check,
    cases=((1, {"max_experts": 4, "update": "sign"}),),
)
