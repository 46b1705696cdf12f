"""Multi-token prediction: modules that learn to predict tokens further ahead (DeepSeek-V3, 2412.19437, section 2.2).

Module m = 1 .. depth goes on from the hidden states of module m - 1, those of the network for m = 1, after their norm:

    h'_i = [RMSNorm(Emb(t_{i+m})); RMSNorm(h_i)] W         (eq. 21)
    h_i = RMSNorm(Block(h'_1 ... h'_i))                     (eq. 22)
    P(t_{i+m+1} | t_1 ... t_{i+m}) = softmax(h_i head)       (eq. 23)

Embedding and head are the network's; the block is one of the kind of its last layer, with experts, router and router
state of its own. W has the embedding's rows first, as released weights have (`MtpLayer` of transformers 5.23); the
paper writes them last. Where t_{i+m} is beyond the row or the document, token i is padding to module m.

The loss is the mean over modules of their mean cross-entropy, each over its own targets; eq. 24 divides by all tokens.
Evaluation does as if there were no modules; generation may let the first one draft tokens that the network checks.

Letters: B batch, T time, D model, L layers (the modules), I contracted axis (2 D).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from frugalmoe import sharding
from frugalmoe.model import pattern
from frugalmoe.model.attention import kinds
from frugalmoe.model.block import Block, Passed, Place, Stream, prepare
from frugalmoe.model.layers import normal, stream_norm
from frugalmoe.model.moe import Context, Routed
from frugalmoe.model.pattern import BlockKind
from frugalmoe.model.scan import remat
from frugalmoe.schema import Model


def kind(config: Model) -> BlockKind:
    """Of the modules' blocks: that of the last layer, which no token skips."""
    return dataclasses.replace(pattern.layers(config)[-1], wrapper="")


def moe_layers(config: Model) -> list[int]:
    """Number of each module with experts, as if the modules were further layers of the network."""
    depth = config.multi_token_prediction.depth if kind(config).feed_forward == "moe" else 0
    return list(range(config.num_layers, config.num_layers + depth))


class Module(nnx.Module):
    """The parameters of one module, or of all of them stacked along a leading axis."""

    def __init__(self, key: Array, config: Model):
        project_key, block_key = jax.random.split(key)
        self.embedding_norm = stream_norm(config)
        self.hidden_norm = stream_norm(config)
        self.project_ID = normal(project_key, "I->D", (2 * config.dim, config.dim), config.init_std)
        self.block = Block(block_key, config, kind(config))
        self.norm = stream_norm(config)

    def __call__(
        self, embedded_BTD: Array, stream: Stream, context: Context, prepared: dict[str, Any], place: Place
    ) -> Passed:
        """`context`: of the tokens ahead, whose embeddings these are; `stream` has the hidden states before."""
        both_BTI = jnp.concatenate([self.embedding_norm(embedded_BTD), self.hidden_norm(stream.x_BTD)], axis=-1)
        project_ID = self.project_ID.astype(both_BTI.dtype)
        x_BTD = jnp.einsum("bti,id->btd", both_BTI, project_ID, out_sharding=sharding.spec("BTD"))
        passed = self.block(stream._replace(x_BTD=x_BTD), context, prepared, place)
        return passed._replace(stream=passed.stream._replace(x_BTD=self.norm(passed.stream.x_BTD)))


def stacked(key: Array, config: Model) -> Module:
    """All modules of a config."""
    return jax.vmap(lambda key: Module(key, config))(jax.random.split(key, config.multi_token_prediction.depth))


def run(
    modules: Module, config: Model, context: Context, stream: Stream, look_up: Callable[[Array], Array]
) -> tuple[Array, Routed | None]:
    """-> (the modules' hidden states [L, B, T, D], what their MoE layers report, stacked).

    stream: the network's hidden states, and the carry before a first MoE layer. look_up: embeddings [B, T, D] of ids.
    """
    depth, first = config.multi_token_prediction.depth, len(pattern.moe_layers(config))
    of_tokens = (context.token_ids_BT, context.segment_ids_BT)
    ids_LBT, segments_LBT = look_ahead(of_tokens, context.segment_ids_BT, depth)
    prepared = prepare(context.positions_BT, config, (kind(config).attention,))

    def body(stream: Stream, xs: tuple) -> tuple[Stream, tuple[Array, Routed | None]]:
        module, layer, ids_BT, segments_BT = xs
        module = sharding.gather(module, config.compute_dtype)
        ahead = context._replace(token_ids_BT=ids_BT, segment_ids_BT=segments_BT)
        passed = module(look_up(ids_BT), stream, ahead, prepared, Place(layer))
        return passed.stream, (passed.stream.x_BTD, passed.routed)

    layers = first + jnp.arange(depth, dtype=jnp.int32)
    _, found = jax.lax.scan(remat(body, config.remat), stream, (modules, layers, ids_LBT, segments_LBT))
    return found


def draft(
    modules: Module, config: Model, context: Context, stream: Stream, look_up: Callable[[Array], Array], place: Place
) -> Passed:
    """The first module alone, in generation. `context` is of the tokens ahead, at the positions of those before."""
    first = sharding.gather(jax.tree.map(lambda a: a[0], modules), config.compute_dtype)
    prepared = prepare(context.positions_BT, config, (kind(config).attention,))
    return first(look_up(context.token_ids_BT), stream, context, prepared, place)


def empty_cache(config: Model, batch: int, slots: int) -> Any:
    """Of the first module."""
    name = kind(config).attention
    cache = kinds.get(name).empty_cache(config, kinds.options_of(config, name), batch, slots)
    return jax.tree.map(lambda a: sharding.reshard(jnp.zeros(a.shape, a.dtype), "B" + "." * (a.ndim - 1)), cache)


def look_ahead(of_tokens: Any, segment_ids_BT: Array, depth: int) -> Any:
    """What module m = 1 .. depth has in place of each token's own: arrays [..., B, T] -> [L, ..., B, T].

    The entry of token i + m, and 0 where the row has no such token in the same document.
    """
    letters = "." * (segment_ids_BT.ndim - 2) + "BT"

    def on_device(of_tokens: Any, segment_ids_BT: Array) -> Any:
        of_tokens, segment_ids_BT = sharding.whole_sequences((of_tokens, segment_ids_BT), letters)
        ahead = lambda a_BT, m: jnp.pad(a_BT, [(0, 0)] * (a_BT.ndim - 1) + [(0, m)])[..., m:]

        def of_module(a_BT: Array, m: int) -> Array:
            same_BT = (ahead(segment_ids_BT, m) == segment_ids_BT) & (segment_ids_BT > 0)
            return sharding.own_part(jnp.where(same_BT, ahead(a_BT, m), 0), "context", a_BT.ndim - 1)

        return jax.tree.map(lambda a_BT: jnp.stack([of_module(a_BT, m + 1) for m in range(depth)]), of_tokens)

    return sharding.local(on_device, (letters, letters), "." + letters)(of_tokens, segment_ids_BT)
