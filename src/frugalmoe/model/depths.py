"""Mixture of depths: blocks that some tokens of a sequence pass and the others skip (Raposo et al., arXiv 2404.02258).

With r_t = w . x_t, a token that passes gets y_t = x_t + r_t * (attention + feed-forward)_t, where it attends to tokens
that pass alone, and one that skips keeps y_t = x_t (section 3.4, eq. 1). Who passes:

- In training, the ceil(capacity * T) tokens of a sequence with the largest r, so that later tokens have a say: a leak.
- In evaluation and generation, each token of which the predictor says that it is more likely than not one of those.
  The predictor is a small network on x_t alone, trained on that question; its gradient stops at x_t (section 3.5). So
  whether a token passes is causal, and how many pass is not fixed.

An MoE layer in such a block routes, counts and balances the tokens that pass. Its losses per token are divided by all
tokens, as in other layers: a token weighs the same in each.

Letters: B batch, T time, C slots for the tokens that pass, D model, P hidden channels of the predictor, E experts.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from frugalmoe.model.attention import contract
from frugalmoe.model.block import Branches, Passed, Place, Report, Stream
from frugalmoe.model.layers import normal
from frugalmoe.model.moe import Context, Routed
from frugalmoe.routing import threshold
from frugalmoe.routing.contract import About, Loss, TokenPlan, project
from frugalmoe.schema import Model
from frugalmoe.sharding import BATCH_AXES, local, parameter

ABOUT = About(
    year=2024,
    paper="Raposo et al., Mixture-of-Depths, 2404.02258, eq. 1 and section 3.5",
    score="linear",
    selection="a sequence's C tokens with the largest score; in evaluation those that a predictor takes for them",
    weights="the score as it is",
    balance="by construction",
    causal="leak",
    causal_in_evaluation="safe",
    form="expert",
    losses=("depth_predictor",),
)


class Cache(NamedTuple):
    """Of a routed block: that of its attention holds the tokens that passed it, side by side."""

    attention: contract.Cache
    used_B: Array  # int32: how many they are


def empty_cache(attention: contract.Cache, batch: int) -> Cache:
    """From an empty cache of the block's attention."""
    return Cache(attention, jnp.zeros(batch, jnp.int32))


