"""The mesh, and one table from shape letters to mesh axes. Only this file names mesh axes.

Letters: A micro-batch of a step, B batch, T time, V vocabulary, D model, F expert hidden, E experts, H heads, L layers;
'.' any unsharded dimension. A mesh of one device runs the same code.
"""

from collections.abc import Callable, Mapping

import jax
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "expert", "tensor", "context")
BATCH_AXES = ("data",)  # axes over which sequences are spread: sums over tokens are summed over these
_AXIS_OF_LETTER = {"B": "data"}


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """A mesh with explicit axis types: shardings are part of array types and mistakes are trace-time errors."""
    return jax.make_mesh(tuple(sizes[a] for a in AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def spec(letters: str) -> P:
    """`spec("BTD")` -> P("data", None, None)."""
    return P(*(_AXIS_OF_LETTER.get(letter) for letter in letters))


def put(mesh: Mesh, array: Array, letters: str) -> Array:
    return jax.device_put(array, NamedSharding(mesh, spec(letters)))


def reshard(array: Array, letters: str) -> Array:
    """Inside jit: gives an array the sharding of its letters."""
    return jax.sharding.reshard(array, spec(letters))


def local(fn: Callable, in_letters: tuple[str, ...], out_letters: tuple[str, ...] | str) -> Callable:
    """`fn` as seen by one device: its arguments are local shards, and collectives over `BATCH_AXES` are allowed in it.

    An entry of the letters may stand for a whole pytree of arrays of that shape. Kernels (sorting, loops, Pallas) run
    inside this, where every shape is static and local. Outputs without 'B' must be equal on all devices.
    """
    out = spec(out_letters) if isinstance(out_letters, str) else tuple(map(spec, out_letters))
    return jax.shard_map(fn, in_specs=tuple(map(spec, in_letters)), out_specs=out, check_vma=False)
