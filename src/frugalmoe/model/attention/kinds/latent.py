"""Multi-head latent attention (MLA): keys and values are made from one compressed vector per token.

With c_t = norm(W_down x_t) a head's key is (W_key c_t, rotated W_rotary x_t) and its value W_value c_t; the rotated
part is shared by all heads (DeepSeek-V2, arXiv 2405.04434, section 2.1, eq. 9-19). Queries have both parts too, and may
come from a compressed vector of their own. Channels of a head: model.head_dim without rotation, then those with.

Decoding is absorbed: with W_key^T q as query and c as key and value, W_key and W_value meet the new tokens alone, and
the cache holds c_t and the rotated part, for all heads once.

Channels are rotated half against half. DeepSeek's weights rotate channel 2 i with 2 i + 1: theirs are ours with the
even rotated channels of queries and keys before the odd ones.

Letters: B batch, T time, C slots of a cache, D model, H query heads, P channels of a latent,
n channels without rotation, r rotated channels, e channels of a value, d channels of a key (n and r).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from frugalmoe.model.attention.contract import Attention, Flops, Shared
from frugalmoe.model.attention.heads import attend, write
from frugalmoe.model.attention.kernels import Form, cache_attention
from frugalmoe.model.layers import RMSNorm, normal
from frugalmoe.model.rotary import Rotary, rotary, rotate, score_factor
from frugalmoe.schema import Model
from frugalmoe.sharding import spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of multi-head latent attention."""

    rank: int = 0  # channels of the vector that keys and values are made from; 0: 4 * model.head_dim
    query_rank: int = 0  # of the vector that queries are made from; 0: there is none, they are made from the input
    rotary_dim: int = 0  # rotated channels, beside the model.head_dim ones that are not; 0: model.head_dim / 2
    value_dim: int = 0  # channels of a head's value; 0: model.head_dim
    norm_eps: float = 0.0  # of the norms of both compressed vectors; 0: model.norm_eps


class Sizes(NamedTuple):
    """Numbers of channels, settled."""

    rank: int
    query_rank: int  # 0: none
    still: int  # of a head, without rotation
    rotated: int
    value: int


