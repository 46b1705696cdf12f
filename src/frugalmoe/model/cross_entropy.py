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
    loss: Array  # float32 []: sum_n weight_n * (ce_n + z_coefficient * lse_n^2); the only output with a gradient
    ce_N: Array  # float32, nats, unweighted; of no meaning where the target is not in [0, V)
    lse_sq_sum: Array  # float32 []: sum_n weight_n * lse_n^2


def cross_entropy(
    h_ND: Array, head_DV: Array, targets_N: Array, weights_N: Array, *, z_coefficient: float = 0.0, chunk: int = 512
) -> CrossEntropy:
    """Weighted sum over tokens of -log softmax(h head)[target], with the z-loss of PaLM (arXiv 2204.02311, section 5).

    Differentiable in h and head; gradients have their dtypes. Logits and sums are float32. At most `chunk` rows of
    logits exist at one time. A token of weight 0 has no part in loss or gradients.
    """
    N, D = h_ND.shape
    chunk = min(chunk, N)
    h_ND, targets_N, weights_N = (_pad(a, -N % chunk) for a in (h_ND, targets_N, weights_N.astype(jnp.float32)))
    targets_MC, weights_MC = targets_N.reshape(-1, chunk), weights_N.reshape(-1, chunk)
    loss, ce_MC, lse_sq_sum = _over_chunks(z_coefficient, h_ND.reshape(-1, chunk, D), head_DV, targets_MC, weights_MC)
    return CrossEntropy(loss, jax.lax.stop_gradient(ce_MC.reshape(-1)[:N]), jax.lax.stop_gradient(lse_sq_sum))


def _pad(a: Array, rows: int) -> Array:
    return jnp.pad(a, ((0, rows), *((0, 0),) * (a.ndim - 1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_chunks(z: float, h_MCD: Array, head_DV: Array, targets_MC: Array, weights_MC: Array) -> CrossEntropy:
    """M chunks of C tokens, one after the other."""

    def body(sums, xs):
        h_CD, targets_C, weights_C = xs
        logits_CV = _dot(h_CD, head_DV)
        lse_C = jax.nn.logsumexp(logits_CV, axis=-1)
        ce_C = lse_C - _at_target(logits_CV, targets_C)
        return _add(sums, z, ce_C, lse_C, weights_C), ce_C

    (loss, lse_sq_sum), ce_MC = jax.lax.scan(body, _zeros(), (h_MCD, targets_MC, weights_MC))
    return CrossEntropy(loss, ce_MC, lse_sq_sum)


def _forward(z, h_MCD, head_DV, targets_MC, weights_MC):
    """The same, and the gradients of the loss in h and head."""

    def body(carry, xs):
        sums, dhead_DV = carry
        h_CD, targets_C, weights_C = xs
        logits_CV = _dot(h_CD, head_DV)
        top_C1 = jnp.max(logits_CV, axis=-1, keepdims=True)
        p_CV = jnp.exp(logits_CV - top_C1)  # not yet normalised
        total_C1 = jnp.sum(p_CV, axis=-1, keepdims=True)
        lse_C = (top_C1 + jnp.log(total_C1))[:, 0]
        ce_C = lse_C - _at_target(logits_CV, targets_C)
        is_target_CV = jnp.arange(head_DV.shape[1]) == targets_C[:, None]
        slope_C1 = (weights_C * (1 + 2 * z * lse_C))[:, None] / total_C1
        dlogits_CV = (slope_C1 * p_CV - jnp.where(is_target_CV, weights_C[:, None], 0)).astype(head_DV.dtype)
        dhead_DV += _dot(h_CD.T, dlogits_CV)
        dh_CD = _dot(dlogits_CV, head_DV.T).astype(h_CD.dtype)
        return (_add(sums, z, ce_C, lse_C, weights_C), dhead_DV), (ce_C, dh_CD)

    start = _zeros(), jnp.zeros(head_DV.shape, jnp.float32)
    (sums, dhead_DV), (ce_MC, dh_MCD) = jax.lax.scan(body, start, (h_MCD, targets_MC, weights_MC))
    return CrossEntropy(sums[0], ce_MC, sums[1]), (dh_MCD, dhead_DV.astype(head_DV.dtype))


def _backward(z, saved, cotangent):
    dh_MCD, dhead_DV = saved
    return dh_MCD * cotangent.loss.astype(dh_MCD.dtype), dhead_DV * cotangent.loss.astype(dhead_DV.dtype), None, None


_over_chunks.defvjp(_forward, _backward)


def _zeros() -> tuple[Array, Array]:
    return jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)


def _add(sums: tuple[Array, Array], z: float, ce_C: Array, lse_C: Array, weights_C: Array) -> tuple[Array, Array]:
    loss, lse_sq_sum = sums
    lse_sq_C = jnp.square(lse_C)
    return loss + jnp.sum(weights_C * (ce_C + z * lse_sq_C)), lse_sq_sum + jnp.sum(weights_C * lse_sq_C)


def _at_target(logits_CV: Array, targets_C: Array) -> Array:
    return jnp.take_along_axis(logits_CV, targets_C[:, None], axis=1, mode="clip")[:, 0]
