"""Cross-entropy of a linear head without the matrix of logits: a chunk of tokens at a time, gradients in the same pass.

The cotangent of a loss is one number, so the forward pass can form the gradients up to that factor while a chunk's
probabilities exist: three matrix products in all, where recomputing the logits would take four.

Letters: N tokens, M chunks, C tokens of one chunk, D model, V vocabulary.
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
    targets_MC, weights_MC = targets_N.reshape(-1, chunk), weights_N.reshape(-1, chunk)
    h_MCD = h_ND.reshape(-1, chunk, D)
    loss, ce_MC, lse_sq_sum = _over_chunks(z_coefficient, axis, h_MCD, head_DV, targets_MC, weights_MC)
    return CrossEntropy(loss, jax.lax.stop_gradient(ce_MC.reshape(-1)[:N]), jax.lax.stop_gradient(lse_sq_sum))


def _pad(a: Array, rows: int) -> Array:
    return jnp.pad(a, ((0, rows), *((0, 0),) * (a.ndim - 1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _over_chunks(
    z: float, axis: str | None, h_MCD: Array, head_DV: Array, targets_MC: Array, weights_MC: Array
) -> CrossEntropy:
    """M chunks of C tokens, one after the other."""

    def body(sums, xs):
        h_CD, targets_C, weights_C = xs
        p = _probabilities(h_CD, head_DV, targets_C, axis)
        return _add(sums, z, p, weights_C), p.ce_C

    sums, ce_MC = jax.lax.scan(body, _zeros(), (h_MCD, targets_MC, weights_MC))
    loss, lse_sq_sum = _share(sums, axis)
    return CrossEntropy(loss, ce_MC, lse_sq_sum)


def _forward(z, axis, h_MCD, head_DV, targets_MC, weights_MC):
    """The same, and the gradients of the loss in h and head."""

    def body(carry, xs):
        sums, dhead_DV = carry
        h_CD, targets_C, weights_C = xs
        p = _probabilities(h_CD, head_DV, targets_C, axis)
        slope_C1 = (weights_C * (1 + 2 * z * p.lse_C))[:, None] / p.total_C1
        dlogits_CV = slope_C1 * p.unnormalised_CV - jnp.where(p.is_target_CV, weights_C[:, None], 0)
        dlogits_CV = dlogits_CV.astype(head_DV.dtype)
        dhead_DV += _dot(h_CD.T, dlogits_CV)
        dh_CD = _dot(dlogits_CV, head_DV.T).astype(h_CD.dtype)
        return (_add(sums, z, p, weights_C), dhead_DV), (p.ce_C, dh_CD)

    start = _zeros(), jnp.zeros(head_DV.shape, jnp.float32)
    (sums, dhead_DV), (ce_MC, dh_MCD) = jax.lax.scan(body, start, (h_MCD, targets_MC, weights_MC))
    loss, lse_sq_sum = _share(sums, axis)
    return CrossEntropy(loss, ce_MC, lse_sq_sum), (dh_MCD, dhead_DV.astype(head_DV.dtype))


def _backward(z, axis, saved, cotangent):
    dh_MCD, dhead_DV = saved
    return dh_MCD * cotangent.loss.astype(dh_MCD.dtype), dhead_DV * cotangent.loss.astype(dhead_DV.dtype), None, None


_over_chunks.defvjp(_forward, _backward)


class _Probabilities(NamedTuple):
    """Softmax of a chunk's logits; columns are those of this device's part of the vocabulary."""

    unnormalised_CV: Array
    total_C1: Array  # what to divide them by
    is_target_CV: Array
    lse_C: Array
    ce_C: Array


def _probabilities(h_CD: Array, head_DV: Array, targets_C: Array, axis: str | None) -> _Probabilities:
    over = (lambda reduce, a: a) if axis is None else (lambda reduce, a: reduce(a, axis))
    logits_CV = _dot(h_CD, head_DV)
    first = 0 if axis is None else jax.lax.axis_index(axis) * head_DV.shape[1]
    targets_C -= first
    is_target_CV = jnp.arange(head_DV.shape[1]) == targets_C[:, None]
    top_C1 = over(jax.lax.pmax, jnp.max(logits_CV, axis=-1, keepdims=True))
    unnormalised_CV = jnp.exp(logits_CV - top_C1)
    own = jnp.sum(unnormalised_CV, axis=-1), _at_target(logits_CV, targets_C)
    total_C, at_target_C = over(jax.lax.psum, own)
    lse_C = top_C1[:, 0] + jnp.log(total_C)
    return _Probabilities(unnormalised_CV, total_C[:, None], is_target_CV, lse_C, lse_C - at_target_C)


def _at_target(logits_CV: Array, targets_C: Array) -> Array:
    """0 for a target that is not among the columns."""
    found_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=1, mode="clip")[:, 0]
    return jnp.where((targets_C >= 0) & (targets_C < logits_CV.shape[1]), found_C, 0)


def _share(sums: tuple[Array, Array], axis: str | None) -> tuple[Array, Array]:
    """Of sums that all devices of an axis have whole."""
    return sums if axis is None else tuple(a / jax.lax.axis_size(axis) for a in sums)


def _zeros() -> tuple[Array, Array]:
    return jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)


def _add(sums: tuple[Array, Array], z: float, p: _Probabilities, weights_C: Array) -> tuple[Array, Array]:
    loss, lse_sq_sum = sums
    lse_sq_C = jnp.square(p.lse_C)
    return loss + jnp.sum(weights_C * (p.ce_C + z * lse_sq_C)), lse_sq_sum + jnp.sum(weights_C * lse_sq_C)
