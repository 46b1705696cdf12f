"""Causal attention inside documents, as fast as each platform allows, and attention to a cache of keys and values.

The mask is the same in every implementation: query t sees keys first[t] .. t, where `first_BT` is the position of the
first token of the query's document or of its window. Padding (segment 0) is one more document, whose outputs are set to
zero: no row of scores is ever empty, so no NaN arises in values or gradients.

Letters: B batch, T time (queries), C keys that a query may see (slots of a cache, or tokens), H query heads, h heads
of keys and values, g query heads of one group (H/h), d channels of a head, e channels of its value, N tokens of all
query heads of one group (g*T), R rows (one is one head of keys and values in one sequence), t tokens of one chunk
(queries), c slots of one chunk (keys).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.sharding import platform

_MASKED = -1e30
_SCORES_IN_CACHE = 2**18  # float32 scores of one block of rows (1 MiB): they stay in a core's cache; measured
_UNROLLED = 16  # at most this many query chunks, to bound compile time


def _einsum(letters: str, a: Array, b: Array) -> Array:
    """A product that is summed in float32, whatever the dtype of its factors."""
    if (
        platform() == "cpu"
    ):  # where XLA has not all products of bfloat16 with a float32 result; float32 holds the factors
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)


class Form(NamedTuple):
    """What is known of a kind's scores before any array."""

    scale: float  # of the products of queries and keys
    window: int = 0  # a query sees itself and the window - 1 keys before it; 0: all
    chunked: bool = False  # of these, those of its chunk: a document is cut into chunks of `window` tokens


def causal_attention(
    q_BTHd: Array,
    k_BThd: Array,
    v_BThe: Array,
    segment_ids_BT: Array,
    *,
    form: Form | None = None,
    sink_H: Array | None = None,
    implementation: str = "auto",
) -> Array:
    """softmax(q k^T * scale) v over the earlier tokens of the same document, in q's dtype; softmax in float32.

    segment_ids_BT: a run of equal ids is one document; 0 is padding, which outputs zeros. H is a multiple of h.
    form: by default a scale of 1 / sqrt(d). sink_H: float32, a logit per head of a key whose value is zero.
    implementation: auto, or a name in `IMPLEMENTATIONS`. Shapes are local, so call it inside `shard_map`.
    """
    form = form or Form(q_BTHd.shape[-1] ** -0.5)
    if implementation == "auto":
        plain = sink_H is None and v_BThe.shape[-1] == q_BTHd.shape[-1]
        implementation = choose_implementation(q_BTHd.shape, q_BTHd.dtype, platform(), plain)
    document_BT = _first_of_document(segment_ids_BT)
    if form.chunked:  # each chunk is a document
        index_T = jnp.arange(document_BT.shape[1])
        document_BT = index_T - (index_T - document_BT) % form.window
    o_BTHe = IMPLEMENTATIONS[implementation](Inputs(q_BTHd, k_BThd, v_BThe, document_BT, sink_H), form)
    # A product, because the gradient of `where` would keep a mask of the whole output.
    return o_BTHe * (segment_ids_BT > 0)[:, :, None, None].astype(o_BTHe.dtype)


class Inputs(NamedTuple):
    """Of an implementation."""

    q_BTHd: Array
    k_BThd: Array
    v_BThe: Array
    document_BT: Array  # int32, position of the first token of each token's document
    sink_H: Array | None

    def first(self, form: Form) -> Array:
        """int32 [B, T]: the first key that each query sees."""
        if not form.window:
            return self.document_BT
        return jnp.maximum(self.document_BT, jnp.arange(self.document_BT.shape[1]) - (form.window - 1))


def choose_implementation(shape_BTHd: tuple[int, ...], dtype: jnp.dtype, platform: str, plain: bool = True) -> str:
    """The implementation for a platform: a kernel where its limits on shape and dtype are met, else plain XLA.

    plain: values have as many channels as keys, and there are no sinks.
    """
    time, channels = shape_BTHd[1], shape_BTHd[3]
    if platform == "cpu":
        return "chunked"
    # cuDNN's flash attention: 16-bit inputs, head size a multiple of 8 up to 128, an even length with a mask.
    if platform == "gpu" and dtype.itemsize == 2 and channels % 8 == 0 and channels <= 128 and time % 2 == 0 and plain:
        return "cudnn"
    if platform == "tpu" and time % 128 == 0:
        return "splash"
    return "xla"


