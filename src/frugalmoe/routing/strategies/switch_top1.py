"""Switch Transformer: the most probable expert, weighted by its probability.

Fedus et al. (2101.03961, eq. 1-2 and 4-6; input jitter: appendix C). The weight p_e is not renormalized: it is all
that carries a gradient to the router.

Letters: B batch, T time, D model, E experts, K = 1.
"""

import dataclasses

import jax

from frugalmoe.routing import gate, losses, rules, select
from frugalmoe.routing.contract import About, Inputs, Params, Router, Routing, State, linear_init, linear_logits
from frugalmoe.schema import MoE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    jitter: float = 0.0  # in training the router's input is multiplied by uniform noise in [1 - jitter, 1 + jitter]


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    logits_BTE = linear_logits(params, _jittered(inputs, config.options.jitter))
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    choice = select.top_k(logits_BTE, 1)
    return gate.routing(logits_BTE, probs_BTE, choice, select.at(probs_BTE, choice.expert_BTK), inputs, config)


def _jittered(inputs: Inputs, jitter: float) -> Inputs:
    if not (inputs.train and jitter):
        return inputs
    dim = inputs.x_BTD.shape[-1]
    factor_BTD = select.noise(inputs, lambda key: jax.random.uniform(key, (dim,), minval=1 - jitter, maxval=1 + jitter))
    return inputs._replace(x_BTD=inputs.x_BTD.astype("float32") * factor_BTD)


def check(config: MoE) -> str | None:
    k = config.num_experts_per_token
    return rules.first(
        None if k == 1 else f"num_experts_per_token={k}: must be 1; use topk_softmax for more",
        rules.at_least("jitter", config.options.jitter, 0),
    )


ROUTER = Router(
    about=About(
        year=2021,
        paper="Fedus et al., Switch Transformers, 2101.03961, eq. 1-6",
        score="softmax",
        selection="largest logit",
        weights="softmax probability as it is",
        balance="auxiliary loss",
        weight_sum="at_most_one",
        random=lambda config: config.options.jitter > 0,
        losses=losses.GATE_LOSSES,
    ),
    route=route,
    options=Options,
    init=linear_init,
    check=check,
    cases=((1, {"jitter": 0.5}),),
)
