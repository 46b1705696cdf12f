"""What kinds share: attention of heads that are spread over devices, and caches that are written along their slots.

Letters: B batch, T time, C slots of a cache, H query heads, h key-value heads, d channels of a head,
e channels of its value.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.model.attention.kernels import Form, causal_attention
from frugalmoe.sharding import axis_size, local, own_part, reshard, whole_sequences


def attend(
    q_BTHd: Array, k_BThd: Array, v_BThe: Array, segment_ids_BT: Array, sink_H: Array | None, form: Form
) -> Array:
    """Attention [B, T, H, e] of whole arrays, each device with its sequences and heads."""
    letters = ("BTHd", "BThd", "BThd", "BT", "H")
    on_device = local(functools.partial(_attend, form=form), letters, "BTHd")
    return on_device(q_BTHd, k_BThd, v_BThe, segment_ids_BT, sink_H)


def _attend(
    q_BTHd: Array, k_BThd: Array, v_BThe: Array, segment_ids_BT: Array, sink_H: Array | None, form: Form
) -> Array:
    """Attention of local shards. Where sequences are spread over devices, these exchange tokens for heads.

    Each device then attends whole sequences with its share of the heads (Ulysses, Jacobs et al. 2023, arXiv
    2309.14509): any kernel serves unchanged, and causality leaves no device idle. Key-value heads are repeated where
    there are fewer of them than devices.
    """
    devices = axis_size("context")
    if devices == 1:
        return causal_attention(q_BTHd, k_BThd, v_BThe, segment_ids_BT, form=form, sink_H=sink_H)
    repeats = -(-devices // k_BThd.shape[2])
    k_BThd, v_BThe = (jnp.repeat(a, repeats, axis=2) for a in (k_BThd, v_BThe))
    q, k, v = (jax.lax.all_to_all(a, "context", 2, 1, tiled=True) for a in (q_BTHd, k_BThd, v_BThe))
    sink_H = None if sink_H is None else own_part(sink_H, "context", 0)
    o = causal_attention(q, k, v, whole_sequences(segment_ids_BT), form=form, sink_H=sink_H)
    return jax.lax.all_to_all(o, "context", 1, 2, tiled=True)


def write(old: Array, new: Array, start: Array) -> Array:
    """A cache [B, ..., C, d] with the T tokens of `new` [B, ..., T, d] at places start, start + 1, ... modulo C.

    start: int32 [] or [B]. Devices that share the heads hold the caches of all.
    """
    slots, time, new = old.shape[-2], new.shape[-2], new.astype(old.dtype)
    letters = "B" + "." * (old.ndim - 1)
    start_B, new = jnp.broadcast_to(start, old.shape[:1]), reshard(new, letters)

    put = lambda old, new, start: old.at[..., (start + jnp.arange(time)) % slots, :].set(new, unique_indices=True)
    return local(jax.vmap(put), (letters, letters, "B"), letters)(old, new, start_B)
