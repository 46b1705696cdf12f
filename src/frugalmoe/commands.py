"""How a command of `frugalmoe` is declared: a summary, examples in its help, and the config flag."""

import argparse
from collections.abc import Callable

from frugalmoe.config import Config, load


def add_command(
    commands: argparse._SubParsersAction, name: str, handler: Callable | None, summary: str, examples: str
) -> argparse.ArgumentParser:
    """A subcommand whose `handler(args)` returns an exit code."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if handler:
        parser.set_defaults(handler=handler)
    return parser


def add_config_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARG]",
        help="a Python file with get_config(ARG); override fields with --config.section.field=VALUE",
    )


def load_config(args: argparse.Namespace) -> Config:
    return load(args.config, args.overrides)


def set_up_training(config: Config) -> None:
    """For a process that trains: compiled programs outlive it, so that a second start of the same run does not compile,
    and memory that a step frees stays with it. To be called before JAX allocates.
    """
    import jax

    from frugalmoe.data.cache import cache_root
    from frugalmoe.train.allocator import keep_freed_memory

    keep_freed_memory()
    jax.config.update("jax_compilation_cache_dir", str(cache_root(config.data) / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
