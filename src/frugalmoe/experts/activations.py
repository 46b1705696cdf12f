"""What an expert makes of gate and up, one row each; `model.moe.activation` names a row.

Letters: R rows, F expert hidden.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

ALPHA, LIMIT = 1.702, 7.0  # of clamped_swiglu


class Activation(NamedTuple):
    """A function of gate and up, of any equal shapes, float32."""

    value: Callable[[Array, Array], Array]  # (gate_RF, up_RF) -> hidden_RF
    # (gate_RF, up_RF, d hidden_RF) -> (d gate_RF, d up_RF): what autodiff makes of `value`, for executors that compute
    # their gradient themselves.
    pull: Callable[[Array, Array, Array], tuple[Array, Array]]


def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202)."""
    return jax.nn.silu(gate) * up


def _pull_swiglu(gate_RF: Array, up_RF: Array, dhidden_RF: Array) -> tuple[Array, Array]:
    sigmoid_RF = jax.nn.sigmoid(gate_RF)
    silu_RF = gate_RF * sigmoid_RF
    return dhidden_RF * up_RF * (sigmoid_RF + silu_RF * (1 - sigmoid_RF)), dhidden_RF * silu_RF


def clamped_swiglu(gate: Array, up: Array) -> Array:
    """g * sigmoid(1.702 g) * (u + 1) with g = min(gate, 7) and u = up within -7 and 7.

    As in the code that OpenAI released with gpt-oss (2508.10925). At a bound the gradient still passes.
    """
    gate, up = _clamped(gate, up)
    return gate * jax.nn.sigmoid(ALPHA * gate) * (up + 1)


def _clamped(gate: Array, up: Array) -> tuple[Array, Array]:
    return jnp.where(gate > LIMIT, LIMIT, gate), jnp.where(jnp.abs(up) > LIMIT, jnp.sign(up) * LIMIT, up)


def _pull_clamped(gate_RF: Array, up_RF: Array, dhidden_RF: Array) -> tuple[Array, Array]:
    g_RF, u_RF = _clamped(gate_RF, up_RF)
    sigmoid_RF = jax.nn.sigmoid(ALPHA * g_RF)
    slope_RF = sigmoid_RF * (1 + ALPHA * g_RF * (1 - sigmoid_RF))
    dgate_RF = jnp.where(gate_RF > LIMIT, 0, dhidden_RF * (u_RF + 1) * slope_RF)
    return dgate_RF, jnp.where(jnp.abs(up_RF) > LIMIT, 0, dhidden_RF * g_RF * sigmoid_RF)


SWIGLU = "swiglu"  # what every executor computes
ACTIVATIONS = {
    SWIGLU: Activation(swiglu, _pull_swiglu),
    "clamped_swiglu": Activation(clamped_swiglu, _pull_clamped),
}
