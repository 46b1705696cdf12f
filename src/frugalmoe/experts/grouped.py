"""The grouped executor on accelerators: gather rows, two grouped products, weighted sums over each token's rows.

A platform brings two kernels (`Kernels`); their gradients and everything around them are here, once. What a backward
pass needs is the input, the plan and the products of gate and up: rows are gathered again, the activation is computed
again while its product is read, and the gradient of a token's weights is formed in the hidden layer,

    d w_r = <dy_r @ down', a_r>,

so that neither rows of D, nor float32 rows of F, nor the experts' outputs are kept from the forward pass. Nor are
weights that were cast: they are cast again from the parameters, which are there anyway. A token's rows are found by
their places among the sorted ones, not added into zeros: no float32 row is written, and sums have one order.
benchmarks/DEVICES.md has what that spares.

Letters: N tokens, D model, E experts, F expert hidden, K choices, R sorted rows; I and J any two axes of a matrix
(J is 2F: gate, then up).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.experts.activations import Activation
from frugalmoe.experts.contract import Biases, Call, Run
from frugalmoe.experts.rows import held_rows, places
from frugalmoe.routing.contract import Plan, TokenPlan


class Kernels(NamedTuple):
    """Two grouped products, summed in float32. Rows that no group holds may be anything on the way in and out."""

    # (a[R, I], w[E, I, J], group_sizes, transpose) -> a @ w[group of the row], or with transpose a @ w[E, J, I]'
    rows_by_weights: Callable[[Array, Array, Array, bool], Array]
    # (a[R, I], b[R, J], group_sizes, dtype) -> [E, I, J]: a' @ b over the rows of each group, zeros for an empty one
    rows_by_rows: Callable[[Array, Array, Array, jnp.dtype], Array]
    row_multiple: int  # R must be a multiple of this, with at least this many rows outside the groups at the end


class _Form(NamedTuple):
    """What is static."""

    kernels: Kernels
    activation: Activation


class _Layout(NamedTuple):
    """Where rows come from and where they go."""

    token_R: Array  # int32; N: of none
    weight_R: Array  # float32; it has no gradient, the plan's weights have
    group_sizes_E: Array  # int32
    place_NK: Array | None  # int32, the row of each choice, R: none; None: of an expert-major plan

    @property
    def expert_R(self) -> Array:
        """E for rows outside the groups."""
        ends_E = jnp.cumsum(self.group_sizes_E)
        return jnp.searchsorted(ends_E, jnp.arange(self.token_R.size), side="right")


def run(
    kernels_for: Callable[[int], Kernels],
    plan: Plan,
    x_ND: Array,
    gate_up_ED2F: Array,
    down_EFD: Array,
    call: Call,
) -> tuple[Array, Array]:
    """-> (y[N, D] in x's dtype, dropped rows). kernels_for: of a number of rows.

    Biases are no part of the kernels: rows gather theirs.
    """
    num_experts, hidden, dim = down_EFD.shape
    with jax.named_scope("dispatch"):
        rows, dropped = held_rows(plan, num_experts, call.room)
        kernels = kernels_for(rows.token_R.size)
        spare = kernels.row_multiple + -rows.token_R.size % kernels.row_multiple
        token_R = jnp.pad(rows.token_R, (0, spare), constant_values=x_ND.shape[0])
        weight_R = jax.lax.stop_gradient(jnp.pad(rows.weight_R, (0, spare)))
        place_NK = places(plan) if isinstance(plan, TokenPlan) else None
        if place_NK is not None:
            place_NK = jnp.where(place_NK < jnp.sum(rows.group_sizes_E), place_NK, token_R.size)
    layout = _Layout(token_R, weight_R, rows.group_sizes_E, place_NK)
    matrices = gate_up_ED2F.reshape(num_experts, dim, 2 * hidden), down_EFD
    form = _Form(kernels, call.activation)
    return _experts(form, layout, plan.weights, call.biases, x_ND, matrices), dropped


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(form: _Form, layout: _Layout, weights: Array, biases: Biases | None, x_ND: Array, matrices: tuple):
    """y[N, D]. matrices: gate and up [E, D, J], down [E, F, D]."""
    return _forward(form, layout, weights, biases, x_ND, matrices)[0]


def _forward(form, layout, weights, biases, x_ND, matrices):
    gate_up_EDJ, down_EFD = matrices
    product, sizes_E = form.kernels.rows_by_weights, layout.group_sizes_E
    h_RJ = product(_take(x_ND, layout), gate_up_EDJ.astype(x_ND.dtype), sizes_E, False)
    a_RF = form.activation.value(*_halves(h_RJ, layout, biases)).astype(x_ND.dtype)
    y_RD = product(a_RF, down_EFD.astype(x_ND.dtype), sizes_E, False)
    if biases is not None:
        y_RD = y_RD.astype(jnp.float32) + _of_rows(biases.down_ED, layout)
    with jax.named_scope("combine"):
        y_ND = _sum_of_rows(y_RD, layout, x_ND, weights)
    return y_ND, (layout, weights, biases, x_ND, matrices, h_RJ)


def _backward(form, saved, dy_ND):
    layout, weights, biases, x_ND, (gate_up_EDJ, down_EFD), h_RJ = saved
    kernels, sizes_E, dtype = form.kernels, layout.group_sizes_E, x_ND.dtype
    weight_R1 = layout.weight_R[:, None]
    dy_RD = _take(dy_ND, layout)
    da_RF = kernels.rows_by_weights(dy_RD, down_EFD.astype(dtype), sizes_E, True)  # not yet times the weights
    da_RF = da_RF.astype(jnp.float32)
    gate_RF, up_RF = _halves(h_RJ, layout, biases)
    a_RF = form.activation.value(gate_RF, up_RF)
    dh_RJ = jnp.concatenate(form.activation.pull(gate_RF, up_RF, da_RF * weight_R1), axis=1)
    dweight_R = jnp.sum(da_RF * a_RF, axis=1)
    dbiases = None
    if biases is not None:
        dweight_R += jnp.sum(dy_RD.astype(jnp.float32) * _of_rows(biases.down_ED, layout), axis=1)
        of_rows = Biases(dh_RJ, dy_RD * weight_R1)
        dbiases = jax.tree.map(lambda bias, of_row: _sum_of_experts(of_row, layout, bias), biases, of_rows)
    dh_RJ, weighted_RF = dh_RJ.astype(dtype), (a_RF * weight_R1).astype(dtype)
    # Gradients in the rows' type: as float32, those of all experts were the largest array of a bfloat16 program.
    ddown_EFD = kernels.rows_by_rows(weighted_RF, dy_RD, sizes_E, dtype)
    dgate_up_EDJ = kernels.rows_by_rows(_take(x_ND, layout), dh_RJ, sizes_E, dtype)
    dx_RD = kernels.rows_by_weights(dh_RJ, gate_up_EDJ.astype(dtype), sizes_E, True)
    with jax.named_scope("dispatch"):
        dx_ND = _sum_of_rows(dx_RD, layout, x_ND)
    if layout.place_NK is None:
        dweights = dweight_R[: weights.size].reshape(weights.shape)
    else:
        dweights = dweight_R.at[layout.place_NK].get(mode="fill", fill_value=0)
    of_matrices = dgate_up_EDJ.astype(gate_up_EDJ.dtype), ddown_EFD.astype(down_EFD.dtype)
    return None, dweights.astype(weights.dtype), dbiases, dx_ND, of_matrices


_experts.defvjp(_forward, _backward)


def _take(x_ND: Array, layout: _Layout) -> Array:
    """Rows of tokens [R, D], zeros for those of none."""
    with jax.named_scope("dispatch"):
        return x_ND.at[layout.token_R].get(mode="fill", fill_value=0)


def _halves(h_RJ: Array, layout: _Layout, biases: Biases | None) -> list[Array]:
    """[gate, up], float32 [R, F]."""
    h_RJ = h_RJ.astype(jnp.float32)
    if biases is not None:
        h_RJ += _of_rows(biases.gate_up_E2F.reshape(biases.gate_up_E2F.shape[0], -1), layout)
    return jnp.split(h_RJ, 2, axis=1)


def _of_rows(bias_EJ: Array, layout: _Layout) -> Array:
    """Each row's own, float32 [R, J]."""
    return bias_EJ.at[layout.expert_R].get(mode="fill", fill_value=0).astype(jnp.float32)


def _sum_of_experts(rows_RJ: Array, layout: _Layout, bias: Array) -> Array:
    """Sums over each expert's rows, in a bias' shape and dtype."""
    total_EJ = jnp.zeros((bias.shape[0], rows_RJ.shape[1]), jnp.float32)
    total_EJ = total_EJ.at[layout.expert_R].add(rows_RJ.astype(jnp.float32), mode="drop")
    return total_EJ.reshape(bias.shape).astype(bias.dtype)


def _sum_of_rows(rows_RD: Array, layout: _Layout, like_ND: Array, weights: Array | None = None) -> Array:
    """Sums over each token's rows, times the plan's weights, in float32, in the shape and dtype of `like_ND`. An
    expert-major plan does not say how many rows a token has: they are added into zeros.
    """
    if layout.place_NK is not None:
        rows_NKD = rows_RD.at[layout.place_NK].get(mode="fill", fill_value=0).astype(jnp.float32)
        rows_NKD = rows_NKD if weights is None else rows_NKD * weights[..., None]
        return jnp.sum(rows_NKD, axis=1).astype(like_ND.dtype)
    rows_RD = rows_RD.astype(jnp.float32) * (1 if weights is None else layout.weight_R[:, None])
    return jnp.zeros(like_ND.shape, jnp.float32).at[layout.token_R].add(rows_RD, mode="drop").astype(like_ND.dtype)


def by(kernels_for: Callable[[int], Kernels]) -> Run:
    """An executor's `run` by the kernels for a number of rows."""
    return partial(run, kernels_for)
