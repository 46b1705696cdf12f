"""Grouped-query attention with rotary positions, optional QK-norm, biases and sinks.

Letters: B batch, T time, C slots of a cache, D model, H query heads, h key-value heads, d channels of a head.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from frugalmoe.model.attention.contract import Attention, Flops, Shared
from frugalmoe.model.attention.heads import attend, write
from frugalmoe.model.attention.kernels import Form, cache_attention
from frugalmoe.model.layers import RMSNorm, normal, over_rms
from frugalmoe.model.rotary import Rotary, rotary, rotate
from frugalmoe.schema import Model
from frugalmoe.sharding import parameter, spec

_AFTER = ("rotated", "unit")  # values of model.qk_norm that act behind the rotation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of grouped-query attention."""

    sinks: bool = False  # a learned logit per head of a key without a value: a head may attend to nothing (gpt-oss)


class Cache(NamedTuple):
    """Keys and values of the tokens so far, each head's together: else every step would copy them to be so."""

    k_BhCd: Array
    v_BhCd: Array


class GroupedAttention(nnx.Module):
    """softmax(q k^T / sqrt(d)) v over earlier tokens of the same document, of the last `window` where there is one, or
    where it is `chunked` of a chunk of so many.
    """

    def __init__(
        self, key: Array, config: Model, options: Options, out_std: float, window: int = 0, chunked: bool = False
    ):
        scale = config.multipliers.scores or config.head_dim**-0.5
        self.config, self.form = config, Form(scale, window, chunked)
        d, heads, kv_heads = config.head_dim, config.num_heads, config.num_kv_heads
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        self.query_DHd = normal(q_key, "D->Hd", (config.dim, heads, d), config.init_std)
        self.key_Dhd = normal(k_key, "D->hd", (config.dim, kv_heads, d), config.init_std)
        self.value_Dhd = normal(v_key, "D->hd", (config.dim, kv_heads, d), config.init_std)
        self.out_HdD = normal(o_key, "Hd->D", (heads, d, config.dim), out_std)
        if config.qkv_bias:
            self.query_bias_Hd = parameter(jnp.zeros((heads, d)), "Hd", "vector")
            self.key_bias_hd = parameter(jnp.zeros((kv_heads, d)), "hd", "vector")
            self.value_bias_hd = parameter(jnp.zeros((kv_heads, d)), "hd", "vector")
        if config.out_bias:
            self.out_bias_D = parameter(jnp.zeros(config.dim), "D", "vector")
        if config.qk_norm not in ("none", "unit"):
            whole = config.qk_norm == "full"
            self.query_norm = RMSNorm(heads * d if whole else d, config.norm_eps, "." if whole else "d")
            self.key_norm = RMSNorm(kv_heads * d if whole else d, config.norm_eps, "." if whole else "d")
        self.sink_H = parameter(jnp.zeros(heads), "H", "vector") if options.sinks else None

    def __call__(
        self, x_BTD: Array, prepared: Any, segment_ids_BT: Array, cache: Cache | None, start: Array | None
    ) -> tuple[Array, Cache | None]:
        """See `contract`."""
        q_BTHd, k_BThd, v_BThd = self._project(x_BTD)
        if self.config.qk_norm not in _AFTER:
            q_BTHd, k_BThd = self._normed(q_BTHd, k_BThd)
        if most := self.config.clip_qkv:
            q_BTHd, k_BThd, v_BThd = (jnp.clip(a, -most, most) for a in (q_BTHd, k_BThd, v_BThd))
        q_BTHd, k_BThd = self._placed(q_BTHd, k_BThd, prepared)
        if self.config.qk_norm in _AFTER:
            q_BTHd, k_BThd = self._normed(q_BTHd, k_BThd)
        sink_H = None if self.sink_H is None else self.sink_H[...]
        if cache is None:
            o_BTHd = attend(q_BTHd, k_BThd, v_BThd, segment_ids_BT, sink_H, self.form)
        else:
            new = (k_BThd.swapaxes(1, 2), v_BThd.swapaxes(1, 2))
            cache = Cache(*(write(old, new_BhTd, start) for old, new_BhTd in zip(cache, new)))
            o_BTHd = cache_attention(q_BTHd, *cache, start, form=self.form, sink_H=sink_H)
        out_HdD = self.out_HdD.astype(x_BTD.dtype)
        y_BTD = jnp.einsum("bthk,hkd->btd", o_BTHd, out_HdD, out_sharding=spec("BTD"))
        return (y_BTD + self.out_bias_D.astype(x_BTD.dtype) if self.config.out_bias else y_BTD), cache

    def _project(self, x_BTD: Array) -> tuple[Array, Array, Array]:
        dtype = x_BTD.dtype
        q_BTHd, k_BThd, v_BThd = (
            jnp.einsum("btd,dhk->bthk", x_BTD, w.astype(dtype)) for w in (self.query_DHd, self.key_Dhd, self.value_Dhd)
        )
        if self.config.qkv_bias:
            biases = (self.query_bias_Hd, self.key_bias_hd, self.value_bias_hd)
            q_BTHd, k_BThd, v_BThd = (a + b.astype(dtype) for a, b in zip((q_BTHd, k_BThd, v_BThd), biases))
        return q_BTHd, k_BThd, v_BThd

    def _placed(self, q_BTHd: Array, k_BThd: Array, prepared: Rotary) -> tuple[Array, Array]:
        """Queries and keys that know their positions."""
        return rotate(q_BTHd, prepared), rotate(k_BThd, prepared)

    def _normed(self, q_BTHd: Array, k_BThd: Array) -> tuple[Array, Array]:
        """Queries and keys as model.qk_norm has them."""
        if self.config.qk_norm == "none":
            return q_BTHd, k_BThd
        if self.config.qk_norm == "unit":
            return tuple(over_rms(a, self.config.norm_eps).astype(a.dtype) for a in (q_BTHd, k_BThd))
        if self.config.qk_norm == "full":
            return tuple(
                norm(a.reshape(*a.shape[:2], -1)).reshape(a.shape)
                for norm, a in ((self.query_norm, q_BTHd), (self.key_norm, k_BThd))
            )
        return self.query_norm(q_BTHd), self.key_norm(k_BThd)