def cache_attention(
    q_BTHd: Array,
    k_BhCd: Array,
    v_BhCe: Array,
    start: Array,
    *,
    form: Form | None = None,
    sink_H: Array | None = None,
) -> Array:
    """Query t of sequence b sees the tokens at places 0 .. start[b] + t; `start` is int32 [B] or []. Cost T*C.

    The token at place p lies in slot p, or with a window in slot p % C, where C is at least window + T - 1 or the
    number of all places. A cache of n earlier tokens and one new token already written: start = n.
    """
    form = form or Form(q_BTHd.shape[-1] ** -0.5)
    last_BT = jnp.broadcast_to(start, q_BTHd.shape[:1])[:, None] + jnp.arange(q_BTHd.shape[1])
    slot_C = jnp.arange(k_BhCd.shape[2])
    visible_BTC = slot_C <= last_BT[:, :, None]
    if form.window:
        age_BTC = (last_BT[:, :, None] - slot_C) % slot_C.size
        visible_BTC = (age_BTC < form.window) & (age_BTC <= last_BT[:, :, None])
        if form.chunked:
            visible_BTC &= age_BTC <= last_BT[:, :, None] % form.window
    return _weighted_sum(q_BTHd, k_BhCd, v_BhCe, visible_BTC, form.scale, sink_H)


def _weighted_sum(
    q_BTHd: Array, k_BhCd: Array, v_BhCe: Array, visible_BTC: Array, scale: float, sink_H: Array | None
) -> Array:
    """The definition: all scores at one time, float32 [B, H, T, C].

    The queries of a group are n rows, so that XLA's products for CPUs take and leave arrays as they lie.
    """
    B, T, H, d = q_BTHd.shape
    kv_heads = k_BhCd.shape[1]
    groups = H // kv_heads
    q_BhNd = q_BTHd.reshape(B, T, kv_heads, groups, d).transpose(0, 2, 3, 1, 4).reshape(B, kv_heads, groups * T, d)
    score_BhNC = _einsum("bhnd,bhcd->bhnc", q_BhNd, k_BhCd) * scale
    score_BhgTC = jnp.where(visible_BTC[:, None, None], score_BhNC.reshape(B, kv_heads, groups, T, -1), _MASKED)
    if sink_H is not None:
        sink_hg11 = sink_H.astype(jnp.float32).reshape(kv_heads, groups, 1, 1)
        sink_BhgT1 = jnp.zeros_like(score_BhgTC[..., :1]) + sink_hg11  # spread over devices as the scores are
        score_BhgTC = jnp.concatenate([score_BhgTC, sink_BhgT1], axis=-1)
    p_BhgTC = jax.nn.softmax(score_BhgTC, axis=-1)[..., : v_BhCe.shape[2]]
    p_BhNC = p_BhgTC.reshape(score_BhNC.shape).astype(v_BhCe.dtype)
    o_BhgTe = _einsum("bhnc,bhce->bhne", p_BhNC, v_BhCe).reshape(B, kv_heads, groups, T, -1)
    return o_BhgTe.transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1).astype(q_BTHd.dtype)


def _first_of_document(segment_ids_BT: Array) -> Array:
    changed_BT = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)))
    return jax.lax.cummax(jnp.where(changed_BT, jnp.arange(segment_ids_BT.shape[1]), 0), axis=1)


def _visible(inputs: Inputs, form: Form) -> Array:
    """bool [B, T, C]."""
    key_C = jnp.arange(inputs.document_BT.shape[1])
    return (key_C >= inputs.first(form)[:, :, None]) & (key_C <= key_C[:, None])


def _xla(inputs: Inputs, form: Form) -> Array:
    """All scores at one time: float32 [B, H, T, T]."""
    visible_BTC = _visible(inputs, form)
    k_BhTd, v_BhTe = inputs.k_BThd.swapaxes(1, 2), inputs.v_BThe.swapaxes(1, 2)
    return _weighted_sum(inputs.q_BTHd, k_BhTd, v_BhTe, visible_BTC, form.scale, inputs.sink_H)


def _cudnn(inputs: Inputs, form: Form) -> Array:
    """cuDNN flash attention for 16-bit types; documents and windows enter as a bias [B, 1, T, T] of that type."""
    mask_B1TC = _visible(inputs, form)[:, None]
    return jax.nn.dot_product_attention(
        *inputs[:3], mask=mask_B1TC, is_causal=True, scale=form.scale, implementation="cudnn"
    )


