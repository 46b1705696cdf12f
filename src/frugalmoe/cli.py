"""`frugalmoe COMMAND ...`: finds the command, and turns an error of the user's into one line and an exit code."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from frugalmoe import __version__, commands, completion
from frugalmoe.errors import EXIT_INTERRUPTED, EXIT_READER_GONE, EXIT_USER_ERROR, UserError, one_line
from frugalmoe.interrupts import at_once, may_speak, silence

_FIRST_LINE = time.perf_counter()
_LONGEST_START = 10.0  # seconds that Python takes for its own start


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    0 done, 2 user error, 75 stopped by a signal after saving or before there was anything to save, 130 interrupted,
    141 the reader of the output has gone.
    """
    began = time.perf_counter() - (_age() if argv is None else 0.0)
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv), began)
        finally:
            sys.stdout.flush()  # here, where it can be caught that nobody reads
    except BrokenPipeError:
        silence(sys.stdout)
        return EXIT_READER_GONE
    except KeyboardInterrupt:
        if not may_speak():
            time.sleep(10)  # another thread is ending the process
        print("frugalmoe: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _age() -> float:
    """Seconds since this process began; since its first line of ours where the system does not say, or where it was
    another program for long before it became this one.
    """
    ours = time.perf_counter() - _FIRST_LINE
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return ours
    return age if ours < age < ours + _LONGEST_START else ours


def _run(argv: list[str], began: float) -> int:
    parser = _parser()
    if completion.REQUESTED in os.environ:
        completion.complete(parser)
    flags, overrides = _take_overrides(argv)
    args, unknown = parser.parse_known_args(flags)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.overrides, args.argv, args.began = overrides, argv, began
    try:
        if overrides and not hasattr(args, "config"):
            raise UserError(f"--config.{overrides[0]}: frugalmoe {args.command} takes no config")
        command = commands.get(args.command)
        with at_once(resumable=getattr(command, "RESUMABLE", False)):
            return command.run(args) or 0
    except Exception as e:
        if not (line := one_line(e)):
            raise
        print(f"frugalmoe: {line}", file=sys.stderr)
        return EXIT_USER_ERROR


def _take_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Splits off `--config.a.b=value` (or `--config.a.b value`); returns (other flags, ["a.b=value", ...])."""
    flags, overrides = [], []
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("--config."):
            flags.append(_hyphened(argument))
        elif "=" in argument:
            overrides.append(argument.removeprefix("--config."))
        else:
            value = next(arguments, None)
            overrides.append(argument.removeprefix("--config.") + ("" if value is None else f"={value}"))
    return flags, overrides


def _hyphened(argument: str) -> str:
    """A flag as we spell it: launch scripts that exist say --num_processes where it is --num-processes now."""
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") and " " not in flag else argument


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
        of_command = subparsers.add_parser(
            name,
            help=command.SUMMARY,
            description=command.SUMMARY,
            epilog=f"examples:\n{command.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        of_command.set_defaults(parser=of_command)  # its usage is shown with what it does not know
        command.add_flags(of_command)
    return parser


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    sys.exit(main())
