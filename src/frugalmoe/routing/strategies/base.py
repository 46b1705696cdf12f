"""BASE layers: in training every expert gets the same number of tokens, by an assignment of the largest total score.

Lewis et al. (2103.16716, section 3), with the sequence as the pool of tokens. Each token has one expert and each expert
at most ceil(n/E) of the n valid tokens of a sequence; the sum of their logits is the largest possible, up to n *
`tolerance`. A solver over the sequence looks at later tokens: a leak. In evaluation: the largest logit. The weight is
sigmoid(logit), on the residual branch as in fairseq, and carries the only gradient.

The assignment is an auction (Bertsekas and Castanon, Annals of Operations Research 1989): tokens without an expert bid
for the one with the best score less price, and experts keep their highest bids. It ends when all tokens have an expert;
after `rounds` those without one take what room is left. A round costs a sort of T*E numbers, and the rounds follow each
other: a training step takes 1.4 times that of `switch_top1` while few tokens compete (T = D = 256, E = 8, CPU), and
up to 6 times when most of them want the same experts (E = 16, benchmarks/ROUTERS.md).

Letters: B batch, T time, E experts, C slots of an expert; K = 1.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from frugalmoe.routing import rules, select, stats
from frugalmoe.routing.contract import About, Inputs, Params, Router, Routing, State, linear_init, linear_logits
from frugalmoe.schema import MoE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    tolerance: float = 0.03  # logits per token that the assignment may be below the best one
    rounds: int = 200  # at most


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    logits_BTE, options = linear_logits(params, inputs), config.options
    choice = select.top_k(logits_BTE, 1)
    expert_BTK = choice.expert_BTK
    if inputs.train:
        solve = functools.partial(assign, tolerance=options.tolerance, rounds=options.rounds)
        expert_BTK = jax.vmap(solve)(jax.lax.stop_gradient(logits_BTE), inputs.valid_BT)[..., None]
        expert_BTK = checkpoint_name(expert_BTK, "routing_plan")  # as in `select.top_k`
    weight_BTK = select.at(jax.nn.sigmoid(logits_BTE), expert_BTK)
    plan = select.token_plan(expert_BTK, weight_BTK, inputs, config.num_experts)
    load_BE = stats.load(plan, inputs, config.num_experts)
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    return Routing(
        plan, {}, stats.of_layer(load_BE, inputs, logits_BTE=logits_BTE, probs_BTE=probs_BTE, tied_BT=choice.tied_BT)
    )


def assign(score_TE: Array, valid_T: Array, *, tolerance: float, rounds: int) -> Array:
    """One expert for every valid token, at most ceil(n/E) tokens for every expert: int32 [T]; padding gets any."""
    num_tokens, num_experts = score_TE.shape
    slots = -(-valid_T.sum(dtype=jnp.int32) // num_experts)
    most = -(-num_tokens // num_experts)
    ids_E, nobody = jnp.arange(num_experts, dtype=jnp.int32), num_experts

    def waiting(expert_T: Array) -> Array:
        return valid_T & (expert_T == nobody)

    def round_of_bids(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, expert_T, bid_T = state
        held_TE = expert_T[:, None] == ids_E
        lowest_E = jnp.min(bid_T[:, None], axis=0, where=held_TE, initial=jnp.inf)
        price_E = jnp.where(held_TE.sum(0) < slots, 0, lowest_E)
        value_TE = score_TE - price_E
        best_TK, best_expert_TK = jax.lax.top_k(value_TE, min(2, num_experts))
        wish_T = best_expert_TK[:, 0]
        offer_T = price_E[wish_T] + best_TK[:, 0] - best_TK[:, -1] + tolerance
        bid_T = jnp.where(waiting(expert_T), offer_T, bid_T)
        wish_T = jnp.where(waiting(expert_T), wish_T, expert_T)
        claim_ET = jnp.where(wish_T == ids_E[:, None], bid_T, -jnp.inf)
        claim_EC, token_EC = jax.lax.top_k(claim_ET, most)
        won_EC = (jnp.arange(most) < slots) & (claim_EC > -jnp.inf)
        token_EC = jnp.where(won_EC, token_EC, num_tokens)
        expert_T = jnp.full_like(expert_T, nobody).at[token_EC].set(ids_E[:, None], mode="drop")
        return count + 1, expert_T, bid_T

    def going_on(state: tuple[Array, Array, Array]) -> Array:
        return (state[0] < rounds) & jnp.any(waiting(state[1]))

    start = jnp.int32(0), jnp.full(num_tokens, nobody, jnp.int32), jnp.zeros(num_tokens, jnp.float32)
    _, expert_T, _ = jax.lax.while_loop(going_on, round_of_bids, start)
    room_E = slots - jnp.sum(expert_T[:, None] == ids_E, axis=0, dtype=jnp.int32)
    place_T = jnp.cumsum(waiting(expert_T)) - 1
    left_T = jnp.sum(jnp.cumsum(room_E) <= place_T[:, None], axis=1, dtype=jnp.int32)
    return jnp.where(expert_T == nobody, jnp.minimum(left_T, num_experts - 1), expert_T)


def check(config: MoE) -> str | None:
    k = config.num_experts_per_token
    return rules.first(
        None if k == 1 else f"num_experts_per_token={k}: must be 1; use sinkhorn for more",
        rules.positive("tolerance", config.options.tolerance),
        rules.at_least("rounds", config.options.rounds, 1),
    )


ROUTER = Router(
    about=About(
        year=2021,
        paper="Lewis et al., BASE Layers, 2103.16716, section 3; auction: Bertsekas and Castanon 1989",
        score="sigmoid",
        selection="the assignment of a sequence's tokens with the largest total; in evaluation the largest logit",
        weights="sigmoid as it is",
        balance="by construction",
        causal="leak",
        causal_in_evaluation="safe",
        weight_sum="at_most_one",
    ),
    route=route,
    options=Options,
    init=linear_init,
    check=check,
)
