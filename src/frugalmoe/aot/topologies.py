"""Devices that are not there: `v5e:8x8`, `v5p:4x4x4x2slices`, `h100:64` -> devices that one can compile for.

A TPU compiles with the libtpu wheel, a GPU with JAX's CUDA plugin, both on a machine that has neither.
"""

import functools
import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from frugalmoe.devices import DEVICES, GPUS, TPUS, Gpu, Tpu, target_config
from frugalmoe.errors import UserError, needs_package

_SLICES = re.compile(r"^(.*?)x?(\d+)slices?$")
# The package, and the module that is there when it is installed.
_NEEDED = {
    "tpu": (("libtpu", "libtpu"),),
    "cuda": (
        ("jax-cuda12-plugin", "jax_cuda12_plugin"),
        ("jax-cuda12-pjrt", "jax_plugins.xla_cuda12"),
        ("nvidia-cuda-nvcc-cu12", "nvidia.cuda_nvcc"),
        ("nvidia-cudnn-cu12", "nvidia.cudnn"),
        ("jax-triton", "jax_triton"),
    ),
}
# pip brings the versions that suit the jax that is installed.
_INSTALLED_BY = {
    "tpu": ("jax[tpu]",),
    "cuda": ("jax[cuda12-local]", "nvidia-cuda-nvcc-cu12", "nvidia-cudnn-cu12", "jax-triton>=0.3.1"),
}


class Topology(NamedTuple):
    kind: str  # a name in `DEVICES`
    shape: tuple[int, ...]  # chips per axis of a slice; for GPUs, how many
    slices: int = 1

    @property
    def device(self) -> Tpu | Gpu:
        return DEVICES[self.kind]

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape) * self.slices

    def __str__(self) -> str:
        slices = f"x{self.slices}slices" if self.slices > 1 else ""
        return f"{self.kind}:{'x'.join(map(str, self.shape))}{slices}"


def parse(text: str, slices: int | None = None) -> Topology:
    """Returns the topology that a text names. `slices` is that of a flag of its own; it may also end the text."""
    kind, _, shape = text.partition(":")
    if kind not in DEVICES:
        raise _unknown(text, f"unknown device {kind!r}")
    if match := _SLICES.match(shape):
        shape, in_text = match[1], int(match[2])
        if slices not in (None, in_text):
            raise UserError(f"--slices={slices}: --topology={text} has {in_text}")
        slices = in_text
    sizes = shape.split("x")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise _unknown(text, f"{shape!r} is no shape")
    topology = Topology(kind, tuple(map(int, sizes)), 1 if slices is None else slices)
    (_check_tpu if kind in TPUS else _check_gpu)(topology, text)
    return topology


def _unknown(text: str, rule: str) -> UserError:
    shapes = [f"{kind}:{'|'.join(tpu.usual)}" for kind, tpu in TPUS.items()]
    return UserError(f"--topology={text}: {rule}; valid: {', '.join([*shapes, *(f'{kind}:N' for kind in GPUS)])}")


def _check_tpu(topology: Topology, text: str) -> None:
    tpu, shape = topology.device, topology.shape
    if topology.slices < 1:
        raise UserError(f"--slices={topology.slices}: must be at least 1")
    if len(shape) != len(tpu.largest) or any(n > most for n, most in zip(shape, tpu.largest)):
        largest = "x".join(map(str, tpu.largest))
        raise _unknown(text, f"a slice of {topology.kind} has {len(tpu.largest)} axes of at most {largest} chips")
    if math.prod(shape) > 1 and any(n % chips for n, chips in zip(shape, tpu.host)):
        host = "x".join(map(str, tpu.host))
        raise _unknown(text, f"each axis must be a multiple of a host's {host} chips")


def _check_gpu(topology: Topology, text: str) -> None:
    count, *more = topology.shape
    if more or topology.slices != 1:
        raise _unknown(text, "GPUs are given by their number")
    if count > Gpu.per_host and count % Gpu.per_host:
        raise _unknown(text, f"more than one host of {Gpu.per_host} GPUs: must be a multiple of {Gpu.per_host}")


def devices(topology: Topology) -> list[jax.Device]:
    """Devices to put into a mesh and to compile for; raises where the compiler is not installed."""
    device = topology.device
    _require_packages(device.platform)
    if isinstance(device, Gpu):
        hosts, per_host = max(topology.num_devices // Gpu.per_host, 1), min(topology.num_devices, Gpu.per_host)
        shape = {"topology": f"1x{hosts}x{per_host}", "target_config": target_config(device)}
        return topologies.get_topology_desc("", platform="cuda", **shape).devices
    _quieten_libtpu()
    options = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.num_devices == topology.slices:
        options["chips_per_host_bounds"] = [1, 1, 1]
    name = f"{topology.kind}:{'x'.join(map(str, topology.shape))}"
    return topologies.get_topology_desc(name, platform="tpu", **options).devices


def _require_packages(platform: str) -> None:
    for package, module in _NEEDED[platform]:
        if not _is_installed(module):
            raise needs_package(f"--topology: compiling for this device without {package}", *_INSTALLED_BY[platform])


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent
        return False


@functools.cache
def _quieten_libtpu() -> None:
    """Before it is loaded: it asks no metadata server, takes no lock for devices that it will not use, logs errors."""
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)
