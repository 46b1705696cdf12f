"""`frugalmoe COMMAND ...`: finds the command, and turns an error of the user's into one line and an exit code."""

import argparse
import os
import sys
from collections.abc import Sequence

from frugalmoe import __version__, commands, completion
from frugalmoe.errors import EXIT_USER_ERROR, UserError, one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; 0 done, 2 user error, 75 stopped by a signal after saving."""
    parser = _parser()
    if completion.REQUESTED in os.environ:
        completion.complete(parser)
    flags, overrides = _take_overrides(list(sys.argv[1:] if argv is None else argv))
    args = parser.parse_args(flags)
    args.overrides = overrides
    try:
        if overrides and not hasattr(args, "config"):
            raise UserError(f"--config.{overrides[0]}: frugalmoe {args.command} takes no config")
        return commands.get(args.command).run(args) or 0
    except Exception as e:
        if not (line := one_line(e)):
            raise
        print(f"frugalmoe: {line}", file=sys.stderr)
        return EXIT_USER_ERROR


def _take_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Splits off `--config.a.b=value` (or `--config.a.b value`) -> (other flags, ["a.b=value", ...])."""
    flags, overrides = [], []
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("--config."):
            flags.append(argument)
        elif "=" in argument:
            overrides.append(argument.removeprefix("--config."))
        else:
            value = next(arguments, None)
            overrides.append(argument.removeprefix("--config.") + ("" if value is None else f"={value}"))
    return flags, overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="frugalmoe",
        description="Train, ablate and cost mixture-of-experts language models on the hardware a team can afford.",
        epilog="frugalmoe COMMAND --help shows a command's flags with examples.",
    )
    parser.add_argument("--version", action="version", version=f"frugalmoe {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in commands.names():
        command = commands.get(name)
        command.add_flags(
            subparsers.add_parser(
                name,
                help=command.SUMMARY,
                description=command.SUMMARY,
                epilog=f"examples:\n{command.EXAMPLES}",
                formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False,
            )
        )
    return parser


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    sys.exit(main())
