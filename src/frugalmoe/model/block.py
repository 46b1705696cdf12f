"""One block: attention and feed-forward, each with a norm, each added to the residual stream.

Letters: B batch, T time, D model.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from frugalmoe.model import pattern
from frugalmoe.model.attention import kinds
from frugalmoe.model.attention.contract import Cache
from frugalmoe.model.layers import FeedForward, Norm, stream_norm
from frugalmoe.model.moe import Context, MoELayer, Routed
from frugalmoe.model.pattern import BlockKind
from frugalmoe.routing.contract import Loss
from frugalmoe.schema import Model


class Stream(NamedTuple):
    """What goes from block to block."""

    x_BTD: Array
    carry: Any = None  # of routers, through MoE blocks


class Place(NamedTuple):
    """Where a block is, and what it remembers."""

    layer: Array  # int32 [], index among the blocks with its feed-forward
    cache: Cache | None = None  # in generation only, as the next
    start: Array | None = None  # int32 [] or [B]: the place of the first token


class Report(NamedTuple):
    """What a wrapper of a block reports; stacked over wrapped blocks by the scan."""

    losses: Mapping[str, Loss]
    stats: Mapping[str, Array]  # int32 [], sums over valid tokens


class Passed(NamedTuple):
    """What comes out of a block, wrapped or not."""

    stream: Stream
    routed: Routed | None  # of a layer with experts
    cache: Cache | None
    report: Report | None = None  # of a wrapper


class Branches(NamedTuple):
    """What a block adds, before it is added."""

    attended_BTD: Array
    hidden_BTD: Array  # x + attended
    y_BTD: Array  # of the feed-forward
    carry: Any
    routed: Routed | None
    cache: Cache | None


class FeedForwardKind(NamedTuple):
    """One of the two halves of a block."""

    name: str  # of its parameters in a block
    layer: Callable[[Array, Model, float], Any]  # (key, config, deviation of the output's weights)
    apply: Callable  # (layer, x_BTD, context, index, carry) -> (y_BTD, routed, carry)


def _dense(key: Array, config: Model, out_std: float) -> FeedForward:
    return FeedForward(key, config.dim, config.dense_dim, config.init_std, out_std)


FEED_FORWARDS = {
    "dense": FeedForwardKind("ffn", _dense, lambda ffn, x_BTD, context, index, carry: (ffn(x_BTD), None, carry)),
    "moe": FeedForwardKind("moe", MoELayer, lambda moe, *inputs: moe(*inputs)),
}


class Parts(NamedTuple):
    """The modules of a block, of whatever kinds."""

    attention_norm: Norm
    attention: Any
    ffn_norm: Norm
    feed_forward: Any

    def branches(
        self, kind: BlockKind, stream: Stream, context: Context, prepared: Mapping[str, Any], place: Place
    ) -> Branches:
        """`prepared`: what each kind of attention has of the positions."""
        seen, added = _norms(kind)
        with jax.named_scope("attention"):
            attended_BTD, cache = self.attention(
                seen(self.attention_norm, stream.x_BTD),
                prepared[kind.attention],
                context.segment_ids_BT,
                place.cache,
                place.start,
            )
            attended_BTD = added(self.attention_norm, attended_BTD)
        hidden_BTD = stream.x_BTD + attended_BTD
        with jax.named_scope("feed_forward"):
            apply, seen_BTD = FEED_FORWARDS[kind.feed_forward].apply, seen(self.ffn_norm, hidden_BTD)
            y_BTD, routed, carry = apply(self.feed_forward, seen_BTD, context, place.layer, stream.carry)
            added_BTD = added(self.ffn_norm, y_BTD)
        return Branches(attended_BTD, hidden_BTD, added_BTD, carry, routed, cache)


Normed = Callable[[Norm, Array], Array]


def _norms(kind: BlockKind) -> tuple[Normed, Normed]:
    """What is done with the norm of attention, or of the feed-forward, to what it sees and to what it adds."""

    def scaled(y_BTD: Array) -> Array:
        return y_BTD if kind.multiplier == 1 else y_BTD * kind.multiplier

    if kind.norm_position == "before":
        return (lambda norm, x_BTD: norm(x_BTD)), (lambda norm, y_BTD: scaled(y_BTD))
    return (lambda norm, x_BTD: x_BTD), (lambda norm, y_BTD: scaled(norm(y_BTD)))


class Block(nnx.Module):
    """The parameters of one block, or of blocks that are stacked: see `stacked`."""

    def __init__(self, key: Array, config: Model, kind: BlockKind):
        self.kind = kind
        attention_key, ffn_key = jax.random.split(key)
        out_std = config.init_std / (2 * config.num_layers) ** 0.5
        self.attention_norm = stream_norm(config)
        self.attention = attention_layer(attention_key, config, kind.attention)
        self.ffn_norm = stream_norm(config)
        feed_forward = FEED_FORWARDS[kind.feed_forward]
        setattr(self, feed_forward.name, feed_forward.layer(ffn_key, config, out_std))

    @property
    def parts(self) -> Parts:
        """The modules, under names that are the same for all kinds."""
        feed_forward = getattr(self, FEED_FORWARDS[self.kind.feed_forward].name)
        return Parts(self.attention_norm, self.attention, self.ffn_norm, feed_forward)

    def __call__(self, stream: Stream, context: Context, prepared: Mapping[str, Any], place: Place) -> Passed:
        """x + attention + feed-forward for every token."""
        return apply_block(self.parts, self.kind, stream, context, prepared, place)


def apply_block(
    parts: Parts, kind: BlockKind, stream: Stream, context: Context, prepared: Mapping[str, Any], place: Place
) -> Passed:
    """x + attention + feed-forward for every token."""
    added = parts.branches(kind, stream, context, prepared, place)
    return Passed(Stream(added.hidden_BTD + added.y_BTD, added.carry), added.routed, added.cache)


class Layer(NamedTuple):
    """A block as the pattern has it."""

    parts: Parts
    wrapper: Any  # decides which tokens pass; None: all do


def apply_layer(
    layer: Layer, kind: BlockKind, stream: Stream, context: Context, prepared: Mapping[str, Any], place: Place
) -> Passed:
    """The block for the tokens that pass it."""
    if layer.wrapper is None:
        return apply_block(layer.parts, kind, stream, context, prepared, place)
    return layer.wrapper(functools.partial(layer.parts.branches, kind), stream, context, prepared, place)


def attention_layer(key: Array, config: Model, name: str) -> Any:
    """The parameters of one layer's attention."""
    kind, out_std = kinds.get(name), config.init_std / (2 * config.num_layers) ** 0.5
    return kind.layer(key, config, kinds.options_of(config, name), out_std)


def stacked(keys: Array, config: Model, of_layers: list[BlockKind]) -> Block:
    """Blocks with one kind of feed-forward, stacked along a leading axis in order of depth.

    Attention of several kinds is a stack for each, under its name: `attention/window`, `attention/grouped`.
    """
    blocks = jax.vmap(lambda key: Block(key, config, of_layers[0]))(keys)
    names = list(dict.fromkeys(kind.attention for kind in of_layers))
    if len(names) > 1:
        stacks = {}
        for name in names:
            own = keys[jnp.array([i for i, kind in enumerate(of_layers) if kind.attention == name])]
            stacks[pattern.short(name)] = jax.vmap(
                lambda key, name=name: attention_layer(jax.random.split(key)[0], config, name)
            )(own)
        blocks.attention = nnx.Dict(stacks)
    return blocks


def prepare(positions_BT: Array, config: Model, names: tuple[str, ...]) -> dict[str, Any]:
    """What each kind of attention computes of the positions, once for all layers."""
    return {
        name: kinds.get(name).prepare(positions_BT, config, kinds.options_of(config, name))
        for name in dict.fromkeys(names)
    }
