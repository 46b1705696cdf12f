"""Grouped products on GPUs: two Pallas-Triton kernels. XLA's own `ragged_dot` is a masked dense product there.

A row tile belongs to one expert. How many tiles an expert has is known at run time only, so the grid has room for the
worst case (every expert's last tile partly full) and the tiles that are not needed return at once.

Letters: E experts, R sorted rows, I contracted and J produced axis of a product, T tiles.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from frugalmoe.errors import UserError
from frugalmoe.experts.blocks import cover
from frugalmoe.experts.grouped import Kernels

ROWS = 64  # of a tile
COLUMNS = 128  # of a tile, at most


def _tile(width: int) -> int:
    """The widest power of two that divides an axis. Tensor cores need 16."""
    tile = min(width & -width, COLUMNS)
    if tile < 16:
        rule = "model.dim and model.moe.expert_dim must be multiples of 16"
        raise UserError(f"model.moe.executor=gpu: axis of {width}: {rule}; model.moe.executor=blocks has no such rule")
    return tile


def _dot(a: Array, b: Array) -> Array:
    """float32 operands stay float32 (no TF32), so that the executors agree."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)


def _weights_kernel(expert_T, start_T, end_T, a_RI, w_EIJ, y_RJ, *, transpose: bool, tile_i: int, tile_j: int):
    """One tile of y = a @ w[expert]."""
    expert, start, end = expert_T[pl.program_id(0)], start_T[pl.program_id(0)], end_T[pl.program_id(0)]
    columns = pl.ds(pl.program_id(1) * tile_j, tile_j)

    @pl.when(start < end)
    def _():
        rows = pl.ds(start, ROWS)
        live = (start + jnp.arange(ROWS) < end)[:, None]

        def step(i, sum_SJ):
            inner = pl.ds(i * tile_i, tile_i)
            a = plt.load(a_RI.at[rows, inner], mask=jnp.broadcast_to(live, (ROWS, tile_i)), other=0)
            w = plt.load(w_EIJ.at[expert, columns, inner] if transpose else w_EIJ.at[expert, inner, columns])
            return sum_SJ + _dot(a, w.T if transpose else w)

        zeros = jnp.zeros((ROWS, tile_j), jnp.float32)
        sum_SJ = jax.lax.fori_loop(0, a_RI.shape[1] // tile_i, step, zeros)
        plt.store(y_RJ.at[rows, columns], sum_SJ.astype(y_RJ.dtype), mask=jnp.broadcast_to(live, (ROWS, tile_j)))


def _rows_kernel(start_E, end_E, a_RI, b_RJ, y_EIJ, *, tile_i: int, tile_j: int):
    """One tile of y[expert] = a' @ b over the expert's rows."""
    expert = pl.program_id(0)
    start, end = start_E[expert], end_E[expert]
    across, columns = pl.ds(pl.program_id(1) * tile_i, tile_i), pl.ds(pl.program_id(2) * tile_j, tile_j)

    def step(i, sum_IJ):
        first = start + i * ROWS
        live = (first + jnp.arange(ROWS) < end)[:, None]
        rows = pl.ds(first, ROWS)
        a = plt.load(a_RI.at[rows, across], mask=jnp.broadcast_to(live, (ROWS, tile_i)), other=0)
        b = plt.load(b_RJ.at[rows, columns], mask=jnp.broadcast_to(live, (ROWS, tile_j)), other=0)
        return sum_IJ + _dot(a.T, b)

    zeros = jnp.zeros((tile_i, tile_j), jnp.float32)
    sum_IJ = jax.lax.fori_loop(0, pl.cdiv(end - start, ROWS), step, zeros)
    plt.store(y_EIJ.at[expert, across, columns], sum_IJ.astype(y_EIJ.dtype))


def _rows_by_weights(a_RI: Array, w_EIJ: Array, sizes_E: Array, transpose: bool, interpret: bool) -> Array:
    num_rows, inner = a_RI.shape
    width = w_EIJ.shape[1 if transpose else 2]
    tile_i, tile_j = _tile(inner), _tile(width)
    ((_, count_E, start_E),) = cover(sizes_E, (ROWS,))
    num_tiles = pl.cdiv(num_rows, ROWS) + sizes_E.size
    last_E = jnp.cumsum(count_E)
    tile_T = jnp.arange(num_tiles, dtype=jnp.int32)
    expert_T = jnp.minimum(jnp.sum(last_E <= tile_T[:, None], axis=1, dtype=jnp.int32), sizes_E.size - 1)
    start_T = start_E[expert_T] + (tile_T - (last_E - count_E)[expert_T]) * ROWS
    end_T = jnp.cumsum(sizes_E)[expert_T]
    return pl.pallas_call(
        partial(_weights_kernel, transpose=transpose, tile_i=tile_i, tile_j=tile_j),
        grid=(num_tiles, width // tile_j),
        out_shape=jax.ShapeDtypeStruct((num_rows, width), a_RI.dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
    )(expert_T, start_T, end_T, a_RI, w_EIJ)


def _rows_by_rows(a_RI: Array, b_RJ: Array, sizes_E: Array, dtype: jnp.dtype, interpret: bool) -> Array:
    end_E = jnp.cumsum(sizes_E)
    tile_i, tile_j = _tile(a_RI.shape[1]), _tile(b_RJ.shape[1])
    return pl.pallas_call(
        partial(_rows_kernel, tile_i=tile_i, tile_j=tile_j),
        grid=(sizes_E.size, a_RI.shape[1] // tile_i, b_RJ.shape[1] // tile_j),
        out_shape=jax.ShapeDtypeStruct((sizes_E.size, a_RI.shape[1], b_RJ.shape[1]), dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
    )(end_E - sizes_E, end_E, a_RI, b_RJ)


def kernels(interpret: bool = False) -> Kernels:
    """`interpret` runs the kernels on any platform, slowly, for tests."""
    by_weights, by_rows = partial(_rows_by_weights, interpret=interpret), partial(_rows_by_rows, interpret=interpret)
    return Kernels(by_weights, by_rows, row_multiple=ROWS)