def _splash(inputs: Inputs, form: Form) -> Array:
    """The Pallas TPU kernel that skips blocks above the diagonal and before the window; T is a multiple of 128."""
    # Imported here: only TPU programs need Pallas.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    T, H = inputs.q_BTHd.shape[1:3]
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
    seen = splash_mask.LocalMask((T, T), (form.window - 1, 0), 0) if form.window else splash_mask.CausalMask((T, T))
    interpret = platform() == "cpu"  # how the tests run it without a TPU
    kernel = splash.make_splash_mha_single_device(
        splash_mask.MultiHeadMask([seen] * H), block_sizes=sizes, interpret=interpret
    )
    arrays = (inputs.q_BTHd * form.scale, inputs.k_BThd, inputs.v_BThe)
    q_BHTd, k_BhTd, v_BhTe = (a.swapaxes(1, 2) for a in arrays)
    documents = splash.SegmentIds(inputs.document_BT, inputs.document_BT)
    run = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, ids, sinks=inputs.sink_H))
    return run(q_BHTd, k_BhTd, v_BhTe, documents).swapaxes(1, 2)


def _chunked(inputs: Inputs, form: Form) -> Array:
    """Query chunks that see only earlier keys, a cache-sized block of rows at a time; keeps o and the log-sum-exp.

    The recomputing backward pass is that of FlashAttention (Dao et al. 2022, arXiv 2205.14135, appendix B). A sink is
    one more term of the sum, with a value of zero.
    """
    B, T, H, d = inputs.q_BTHd.shape
    kv_heads = inputs.k_BThd.shape[2]
    q_RgTd = (
        inputs.q_BTHd.reshape(B, T, kv_heads, H // kv_heads, d)
        .transpose(0, 2, 3, 1, 4)
        .reshape(B * kv_heads, H // kv_heads, T, d)
    )
    k_RCd, v_RCe = (a.swapaxes(1, 2).reshape(B * kv_heads, T, a.shape[-1]) for a in (inputs.k_BThd, inputs.v_BThe))
    sink_Rg = None
    if inputs.sink_H is not None:
        sink_Bhg = jnp.broadcast_to(
            inputs.sink_H.astype(jnp.float32).reshape(kv_heads, H // kv_heads), (B, kv_heads, H // kv_heads)
        )
        sink_Rg = sink_Bhg.reshape(B * kv_heads, H // kv_heads)
    o_RgTe = _attend_rows(form, q_RgTd, k_RCd, v_RCe, jnp.repeat(inputs.first(form), kv_heads, axis=0), sink_Rg)
    return o_RgTe.reshape(B, kv_heads, H // kv_heads, T, -1).transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_rows(form: Form, q_RgTd: Array, k_RCd: Array, v_RCe: Array, first_RT: Array, sink_Rg: Array | None):
    return _attend_rows_forward(form, q_RgTd, k_RCd, v_RCe, first_RT, sink_Rg)[0]


def _attend_rows_forward(form, q_RgTd, k_RCd, v_RCe, first_RT, sink_Rg):
    rows = Rows(q_RgTd, k_RCd, v_RCe, first_RT, sink_Rg)
    o_RgTe, lse_RgT = _in_blocks(functools.partial(_forward, form), form, rows)
    return o_RgTe, (rows, o_RgTe, lse_RgT)


def _attend_rows_backward(form, saved, do_RgTe):
    dq, dk, dv, dsink = _in_blocks(functools.partial(_backward, form), form, *saved, do_RgTe)
    return dq, dk, dv, None, dsink


_attend_rows.defvjp(_attend_rows_forward, _attend_rows_backward)


class Rows(NamedTuple):
    """Queries, keys and values by rows."""

    q_RgTd: Array
    k_RCd: Array
    v_RCe: Array
    first_RT: Array
    sink_Rg: Array | None


def _in_blocks(fn: Callable, form: Form, rows: Rows, *others: Array) -> tuple[Array | None, ...]:
    """`fn` over blocks of rows whose scores for one query chunk fit in a core's cache."""
    R, g, T, _ = rows.q_RgTd.shape
    chunk = _chunk_size(T)
    keys = min(T, form.window + chunk) if form.window else T
    most = max(1, _SCORES_IN_CACHE // (g * keys * chunk))
    block = max(r for r in range(1, min(R, most) + 1) if R % r == 0)
    split = jax.tree.map(lambda a: a.reshape(R // block, block, *a.shape[1:]), (rows, *others))
    return jax.tree.map(lambda a: a.reshape(R, *a.shape[2:]), jax.lax.map(lambda xs: fn(*xs), split))


def _chunk_size(time: int) -> int:
    return max(64 if time <= 512 else 128, -(-time // _UNROLLED))


def _chunks(time: int, form: Form) -> list[tuple[int, int, int]]:
    """(h, i, j): queries i .. j - 1 see no keys but h .. j - 1."""
    size = _chunk_size(time)
    first = lambda i: max(0, i - form.window + 1) if form.window else 0
    return [(first(i), i, min(i + size, time)) for i in range(0, time, size)]


def _scores(form: Form, q_Rgtd: Array, k_Rcd: Array, first_Rt: Array, h: int, i: int) -> tuple[Array, Array]:
    """Scaled scores of queries i .. j - 1 against keys h .. j - 1, and which of them count."""
    j = h + k_Rcd.shape[1]
    key_c = jnp.arange(h, j)
    allowed_Rtc = (key_c >= first_Rt[:, :, None]) & (key_c <= jnp.arange(i, j)[:, None])
    return _einsum("rgtd,rcd->rgtc", q_Rgtd, k_Rcd) * form.scale, allowed_Rtc[:, None]


def _forward(form: Form, rows: Rows) -> tuple[Array, Array]:
    q_RgTd, k_RCd, v_RCe, first_RT, sink_Rg = rows
    o_chunks, lse_chunks = [], []
    for h, i, j in _chunks(q_RgTd.shape[2], form):
        score, allowed = _scores(form, q_RgTd[:, :, i:j], k_RCd[:, h:j], first_RT[:, i:j], h, i)
        score = jnp.where(allowed, score, _MASKED)
        top = jnp.max(score, axis=-1, keepdims=True)
        if sink_Rg is not None:
            top = jnp.maximum(top, sink_Rg[..., None, None])
        p = jnp.exp(score - top)
        total = jnp.sum(p, axis=-1, keepdims=True)
        if sink_Rg is not None:
            total += jnp.exp(sink_Rg[..., None, None] - top)
        o_chunks.append(_einsum("rgtc,rce->rgte", p.astype(v_RCe.dtype), v_RCe[:, h:j]) / total)
        lse_chunks.append((top + jnp.log(total))[..., 0])
    return jnp.concatenate(o_chunks, axis=2).astype(q_RgTd.dtype), jnp.concatenate(lse_chunks, axis=2)


def _backward(
    form: Form, rows: Rows, o_RgTe: Array, lse_RgT: Array, do_RgTe: Array
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of q, k, v and sinks. Those of k and v are formed as [d, C]: XLA's CPU product is 3x slower the other
    way.
    """
    q_RgTd, k_RCd, v_RCe, first_RT, sink_Rg = rows
    R, T, d = k_RCd.shape
    dtype = q_RgTd.dtype
    mean_RgT = jnp.sum(o_RgTe.astype(jnp.float32) * do_RgTe.astype(jnp.float32), axis=-1)
    dq_chunks, dk_RdC, dv_ReC = [], jnp.zeros((R, d, T), jnp.float32), jnp.zeros((R, v_RCe.shape[-1], T), jnp.float32)
    for h, i, j in _chunks(T, form):
        q, do, k, v = q_RgTd[:, :, i:j], do_RgTe[:, :, i:j], k_RCd[:, h:j], v_RCe[:, h:j]
        score, allowed = _scores(form, q, k, first_RT[:, i:j], h, i)
        p = jnp.where(allowed, jnp.exp(score - lse_RgT[:, :, i:j, None]), 0)
        dp = _einsum("rgte,rce->rgtc", do, v)
        dscore = (p * (dp - mean_RgT[:, :, i:j, None]) * form.scale).astype(dtype)
        dq_chunks.append(_einsum("rgtc,rcd->rgtd", dscore, k))
        dk_RdC = dk_RdC.at[:, :, h:j].add(_einsum("rgtd,rgtc->rdc", q, dscore))
        dv_ReC = dv_ReC.at[:, :, h:j].add(_einsum("rgte,rgtc->rec", do, p.astype(dtype)))
    dq_RgTd = jnp.concatenate(dq_chunks, axis=2).astype(dtype)
    dk_RCd, dv_RCe = (a.swapaxes(1, 2).astype(of.dtype) for a, of in ((dk_RdC, k_RCd), (dv_ReC, v_RCe)))
    dsink_Rg = None if sink_Rg is None else -jnp.sum(jnp.exp(sink_Rg[..., None] - lse_RgT) * mean_RgT, axis=-1)
    return dq_RgTd, dk_RCd, dv_RCe, dsink_Rg


IMPLEMENTATIONS = {"chunked": _chunked, "xla": _xla, "cudnn": _cudnn, "splash": _splash}
