"""The two grouped products of `gpu`, in Triton. A tile of rows belongs to one expert.

Every width is a multiple of its tile; rows of no expert are neither read nor written. Offsets are 64 bits wide: the
experts of a layer may have more than 2**31 weights. float32 operands stay float32 (no TF32), so that executors agree.

Letters: E experts, R sorted rows, I contracted (or first) and J produced axis of a product, G groups of rows (tiles).
"""

import triton
import triton.language as tl


@triton.jit
def rows_by_weights(
    expert_G,
    start_G,
    end_G,
    a_RI,
    w_EIJ,
    y_RJ,
    inner: tl.constexpr,
    width: tl.constexpr,
    transpose: tl.constexpr,
    rows: tl.constexpr,
    tile_i: tl.constexpr,
    tile_j: tl.constexpr,
):
    """One tile of y = a @ w[expert], or with `transpose` of a @ w[expert]'. Empty tiles are not needed."""
    tile = tl.program_id(0)
    start = tl.load(start_G + tile)
    end = tl.load(end_G + tile)
    if start < end:
        first = tl.load(expert_G + tile).to(tl.int64) * inner * width
        row_g = start + tl.arange(0, rows)
        live_g1 = (row_g < end)[:, None]
        row_g1 = row_g.to(tl.int64)[:, None]
        i_I = tl.arange(0, tile_i)
        j_J = tl.program_id(1) * tile_j + tl.arange(0, tile_j)
        a_at = a_RI + row_g1 * inner + i_I[None, :]
        if transpose:
            w_at = w_EIJ + first + j_J[None, :] * inner + i_I[:, None]
        else:
            w_at = w_EIJ + first + i_I[:, None] * width + j_J[None, :]
        sum_gJ = tl.full((rows, tile_j), 0.0, tl.float32)
        for _ in range(0, inner, tile_i):
            a_gI = tl.load(a_at, mask=live_g1, other=0.0)
            w_IJ = tl.load(w_at)
            sum_gJ = tl.dot(a_gI, w_IJ, sum_gJ, input_precision="ieee")
            a_at += tile_i
            w_at += tile_i if transpose else tile_i * width
        tl.store(y_RJ + row_g1 * width + j_J[None, :], sum_gJ.to(y_RJ.dtype.element_ty), mask=live_g1)


@triton.jit
def rows_by_rows(
    start_E,
    end_E,
    a_RI,
    b_RJ,
    y_EIJ,
    width_i: tl.constexpr,
    width_j: tl.constexpr,
    rows: tl.constexpr,
    tile_i: tl.constexpr,
    tile_j: tl.constexpr,
):
    """One tile of y[expert] = a' @ b over the expert's rows."""
    expert = tl.program_id(0)
    start = tl.load(start_E + expert)
    end = tl.load(end_E + expert)
    i_I = tl.program_id(1) * tile_i + tl.arange(0, tile_i)
    j_J = tl.program_id(2) * tile_j + tl.arange(0, tile_j)
    sum_IJ = tl.full((tile_i, tile_j), 0.0, tl.float32)
    for first in range(start, end, rows):
        row_g = first + tl.arange(0, rows)
        live_g = row_g < end
        row_g = row_g.to(tl.int64)
        a_Ig = tl.load(a_RI + row_g[None, :] * width_i + i_I[:, None], mask=live_g[None, :], other=0.0)
        b_gJ = tl.load(b_RJ + row_g[:, None] * width_j + j_J[None, :], mask=live_g[:, None], other=0.0)
        sum_IJ = tl.dot(a_Ig, b_gJ, sum_IJ, input_precision="ieee")
    y_at = y_EIJ + expert.to(tl.int64) * width_i * width_j + i_I[:, None] * width_j + j_J[None, :]
    tl.store(y_at, sum_IJ.to(y_EIJ.dtype.element_ty))
