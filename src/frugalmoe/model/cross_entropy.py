"""Cross-entropy of a linear head without the matrix of logits: a chunk of tokens at a time, gradients in the same pass.

The cotangent of a loss is one number, so the forward pass can form the gradients up to that factor while a chunk's
probabilities exist: three matrix products in all, where recomputing the logits would take four.

Letters: N tokens, G groups of them (chunks), g tokens of one, D model, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

_dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)


class CrossEntropy(NamedTuple):
    # float32 []: sum_n weight_n * (ce_n + z_coefficient * lse_n^2); the only output with a gradient
    loss: Array
    ce_N: Array  # float32, nats, unweighted; of no meaning where the target is not in [0, V)
    lse_sq_sum: Array  # float32 []: sum_n weight_n * lse_n^2


def cross_entropy(
    h_ND: Array,
    head_DV: Array,
    targets_N: Array,
    weights_N: Array,
    *,
    bias_V: Array | None = None,
    z_coefficient: float | Array = 0.0,
    chunk: int = 512,
    axis: str | None = None,
) -> CrossEntropy:
    """Weighted sum over tokens of -log softmax(h head + bias)[target], with the z-loss of PaLM (2204.02311, section 5).

    Differentiable in h, head and bias; gradients have their dtypes. Logits and sums are float32. At most `chunk` rows
    of logits exist at one time. A token of weight 0 has no part in loss or gradients.

    axis: of the mesh, inside `sharding.local`. Each of its devices gets the same tokens and its own part of the
    vocabulary, the first device the first. `loss`, `lse_sq_sum` and the gradient in h are then this device's shares of
    sums over the axis (Shoeybi et al. 2019, arXiv 1909.08053, section 3).
    """
    N, D = h_ND.shape
    chunk = min(chunk, N)
    h_ND, targets_N, weights_N = (_pad(a, -N % chunk) for a in (h_ND, targets_N, weights_N.astype(jnp.float32)))
    targets_Gg, weights_Gg = targets_N.reshape(-1, chunk), weights_N.reshape(-1, chunk)
    h_GgD = h_ND.reshape(-1, chunk, D)
    head = Head(head_DV, bias_V)
    loss, ce_Gg, lse_sq_sum = _over_chunks(axis, jnp.float32(z_coefficient), h_GgD, head, targets_Gg, weights_Gg)
    return CrossEntropy(loss, jax.lax.stop_gradient(ce_Gg.reshape(-1)[:N]), jax.lax.stop_gradient(lse_sq_sum))


def _pad(a: Array, rows: int) -> Array:
    return jnp.pad(a, ((0, rows), *((0, 0),) * (a.ndim - 1)))


class Head(NamedTuple):
    """What makes logits of hidden states."""

    head_DV: Array
    bias_V: Array | None  # float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_chunks(
    axis: str | None, z: Array, h_GgD: Array, head: Head, targets_Gg: Array, weights_Gg: Array
) -> CrossEntropy:
    """G chunks of g tokens, one after the other."""

    def body(sums, xs):
        h_gD, targets_g, weights_g = xs
        p = _probabilities(h_gD, head, targets_g, axis)
        return _add(sums, z, p, weights_g), p.ce_g

    sums, ce_Gg = jax.lax.scan(body, _zeros(), (h_GgD, targets_Gg, weights_Gg))
    loss, lse_sq_sum = _share(sums, axis)
    return CrossEntropy(loss, ce_Gg, lse_sq_sum)


def _forward(axis, z, h_GgD, head, targets_Gg, weights_Gg):
    """The same, and the gradients of the loss in h and head."""
    head_DV, bias_V = head

    def body(carry, xs):
        sums, dhead_DV, dbias_V = carry
        h_gD, targets_g, weights_g = xs
        p = _probabilities(h_gD, head, targets_g, axis)
        slope_g1 = (weights_g * (1 + 2 * z * p.lse_g))[:, None] / p.total_g1
        dlogits_gV = slope_g1 * p.unnormalized_gV - jnp.where(p.is_target_gV, weights_g[:, None], 0)
        if dbias_V is not None:
            dbias_V += jnp.sum(dlogits_gV, axis=0)
        dlogits_gV = dlogits_gV.astype(head_DV.dtype)
        dhead_DV += _dot(h_gD.T, dlogits_gV)
        dh_gD = _dot(dlogits_gV, head_DV.T).astype(h_gD.dtype)
        return (_add(sums, z, p, weights_g), dhead_DV, dbias_V), (p.ce_g, dh_gD)

    start = _zeros(), jnp.zeros(head_DV.shape, jnp.float32), None if bias_V is None else jnp.zeros_like(bias_V)
    (sums, dhead_DV, dbias_V), (ce_Gg, dh_GgD) = jax.lax.scan(body, start, (h_GgD, targets_Gg, weights_Gg))
    loss, lse_sq_sum = _share(sums, axis)
    return CrossEntropy(loss, ce_Gg, lse_sq_sum), (dh_GgD, Head(dhead_DV.astype(head_DV.dtype), dbias_V))


def _backward(axis, saved, cotangent):
    dh_GgD, dhead = jax.tree.map(lambda a: a * cotangent.loss.astype(a.dtype), saved)
    return None, dh_GgD, dhead, None, None


_over_chunks.defvjp(_forward, _backward)


class _Probabilities(NamedTuple):
    """Softmax of a chunk's logits; columns are those of this device's part of the vocabulary."""

    unnormalized_gV: Array
    total_g1: Array  # what to divide them by
    is_target_gV: Array
    lse_g: Array
    ce_g: Array


def _probabilities(h_gD: Array, head: Head, targets_g: Array, axis: str | None) -> _Probabilities:
    over = (lambda reduce, a: a) if axis is None else (lambda reduce, a: reduce(a, axis))
    logits_gV = _dot(h_gD, head.head_DV)
    if head.bias_V is not None:
        logits_gV += head.bias_V
    vocabulary = logits_gV.shape[1]
    first = 0 if axis is None else jax.lax.axis_index(axis) * vocabulary
    targets_g -= first
    is_target_gV = jnp.arange(vocabulary) == targets_g[:, None]
    top_g1 = over(jax.lax.pmax, jnp.max(logits_gV, axis=-1, keepdims=True))
    unnormalized_gV = jnp.exp(logits_gV - top_g1)
    own = jnp.sum(unnormalized_gV, axis=-1), _at_target(logits_gV, targets_g)
    total_g, at_target_g = over(jax.lax.psum, own)
    lse_g = top_g1[:, 0] + jnp.log(total_g)
    return _Probabilities(unnormalized_gV, total_g[:, None], is_target_gV, lse_g, lse_g - at_target_g)


def _at_target(logits_gV: Array, targets_g: Array) -> Array:
    """0 for a target that is not among the columns."""
    found_g = jnp.take_along_axis(logits_gV, targets_g[:, None], axis=1, mode="clip")[:, 0]
    return jnp.where((targets_g >= 0) & (targets_g < logits_gV.shape[1]), found_g, 0)


def _share(sums: tuple[Array, Array], axis: str | None) -> tuple[Array, Array]:
    """Of sums that all devices of an axis have whole."""
    return sums if axis is None else tuple(a / jax.lax.axis_size(axis) for a in sums)


def _zeros() -> tuple[Array, Array]:
    return jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)


def _add(sums: tuple[Array, Array], z: Array, p: _Probabilities, weights_g: Array) -> tuple[Array, Array]:
    loss, lse_sq_sum = sums
    lse_sq_g = jnp.square(p.lse_g)
    return loss + jnp.sum(weights_g * (p.ce_g + z * lse_sq_g)), lse_sq_sum + jnp.sum(weights_g * lse_sq_g)
