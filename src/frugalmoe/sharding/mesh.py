"""The mesh of devices: its axes, how it is made, what platform it is of."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from frugalmoe.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor", "context")
BATCH_AXES = ("data", "fsdp", "expert")  # axes over which sequences are spread
GPUS = ("gpu", "cuda", "rocm")  # names of one platform: of a backend, of its devices
TOKEN_AXES = (*BATCH_AXES, "context")  # sums over tokens are summed over these


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


def platform() -> str:
    """Returns the platform of the mesh in context, whose devices may be absent where a program is compiled for them."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def has_ragged_all_to_all() -> bool:
    """Whether XLA can compile that collective for the mesh in context: not for CPUs, nor for v5e beyond 16 chips
    ("not supported in limited ICI routing settings", libtpu 0.0.42.1).
    """
    device, chips = jax.sharding.get_abstract_mesh().abstract_device, axis_size(*AXES)
    return platform() in ("tpu", *GPUS) and not (device and device.device_kind == "TPU v5 lite" and chips > 16)