def predictor_hidden(dim: int) -> int:
    """Channels between the predictor's two maps."""
    return max(dim // 4, 1)


def flops(config: Model) -> float:
    """FLOPs per token of a block's router and predictor."""
    hidden = predictor_hidden(config.dim)
    return 2 * (config.dim + config.dim * hidden + hidden)


def metrics(stats: Mapping[str, Array]) -> dict[str, Array]:
    """From summed stats: the share of tokens that passed, and of those about which the predictor was right.

    One that always says no is right about 1 - capacity of the tokens.
    """
    tokens = jnp.maximum(jnp.asarray(stats["tokens"], jnp.float32), 1)
    return {"share": stats["passed"] / tokens, "predictor_accuracy": stats["told"] / tokens}


class Depth(nnx.Module):
    """The router and the predictor of one routed block, in float32."""

    def __init__(self, key: Array, config: Model):
        self.config = config
        router_key, up_key, out_key = jax.random.split(key, 3)
        hidden = predictor_hidden(config.dim)
        self.router_D = normal(router_key, "D", (config.dim,), config.dim**-0.5, "router")
        self.up_DP = normal(up_key, "DP", (config.dim, hidden), config.dim**-0.5, "router")
        self.out_P = normal(out_key, "P", (hidden,), hidden**-0.5, "router")
        self.bias = parameter(jnp.zeros((), jnp.float32), "", "router")

    def scores(self, x_BTD: Array) -> tuple[Array, Array]:
        """-> (r, the predictor's logit), float32 [B, T]. The predictor sees x / rms(x), whatever the size of x."""
        x_BTD = x_BTD.astype(jnp.float32)
        r_BT = project(x_BTD, self.router_D[:, None])[..., 0]
        x_BTD = jax.lax.stop_gradient(x_BTD)
        x_BTD = x_BTD * jax.lax.rsqrt(jnp.mean(jnp.square(x_BTD), axis=-1, keepdims=True) + self.config.norm_eps)
        hidden_BTP = jax.nn.silu(project(x_BTD, self.up_DP[...]))
        return r_BT, project(hidden_BTP, self.out_P[:, None])[..., 0] + self.bias[...]

    def __call__(
        self,
        branches: Callable[[Stream, Context, Mapping[str, Any], Place], Branches],
        stream: Stream,
        context: Context,
        prepared: Mapping[str, Any],
        place: Place,
    ) -> Passed:
        """The block on the tokens that pass, in order: everything in it, attention too, sees those alone.

        Its cache holds their keys and values in slots 0 .. used - 1. Those of a token that skips lie beyond, where no
        query looks and the next ones are written.
        """
        x_BTD, carry = stream
        r_BT, logit_BT = self.scores(x_BTD)
        capacity, train = self.config.mixture_of_depths.capacity, context.train

        def enter(r_BT, logit_BT, segment_ids_BT, tokens):
            token_BC, count_B, report = choose(r_BT, logit_BT, segment_ids_BT > 0, capacity, train)
            return token_BC, count_B, _take(tokens, token_BC), jax.lax.psum(report, BATCH_AXES)

        tokens = (x_BTD, r_BT, prepared, carry, context.token_ids_BT, context.segment_ids_BT, context.positions_BT)
        token_BC, count_B, tokens, report = local(enter, ("BT",) * 4, ("BC", "B", "BC", ""))(
            r_BT, logit_BT, context.segment_ids_BT, tokens
        )
        x_BCD, r_BC, prepared, carry_BC, ids_BC, segments_BC, positions_BC = tokens
        inner = context._replace(token_ids_BT=ids_BC, segment_ids_BT=segments_BC, positions_BT=positions_BC)
        if (cache := place.cache) is not None:
            place = place._replace(cache=cache.attention, start=cache.used_B)
        added = branches(Stream(x_BCD, carry_BC), inner, prepared, place)
        if cache is not None:
            cache = Cache(added.cache, cache.used_B + count_B)
        added_BCD = r_BC[..., None] * (added.attended_BTD + added.y_BTD)
        leave = local(_put, ("BT", "BC", "BC"), "BT")
        new = ((x_BCD + added_BCD).astype(x_BCD.dtype), added.carry)
        stream, routed = Stream(*leave((x_BTD, carry), new, token_BC)), added.routed
        if routed is not None and routed.plan is not None:
            selected_BTE, plan = leave(self._skipped(routed), (routed.selected_BTE, routed.plan), token_BC)
            routed = routed._replace(selected_BTE=selected_BTE, plan=plan)
        return Passed(stream, routed, cache, report)

    def _skipped(self, routed: Routed) -> tuple[Array, TokenPlan]:
        """What a trace says of tokens that skip; in evaluation, where it is made, there are T slots."""
        expert, weight = routed.plan
        return jnp.zeros_like(routed.selected_BTE), TokenPlan(
            jnp.full_like(expert, self.config.moe.num_experts), jnp.zeros_like(weight)
        )


def choose(r_BT: Array, logit_BT: Array, valid_BT: Array, capacity: float, train: bool) -> tuple[Array, Array, Report]:
    """-> (the tokens that pass, in order, int32 [B, C], T in slots left empty; how many pass [B]; report), on a shard.

    C is T in evaluation, where all may pass. Padding never passes, and C tokens are those of the tokens that are none.
    """
    time = r_BT.shape[1]
    best = threshold.rank(r_BT[..., None], valid_BT, capacity)
    # A recomputed backward pass takes the saved tokens, so that near-ties cannot be chosen twice differently.
    best_BC = checkpoint_name(jnp.where(best.full_GEC, best.token_GEC, time)[:, 0], "routing_plan")
    best_BT = _put(jnp.zeros(r_BT.shape, bool), jnp.ones(best_BC.shape, bool), best_BC)
    guess_BT = logit_BT > 0
    passes_BT = best_BT if train else guess_BT & valid_BT
    token_BT = jnp.sort(jnp.where(passes_BT, jnp.arange(time, dtype=jnp.int32), time), axis=1)
    cross_entropy_BT = jax.nn.softplus(logit_BT) - best_BT * logit_BT
    loss = Loss(jnp.sum(cross_entropy_BT, where=valid_BT), "token")
    count = lambda which_BT: jnp.sum(which_BT & valid_BT, dtype=jnp.int32)
    stats = {"tokens": count(valid_BT), "passed": count(passes_BT), "told": count(guess_BT == best_BT)}
    slots = best_BC.shape[1] if train else time
    count_B = jnp.sum(passes_BT, axis=1, dtype=jnp.int32)
    return token_BT[:, :slots], count_B, Report({"depth_predictor": loss}, stats)


def _take(of_tokens: Any, token_BC: Array) -> Any:
    """Arrays [B, T, ...] at some tokens: [B, C, ...], zeros in empty slots."""
    take = lambda a_T, token_C: a_T.at[token_C].get(mode="fill", fill_value=0)
    return jax.tree.map(lambda a_BT: jax.vmap(take)(a_BT, token_BC), of_tokens)


def _put(of_tokens: Any, new: Any, token_BC: Array) -> Any:
    """Arrays [B, T, ...] with those tokens' entries replaced by [B, C, ...]."""
    put = lambda a_T, new_C, token_C: a_T.at[token_C].set(new_C, mode="drop")
    return jax.tree.map(lambda a_BT, new_BC: jax.vmap(put)(a_BT, new_BC, token_BC), of_tokens, new)
