"""Configuration: `load` a file with overrides, `resolve` it into checked frozen dataclasses."""

from frugalmoe.config.checks import check_devices, check_float, check_integer, check_seed
from frugalmoe.config.load import (
    RECORD,
    completed,
    default,
    load,
    override,
    python_file,
    read,
    record,
    resolve,
    to_dict,
    with_vocabulary,
)
from frugalmoe.config.modes import with_mode
from frugalmoe.config.schema import Config

__all__ = [
    "RECORD",
    "Config",
    "check_devices",
    "check_float",
    "check_integer",
    "check_seed",
    "completed",
    "default",
    "load",
    "override",
    "python_file",
    "read",
    "record",
    "resolve",
    "to_dict",
    "with_mode",
    "with_vocabulary",
]
