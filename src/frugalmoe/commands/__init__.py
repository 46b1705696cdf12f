"""The commands of `frugalmoe`, one file each.

A command is a module of this folder with

    SUMMARY    one line
    EXAMPLES   command lines, shown by --help
    add_flags  (parser) -> None
    run        (args) -> exit code
    RESUMABLE  True where the same command goes on after SIGTERM, which then ends it with 75; may be left out

All are imported for `frugalmoe --help` and for every typing error, so at its top a module imports only the standard
library, this package and `frugalmoe.errors`; what takes time is imported in `run`.
"""

import argparse
import importlib
import logging
import os
import pkgutil
import sys
from pathlib import Path
from types import ModuleType


def names() -> tuple[str, ...]:
    """Returns the names of all commands: the files of this folder, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def get(name: str) -> ModuleType:
    """Returns the module of a command."""
    return importlib.import_module(f"{__name__}.{name}")


def add_config_flag(parser: argparse.ArgumentParser, required: bool = True, default: str | None = None) -> None:
    """Adds --config=FILE[:ARG]; `frugalmoe.cli` takes --config.a.b=VALUE out of the command line before."""
    parser.add_argument(
        "--config",
        required=required and not default,
        default=default,
        metavar="FILE[:ARG]",
        help="a Python file with get_config(ARG), or the name of one of ours, as quickstart:laptop or "
        "ling_2:flash; or the directory of a run or of a published model; set fields with "
        "--config.section.field=VALUE (`frugalmoe config` lists them)",
    )


def load_config(args: argparse.Namespace):
    """Returns the checked `Config` that --config and its overrides name."""
    from frugalmoe.config import override, resolve

    return resolve(override(read_config(args.config), args.overrides))


def read_config(spec: str):
    """Returns the ConfigDict that --config names: of a file, of a run, or of a published model."""
    from frugalmoe.config import read

    if os.path.isdir(spec):
        from frugalmoe.convert.checkpoint import is_published

        if is_published(Path(spec)):
            from frugalmoe.convert.origin import config_of

            return config_of(Path(spec))
    return read(spec)


def set_up_training(config) -> None:
    """Sets up a process that trains; to be called before JAX allocates.

    Programs that took more than half a second to compile are kept in the cache for later processes, and memory that a
    step frees stays with the process.
    """
    import jax

    from frugalmoe.data.cache import cache_root
    from frugalmoe.train.allocator import keep_freed_memory

    keep_freed_memory()
    # Of a save that failed Orbax logs pages; the run says it in a line.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: not record.exc_info)
    tell = sys.unraisablehook
    sys.unraisablehook = lambda of: str(of.exc_value) == "Event loop is closed" or tell(of)
    jax.config.update("jax_compilation_cache_dir", str(cache_root(config.data) / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
