"""`frugalmoe runs DIR`."""

import argparse
import sys

SUMMARY = "List the runs in a directory: what differs in their configs, how far they are, how well they do."
EXAMPLES = """\
  frugalmoe runs runs
  frugalmoe runs runs/balance --by=speed/tokens_per_second
  frugalmoe runs runs --by=eval/loss/plays --json"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `frugalmoe runs`."""
    parser.add_argument("directory", metavar="DIR", help="a directory with runs in it, at any depth")
    parser.add_argument(
        "--by",
        default="eval/loss/mean",
        metavar="METRIC",
        help="a name of metrics.jsonl: the run whose last value is best comes first (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with all metrics, instead of a table")


def run(args: argparse.Namespace) -> int:
    """Prints the runs; a line for each that is damaged comes before them."""
    from frugalmoe.analysis.stored.listing import list_runs
    from frugalmoe.files import to_json

    listing = list_runs(args.directory, args.by)
    for line in listing.unreadable:
        print(f"frugalmoe: {line}", file=sys.stderr)
    if args.json:
        print(to_json([run._asdict() for run in listing.runs], indent=1))
    else:
        _print(listing.runs, args.by)
    return 0


def _print(runs, by: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from frugalmoe import metrics
    from frugalmoe.analysis.stored.listing import BITS, LOSS
    from frugalmoe.analysis.wording import number
    from frugalmoe.console import Console
    from frugalmoe.errors import printable

    shown = dict.fromkeys([LOSS, BITS, by])
    table = Table(box=None, pad_edge=False)
    for name in ("run", "status", "steps", "last start (UTC)"):
        table.add_column(name)
    for name in shown:
        table.add_column(Text(metrics.titled(name)), justify="right")
    kept = [run.best for run in runs if run.best]
    if kept:
        table.add_column("best checkpoint", justify="right")
    table.add_column("where its config is not as most are")
    for run in runs:
        about = (run.path, run.status, f"{run.step:,} of {run.steps:,}", (run.started or "")[:16].replace("T", " "))
        values = [number(run.values.get(name), 4) for name in shown]
        if kept:
            of = run.best
            values.append(f"{of['metric']} {number(of['value'], 4)} at step {of['step']:,}" if of else "")
        apart = ", ".join(f"{field}={value}" for field, value in run.differences.items())
        table.add_row(*(Text(printable(text)) for text in (*about, *values, apart)))
    Console(width=None if sys.stdout.isatty() else 2000).print(table)  # a line for each run, where a program reads it
