"""Grouped products on GPUs: two Triton kernels, called by `jax_triton`. XLA's own `ragged_dot` is a masked dense
product there.

Triton is the ground that reaches every card from A100 on, both types of numbers and both ends of the supported JAX. It
was chosen by compiling both products and their gradients for A100 (8.0) and H100 (9.0) without a GPU, in bfloat16 and
float32, with ragged groups (Triton 3.7.1 and the ptxas of its wheel). No GPU was at hand to measure on.

| ground | jax 0.10.2 | jax 0.12.0.1 |
|---|---|---|
| Triton by `jax_triton` (0.3.1, 0.4.1) | everything compiles | everything compiles |
| Pallas' Triton back end | works | deprecated, to be removed |
| Mosaic GPU, as tokamax has it (0.0.12, 0.0.17) | none for A100, no float32 | A100: not rows by rows; no float32 |

bfloat16 runs on tensor cores (`mma` on A100, `wgmma` on H100), and no kernel needs more than 96 KiB of shared memory,
which cards of 8.6 and 8.9 have too.

A row tile belongs to one expert. How many tiles an expert has is known at run time only, so the grid has room for the
worst case (every expert's last tile partly full) and the tiles that are not needed return at once.

Letters: E experts, R sorted rows, I contracted and J produced axis of a product, G groups of rows (tiles).
"""

from collections.abc import Callable
from functools import cache, partial
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import sequential_vmap

from frugalmoe import sharding
from frugalmoe.devices import GPUS
from frugalmoe.errors import UserError, needs_package
from frugalmoe.experts import grouped
from frugalmoe.experts.contract import Executor
from frugalmoe.experts.executors.blocks import cover
from frugalmoe.experts.grouped import Kernels

ROWS = 64  # of a tile
COLUMNS = 128  # of a tile, at most
CONTRACTED = 128  # bytes of a step along a product's contracted axis: three steps fit into shared memory
WARPS, STAGES = 4, 3


def _tile(width: int, limit: int = COLUMNS) -> int:
    """The widest power of two that divides an axis. Tensor cores need 16."""
    tile = min(width & -width, limit)
    if tile < 16:
        rule = "model.dim and model.moe.expert_dim must be multiples of 16"
        raise UserError(f"model.moe.executor=gpu: axis of {width}: {rule}; model.moe.executor=blocks has no such rule")
    return tile


@cache
def _triton() -> Any:
    """The module of the kernels, and `triton_call` as both of its generations have it."""
    try:
        import jax_triton

        from frugalmoe.experts import gpu_kernels
    except ImportError as e:
        raise needs_package("model.moe.executor=gpu", "jax-triton>=0.3.1") from e
    return gpu_kernels, jax_triton.triton_call


def _capability() -> int | None:
    """Of the GPU of the mesh in context, which may be absent, as 90 for 9.0; None: `jax_triton` asks the driver."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    known = {gpu.name: gpu.capability for gpu in GPUS.values()}
    major, minor = known.get(device.device_kind if device else "", (0, 0))
    return 10 * major + minor or None


def _launch(name: str, grid: tuple[int, ...], out: jax.ShapeDtypeStruct, *arrays: Array, **sizes: Any) -> Array:
    """What a kernel of `gpu_kernels` writes."""
    kernels, triton_call = _triton()
    old = metadata.version("jax-triton").startswith("0.3.")  # the last for Python 3.11
    return triton_call(
        *arrays,
        kernel=getattr(kernels, name),
        grid=grid,
        num_warps=WARPS,
        num_stages=STAGES,
        compute_capability=_capability(),
        **{"out_shape" if old else "out_type": out},
        **sizes,
    )


def _rows_by_weights(launch: Callable, a_RI: Array, w_EIJ: Array, sizes_E: Array, transpose: bool) -> Array:
    @sequential_vmap  # the kernels have no batched form
    def product(a_RI: Array, w_EIJ: Array, sizes_E: Array) -> Array:
        num_rows, inner = a_RI.shape
        width = w_EIJ.shape[1 if transpose else 2]
        tile_i, tile_j = _tile(inner, CONTRACTED // a_RI.dtype.itemsize), _tile(width)
        ((_, count_E, start_E),) = cover(sizes_E, (ROWS,))
        num_tiles = -(-num_rows // ROWS) + sizes_E.size
        last_E = jnp.cumsum(count_E)
        tile_G = jnp.arange(num_tiles, dtype=jnp.int32)
        expert_G = jnp.minimum(jnp.sum(last_E <= tile_G[:, None], axis=1, dtype=jnp.int32), sizes_E.size - 1)
        start_G = start_E[expert_G] + (tile_G - (last_E - count_E)[expert_G]) * ROWS
        end_G = jnp.cumsum(sizes_E)[expert_G]
        out = jax.ShapeDtypeStruct((num_rows, width), a_RI.dtype)
        sizes = {"inner": inner, "width": width, "rows": ROWS, "tile_i": tile_i, "tile_j": tile_j}
        grid, ids = (num_tiles, width // tile_j), (expert_G, start_G, end_G)
        return launch("rows_by_weights", grid, out, *ids, a_RI, w_EIJ, transpose=transpose, **sizes)

    return product(a_RI, w_EIJ, sizes_E)


def _rows_by_rows(launch: Callable, a_RI: Array, b_RJ: Array, sizes_E: Array, dtype: jnp.dtype) -> Array:
    @sequential_vmap
    def product(a_RI: Array, b_RJ: Array, sizes_E: Array) -> Array:
        end_E = jnp.cumsum(sizes_E)
        width_i, width_j = a_RI.shape[1], b_RJ.shape[1]
        tile_i, tile_j = _tile(width_i), _tile(width_j)
        out = jax.ShapeDtypeStruct((sizes_E.size, width_i, width_j), dtype)
        rows = CONTRACTED // a_RI.dtype.itemsize
        sizes = {"width_i": width_i, "width_j": width_j, "rows": rows, "tile_i": tile_i, "tile_j": tile_j}
        grid = (sizes_E.size, width_i // tile_i, width_j // tile_j)
        return launch("rows_by_rows", grid, out, end_E - sizes_E, end_E, a_RI, b_RJ, **sizes)

    return product(a_RI, b_RJ, sizes_E)


def kernels(launch: Callable = _launch) -> Kernels:
    """`launch` runs a kernel: tests bring one that interprets it, on any platform, slowly."""
    return Kernels(partial(_rows_by_weights, launch), partial(_rows_by_rows, launch), row_multiple=ROWS)


def _interpreted(num_rows: int) -> Kernels:
    try:
        from frugalmoe.experts import triton_interpreter
    except ImportError as e:
        raise needs_package("Triton's interpreter of model.moe.executor=gpu", "triton==3.7.1") from e
    return kernels(triton_interpreter.launch)


EXECUTOR = Executor(
    run=grouped.by(lambda num_rows: kernels()),
    work="1 (plus a partial tile per expert)",
    purpose="Triton kernels",
    platforms=sharding.GPUS,
    casts=True,
    every_form=True,
    default_on=sharding.GPUS,
    interpreted=grouped.by(_interpreted),
)
