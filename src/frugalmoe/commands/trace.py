"""`frugalmoe trace RUN`."""

import argparse
from pathlib import Path

SUMMARY = "Store how each checkpoint of a run routes the same held-out tokens, for analysis and the report."
EXAMPLES = """\
  frugalmoe trace runs/quickstart
  frugalmoe trace runs/quickstart --checkpoints=last --tokens=200000
  frugalmoe report runs/quickstart     (afterwards: with saturation, words and churn)"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `frugalmoe trace`."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory with checkpoints")
    parser.add_argument(
        "--checkpoints", choices=("all", "last"), default="all", help="checkpoints already traced are skipped"
    )
    parser.add_argument(
        "--tokens", type=int, default=65_536, help="about how many, spread evenly over domains (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Writes what is missing of the trace and prints where it is."""
    from frugalmoe.analysis.lab.record import write_trace
    from frugalmoe.analysis.stored.trace import FOLDER, trace_files

    written = write_trace(args.run, checkpoints=args.checkpoints, tokens=args.tokens)
    print(f"{args.run / FOLDER}: {len(trace_files(args.run))} checkpoints traced, {len(written)} of them now")
    return 0
