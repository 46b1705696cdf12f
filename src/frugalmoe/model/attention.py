"""Grouped-query attention with rotary positions, optional QK-norm and QKV bias.

Letters: B batch, T time, S cache slots, D model, H query heads, K key-value heads, d channels of a head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from frugalmoe.model.attention_ops import cache_attention, causal_attention
from frugalmoe.model.layers import RMSNorm, Rotary, normal, rotate
from frugalmoe.schema import Model
from frugalmoe.sharding import axis_size, local, parameter, spec, whole_sequences


class Cache(NamedTuple):
    """Keys and values of the tokens so far, of one layer or stacked over layers; token t sits in slot t.

    With mixture of depths, a routed block holds the tokens that passed it, side by side, and counts them in `used_B`.
    """

    k_BSKd: Array
    v_BSKd: Array
    used_B: Array | None = None  # int32


def empty_cache(config: Model, layers: int, batch: int, slots: int) -> Cache:
    shape = (layers, batch, slots, config.num_kv_heads, config.head_dim)
    used_B = jnp.zeros(shape[:2], jnp.int32) if config.mixture_of_depths.capacity else None
    return Cache(jnp.zeros(shape, config.compute_dtype), jnp.zeros(shape, config.compute_dtype), used_B)


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(d)) v over earlier tokens of the same document."""

    def __init__(self, key: Array, config: Model, out_std: float):
        self.config = config
        d, heads, kv_heads = config.head_dim, config.num_heads, config.num_kv_heads
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        self.query_DHd = normal(q_key, "D->Hd", (config.dim, heads, d), config.init_std)
        self.key_DKd = normal(k_key, "D->Kd", (config.dim, kv_heads, d), config.init_std)
        self.value_DKd = normal(v_key, "D->Kd", (config.dim, kv_heads, d), config.init_std)
        self.out_HdD = normal(o_key, "Hd->D", (heads, d, config.dim), out_std)
        if config.qkv_bias:
            self.query_bias_Hd = parameter(jnp.zeros((heads, d)), "Hd", "vector")
            self.key_bias_Kd = parameter(jnp.zeros((kv_heads, d)), "Kd", "vector")
            self.value_bias_Kd = parameter(jnp.zeros((kv_heads, d)), "Kd", "vector")
        if config.qk_norm != "none":
            whole = config.qk_norm == "full"
            self.query_norm = RMSNorm(heads * d if whole else d, config.norm_eps, "." if whole else "d")
            self.key_norm = RMSNorm(kv_heads * d if whole else d, config.norm_eps, "." if whole else "d")

    def __call__(
        self, x_BTD: Array, angles: Rotary, segment_ids_BT: Array, cache: Cache | None, start: Array | None
    ) -> tuple[Array, Cache | None]:
        """`cache` and `start` (first slot to write, int32 [] or [B]) are given in generation only."""
        q_BTHd, k_BTKd, v_BTKd = self._project(x_BTD)
        q_BTHd, k_BTKd = rotate(q_BTHd, angles), rotate(k_BTKd, angles)
        if cache is None:
            attend = local(_attend, ("BTHd", "BTKd", "BTKd", "BT"), "BTHd")
            o_BTHd = attend(q_BTHd, k_BTKd, v_BTKd, segment_ids_BT)
        else:
            k_BSKd, v_BSKd = (_write(old, new, start) for old, new in zip(cache[:2], (k_BTKd, v_BTKd)))
            cache = cache._replace(k_BSKd=k_BSKd, v_BSKd=v_BSKd)
            o_BTHd = cache_attention(q_BTHd, k_BSKd, v_BSKd, start)
        out_HdD = self.out_HdD.astype(x_BTD.dtype)
        return jnp.einsum("bthk,hkd->btd", o_BTHd, out_HdD, out_sharding=spec("BTD")), cache

    def _project(self, x_BTD: Array) -> tuple[Array, Array, Array]:
        dtype = x_BTD.dtype
        q_BTHd, k_BTKd, v_BTKd = (
            jnp.einsum("btd,dhk->bthk", x_BTD, w.astype(dtype)) for w in (self.query_DHd, self.key_DKd, self.value_DKd)
        )
        if self.config.qkv_bias:
            biases = (self.query_bias_Hd, self.key_bias_Kd, self.value_bias_Kd)
            q_BTHd, k_BTKd, v_BTKd = (a + b.astype(dtype) for a, b in zip((q_BTHd, k_BTKd, v_BTKd), biases))
        if self.config.qk_norm == "head":
            q_BTHd, k_BTKd = self.query_norm(q_BTHd), self.key_norm(k_BTKd)
        elif self.config.qk_norm == "full":
            q_BTHd, k_BTKd = (
                norm(a.reshape(*a.shape[:2], -1)).reshape(a.shape)
                for norm, a in ((self.query_norm, q_BTHd), (self.key_norm, k_BTKd))
            )
        return q_BTHd, k_BTKd, v_BTKd


def _attend(q_BTHd: Array, k_BTKd: Array, v_BTKd: Array, segment_ids_BT: Array) -> Array:
    """Attention of local shards. Where sequences are spread over devices, these exchange tokens for heads.

    Each device then attends whole sequences with its share of the heads (Ulysses, Jacobs et al. 2023, arXiv
    2309.14509): any kernel serves unchanged, and causality leaves no device idle. Key-value heads are repeated where
    there are fewer of them than devices.
    """
    devices = axis_size("context")
    if devices == 1:
        return causal_attention(q_BTHd, k_BTKd, v_BTKd, segment_ids_BT)
    repeats = -(-devices // k_BTKd.shape[2])
    k_BTKd, v_BTKd = (jnp.repeat(a, repeats, axis=2) for a in (k_BTKd, v_BTKd))
    q, k, v = (jax.lax.all_to_all(a, "context", 2, 1, tiled=True) for a in (q_BTHd, k_BTKd, v_BTKd))
    o = causal_attention(q, k, v, whole_sequences(segment_ids_BT))
    return jax.lax.all_to_all(o, "context", 1, 2, tiled=True)


def _write(old_BSKd: Array, new_BTKd: Array, start: Array) -> Array:
    new_BTKd = new_BTKd.astype(old_BSKd.dtype)
    if not start.ndim:
        return jax.lax.dynamic_update_slice_in_dim(old_BSKd, new_BTKd, start, axis=1)
    write = jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0))
    return local(write, ("BSKd", "BTKd", "B"), "BSKd")(old_BSKd, new_BTKd, start)
