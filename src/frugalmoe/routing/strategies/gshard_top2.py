"""GShard top-2: the most probable expert, and in training a second one drawn in proportion to its probability.

Lepikhin et al. (2006.16668, section 2.2 and algorithm 1). With p the softmax of the logits, the first expert is that of
the largest p. The second is drawn from the others with probability p_e / (1 - p_first), as the largest of logit plus
Gumbel noise (DeepSpeed's `top2gating`; algorithm 1 itself keeps the runner-up with a probability that grows with its
p), and is the runner-up in evaluation. Weights: p1 and p2 over p1 + p2. The balance loss counts first choices only:
E * sum_e (share of tokens whose first choice is e) * (mean p_e). ST-MoE (2202.08906) adds the z-loss.

Capacity is the executor's: `model.moe.executor=capacity` with `drop_order=choice` is GShard's order, all first choices
before any second, in which later tokens push out earlier ones: it leaks the future, `drop_order=token` does not.
GShard renormalizes weights after drops; here a dropped slot's weight is lost, since an executor drops after the router.

Letters: B batch, T time, E experts, K = 2.
"""

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing import losses, select, stats
from frugalmoe.routing.contract import (
    About,
    Inputs,
    Params,
    Router,
    Routing,
    State,
    TokenPlan,
    linear_init,
    linear_logits,
)
from frugalmoe.schema import MoE


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    logits_BTE = linear_logits(params, inputs)
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    choice = choose(logits_BTE, inputs)
    weight_BTK = select.shares(select.at(logits_BTE, choice.expert_BTK))
    plan = select.token_plan(choice.expert_BTK, weight_BTK, inputs, config.num_experts)
    first = TokenPlan(plan.expert_NK[:, :1], plan.weight_NK[:, :1])
    # The losses divide a load by K slots per token: each first choice counts for both.
    first_BE = 2 * stats.load(first, inputs, config.num_experts)
    return Routing(
        plan,
        losses.gate_losses(logits_BTE, probs_BTE, first_BE, inputs, config),
        stats.of_layer(
            stats.load(plan, inputs, config.num_experts),
            inputs,
            logits_BTE=logits_BTE,
            probs_BTE=probs_BTE,
            tied_BT=choice.tied_BT,
        ),
    )


def choose(logits_BTE: Array, inputs: Inputs) -> select.Choice:
    """The largest logit, then the largest of the others with noise."""
    first = select.top_k(logits_BTE, 1)
    num_experts = logits_BTE.shape[-1]
    rank_BTE = logits_BTE
    if inputs.train:
        rank_BTE = rank_BTE + select.noise(inputs, lambda key: jax.random.gumbel(key, (num_experts,)))
    second = select.top_k(jnp.where(first.expert_BTK == jnp.arange(num_experts), -jnp.inf, rank_BTE), 1)
    both_BTK = jnp.concatenate([first.expert_BTK, second.expert_BTK], axis=-1)
    return select.Choice(both_BTK, first.tied_BT | second.tied_BT)


def check(config: MoE) -> str | None:
    k = config.num_experts_per_token
    return None if k == 2 else f"num_experts_per_token={k}: must be 2; use topk_softmax for others"


ROUTER = Router(
    about=About(
        year=2020,
        paper="Lepikhin et al., GShard, 2006.16668, section 2.2 and algorithm 1",
        score="softmax",
        selection="largest logit, and a second expert drawn in proportion to its probability",
        weights="softmax probabilities, renormalized over the two",
        balance="auxiliary loss on first choices",
        weight_sum=1.0,
        random=True,
        losses=losses.GATE_LOSSES,
    ),
    route=route,
    init=linear_init,
    check=check,
)
