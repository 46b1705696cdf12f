"""The grouped executor on accelerators: gather rows, two grouped products, weighted scatter-add.

A platform brings two kernels (`Kernels`); their gradients and everything around them are here, once.

Letters: N tokens, D model, E experts, F expert hidden, R sorted rows; I and J any two axes of a matrix.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.experts.contract import Call, Run
from frugalmoe.experts.rows import Rows, held_rows
from frugalmoe.routing.contract import Plan


class Kernels(NamedTuple):
    """Two grouped products, summed in float32. Rows that no group holds may be anything on the way in and out."""

    # (a[R, I], w[E, I, J], group_sizes, transpose) -> a @ w[group of the row], or with transpose a @ w[E, J, I]'
    rows_by_weights: Callable[[Array, Array, Array, bool], Array]
    # (a[R, I], b[R, J], group_sizes, dtype) -> [E, I, J]: a' @ b over the rows of each group, zeros for an empty one
    rows_by_rows: Callable[[Array, Array, Array, jnp.dtype], Array]
    row_multiple: int  # R must be a multiple of this, with at least this many rows outside the groups at the end


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_matmul(kernels: Kernels, a_RI: Array, w_EIJ: Array, group_sizes_E: Array) -> Array:
    """[R, J] in a's dtype: each row times its group's matrix."""
    return kernels.rows_by_weights(a_RI, w_EIJ, group_sizes_E, False)


def _forward(kernels, a_RI, w_EIJ, group_sizes_E):
    return grouped_matmul(kernels, a_RI, w_EIJ, group_sizes_E), (a_RI, w_EIJ, group_sizes_E)


def _backward(kernels, saved, dy_RJ):
    a_RI, w_EIJ, group_sizes_E = saved
    da_RI = kernels.rows_by_weights(dy_RJ, w_EIJ, group_sizes_E, True)
    # In the weights' own type: as float32, all experts' gradients were the largest array of a bfloat16 program.
    return da_RI, kernels.rows_by_rows(a_RI, dy_RJ, group_sizes_E, w_EIJ.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def run(kernels: Kernels, rows: Rows, x_ND: Array, gate_up_ED2F: Array, down_EFD: Array, call: Call) -> Array:
    """y[N, D] in x's dtype. Biases are no part of the kernels: rows gather theirs, zeros outside the groups."""
    num_experts, hidden, dim = down_EFD.shape
    spare = kernels.row_multiple + -rows.token_R.size % kernels.row_multiple
    token_R = jnp.pad(rows.token_R, (0, spare), constant_values=x_ND.shape[0])
    weight_R = jnp.pad(rows.weight_R, (0, spare))
    live_R1 = (jnp.arange(token_R.size) < jnp.sum(rows.group_sizes_E))[:, None]

    def matmul(a_RI: Array, w_EIJ: Array) -> Array:
        """Zeros in the rows outside the groups, in the value and, by the inner `where`, in the gradient of `a`."""
        y_RJ = grouped_matmul(kernels, jnp.where(live_R1, a_RI, 0), w_EIJ, rows.group_sizes_E)
        return jnp.where(live_R1, y_RJ, 0)

    def biased(y_RJ: Array, bias_EJ: Array) -> Array:
        expert_R = jnp.searchsorted(jnp.cumsum(rows.group_sizes_E), jnp.arange(token_R.size), side="right")
        return y_RJ + bias_EJ.at[expert_R].get(mode="fill", fill_value=0).astype(jnp.float32)

    x_RD = x_ND.at[token_R].get(mode="fill", fill_value=0)
    h_RJ = matmul(x_RD, gate_up_ED2F.reshape(num_experts, dim, 2 * hidden)).astype(jnp.float32)
    if call.biases is not None:
        h_RJ = biased(h_RJ, call.biases.gate_up_E2F.reshape(num_experts, -1))
    a_RF = call.activation.value(h_RJ[:, :hidden], h_RJ[:, hidden:]).astype(x_ND.dtype)
    y_RD = matmul(a_RF, down_EFD).astype(jnp.float32)
    if call.biases is not None:
        y_RD = biased(y_RD, call.biases.down_ED)
    y_RD = y_RD * weight_R[:, None]
    return jnp.zeros(x_ND.shape, jnp.float32).at[token_R].add(y_RD, mode="drop").astype(x_ND.dtype)


def by(kernels: Callable[[int], Kernels]) -> Run:
    """An executor's `run` by the kernels for a number of rows."""

    def with_kernels(plan: Plan, x_ND: Array, gate_up_ED2F: Array, down_EFD: Array, call: Call) -> tuple[Array, Array]:
        rows, dropped = held_rows(plan, down_EFD.shape[0], call.room)
        return run(kernels(rows.token_R.size), rows, x_ND, gate_up_ED2F, down_EFD, call), dropped

    return with_kernels
