"""Grouped products on TPUs: the Megablox kernels that ship with JAX (Pallas; Gale et al., MegaBlocks, 2211.15841)."""

from functools import partial

import jax.numpy as jnp
from jax import Array

from frugalmoe.experts import grouped
from frugalmoe.experts.contract import Executor
from frugalmoe.experts.grouped import Kernels

TILE = 512  # rows and columns of a tile; compiles to exactly the useful work on v5e, v5p, v6e and 7x


def _rows_by_weights(a_RI: Array, w_EIJ: Array, sizes_E: Array, transpose: bool, tile: int, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm  # other platforms need not have it

    width = w_EIJ.shape[1 if transpose else 2]
    tiling = (tile, min(tile, a_RI.shape[1]), min(tile, width))
    return gmm(a_RI, w_EIJ, sizes_E, a_RI.dtype, tiling, transpose_rhs=transpose, interpret=interpret)


def _rows_by_rows(a_RI: Array, b_RJ: Array, sizes_E: Array, dtype: jnp.dtype, tile: int, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiling = (tile, min(tile, a_RI.shape[1]), min(tile, b_RJ.shape[1]))
    return tgmm(a_RI.T, b_RJ, sizes_E, dtype, tiling, interpret=interpret)


def kernels(num_rows: int, interpret: bool = False) -> Kernels:
    """`interpret` runs the kernels on any platform, slowly, for tests."""
    tile = min(TILE, max(128, 1 << (num_rows - 1).bit_length()))
    fixed = {"tile": tile, "interpret": interpret}
    return Kernels(partial(_rows_by_weights, **fixed), partial(_rows_by_rows, **fixed), row_multiple=tile)


EXECUTOR = Executor(
    run=grouped.by(kernels),
    work="1 (plus a partial tile per expert)",
    purpose="Pallas kernels",
    platforms=("tpu",),
    casts=True,
    every_form=True,
    default_on=("tpu",),
    interpreted=grouped.by(partial(kernels, interpret=True)),
)
