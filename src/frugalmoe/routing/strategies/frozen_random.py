"""A linear router that stays as it was drawn: the control for whether it matters that routing is learned.

Chen et al. (SMoE-Dropout, 2303.01610, section 3) route by a random network that is never trained; their schedule of a
growing K is left out. K largest logits, weights softmax over the K, as `topk_softmax`. No gradient reaches the router,
but the weights are a function of the token, and their gradient reaches it.

Weight decay would shrink a frozen parameter, so the matrix is none: it is drawn from (seed, layer) in every step. That
is D*E random numbers, beside N*D*E multiplications with them, and nothing in checkpoint and optimizer.

Letters: B batch, T time, D model, E experts, K choices.
"""

import dataclasses

import jax

from frugalmoe.routing import select, stats
from frugalmoe.routing.contract import About, Inputs, Params, Router, Routing, State, arrays, linear_init, linear_logits
from frugalmoe.schema import MoE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    seed: int = 0  # of the matrices


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    key = jax.random.fold_in(jax.random.key(config.options.seed), inputs.layer)
    logits_BTE = linear_logits(arrays(linear_init(key, inputs.x_BTD.shape[-1], config)), inputs)
    choice = select.top_k(logits_BTE, config.num_experts_per_token)
    weight_BTK = jax.nn.softmax(select.at(logits_BTE, choice.expert_BTK), axis=-1)
    plan = select.token_plan(choice.expert_BTK, weight_BTK, inputs, config.num_experts)
    load_BE = stats.load(plan, inputs, config.num_experts)
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    return Routing(
        plan, {}, stats.of_layer(load_BE, inputs, logits_BTE=logits_BTE, probs_BTE=probs_BTE, tied_BT=choice.tied_BT)
    )


ROUTER = Router(
    about=About(
        year=2023,
        paper="Chen et al., Sparse MoE as the New Dropout, 2303.01610, section 3; without the growing K",
        score="softmax",
        selection="K largest logits of a fixed random matrix",
        weights="softmax over the K",
        balance="by chance",
        weight_sum=1.0,
        learned=False,
    ),
    route=route,
    options=Options,
)
