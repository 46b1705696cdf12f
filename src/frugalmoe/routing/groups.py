"""Group-limited selection: a token's K experts come from a few groups of experts, so that it visits few devices.

The experts form `num_groups` equal groups of consecutive ids. A group's score is the sum of its `best` largest scores:
1 in DeepSeek-V2 (2405.04434, section 2.2.2, device-limited routing), 2 in DeepSeek-V3 (2412.19437, section 2.1.2) and
Ling 2.0. Only experts of the `groups_per_token` best groups take part. The others are masked with -inf, not 0: scores
with a bias can be negative. (With `closed` = 0, as in A.X-K2, an expert of another group wins over such.)

Letters: B batch, T time, E experts, K choices, G groups of experts, g experts of one group.
"""

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing import rules, select
from frugalmoe.schema import MoE


def top_k(
    score_BTE: Array, k: int, num_groups: int, groups_per_token: int, best: int, *, closed: float = -jnp.inf
) -> select.Choice:
    """The k largest scores of the best groups. A tie between groups at their cut counts as a tie too."""
    if groups_per_token == num_groups:
        return select.top_k(score_BTE, k)
    score_BTGg = jax.lax.stop_gradient(score_BTE).reshape(*score_BTE.shape[:-1], num_groups, -1)
    group_BTG = jax.lax.top_k(score_BTGg, min(best, score_BTGg.shape[-1]))[0].sum(-1)
    group = select.top_k(group_BTG, groups_per_token)
    open_BTG = jnp.any(group.expert_BTK[..., None] == jnp.arange(num_groups), axis=-2)
    choice = select.top_k(jnp.where(open_BTG[..., None], score_BTGg, closed).reshape(score_BTE.shape), k)
    return choice._replace(tied_BT=choice.tied_BT | group.tied_BT)


def check(config: MoE) -> str | None:
    """The rule that `options.num_groups` and `options.groups_per_token` break, or None."""
    o, k, num_experts = config.options, config.num_experts_per_token, config.num_experts
    rule = rules.first(
        rules.at_least("num_groups", o.num_groups, 1), rules.at_least("groups_per_token", o.groups_per_token, 1)
    )
    if rule:
        return rule
    if num_experts % o.num_groups:
        return f"options.num_groups={o.num_groups}: must divide num_experts={num_experts}"
    if o.groups_per_token > o.num_groups:
        return f"options.groups_per_token={o.groups_per_token}: must be at most options.num_groups={o.num_groups}"
    reach = o.groups_per_token * num_experts // o.num_groups
    return None if k <= reach else f"num_experts_per_token={k}: must be at most the {reach} experts of a token's groups"
