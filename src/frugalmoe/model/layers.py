"""Normalization and the dense feed-forward.

Letters: B batch, T time, D model, F hidden.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from frugalmoe.schema import Model
from frugalmoe.sharding import parameter, spec


def normal(key: Array, letters: str, shape: tuple[int, ...], std: float, role: str = "matrix") -> nnx.Param:
    """A float32 parameter drawn from a normal distribution; see `sharding.parameter` for its letters and role."""
    return parameter(jax.random.normal(key, shape, jnp.float32) * std, letters, role)


def over_rms(x: Array, eps: float) -> Array:
    """x / rms(x) over the last axis, float32."""
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)


def _kept_as_it_is(function: Callable[..., Array], x: Array, *rest: Array) -> Array:
    """function(x, ...), whose gradient keeps an x of 16 bits and no float32 array that was made of it: these cost more
    to write and to read than to compute again.
    """
    return (jax.checkpoint(function, prevent_cse=False) if x.dtype.itemsize < 4 else function)(x, *rest)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, letter: str):
        """`letter` of the last axis."""
        self.eps = eps
        self.scale = parameter(jnp.ones(size, jnp.float32), letter, "vector")

    def __call__(self, x: Array) -> Array:
        normed = lambda x, scale: (over_rms(x, self.eps) * scale).astype(x.dtype)
        return _kept_as_it_is(normed, x, self.scale[...])


class LayerNorm(nnx.Module):
    """(x - mean(x)) / deviation(x) over the last axis, in float32 (Ba et al. 2016, arXiv 1607.06450).

    affine: times a learned scale, and a learned bias added.
    """

    def __init__(self, size: int, eps: float, letter: str, affine: bool):
        """`letter` of the last axis."""
        self.eps = eps
        self.scale = parameter(jnp.ones(size, jnp.float32), letter, "vector") if affine else None
        self.bias = parameter(jnp.zeros(size, jnp.float32), letter, "vector") if affine else None

    def __call__(self, x: Array) -> Array:
        def normed(x: Array, *affine: Array) -> Array:
            x32 = x.astype(jnp.float32)
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
            x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
            return (x32 * affine[0] + affine[1] if affine else x32).astype(x.dtype)

        return _kept_as_it_is(normed, x, *(() if self.scale is None else (self.scale[...], self.bias[...])))


Norm = RMSNorm | LayerNorm
NORMS = {
    "rms": RMSNorm,
    "layer": functools.partial(LayerNorm, affine=True),
    "layer_bare": functools.partial(LayerNorm, affine=False),
}


def stream_norm(config: Model) -> Norm:
    """The norm of channels of the residual stream that model.norm names."""
    return NORMS[config.norm](config.dim, config.norm_eps, "D")


@jax.custom_vjp
def swiglu(hidden_2F: Array) -> Array:
    """silu(gate) * up for `hidden[..., 0, :]` = gate, `hidden[..., 1, :]` = up (Shazeer 2020, arXiv 2002.05202).

    Its gradient keeps only the input: what autodiff would keep beside it costs more to write than to compute again.
    """
    return jax.nn.silu(hidden_2F[..., 0, :]) * hidden_2F[..., 1, :]


def _swiglu_backward(hidden_2F: Array, dy_F: Array) -> tuple[Array]:
    gate_F, up_F = hidden_2F[..., 0, :], hidden_2F[..., 1, :]
    sigmoid_F = jax.nn.sigmoid(gate_F)
    silu_F = gate_F * sigmoid_F
    dgate_F = dy_F * up_F * (sigmoid_F + silu_F * (1 - sigmoid_F))
    return (jnp.stack([dgate_F, dy_F * silu_F], axis=-2),)


swiglu.defvjp(lambda hidden_2F: (swiglu(hidden_2F), hidden_2F), _swiglu_backward)


class FeedForward(nnx.Module):
    """Dense SwiGLU feed-forward: gate_up (D, 2, F), down (F, D)."""

    def __init__(self, key: Array, dim: int, hidden: int, std: float, out_std: float):
        up_key, down_key = jax.random.split(key)
        self.gate_up_D2F = normal(up_key, "D->2F", (dim, 2, hidden), std)
        self.down_FD = normal(down_key, "F->D", (hidden, dim), out_std)

    def __call__(self, x_BTD: Array) -> Array:
        gate_up, down = self.gate_up_D2F.astype(x_BTD.dtype), self.down_FD.astype(x_BTD.dtype)
        hidden = jnp.einsum("btd,dgf->btgf", x_BTD, gate_up)
        return jnp.einsum("btf,fd->btd", swiglu(hidden), down, out_sharding=spec("BTD"))