def prepare(positions_BT: Array, config: Model, options: Options) -> Rotary:
    """The angles of a share of each head's channels."""
    return rotary(positions_BT, int(config.head_dim * config.rope_fraction), config.rope_theta, config.rope_scaling)


def empty_cache(config: Model, options: Options, batch: int, slots: int) -> Cache:
    """A slot for every token."""
    zeros = jnp.zeros((batch, config.num_kv_heads, slots, config.head_dim), config.compute_dtype)
    return Cache(zeros, zeros)


def flops(config: Model, options: Options) -> Flops:
    """Projections to queries, keys, values and back; scores and weighted values."""
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
    return Flops(2 * config.dim * width * (2 * heads + 2 * kv_heads), 2 * 2 * heads * width)


def mesh(config: Model, options: Options) -> Shared:
    """Heads."""
    return Shared(
        (f"model.num_heads={config.num_heads}", config.num_heads),
        (f"model.num_kv_heads={config.num_kv_heads}", config.num_kv_heads),
    )


def check(config: Model, options: Options) -> str | None:
    """Whole groups of heads, whole pairs of rotated channels."""
    if config.num_heads % config.num_kv_heads:
        rule = f"must be a multiple of model.num_kv_heads={config.num_kv_heads}"
        return f"model.num_heads={config.num_heads}: {rule}"
    rotated = config.rope_fraction * config.head_dim
    if rotated != int(rotated) or int(rotated) % 2:
        rule = f"times model.head_dim={config.head_dim} must be an even number of channels"
        return f"model.rope_fraction={config.rope_fraction!r}: {rule}"
    return None


ATTENTION = Attention(
    about="every query head sees all earlier tokens; several share a head of keys and values",
    paper="Ainslie et al., GQA, 2305.13245; sinks: OpenAI, gpt-oss, 2508.10925, section 2",
    layer=GroupedAttention,
    prepare=prepare,
    empty_cache=empty_cache,
    flops=flops,
    mesh=mesh,
    check=check,
    options=Options,
    cases=({"sinks": True},),
)
