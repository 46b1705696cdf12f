"""Configuration: `load` a file with overrides, `resolve` it into checked frozen dataclasses."""

from frugalmoe.config.checks import check_devices
from frugalmoe.config.load import default, load, override, python_file, read, resolve, to_dict, with_vocabulary
from frugalmoe.config.modes import with_mode
from frugalmoe.config.schema import Config

__all__ = [
    "Config",
    "check_devices",
    "default",
    "load",
    "override",
    "python_file",
    "read",
    "resolve",
    "to_dict",
    "with_mode",
    "with_vocabulary",
]
