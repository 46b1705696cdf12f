"""Cross-entropy of a linear head without the matrix of logits: a chunk of tokens at a time, gradients in the same pass.

The cotangent of a loss is one number, so the forward pass can form the gradients up to that factor while a chunk's
probabilities exist: three matrix products in all, where recomputing the logits would take four.

Letters: N tokens, G groups of them (chunks), n tokens of one, D model, V vocabulary.
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
    z_coefficient: float = 0.0,
    chunk: int = 512,
    axis: str | None = None,
) -> CrossEntropy:
    """Weighted sum over tokens of -log softmax(h head)[target], with the z-loss of PaLM (arXiv 2204.02311, section 5).

    Differentiable in h and head; gradients have their dtypes. Logits and sums are float32. At most `chunk` rows of
    logits exist at one time. A token of weight 0 has no part in loss or gradients.

    axis: of the mesh, inside `sharding.local`. Each of its devices gets the same tokens and its own part of the
    vocabulary, the first device the first. `loss`, `lse_sq_sum` and the gradient in h are then this device's shares of
    sums over the axis (Shoeybi et al. 2019, arXiv 1909.08053, section 3).
    """
    N, D = h_ND.shape
    chunk = min(chunk, N)
    h_ND, targets_N, weights_N = (_pad(a, -N % chunk) for a in (h_ND, targets_N, weights_N.astype(jnp.float32)))
    targets_Gn, weights_Gn = targets_N.reshape(-1, chunk), weights_N.reshape(-1, chunk)
    h_GnD = h_ND.reshape(-1, chunk, D)
    loss, ce_Gn, lse_sq_sum = _over_chunks(z_coefficient, axis, h_GnD, head_DV, targets_Gn, weights_Gn)
    return CrossEntropy(loss, jax.lax.stop_gradient(ce_Gn.reshape(-1)[:N]), jax.lax.stop_gradient(lse_sq_sum))


def _pad(a: Array, rows: int) -> Array:
    return jnp.pad(a, ((0, rows), *((0, 0),) * (a.ndim - 1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _over_chunks(
    z: float, axis: str | None, h_GnD: Array, head_DV: Array, targets_Gn: Array, weights_Gn: Array
) -> CrossEntropy:
    """G chunks of n tokens, one after the other."""

    def body(sums, xs):
        h_nD, targets_n, weights_n = xs
        p = _probabilities(h_nD, head_DV, targets_n, axis)
        return _add(sums, z, p, weights_n), p.ce_n

    sums, ce_Gn = jax.lax.scan(body, _zeros(), (h_GnD, targets_Gn, weights_Gn))
    loss, lse_sq_sum = _share(sums, axis)
    return CrossEntropy(loss, ce_Gn, lse_sq_sum)


def _forward(z, axis, h_GnD, head_DV, targets_Gn, weights_Gn):
    """The same, and the gradients of the loss in h and head."""

    def body(carry, xs):
        sums, dhead_DV = carry
        h_nD, targets_n, weights_n = xs
        p = _probabilities(h_nD, head_DV, targets_n, axis)
        slope_n1 = (weights_n * (1 + 2 * z * p.lse_n))[:, None] / p.total_n1
        dlogits_nV = slope_n1 * p.unnormalised_nV - jnp.where(p.is_target_nV, weights_n[:, None], 0)
        dlogits_nV = dlogits_nV.astype(head_DV.dtype)
        dhead_DV += _dot(h_nD.T, dlogits_nV)
        dh_nD = _dot(dlogits_nV, head_DV.T).astype(h_nD.dtype)
        return (_add(sums, z, p, weights_n), dhead_DV), (p.ce_n, dh_nD)

    start = _zeros(), jnp.zeros(head_DV.shape, jnp.float32)
    (sums, dhead_DV), (ce_Gn, dh_GnD) = jax.lax.scan(body, start, (h_GnD, targets_Gn, weights_Gn))
    loss, lse_sq_sum = _share(sums, axis)
    return CrossEntropy(loss, ce_Gn, lse_sq_sum), (dh_GnD, dhead_DV.astype(head_DV.dtype))


def _backward(z, axis, saved, cotangent):
    dh_GnD, dhead_DV = saved
    return dh_GnD * cotangent.loss.astype(dh_GnD.dtype), dhead_DV * cotangent.loss.astype(dhead_DV.dtype), None, None


_over_chunks.defvjp(_forward, _backward)


class _Probabilities(NamedTuple):
    """Softmax of a chunk's logits; columns are those of this device's part of the vocabulary."""

    unnormalised_nV: Array
    total_n1: Array  # what to divide them by
    is_target_nV: Array
    lse_n: Array
    ce_n: Array


def _probabilities(h_nD: Array, head_DV: Array, targets_n: Array, axis: str | None) -> _Probabilities:
    over = (lambda reduce, a: a) if axis is None else (lambda reduce, a: reduce(a, axis))
    logits_nV = _dot(h_nD, head_DV)
    first = 0 if axis is None else jax.lax.axis_index(axis) * head_DV.shape[1]
    targets_n -= first
    is_target_nV = jnp.arange(head_DV.shape[1]) == targets_n[:, None]
    top_n1 = over(jax.lax.pmax, jnp.max(logits_nV, axis=-1, keepdims=True))
    unnormalised_nV = jnp.exp(logits_nV - top_n1)
    own = jnp.sum(unnormalised_nV, axis=-1), _at_target(logits_nV, targets_n)
    total_n, at_target_n = over(jax.lax.psum, own)
    lse_n = top_n1[:, 0] + jnp.log(total_n)
    return _Probabilities(unnormalised_nV, total_n[:, None], is_target_nV, lse_n, lse_n - at_target_n)


def _at_target(logits_nV: Array, targets_n: Array) -> Array:
    """0 for a target that is not among the columns."""
    found_n = jnp.take_along_axis(logits_nV, targets_n[:, None], axis=1, mode="clip")[:, 0]
    return jnp.where((targets_n >= 0) & (targets_n < logits_nV.shape[1]), found_n, 0)


def _share(sums: tuple[Array, Array], axis: str | None) -> tuple[Array, Array]:
    """Of sums that all devices of an axis have whole."""
    return sums if axis is None else tuple(a / jax.lax.axis_size(axis) for a in sums)


def _zeros() -> tuple[Array, Array]:
    return jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)


def _add(sums: tuple[Array, Array], z: float, p: _Probabilities, weights_n: Array) -> tuple[Array, Array]:
    loss, lse_sq_sum = sums
    lse_sq_n = jnp.square(p.lse_n)
    return loss + jnp.sum(weights_n * (p.ce_n + z * lse_sq_n)), lse_sq_sum + jnp.sum(weights_n * lse_sq_n)
