"""The decoder-only transformer: embedding, dense blocks, mixture-of-experts blocks, norm, head.

Layers of one kind are stacked along a leading axis L and scanned, so that compile time does not grow with depth.
Letters: B batch, T time, D model, V vocabulary, L layers.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from frugalmoe import sharding
from frugalmoe.model import depths
from frugalmoe.model.attention import Attention, Cache, empty_cache
from frugalmoe.model.layers import FeedForward, RMSNorm, Rotary, normal, rotary
from frugalmoe.model.moe import Context, MoELayer, Routed, RouterState
from frugalmoe.routing import strategies
from frugalmoe.schema import Model


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, key: Array, config: Model, moe: bool):
        attention_key, ffn_key = jax.random.split(key)
        out_std = config.init_std / (2 * config.num_layers) ** 0.5
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, "D")
        self.attention = Attention(attention_key, config, out_std)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, "D")
        if moe:
            self.moe = MoELayer(ffn_key, config, out_std)
        else:
            self.ffn = FeedForward(ffn_key, config.dim, config.dense_dim, config.init_std, out_std)

    def __call__(
        self,
        x_BTD: Array,
        context: Context,
        angles: Rotary,
        layer: Array,
        carry: object,
        cache: Cache | None,
        start: Array | None,
        weight_BT: Array | None = None,
    ) -> tuple[Array, Routed | None, object, Cache | None]:
        """`weight_BT`, float32, is what mixture of depths multiplies all that the block adds with."""
        normed = self.attention_norm(x_BTD)
        attended_BTD, cache = self.attention(normed, angles, context.segment_ids_BT, cache, start)
        hidden_BTD, routed = x_BTD + attended_BTD, None
        normed = self.ffn_norm(hidden_BTD)
        if hasattr(self, "moe"):
            y_BTD, routed, carry = self.moe(normed, context, layer, carry)
        else:
            y_BTD = self.ffn(normed)
        if weight_BT is None:
            return hidden_BTD + y_BTD, routed, carry, cache
        added_BTD = weight_BT[..., None] * (attended_BTD + y_BTD)
        return (x_BTD + added_BTD).astype(x_BTD.dtype), routed, carry, cache


class Output(NamedTuple):
    hidden_BTD: Array  # after the last norm
    routed: Routed | None  # every leaf with a leading axis L over the MoE layers
    caches: tuple[Cache | None, Cache | None]  # of the dense and of the MoE layers
    depths: depths.Report | None  # of the blocks that mixture of depths routes, dense ones first


class Transformer(nnx.Module):
    def __init__(self, config: Model, key: Array):
        self.config = config
        embed_key, dense_key, moe_key, head_key = jax.random.split(key, 4)
        num_moe = config.num_layers - config.num_dense_layers
        self.embed_VD = normal(embed_key, "VD", (config.vocab_size, config.dim), config.init_std, "embedding")
        if config.num_dense_layers:
            keys = jax.random.split(dense_key, config.num_dense_layers)
            self.dense_blocks = jax.vmap(lambda k: Block(k, config, moe=False))(keys)
        if num_moe:
            self.moe_blocks = jax.vmap(lambda k: Block(k, config, moe=True))(jax.random.split(moe_key, num_moe))
            shared_key = jax.random.fold_in(moe_key, num_moe)
            router = strategies.get(config.moe.router)
            shared = router.new_params(shared_key, config.dim, config.moe, shared=True)
            self.shared_router = nnx.Dict(dict(shared))
        dense_depths, moe_depths = map(len, depths.routed_layers(config))
        stacked = lambda key, n: jax.vmap(lambda k: depths.Depth(k, config))(jax.random.split(key, n))
        if dense_depths:
            self.dense_depths = stacked(jax.random.fold_in(dense_key, config.num_layers), dense_depths)
        if moe_depths:
            self.moe_depths = stacked(jax.random.fold_in(moe_key, config.num_layers + 1), moe_depths)
        self.final_norm = RMSNorm(config.dim, config.norm_eps, "D")
        if not config.tie_embeddings:
            self.head_DV = normal(head_key, "DV", (config.dim, config.vocab_size), config.init_std, "head")

    def __call__(
        self,
        context: Context,
        caches: tuple[Cache | None, Cache | None] = (None, None),
        start: Array | None = None,
    ) -> Output:
        """Hidden states of every token; `caches` and `start` are given in generation only."""
        config = self.config
        batch, time = context.token_ids_BT.shape
        embed_VD = sharding.gather(self.embed_VD, config.compute_dtype)[...]
        look_up = sharding.local(_look_up, ("VD", "BT"), "BTD")
        x_BTD = look_up(embed_VD.astype(config.compute_dtype), context.token_ids_BT)
        routed, new_caches, reports = None, [None, None], [None, None]
        if config.num_dense_layers:
            x_BTD, _, _, new_caches[0], reports[0] = self._scan("dense", x_BTD, context, None, caches[0], start)
        if config.num_dense_layers < config.num_layers:
            carry = strategies.get(config.moe.router).init_carry(config.moe, batch, time)
            carry = jax.tree.map(lambda a: sharding.reshard(a, "BT" + "." * (a.ndim - 2)), carry)
            shared = sharding.gather(self.shared_router, config.compute_dtype)
            context = context._replace(shared_router={k: v[...] for k, v in shared.items()})
            x_BTD, routed, _, new_caches[1], reports[1] = self._scan("moe", x_BTD, context, carry, caches[1], start)
        return Output(self.final_norm(x_BTD), routed, tuple(new_caches), depths.join(*reports))

    def _scan(self, kind: str, x_BTD, context, carry, cache, start):
        config, blocks, routers = self.config, getattr(self, f"{kind}_blocks"), getattr(self, f"{kind}_depths", None)
        angles = rotary(context.positions_BT, config.head_dim, config.rope_theta, config.rope_fraction)

        def body(state, xs):
            block, layer, cache = xs
            block = sharding.gather(block, config.compute_dtype)
            x, routed, carry, cache = block(state[0], context, angles, layer, state[1], cache, start)
            return (x, carry), (routed, cache)

        def through(state, xs):
            depth, (block, layer, cache) = xs
            depth = sharding.gather(depth, config.compute_dtype)
            block = sharding.gather(block, config.compute_dtype)
            x, routed, carry, cache, report = depth.through(block, state[0], context, angles, layer, state[1], cache)
            return (x, carry), ((routed, cache), report)

        num_layers = blocks.attention_norm.scale.shape[0]
        layers = jnp.arange(num_layers, dtype=jnp.int32)
        state, xs, body = (x_BTD, carry), (blocks, layers, cache), _remat(body, config.remat)
        if routers is None:
            ((x_BTD, carry), (routed, cache)), report = jax.lax.scan(body, state, xs), None
        else:
            every = config.mixture_of_depths.every
            (x_BTD, carry), (routed, cache), report = depths.scan(
                body, _remat(through, config.remat), state, xs, routers, every
            )
        return x_BTD, routed, carry, cache, report

    def head(self) -> Array:
        """The matrix [D, V] in compute dtype that turns hidden states into logits.

        NormHead (Ling, arXiv 2503.05139 section 3.2.3, axis as in its released code): each hidden channel's weights are
        divided by their L2 norm over the vocabulary, and the norm carries no gradient.
        """
        head_DV = self.embed_VD[...].T if self.config.tie_embeddings else self.head_DV[...]
        if self.config.norm_head:
            head_DV = head_DV / (jax.lax.stop_gradient(jnp.linalg.norm(head_DV, axis=1, keepdims=True)) + 1e-7)
        dtype = self.config.compute_dtype
        return sharding.gather_array(head_DV, sharding.Declaration("DV", "head"), dtype).astype(dtype)

    def logits(self, hidden: Array) -> Array:
        """float32 logits [..., V]; for generation and tests, where the whole matrix may exist."""
        return jnp.einsum("...d,dv->...v", hidden, self.head(), preferred_element_type=jnp.float32)


def empty_caches(config: Model, batch: int, slots: int) -> tuple[Cache | None, Cache | None]:
    """Of the dense and of the MoE layers."""
    dense = config.num_dense_layers
    return tuple(empty_cache(config, n, batch, slots) if n else None for n in (dense, config.num_layers - dense))


def _look_up(embed_VD: Array, token_ids_BT: Array) -> Array:
    """Rows of the embedding; a device of the tensor axis has those of a part of the vocabulary."""
    first = jax.lax.axis_index("tensor") * embed_VD.shape[0]
    own_BT = token_ids_BT - first
    own_BT = jnp.where(own_BT < 0, embed_VD.shape[0], own_BT)
    return jax.lax.psum(embed_VD.at[own_BT].get(mode="fill", fill_value=0), "tensor")


def _remat(body: Callable, policy: str) -> Callable:
    """`dots` keeps matrix products without a batch dimension; `full` keeps a layer's input and its routing plan.

    None keeps parameters that were gathered from other devices.
    """
    if policy == "none" and not sharding.gathers():
        return body
    keep = {
        "none": jax.checkpoint_policies.save_anything_except_these_names(sharding.GATHERED),
        "dots": jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names("routing_plan"),
        ),
        "full": jax.checkpoint_policies.save_only_these_names("routing_plan"),
    }[policy]
    return jax.checkpoint(body, policy=keep, prevent_cse=False)


def split(model: Transformer) -> tuple[nnx.GraphDef, dict, dict]:
    """(static structure, parameters, router state); the last two are plain nested dicts of arrays."""
    graphdef, params, router_state = nnx.split(model, nnx.Param, RouterState)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(router_state)


def declarations(config: Model) -> sharding.Declarations:
    """What every parameter says of itself. Raises `ValueError` for one that was made without letters."""
    return _declarations(config)


@functools.lru_cache(64)
def _declarations(config: Model) -> sharding.Declarations:
    params = nnx.eval_shape(lambda: nnx.state(Transformer(config, jax.random.key(0)), nnx.Param))
    return sharding.declarations(params)


def structure(config: Model) -> tuple[nnx.GraphDef, dict, dict]:
    """As `split`, with shapes in place of arrays: nothing is allocated."""
    return split(nnx.eval_shape(lambda: Transformer(config, jax.random.key(0))))


def count_parameters(config: Model) -> dict[str, int]:
    """Totals from shapes alone: `total`, `active` (used for one token), and the embedding and head among them.

    A block that mixture of depths routes counts as active for the share of tokens that it takes in training.
    """
    _, params, _ = structure(config)
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    routed = 0
    if "moe_blocks" in params:
        moe = params["moe_blocks"]["moe"]
        routed = size([moe["gate_up_ED2F"], moe["down_EFD"]])
    total, per_token = size(params), config.moe.num_experts_per_token
    idle = routed - routed * per_token // config.moe.num_experts
    for kind, blocks, layers in zip(("dense", "moe"), (0, idle), depths.routed_layers(config)):
        if layers:
            active = size(params[f"{kind}_blocks"]) - blocks
            stacked = params[f"{kind}_blocks"]["attention_norm"]["scale"].shape[0]
            idle += round(active * len(layers) / stacked * (1 - config.mixture_of_depths.capacity))
    embedding = params["embed_VD"].size
    return {
        "total": total,
        "active": total - idle,
        "embedding": embedding,
        "head": 0 if config.tie_embeddings else embedding,
    }
