"""The mesh, and one table from shape letters to mesh axes. Only this package names mesh axes.

Letters: A micro-batch of a step, B batch, T time, V vocabulary, D model, F expert hidden, E experts, H heads,
K key-value heads, L layers; '.' any unsharded dimension.

| axis | what is spread over it |
|---|---|
| data | sequences |
| fsdp | sequences; parameters, gradients and optimizer state (ZeRO-3, Rajbhandari et al. 1910.02054) |
| expert | sequences; experts, whose tokens are exchanged |
| tensor | heads, the hidden width of feed-forwards, the vocabulary (Megatron, Shoeybi et al. 1909.08053) |
| context | tokens of a sequence |

An axis is used once per array, by the first letter that may have it, and an axis of one device by none: the same
program runs on one device, and its arrays have no sharding at all.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from frugalmoe.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor", "context")
BATCH_AXES = ("data", "fsdp", "expert")  # axes over which sequences are spread
GPUS = ("gpu", "cuda", "rocm")  # names of one platform: of a backend, of its devices
TOKEN_AXES = (*BATCH_AXES, "context")  # sums over tokens are summed over these
_AXES_OF_LETTER = {
    "B": BATCH_AXES,
    "T": ("context",),
    "E": ("expert",),
    "H": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
}
_STORED = ("fsdp", "expert", "context")  # of the letter D of a parameter: a layer gathers it for the time of its use
_LETTERS = re.compile(r"(?<![^_])(?=.*[A-Z])[A-Z0-9d]+$")  # ED2F of gate_up_ED2F
GATHERED = "gathered"  # name of gathered parameters: a backward pass gathers them again


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with explicit axis types: shardings are part of array types and mistakes are trace-time errors.

    Several TPU slices share the first axis that their number divides: it alone crosses the network between them.
    """
    shape = tuple(sizes[axis] for axis in AXES)
    devices = (jax.devices() if devices is None else devices)[: math.prod(shape)]
    # Not `jax.make_mesh`: it takes no slices, and on v5p and v6e no axis that needs a part of a physical one.
    of_tpu = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if of_tpu else 1
    if slices == 1:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        outside = _across(slices, shape)
        inside = tuple(size // part for size, part in zip(shape, outside))
        placed = mesh_utils.create_hybrid_device_mesh(inside, outside, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _across(slices: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Slices along each axis of the mesh."""
    for axis, size in enumerate(shape):
        if size % slices == 0:
            return tuple(slices if i == axis else 1 for i in range(len(shape)))
    axes = "*".join(f"{name}={size}" for name, size in zip(AXES, shape))
    raise UserError(f"mesh={axes}: one axis must be a multiple of the number of slices, {slices}")


def axis_size(*axes: str, mesh: Mesh | None = None) -> int:
    """The number of devices along axes, of the mesh in context by default."""
    shape = (mesh or jax.sharding.get_abstract_mesh()).shape
    return math.prod(shape.get(axis, 1) for axis in axes)


def spec(letters: str, stored: bool = False, mesh: Mesh | None = None) -> P:
    """`spec("BTD")` -> P(("data", "fsdp"), "context", None) on a mesh with these three axes larger than 1.

    stored: as a parameter is kept between its uses. mesh: by default the one in context.
    """
    free, entries = {axis for axis in AXES if axis_size(axis, mesh=mesh) > 1}, []
    for letter in letters:
        wanted = _STORED if stored and letter == "D" else _AXES_OF_LETTER.get(letter, ())
        taken = tuple(axis for axis in wanted if axis in free)
        free -= set(taken)
        entries.append(taken[0] if len(taken) == 1 else taken or None)
    return P(*entries)


def platform() -> str:
    """Of the mesh in context, which may be one of absent devices that the program is compiled for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def has_ragged_all_to_all() -> bool:
    """Whether XLA can compile that collective for the mesh in context: not for CPUs, nor for v5e beyond 16 chips
    ("not supported in limited ICI routing settings", libtpu 0.0.42.1).
    """
    device, chips = jax.sharding.get_abstract_mesh().abstract_device, axis_size(*AXES)
    return platform() in ("tpu", *GPUS) and not (device and device.device_kind == "TPU v5 lite" and chips > 16)


def put(mesh: Mesh, array: Array, letters: str, shape: tuple[int, ...] | None = None) -> Array:
    """An array of the host on the mesh; of an array of `shape` it may be no more than this process's devices hold."""
    wanted = NamedSharding(mesh, spec(letters, mesh=mesh))
    return jax.make_array_from_process_local_data(wanted, array, shape or array.shape)


def own_indices(mesh: Mesh, shape: tuple[int, ...], letters: str, letter: str) -> np.ndarray:
    """What of a dimension this process's devices hold, in order."""
    dim = letters.index(letter)
    held = NamedSharding(mesh, spec(letters, mesh=mesh)).addressable_devices_indices_map(shape).values()
    return np.unique([np.arange(shape[dim])[slices[dim]] for slices in held])


def fetch(tree: Any) -> Any:
    """Arrays whole on the host, of whatever devices and processes hold them; every process must call it."""
    return jax.device_get(tree) if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def fits_one_device(tree: Any) -> bool:
    """Whether arrays take at most a quarter of its memory, where that is known: as much is in use, and for copying."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) <= limit / 4


@contextmanager
def one_device(tree: Any) -> Iterator[Any]:
    """Arrays whole on one device of this process, and a mesh of that device alone in context. As `fetch`."""
    if jax.sharding.get_mesh().size == 1:
        yield tree
        return
    whole, mesh = fetch(tree), make_mesh(dict.fromkeys(AXES, 1), jax.local_devices()[:1])
    with jax.set_mesh(mesh):
        yield jax.tree.map(lambda a: put(mesh, a, "." * a.ndim), whole)


def reshard(array: Array, letters: str) -> Array:
    """Inside jit: gives an array the sharding of its letters."""
    return jax.sharding.reshard(array, spec(letters))


def local(fn: Callable, in_letters: tuple[str, ...], out_letters: tuple[str, ...] | str) -> Callable:
    """`fn` as seen by one device: its arguments are local shards, and collectives are allowed in it.

    An entry of the letters may stand for a whole pytree of arrays of that shape. Kernels (sorting, loops, Pallas) run
    inside this, where every shape is static and local. An output must be equal on all devices of the axes that its
    letters do not name.
    """
    out = spec(out_letters) if isinstance(out_letters, str) else tuple(map(spec, out_letters))

    def apply(*args):
        args = jax.tree.map(_with_value_gradient, args)
        entries = [jax.tree.map(functools.partial(_typed, letters), arg) for letters, arg in zip(in_letters, args)]
        return jax.shard_map(fn, in_specs=tuple(entries), out_specs=out, check_vma=False)(*args)

    return apply


@jax.custom_vjp
def _identity(a: Array) -> Array:
    return a


_identity.defvjp(lambda a: (a, None), lambda _, gradient: (gradient,))


def _with_value_gradient(a: Array) -> Array:
    """`a` itself, in no other program. Its gradient is a value when it leaves `shard_map`.

    Where gradients are summed in place, it is added to its sum outside. Newer JAX would hand the sum to `shard_map` and
    add there, which it refuses with `check_vma=False`: what devices have of a gradient must be summed before.
    """
    return _identity(a) if jnp.issubdtype(jnp.result_type(a), jnp.inexact) else a


def _typed(letters: str, array: Array) -> P:
    """The spec of an argument of `local`: gathered parameters keep that their gradients are sums yet to be formed."""
    return P(*spec(letters), reduced=jax.typeof(array).sharding.spec.reduced)


def whole_sequences(tree: Any) -> Any:
    """Inside `local`: arrays [B, T, ...] of this device's tokens -> of all tokens of their sequences."""
    if axis_size("context") == 1:
        return tree
    return jax.tree.map(lambda a: jax.lax.all_gather(a, "context", axis=1, tiled=True), tree)


def own_tokens(tree: Any) -> Any:
    """Inside `local`: the inverse, this device's tokens of arrays [B, T, ...]."""
    return jax.tree.map(lambda a: own_part(a, "context", 1), tree)


def own_part(array: Array, name: str, dim: int) -> Array:
    """Inside `local`: this device's share of a dimension that all devices of a mesh axis hold whole."""
    size = axis_size(name)
    if size == 1:
        return array
    length = array.shape[dim] // size
    return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(name) * length, length, dim)


# Parameters, and what has their names and shapes: gradients, optimizer state


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
    return axis_size(*_STORED) > 1


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
