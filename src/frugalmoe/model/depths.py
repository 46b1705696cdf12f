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
from jax.sharding import PartitionSpec as P

from frugalmoe.model.attention import Cache
from frugalmoe.model.layers import Rotary, normal
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


class Report(NamedTuple):
    """What a routed block reports; stacked over routed blocks by the scan."""

    losses: Mapping[str, Loss]
    stats: Mapping[str, Array]  # int32 [], sums over valid tokens: see `metrics`


def routed_layers(config: Model) -> tuple[list[int], list[int]]:
    """Index in the whole network of each routed block: of the dense ones, and of the MoE ones."""
    depths, dense = config.mixture_of_depths, config.num_dense_layers
    if not depths.capacity:
        return [], []
    every = depths.every
    return list(range(every - 1, dense, every)), list(range(dense + every - 1, config.num_layers, every))


def predictor_hidden(dim: int) -> int:
    return max(dim // 4, 1)


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

    def through(
        self,
        block: Callable,
        x_BTD: Array,
        context: Context,
        angles: Rotary,
        layer: Array,
        carry: object,
        cache: Cache | None,
    ) -> tuple[Array, Routed | None, object, Cache | None, Report]:
        """The block on the tokens that pass, in order: everything in it, attention too, sees those alone.

        Its cache holds their keys and values in slots 0 .. used - 1. Those of a token that skips lie beyond, where no
        query looks and the next ones are written.
        """
        r_BT, logit_BT = self.scores(x_BTD)
        capacity, train = self.config.mixture_of_depths.capacity, context.train

        def enter(r_BT, logit_BT, segment_ids_BT, tokens):
            token_BC, count_B, report = choose(r_BT, logit_BT, segment_ids_BT > 0, capacity, train)
            return token_BC, count_B, _take(tokens, token_BC), jax.lax.psum(report, BATCH_AXES)

        tokens = (x_BTD, r_BT, angles, carry, context.token_ids_BT, context.segment_ids_BT, context.positions_BT)
        token_BC, count_B, tokens, report = local(enter, ("BT",) * 4, ("BC", "B", "BC", ""))(
            r_BT, logit_BT, context.segment_ids_BT, tokens
        )
        x_BCD, r_BC, angles, carry_BC, ids_BC, segments_BC, positions_BC = tokens
        inner = context._replace(token_ids_BT=ids_BC, segment_ids_BT=segments_BC, positions_BT=positions_BC)
        start_B = None if cache is None else cache.used_B
        y_BCD, routed, carry_BC, cache = block(x_BCD, inner, angles, layer, carry_BC, cache, start_B, r_BC)
        if cache is not None:
            cache = cache._replace(used_B=cache.used_B + count_B)
        leave = local(_put, ("BT", "BC", "BC"), "BT")
        x_BTD, carry = leave((x_BTD, carry), (y_BCD, carry_BC), token_BC)
        if routed is not None and routed.plan is not None:
            selected_BTE, plan = leave(self._skipped(routed), (routed.selected_BTE, routed.plan), token_BC)
            routed = routed._replace(selected_BTE=selected_BTE, plan=plan)
        return x_BTD, routed, carry, cache, report

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


def scan(plain: Callable, through: Callable, state: Any, xs: Any, depths: Any, every: int) -> tuple[Any, Any, Report]:
    """`jax.lax.scan` over stacked layers, of which the last of each `every` is routed and is given its `Depth` too.

    `plain(state, x) -> (state, y)`; `through(state, (depth, x)) -> (state, (y, report))`; the result is (state, all y
    in order, reports of the routed). Compile time does not grow with depth: plain layers are a scan inside the scan.
    """
    groups = jax.tree.leaves(depths)[0].shape[0]
    whole = groups * every

    def group(state: Any, of_group: tuple) -> tuple[Any, tuple]:
        depth, xs = of_group
        state, before = _scan_some(plain, state, jax.tree.map(lambda a: a[:-1], xs))
        state, (last, report) = through(state, (depth, jax.tree.map(lambda a: a[-1], xs)))
        return state, (join(before, jax.tree.map(lambda a: a[None], last)), report)

    grouped = jax.tree.map(lambda a: _reshape(a[:whole], (groups, every), 1), xs)
    state, (ys, reports) = jax.lax.scan(group, state, (depths, grouped))
    ys = jax.tree.map(lambda a: _reshape(a, (whole,), 2), ys)
    state, rest = _scan_some(plain, state, jax.tree.map(lambda a: a[whole:], xs))
    return state, join(ys, rest), reports


def _reshape(a: Array, leading: tuple[int, ...], replaced: int) -> Array:
    """Other leading axes, none of them sharded. JAX would lose the sharding of an axis of size 1: it has to be told."""
    spec = P(*[None] * len(leading), *jax.typeof(a).sharding.spec[replaced:])
    return jnp.reshape(a, (*leading, *a.shape[replaced:]), out_sharding=spec)


def _scan_some(body: Callable, state: Any, xs: Any) -> tuple[Any, Any]:
    """A scan over no layers is none, and its outputs are None."""
    return jax.lax.scan(body, state, xs) if jax.tree.leaves(xs)[0].shape[0] else (state, None)


def join(a: Any, b: Any) -> Any:
    """Two stacks as one; None is an empty one."""
    if a is None or b is None:
        return b if a is None else a
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)
