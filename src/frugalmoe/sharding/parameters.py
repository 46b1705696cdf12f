"""Parameters on the mesh, and what has their names and shapes: gradients, optimizer state."""

import functools
import re
from typing import Any

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from frugalmoe.sharding.letters import STORED, spec
from frugalmoe.sharding.mesh import TOKEN_AXES, axis_size

_LETTERS = re.compile(r"(?<![^_])(?=.*[A-Z])[A-Z0-9d]+$")  # ED2F of gate_up_ED2F
GATHERED = "gathered"  # name of gathered parameters: a backward pass gathers them again


def parameter_spec(path: tuple, ndim: int, stored: bool = True) -> P:
    """Of a leaf, from the letters that end its name; axes before those are layers. No letters: whole everywhere.

    Parameters of a router, of mixture of depths too, are whole when used; a router's state is always.
    """
    names = _names(path)
    letters = _LETTERS.search(names[-1])
    letters = letters[0] if letters and "router_state" not in names else ""
    if _routes(names):
        letters = "".join(letter if letter == "D" and stored else "." for letter in letters)
    return spec("." * (ndim - len(letters)) + letters, stored)


def _names(path: tuple) -> list[str]:
    """Of the keys of a leaf, without the `value` in which a module keeps an array."""
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    return names[:-1] if names[-1] == "value" else names


def _routes(names: list[str]) -> bool:
    return any("router" in name or name.endswith("depths") for name in names)


def placed(tree: Any) -> Any:
    """Abstract arrays with the shardings that they have between steps on the mesh in context."""
    mesh = jax.sharding.get_mesh()

    def place(path: tuple, a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, parameter_spec(path, a.ndim)))

    return jax.tree_util.tree_map_with_path(place, tree)


def store(tree: Any) -> Any:
    """Inside jit: arrays as they are kept between steps."""
    return jax.tree_util.tree_map_with_path(lambda p, a: jax.sharding.reshard(a, parameter_spec(p, a.ndim)), tree)


def _axes(entries: P) -> set[str]:
    return {axis for entry in entries if entry for axis in ([entry] if isinstance(entry, str) else entry)}


def gathers() -> bool:
    """Whether parameters are spread over devices between their uses."""
    return axis_size(*STORED) > 1


def gather(tree: Any, dtype: Any) -> Any:
    """Inside jit: parameters as one layer uses them. What devices exchange is in `dtype`, in the backward pass too,
    but for routers, which are float32.

    A gathered parameter has the type "reduced": its gradient is the sum of what each device has of it, not yet formed.
    That sum is scattered as it is formed. Left to XLA it is formed whole on TPUs, which sends twice as much.
    """

    def whole(path: tuple, a: Array) -> Array:
        kept, used = (parameter_spec(path, a.ndim, stored) for stored in (True, False))
        if kept == used:
            return a
        a = a if _routes(_names(path)) else a.astype(dtype)
        summed = {axis for axis in TOKEN_AXES if axis_size(axis) > 1}
        kept = P(*kept, reduced=summed - _axes(kept))
        used = P(*used, reduced=summed - _axes(used))
        return checkpoint_name(_gathered(kept, used, jax.sharding.reshard(a, kept)), GATHERED)

    return jax.tree_util.tree_map_with_path(whole, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(kept: P, used: P, a: Array) -> Array:
    def gather(a: Array) -> Array:
        for dim, axes in _spread(kept, used):
            a = jax.lax.all_gather(a, axes, axis=dim, tiled=True)
        return a

    return jax.shard_map(gather, in_specs=kept, out_specs=used, check_vma=False)(a)


def _scattered(kept: P, used: P, _: None, gradient: Array) -> tuple[Array]:
    def scatter(a: Array) -> Array:
        for dim, axes in _spread(kept, used):
            a = jax.lax.psum_scatter(a, axes, scatter_dimension=dim, tiled=True)
        # Else XLA may add up whole gradients of a matrix outside the layers, and scatter their sum after the last one.
        return jax.lax.optimization_barrier(a)

    kept_ct, used_ct = (P(*entries.partitions, unreduced=entries.reduced) for entries in (kept, used))
    return (jax.shard_map(scatter, in_specs=used_ct, out_specs=kept_ct, check_vma=False)(gradient),)


def _spread(kept: P, used: P) -> list[tuple[int, str | tuple[str, ...]]]:
    """Dimensions that are spread over devices only as they are kept, and over which axes."""
    return [(dim, axes) for dim, axes in enumerate(kept.partitions) if axes != used.partitions[dim]]


_gathered.defvjp(lambda kept, used, a: (_gathered(kept, used, a), None), _scattered)
