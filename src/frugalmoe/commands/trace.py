"""`frugalmoe trace RUN`."""

import argparse

from frugalmoe.errors import UserError

SUMMARY = "Store how each checkpoint of a run routes the same held-out tokens, for analysis and the report."
EXAMPLES = """\
  frugalmoe trace runs/quickstart
  frugalmoe trace runs/quickstart --checkpoints=last --tokens=200000
  frugalmoe trace runs/quickstart@best
  frugalmoe report runs/quickstart     (afterwards: with saturation, words and churn)"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `frugalmoe trace`."""
    parser.add_argument(
        "run", metavar="RUN[@STEP]", help="a run directory with checkpoints, and of which one (RUN@best: the best)"
    )
    parser.add_argument(
        "--checkpoints", choices=("all", "last"), help="default: all; checkpoints already traced are skipped"
    )
    parser.add_argument(
        "--tokens", type=int, default=65_536, help="about how many, spread evenly over domains (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Writes what is missing of the trace and prints where it is."""
    from frugalmoe.analysis.lab.record import write_trace
    from frugalmoe.analysis.stored.trace import FOLDER, trace_files
    from frugalmoe.train.weights import run_and_step

    run, step = run_and_step(args.run)
    if None not in (step, args.checkpoints):
        raise UserError(f"--checkpoints={args.checkpoints}: {args.run} names a step already")
    written = write_trace(run, checkpoints=args.checkpoints or "all", step=step, tokens=args.tokens)
    print(f"{run / FOLDER}: {len(trace_files(run))} checkpoints traced, {len(written)} of them now")
    return 0
