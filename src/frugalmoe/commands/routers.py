"""`frugalmoe routers`."""

import argparse
import json
import sys

SUMMARY = "List the routing strategies and what each one claims."
EXAMPLES = """\
  frugalmoe routers
  frugalmoe routers --format=json
  frugalmoe routers --format=markdown"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `frugalmoe routers`."""
    parser.add_argument("--format", choices=("table", "json", "markdown"), default="table")


def run(args: argparse.Namespace) -> int:
    """Prints the catalogue."""
    from frugalmoe.catalogue import BLOCKS, blocks, catalogue, format_markdown, format_table
    from frugalmoe.console import Console
    from frugalmoe.routing import strategies

    rows = catalogue()
    for line in strategies.broken().values():
        print(f"frugalmoe: {line}", file=sys.stderr)
    if args.format == "json":
        print(json.dumps(rows, indent=1))
    elif args.format == "markdown":
        print(format_markdown(rows, blocks()))
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(format_table(rows), format_table(blocks(), BLOCKS))
    return 0
