"""Arrays on a mesh of devices: the mesh, letters of shapes, what one device sees, and where parameters are kept."""

from frugalmoe.sharding.letters import fetch, fits_one_device, one_device, own_indices, put, reshard, spec
from frugalmoe.sharding.mesh import (
    AXES,
    BATCH_AXES,
    GPUS,
    TOKEN_AXES,
    axis_size,
    has_ragged_all_to_all,
    make_mesh,
    platform,
)
from frugalmoe.sharding.on_device import local, own_part, own_tokens, whole_sequences
from frugalmoe.sharding.parameters import GATHERED, gather, gathers, parameter_spec, placed, store

__all__ = [
    "AXES",
    "BATCH_AXES",
    "GATHERED",
    "GPUS",
    "TOKEN_AXES",
    "axis_size",
    "fetch",
    "fits_one_device",
    "gather",
    "gathers",
    "has_ragged_all_to_all",
    "local",
    "make_mesh",
    "one_device",
    "own_indices",
    "own_part",
    "own_tokens",
    "parameter_spec",
    "placed",
    "platform",
    "put",
    "reshard",
    "spec",
    "store",
    "whole_sequences",
]
