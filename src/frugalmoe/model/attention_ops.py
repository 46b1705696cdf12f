"""Causal attention inside documents, as fast as each platform allows, and attention to a cache of keys and values.

Every implementation takes its mask from `first_BT`, the position of the first token of each token's document: query t
sees keys first[t] .. t. Padding (segment 0) is one more document, whose outputs are set to zero: no row of scores is
ever empty, so no NaN arises in values or gradients.

Letters: B batch, T time (queries), S keys or cache slots, H query heads, K key-value heads, G = H/K, d channels of a
head, R rows (one row is one key-value head of one sequence), q and s chunks of T and S.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.sharding import platform

_MASKED = -1e30
_SCORES_IN_CACHE = 2**18  # float32 scores of one block of rows (1 MiB): they stay in a core's cache; measured
_UNROLLED = 16  # at most this many query chunks, to bound compile time

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def causal_attention(
    q_BTHd: Array, k_BTKd: Array, v_BTKd: Array, segment_ids_BT: Array, *, implementation: str = "auto"
) -> Array:
    """softmax(q k^T / sqrt(d)) v over the earlier tokens of the same document, in q's dtype; softmax in float32.

    segment_ids_BT: a run of equal ids is one document; 0 is padding, which outputs zeros. H is a multiple of K.
    implementation: auto, or a name in `IMPLEMENTATIONS`. Shapes are local, so call it inside `shard_map`.
    """
    if implementation == "auto":
        implementation = choose_implementation(q_BTHd.shape, q_BTHd.dtype, platform())
    first_BT = _first_of_document(segment_ids_BT)
    o_BTHd = IMPLEMENTATIONS[implementation](q_BTHd, k_BTKd, v_BTKd, first_BT)
    # A product, because the gradient of `where` would keep a mask of the whole output.
    return o_BTHd * (segment_ids_BT > 0)[:, :, None, None].astype(o_BTHd.dtype)


def choose_implementation(shape_BTHd: tuple[int, ...], dtype: jnp.dtype, platform: str) -> str:
    """The implementation for a platform: a kernel where its limits on shape and dtype are met, else plain XLA."""
    time, channels = shape_BTHd[1], shape_BTHd[3]
    if platform == "cpu":
        return "chunked"
    # cuDNN's flash attention: 16-bit inputs, head size a multiple of 8 up to 128, an even length with a mask.
    if platform == "gpu" and dtype.itemsize == 2 and channels % 8 == 0 and channels <= 128 and time % 2 == 0:
        return "cudnn"
    if platform == "tpu" and time % 128 == 0:
        return "splash"
    return "xla"


def cache_attention(q_BTHd: Array, k_BSKd: Array, v_BSKd: Array, start: Array) -> Array:
    """Query t of sequence b sees cache slots 0 .. start[b] + t; `start` is int32 [B] or []. Cost T*S.

    A cache of n earlier tokens and one new token already written into slot n: start = n.
    """
    B, T, H, d = q_BTHd.shape
    S, K = k_BSKd.shape[1:3]
    last_BT = jnp.broadcast_to(start, (B,))[:, None] + jnp.arange(T)
    score_BKGTS = _einsum("btkgd,bskd->bkgts", q_BTHd.reshape(B, T, K, H // K, d), k_BSKd) * d**-0.5
    visible_BTS = jnp.arange(S) <= last_BT[:, :, None]
    p_BKGTS = jax.nn.softmax(jnp.where(visible_BTS[:, None, None], score_BKGTS, _MASKED), axis=-1)
    o_BTKGd = _einsum("bkgts,bskd->btkgd", p_BKGTS.astype(v_BSKd.dtype), v_BSKd)
    return o_BTKGd.reshape(q_BTHd.shape).astype(q_BTHd.dtype)


def _first_of_document(segment_ids_BT: Array) -> Array:
    changed_BT = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)))
    return jax.lax.cummax(jnp.where(changed_BT, jnp.arange(segment_ids_BT.shape[1]), 0), axis=1)


def _mask(first_BT: Array) -> Array:
    """bool [B, 1, T, S]; causality is left to the implementation."""
    return (jnp.arange(first_BT.shape[1]) >= first_BT[:, :, None])[:, None]


def _xla(q_BTHd: Array, k_BTKd: Array, v_BTKd: Array, first_BT: Array) -> Array:
    """All scores at one time: float32 [B, H, T, T]."""
    return jax.nn.dot_product_attention(q_BTHd, k_BTKd, v_BTKd, mask=_mask(first_BT), is_causal=True)


def _cudnn(q_BTHd: Array, k_BTKd: Array, v_BTKd: Array, first_BT: Array) -> Array:
    """cuDNN flash attention for 16-bit types; documents enter as a bias [B, 1, T, T] of that type."""
    return jax.nn.dot_product_attention(
        q_BTHd, k_BTKd, v_BTKd, mask=_mask(first_BT), is_causal=True, implementation="cudnn"
    )


def _splash(q_BTHd: Array, k_BTKd: Array, v_BTKd: Array, first_BT: Array) -> Array:
    """The Pallas TPU kernel that skips blocks above the diagonal; T is a multiple of 128."""
    # Imported here: only TPU programs need Pallas.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    _, T, H, d = q_BTHd.shape
    block = next(size for size in (512, 256, 128) if T % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((T, T))] * H)
    interpret = platform() == "cpu"  # how the tests run it without a TPU
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
    q_BHTd, k_BKTd, v_BKTd = (a.swapaxes(1, 2) for a in (q_BTHd * d**-0.5, k_BTKd, v_BTKd))
    return jax.vmap(kernel)(q_BHTd, k_BKTd, v_BKTd, splash.SegmentIds(first_BT, first_BT)).swapaxes(1, 2)


def _chunked(q_BTHd: Array, k_BTKd: Array, v_BTKd: Array, first_BT: Array) -> Array:
    """Query chunks that see only earlier keys, a cache-sized block of rows at a time; keeps o and the log-sum-exp.

    The recomputing backward pass is that of FlashAttention (Dao et al. 2022, arXiv 2205.14135, appendix B).
    """
    B, T, H, d = q_BTHd.shape
    K = k_BTKd.shape[2]
    q_RGTd = q_BTHd.reshape(B, T, K, H // K, d).transpose(0, 2, 3, 1, 4).reshape(B * K, H // K, T, d)
    k_RSd, v_RSd = (a.swapaxes(1, 2).reshape(B * K, T, d) for a in (k_BTKd, v_BTKd))
    o_RGTd = _attend_rows(q_RGTd, k_RSd, v_RSd, jnp.repeat(first_BT, K, axis=0))
    return o_RGTd.reshape(B, K, H // K, T, d).transpose(0, 3, 1, 2, 4).reshape(B, T, H, d)


@jax.custom_vjp
def _attend_rows(q_RGTd: Array, k_RSd: Array, v_RSd: Array, first_RT: Array) -> Array:
    return _attend_rows_forward(q_RGTd, k_RSd, v_RSd, first_RT)[0]


def _attend_rows_forward(q_RGTd, k_RSd, v_RSd, first_RT):
    inputs = (q_RGTd, k_RSd, v_RSd, first_RT)
    o_RGTd, lse_RGT = _in_blocks(_forward, inputs)
    return o_RGTd, (*inputs, o_RGTd, lse_RGT)


def _attend_rows_backward(saved, do_RGTd):
    return *_in_blocks(_backward, (*saved, do_RGTd)), None


_attend_rows.defvjp(_attend_rows_forward, _attend_rows_backward)


def _in_blocks(fn: Callable, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """`fn` over blocks of rows whose scores for one query chunk fit in a core's cache."""
    R, G, T, _ = arrays[0].shape
    most = max(1, _SCORES_IN_CACHE // (G * T * _chunk_size(T)))
    block = max(r for r in range(1, min(R, most) + 1) if R % r == 0)
    split = tuple(a.reshape(R // block, block, *a.shape[1:]) for a in arrays)
    return tuple(a.reshape(R, *a.shape[2:]) for a in jax.lax.map(lambda xs: fn(*xs), split))


def _chunk_size(time: int) -> int:
    return max(64 if time <= 512 else 128, -(-time // _UNROLLED))


def _chunks(time: int) -> list[tuple[int, int]]:
    size = _chunk_size(time)
    return [(i, min(i + size, time)) for i in range(0, time, size)]


def _scores(q_RGqd: Array, k_Rsd: Array, first_Rq: Array, i: int) -> tuple[Array, Array]:
    """Scaled scores of queries i .. j against keys 0 .. j, and which of them count."""
    j = k_Rsd.shape[1]
    key_s = jnp.arange(j)
    allowed_Rqs = (key_s >= first_Rq[:, :, None]) & (key_s <= jnp.arange(i, j)[:, None])
    return _einsum("rgqd,rsd->rgqs", q_RGqd, k_Rsd) * q_RGqd.shape[-1] ** -0.5, allowed_Rqs[:, None]


def _forward(q_RGTd: Array, k_RSd: Array, v_RSd: Array, first_RT: Array) -> tuple[Array, Array]:
    o_chunks, lse_chunks = [], []
    for i, j in _chunks(q_RGTd.shape[2]):
        score, allowed = _scores(q_RGTd[:, :, i:j], k_RSd[:, :j], first_RT[:, i:j], i)
        score = jnp.where(allowed, score, _MASKED)
        top = jnp.max(score, axis=-1, keepdims=True)
        p = jnp.exp(score - top)
        total = jnp.sum(p, axis=-1, keepdims=True)
        o_chunks.append(_einsum("rgqs,rsd->rgqd", p.astype(v_RSd.dtype), v_RSd[:, :j]) / total)
        lse_chunks.append((top + jnp.log(total))[..., 0])
    return jnp.concatenate(o_chunks, axis=2).astype(q_RGTd.dtype), jnp.concatenate(lse_chunks, axis=2)


def _backward(
    q_RGTd: Array, k_RSd: Array, v_RSd: Array, first_RT: Array, o_RGTd: Array, lse_RGT: Array, do_RGTd: Array
) -> tuple[Array, Array, Array]:
    """Gradients of q, k, v. Those of k and v are formed as [d, S]: XLA's CPU product is 3x slower the other way."""
    R, S, d = k_RSd.shape
    dtype = q_RGTd.dtype
    mean_RGT = jnp.sum(o_RGTd.astype(jnp.float32) * do_RGTd.astype(jnp.float32), axis=-1)
    dq_chunks, dk_RdS, dv_RdS = [], jnp.zeros((R, d, S), jnp.float32), jnp.zeros((R, d, S), jnp.float32)
    for i, j in _chunks(S):
        q, do, k, v = q_RGTd[:, :, i:j], do_RGTd[:, :, i:j], k_RSd[:, :j], v_RSd[:, :j]
        score, allowed = _scores(q, k, first_RT[:, i:j], i)
        p = jnp.where(allowed, jnp.exp(score - lse_RGT[:, :, i:j, None]), 0)
        dp = _einsum("rgqd,rsd->rgqs", do, v)
        dscore = (p * (dp - mean_RGT[:, :, i:j, None]) * d**-0.5).astype(dtype)
        dq_chunks.append(_einsum("rgqs,rsd->rgqd", dscore, k))
        dk_RdS = dk_RdS.at[:, :, :j].add(_einsum("rgqd,rgqs->rds", q, dscore))
        dv_RdS = dv_RdS.at[:, :, :j].add(_einsum("rgqd,rgqs->rds", do, p.astype(dtype)))
    dq_RGTd = jnp.concatenate(dq_chunks, axis=2)
    return dq_RGTd.astype(dtype), dk_RdS.swapaxes(1, 2).astype(k_RSd.dtype), dv_RdS.swapaxes(1, 2).astype(v_RSd.dtype)


IMPLEMENTATIONS = {"chunked": _chunked, "xla": _xla, "cudnn": _cudnn, "splash": _splash}