def sizes(config: Model, options: Options) -> Sizes:
    """Defaults follow the head, in the proportions of DeepSeek-V3 (arXiv 2412.19437, section 4.2)."""
    d = config.head_dim
    return Sizes(options.rank or 4 * d, options.query_rank, d, options.rotary_dim or d // 2, options.value_dim or d)


class Cache(NamedTuple):
    """What all heads share of the tokens so far."""

    latent_BCP: Array
    rotated_BCr: Array


class LatentAttention(nnx.Module):
    """softmax(q k^T / sqrt(d)) v over earlier tokens of the same document."""

    def __init__(self, key: Array, config: Model, options: Options, out_std: float):
        size, std, heads = sizes(config, options), config.init_std, config.num_heads
        head, keys = size.still + size.rotated, jax.random.split(key, 7)
        scores, eps = config.multipliers.scores or head**-0.5, options.norm_eps or config.norm_eps
        self.still, self.form = size.still, Form(scores * score_factor(config.rope_scaling))
        if size.query_rank:
            self.query_down_DP = normal(keys[0], "D->P", (config.dim, size.query_rank), std)
            self.query_norm = RMSNorm(size.query_rank, eps, "P")
            self.query_up_PHd = normal(keys[1], "P->Hd", (size.query_rank, heads, head), std)
        else:
            self.query_down_DP = None
            self.query_DHd = normal(keys[1], "D->Hd", (config.dim, heads, head), std)
        self.latent_DP = normal(keys[2], "D->P", (config.dim, size.rank), std)
        self.latent_norm = RMSNorm(size.rank, eps, "P")
        self.rotated_key_Dd = normal(keys[3], "D->d", (config.dim, size.rotated), std)
        self.key_PHd = normal(keys[4], "P->Hd", (size.rank, heads, size.still), std)
        self.value_PHd = normal(keys[5], "P->Hd", (size.rank, heads, size.value), std)
        self.out_HdD = normal(keys[6], "Hd->D", (heads, size.value, config.dim), out_std)

    def __call__(
        self, x_BTD: Array, angles: Rotary, segment_ids_BT: Array, cache: Cache | None, start: Array | None
    ) -> tuple[Array, Cache | None]:
        """See `contract`."""
        dtype = x_BTD.dtype
        still_BTHn, rotated_BTHr = self._queries(x_BTD, angles)
        latent_BTP = self.latent_norm(jnp.einsum("btd,dp->btp", x_BTD, self.latent_DP.astype(dtype)))
        key_BTr = jnp.einsum("btd,dr->btr", x_BTD, self.rotated_key_Dd.astype(dtype))
        key_BTr = rotate(key_BTr[:, :, None], angles)[:, :, 0]
        key_PHn, value_PHe = self.key_PHd.astype(dtype), self.value_PHd.astype(dtype)
        if cache is None:
            k_BTHn = jnp.einsum("btp,phn->bthn", latent_BTP, key_PHn)
            v_BTHe = jnp.einsum("btp,phe->bthe", latent_BTP, value_PHe)
            q_BTHd = jnp.concatenate([still_BTHn, rotated_BTHr], axis=-1)
            shared_BTHr = jnp.broadcast_to(
                key_BTr[:, :, None], (*k_BTHn.shape[:3], key_BTr.shape[-1]), out_sharding=spec("BTHd")
            )
            k_BTHd = jnp.concatenate([k_BTHn, shared_BTHr], axis=-1)
            o_BTHe = attend(q_BTHd, k_BTHd, v_BTHe, segment_ids_BT, None, self.form)
        else:
            cache = Cache(*(write(old, new, start) for old, new in zip(cache, (latent_BTP, key_BTr))))
            q_BTHP = jnp.einsum("bthn,phn->bthp", still_BTHn, key_PHn)
            q_BTHd = jnp.concatenate([q_BTHP, rotated_BTHr], axis=-1)
            k_B1Cd = jnp.concatenate(cache, axis=-1)[:, None]
            o_BTHP = cache_attention(q_BTHd, k_B1Cd, cache.latent_BCP[:, None], start, form=self.form)
            o_BTHe = jnp.einsum("bthp,phe->bthe", o_BTHP, value_PHe)
        out_HeD = self.out_HdD.astype(dtype)
        return jnp.einsum("bthe,hed->btd", o_BTHe, out_HeD, out_sharding=spec("BTD")), cache

    def _queries(self, x_BTD: Array, angles: Rotary) -> tuple[Array, Array]:
        """(channels without rotation, rotated channels) of every head."""
        dtype = x_BTD.dtype
        if self.query_down_DP is not None:
            latent_BTP = self.query_norm(jnp.einsum("btd,dp->btp", x_BTD, self.query_down_DP.astype(dtype)))
            q_BTHd = jnp.einsum("btp,phd->bthd", latent_BTP, self.query_up_PHd.astype(dtype))
        else:
            q_BTHd = jnp.einsum("btd,dhk->bthk", x_BTD, self.query_DHd.astype(dtype))
        return q_BTHd[..., : self.still], rotate(q_BTHd[..., self.still :], angles)


def prepare(positions_BT: Array, config: Model, options: Options) -> Rotary:
    """The angles of the rotated channels."""
    return rotary(positions_BT, sizes(config, options).rotated, config.rope_theta, config.rope_scaling)


def empty_cache(config: Model, options: Options, batch: int, slots: int) -> Cache:
    """A slot for every token."""
    size = sizes(config, options)
    return Cache(*(jnp.zeros((batch, slots, n), config.compute_dtype) for n in (size.rank, size.rotated)))


def flops(config: Model, options: Options) -> Flops:
    """As in training, where keys and values are made of the latent."""
    size, dim, heads = sizes(config, options), config.dim, config.num_heads
    head = size.still + size.rotated
    queries = size.query_rank * (dim + heads * head) if size.query_rank else dim * heads * head
    keys_and_values = dim * (size.rank + size.rotated) + size.rank * heads * (size.still + size.value)
    return Flops(2 * (queries + keys_and_values + heads * size.value * dim), 2 * heads * (head + size.value))


def mesh(config: Model, options: Options) -> Shared:
    """Heads; latents are whole, but for their weights between uses."""
    heads, size = (f"model.num_heads={config.num_heads}", config.num_heads), sizes(config, options)
    ranks = {"rank": size.rank} | ({"query_rank": size.query_rank} if size.query_rank else {})
    stored = {f"model.attention_options.latent.{name}={value}": value for name, value in ranks.items()}
    return Shared(heads, heads, stored)


# Fields of the model that grouped attention has, at the value that means none.
_WITHOUT = {"qk_norm": "none", "qkv_bias": False, "out_bias": False, "clip_qkv": 0.0, "rope_fraction": 1.0}


def check(config: Model, options: Options) -> str | None:
    """Sizes, and that nothing is asked for which it does not have."""
    for field in dataclasses.fields(options):
        if (value := getattr(options, field.name)) < 0:
            return f"model.attention_options.latent.{field.name}={value}: must not be negative"
    rotated = sizes(config, options).rotated
    if rotated % 2 or not rotated:
        return f"model.attention_options.latent.rotary_dim={rotated}: must be an even number of channels"
    for name, without in _WITHOUT.items():
        if (value := getattr(config, name)) != without:
            return f"model.{name}={value!r}: must be {without} with model.attention=latent, which has none"
    return None


ATTENTION = Attention(
    about="keys and values of all heads are made from one compressed vector per token, which alone is cached",
    paper="DeepSeek-AI, DeepSeek-V2, 2405.04434, section 2.1",
    layer=LatentAttention,
    prepare=prepare,
    empty_cache=empty_cache,
    flops=flops,
    mesh=mesh,
    check=check,
    options=Options,
    cases=({"query_rank": 12},),
)
