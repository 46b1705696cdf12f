"""Whether arrays fit into the memory that is here, asked before the first of them is read or made."""

import math
import os
from typing import Any

import jax

from frugalmoe.errors import UserError


def of_device() -> int:
    """Bytes that a device of this process has. CPUs, however many they stand for, share those of the machine."""
    known = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return known or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check(what: str, needed: int, devices: int = 1) -> None:
    """Raises `UserError` where a model needs more memory than there is. `needed`: bytes on each of `devices`."""
    shared = jax.local_devices()[0].platform == "cpu"
    needed, here = needed * (devices if shared else 1), "this machine" if shared else "a device here"
    if needed > (memory := of_device()):
        raise UserError(f"{what}: the model needs {needed / 1e9:,.3g} GB of memory, and {here} has {memory / 1e9:,.3g}")


def on_device(arrays: Any) -> int:
    """Bytes that one device holds of abstract arrays with shardings."""
    leaves = jax.tree.leaves(arrays)
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
