"""Configuration: `load` a file with overrides, `resolve` it into checked dataclasses, `settle` what it leaves open."""

from frugalmoe.config.load import (
    RECORD,
    asked,
    completed,
    default,
    load,
    override,
    python_file,
    read,
    record,
    recorded,
    resolve,
    runnable,
)
from frugalmoe.config.modes import with_mode, with_size
from frugalmoe.config.settle import settle
from frugalmoe.schema import Config

__all__ = [
    "RECORD",
    "Config",
    "asked",
    "completed",
    "default",
    "load",
    "override",
    "python_file",
    "read",
    "record",
    "recorded",
    "resolve",
    "runnable",
    "settle",
    "with_mode",
    "with_size",
]
