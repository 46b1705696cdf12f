"""Configuration: `load` a file with overrides, `resolve` it into checked frozen dataclasses."""

from frugalmoe.config.checks import check_devices
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
    runnable,
    with_vocabulary,
)
from frugalmoe.config.modes import with_mode
from frugalmoe.schema import Config

__all__ = [
    "RECORD",
    "Config",
    "check_devices",
    "completed",
    "default",
    "load",
    "override",
    "python_file",
    "read",
    "record",
    "resolve",
    "runnable",
    "with_mode",
    "with_vocabulary",
]
