"""The decoder-only transformer: embedding, blocks in the order of a pattern, norm, head.

Letters: B batch, T time, D model, V vocabulary, L layers.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from frugalmoe import sharding
from frugalmoe.model import depths, multi_token, pattern, scan
from frugalmoe.model.attention import kinds
from frugalmoe.model.block import Layer, Place, Report, Stream, apply_layer, prepare, stacked
from frugalmoe.model.layers import normal, stream_norm
from frugalmoe.model.moe import OF_EXPERTS, Context, Routed, RouterState
from frugalmoe.routing import strategies
from frugalmoe.routing.contract import Carry
from frugalmoe.schema import Model
from frugalmoe.sharding import parameter

Caches = tuple[Any, ...]  # of each layer

# What decides which tokens pass a block, by its name in the pattern: a module that is called in front of the block, as
# `depths.Depth`, and how its cache holds the block's.
WRAPPERS = {pattern.DEPTHS: (depths.Depth, depths.empty_cache)}


class Output(NamedTuple):
    """What the network makes of a batch."""

    hidden_BTD: Array  # after the last norm
    routed: Routed | None  # every leaf with a leading axis L over the MoE layers
    depths: Report | None  # of the blocks that some tokens skip, in order of depth
    further_LBTD: Array | None = None  # of modules that predict further ahead; theirs end `routed`


class Transformer(nnx.Module):
    """Embedding, blocks as `pattern` has them, norm, head."""

    def __init__(self, config: Model, key: Array):
        self.config = config
        embed_key, *of_blocks, head_key = jax.random.split(key, 4)
        self.embed_VD = normal(embed_key, "VD", (config.vocab_size, config.dim), config.init_std, "embedding")
        for i, (feed_forward, key) in enumerate(zip(pattern.FEED_FORWARDS, of_blocks)):
            self._add_blocks(feed_forward, key, config.num_layers + i)
        if pattern.has_experts(config):
            shared_key = jax.random.fold_in(of_blocks[1], len(pattern.moe_layers(config)))
            router = strategies.get(config.moe.router)
            shared = router.new_params(shared_key, config.dim, config.moe, shared=True)
            self.shared_router = nnx.Dict(dict(shared))
        if config.multi_token_prediction.depth:
            self.multi_token = multi_token.stacked(jax.random.fold_in(head_key, config.num_layers), config)
        self.final_norm = stream_norm(config)
        if not config.tie_embeddings:
            self.head_DV = normal(head_key, "DV", (config.dim, config.vocab_size), config.init_std, "head")
        if config.head_bias:
            self.head_bias_V = parameter(jnp.zeros(config.vocab_size), "V", "vector")

    def _add_blocks(self, feed_forward: str, key: Array, wrapper_number: int) -> None:
        """Stacks of the layers with one kind of feed-forward, if there are any, and of their wrappers."""
        config = self.config
        of_layers = [kind for kind in pattern.layers(config) if kind.feed_forward == feed_forward]
        if of_layers:
            blocks = stacked(jax.random.split(key, len(of_layers)), config, of_layers)
            setattr(self, pattern.NAMES[feed_forward, ""], blocks)
        wrapped = [kind.wrapper for kind in of_layers if kind.wrapper]
        for name in dict.fromkeys(wrapped):
            make, keys = WRAPPERS[name][0], jax.random.split(jax.random.fold_in(key, wrapper_number), len(wrapped))
            setattr(self, pattern.NAMES[feed_forward, name], jax.vmap(lambda key, make=make: make(key, config))(keys))

    def __call__(self, context: Context) -> Output:
        """Hidden states of every token."""
        config = self.config
        stream = Stream(self.embed(context.token_ids_BT))
        prepared = prepare(context.positions_BT, config, pattern.attention_names(config.attention))
        of_segments, begun = [], False
        for segment in pattern.segments(config):
            if "moe" in segment.feed_forwards and not begun:
                begun = True
                context, carry = self._before_experts(context)
                stream = stream._replace(carry=carry)
            stream, found = scan.Segment(self, segment, context, prepared)(stream)
            of_segments.append(found)
        routed, reports = zip(*of_segments)
        return Output(self.final_norm(stream.x_BTD), scan.joined(routed), scan.joined(reports))

    def layers(self, take: Callable[[nnx.Variable, int], nnx.Variable]) -> tuple[Layer, ...]:
        """Every layer by itself, in order of depth. `take`: an entry of a stack."""
        of_layers, count = pattern.layers(self.config), collections.Counter()
        is_variable = lambda leaf: isinstance(leaf, nnx.Variable)
        entry = lambda stack, n: jax.tree.map(lambda leaf: take(leaf, n), stack, is_leaf=is_variable)
        found = []
        for kind in of_layers:
            half, stacks = kind.feed_forward, getattr(self, pattern.NAMES[kind.feed_forward, ""]).parts
            if len({other.attention for other in of_layers if other.feed_forward == half}) > 1:
                attention = entry(stacks.attention[pattern.short(kind.attention)], count[half, kind.attention])
            else:
                attention = entry(stacks.attention, count[half])
            parts = entry(stacks._replace(attention=None), count[half])._replace(attention=attention)
            name, number = pattern.NAMES.get((half, kind.wrapper)), count[half, kind.wrapper]
            found.append(Layer(parts, entry(getattr(self, name), number) if kind.wrapper else None))
            count.update([half, (half, kind.attention), (half, kind.wrapper)])
        return tuple(found)

    def decode(self, layers: tuple[Layer, ...], context: Context, caches: Caches, start: Array) -> tuple[Array, Caches]:
        """Hidden states of tokens that come behind those in the caches: the first of each sequence is its `start`th.

        Layers one by one: a scan would copy every layer's parameters and cache for every token.
        """
        config, new, count = self.config, [], collections.Counter()
        stream = Stream(self.embed(context.token_ids_BT))
        prepared = prepare(context.positions_BT, config, pattern.attention_names(config.attention))
        for kind, layer, cache in zip(pattern.layers(config), layers, caches):
            number = count[kind.feed_forward]
            count[kind.feed_forward] += 1
            if kind.feed_forward == "moe" and not number:
                context, carry = self._before_experts(context)
                stream = stream._replace(carry=carry)
            place, layer = Place(jnp.int32(number), cache, start), sharding.gather(layer, config.compute_dtype)
            passed = apply_layer(layer, kind, stream, context, prepared, place)
            stream = passed.stream
            new.append(passed.cache)
        return self.final_norm(stream.x_BTD), tuple(new)

    def further(self, context: Context, out: Output) -> Output:
        """What the network made of a batch, and what its modules that predict further ahead make of that, if any."""
        config = self.config
        if not config.multi_token_prediction.depth:
            return out
        context, carry = self._before_experts(context)
        stream = Stream(out.hidden_BTD, carry)
        further_LBTD, routed = multi_token.run(self.multi_token, config, context, stream, self._look_up())
        return out._replace(routed=scan.joined([out.routed, routed]), further_LBTD=further_LBTD)

    def draft(self, context: Context, hidden_BTD: Array, cache: Any, start: Array) -> tuple[Array, Any]:
        """Of the first module in generation -> (hidden states, cache); see `multi_token.draft`."""
        config, (context, carry) = self.config, self._before_experts(context)
        place = Place(jnp.int32(len(pattern.moe_layers(config))), cache, start)
        rest = (Stream(hidden_BTD, carry), self._look_up(), place)
        passed = multi_token.draft(self.multi_token, config, context, *rest)
        return passed.stream.x_BTD, passed.cache

    def embed(self, token_ids_BT: Array) -> Array:
        """Embeddings [B, T, D] in compute dtype."""
        return self._look_up()(token_ids_BT)

    def _look_up(self) -> Callable[[Array], Array]:
        """ids [B, T] -> their embeddings in compute dtype."""
        dtype = self.config.compute_dtype
        with jax.named_scope("embedding"):
            embed_VD = sharding.gather(self.embed_VD, dtype)[...].astype(dtype)
        look_up = functools.partial(sharding.local(_look_up, ("VD", "BT"), "BTD"), embed_VD)
        multiplier = self.config.multipliers.embedding
        return look_up if multiplier == 1 else lambda ids_BT: look_up(ids_BT) * multiplier

    def _before_experts(self, context: Context) -> tuple[Context, Carry]:
        """What a first layer with experts is given: the parameters that all routers share, and a carry of nothing.

        The context as it is, and no carry, where no layer has experts.
        """
        config, (batch, time) = self.config, context.token_ids_BT.shape
        if not pattern.has_experts(config):
            return context, None
        carry = strategies.get(config.moe.router).init_carry(config.moe, batch, time)
        carry = jax.tree.map(lambda a: sharding.reshard(a, "BT" + "." * (a.ndim - 2)), carry)
        shared = sharding.gather(self.shared_router, config.compute_dtype)
        return context._replace(shared_router={k: v[...] for k, v in shared.items()}), carry

    def head(self) -> Array:
        """The matrix [D, V] in compute dtype that turns hidden states into logits, over model.multipliers.logits.

        NormHead (Ling, arXiv 2503.05139 section 3.2.3, axis as in its released code): each hidden channel's weights are
        divided by their L2 norm over the vocabulary, and the norm carries no gradient.
        """
        head_DV = self.embed_VD[...].T if self.config.tie_embeddings else self.head_DV[...]
        if self.config.norm_head:
            head_DV = head_DV / (jax.lax.stop_gradient(jnp.linalg.norm(head_DV, axis=1, keepdims=True)) + 1e-7)
        if self.config.multipliers.logits != 1:
            head_DV = head_DV / self.config.multipliers.logits
        dtype = self.config.compute_dtype
        return sharding.gather_array(head_DV, sharding.Declaration("DV", "head"), dtype).astype(dtype)

    def head_bias(self) -> Array | None:
        """What is added to logits, float32 [V], over model.multipliers.logits as they are; None: nothing."""
        if not self.config.head_bias:
            return None
        bias_V, divisor = self.head_bias_V[...], self.config.multipliers.logits
        return bias_V if divisor == 1 else bias_V / divisor

    def logits(self, hidden: Array) -> Array:
        """float32 logits [..., V]; for generation and tests, where the whole matrix may exist."""
        return to_logits(hidden, self.head(), self.head_bias())


def to_logits(hidden: Array, head_DV: Array, bias_V: Array | None) -> Array:
    """float32 logits [..., V]."""
    logits = jnp.einsum("...d,dv->...v", hidden, head_DV, preferred_element_type=jnp.float32)
    return logits if bias_V is None else logits + bias_V


def empty_caches(config: Model, batch: int, slots: int) -> Caches:
    """One cache per layer."""
    zeros = lambda a: sharding.reshard(jnp.zeros(a.shape, a.dtype), "B" + "." * (a.ndim - 1))
    return tuple(jax.tree.map(zeros, _cache(config, kind, batch, slots)) for kind in pattern.layers(config))


def _cache(config: Model, kind: pattern.BlockKind, batch: int, slots: int) -> Any:
    cache = kinds.get(kind.attention).empty_cache(config, kinds.options_of(config, kind.attention), batch, slots)
    return WRAPPERS[kind.wrapper][1](cache, batch) if kind.wrapper else cache


def bytes_of_caches(config: Model, batch: int, slots: int) -> int:
    """What `empty_caches` would take."""
    of_kind = lambda kind: jax.tree.leaves(jax.eval_shape(lambda: _cache(config, kind, batch, slots)))
    size = lambda kind: sum(a.size * a.dtype.itemsize for a in of_kind(kind))
    return sum(count * size(kind) for kind, count in collections.Counter(pattern.layers(config)).items())


def _look_up(embed_VD: Array, token_ids_BT: Array) -> Array:
    """Rows of the embedding; a device of the tensor axis has those of a part of the vocabulary."""
    with jax.named_scope("embedding"):
        first = jax.lax.axis_index("tensor") * embed_VD.shape[0]
        own_BT = token_ids_BT - first
        own_BT = jnp.where(own_BT < 0, embed_VD.shape[0], own_BT)
        return jax.lax.psum(embed_VD.at[own_BT].get(mode="fill", fill_value=0), "tensor")


def split(model: Transformer) -> tuple[nnx.GraphDef, dict, dict]:
    """(static structure, parameters, router state); the last two are plain nested dicts of arrays."""
    graphdef, params, router_state = nnx.split(model, nnx.Param, RouterState)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(router_state)


@functools.lru_cache(64)
def declarations(config: Model) -> sharding.Declarations:
    """What every parameter says of itself. Raises `UserError` for one that was made without letters."""
    return sharding.declarations(nnx.state(_abstract(config, jax.sharding.get_abstract_mesh()), nnx.Param))


def structure(config: Model) -> tuple[nnx.GraphDef, dict, dict]:
    """As `split`, with shapes in place of arrays: nothing is allocated."""
    return split(_abstract(config, jax.sharding.get_abstract_mesh()))


@functools.lru_cache(64)
def _abstract(config: Model, mesh: jax.sharding.AbstractMesh) -> Transformer:
    """The network with shapes in place of arrays, whose shardings are of the mesh in context."""
    return nnx.eval_shape(lambda: Transformer(config, jax.random.key(0)))


def count_parameters(config: Model) -> dict[str, int]:
    """Totals from shapes alone: `total`, `active` (used for one token), and the embedding and head among them.

    A block that mixture of depths routes counts as active for the share of tokens that it takes in training. Modules
    that predict tokens further ahead are not active: the network is used without them.
    """
    _, params, _ = structure(config)
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    routed = 0
    if "moe_blocks" in params:
        moe = params["moe_blocks"]["moe"]
        routed = size([leaf for name, leaf in moe.items() if name in OF_EXPERTS])
    total, per_token = size(params), config.moe.num_experts_per_token
    idle = {"dense": 0, "moe": routed - routed * per_token // config.moe.num_experts}
    skipped = 0
    for feed_forward in pattern.FEED_FORWARDS:
        of_layers = [kind for kind in pattern.layers(config) if kind.feed_forward == feed_forward]
        passed = [kind.attention for kind in of_layers if kind.wrapper]
        if passed:
            blocks = dict(params[pattern.NAMES[feed_forward, ""]])
            per_layer = _by_attention(blocks.pop("attention"), [kind.attention for kind in of_layers])
            rest = (size(blocks) - idle[feed_forward]) * len(passed) / len(of_layers)
            active = rest + sum(map(per_layer.get, passed))
            skipped += round(active * (1 - config.mixture_of_depths.capacity))
    idle = sum(idle.values()) + skipped + size(params.get("multi_token", {}))
    embedding = params["embed_VD"].size
    return {
        "total": total,
        "active": total - idle,
        "embedding": embedding,
        "head": 0 if config.tie_embeddings else embedding,
    }


def _by_attention(stacks: dict, of_layers: list[str]) -> dict[str, float]:
    """Parameters of one layer's attention, by kind."""
    counts, size = collections.Counter(of_layers), lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    own = lambda name: stacks if len(counts) == 1 else stacks[pattern.short(name)]
    return {name: size(own(name)) / count for name, count in counts.items()}
