"""`frugalmoe config`."""

import argparse
import json
import sys

from frugalmoe.commands import add_config_flag

SUMMARY = "Print every field of a config: its value, its default, what it means."
EXAMPLES = """\
  frugalmoe config
  frugalmoe config --config=quickstart --changed
  frugalmoe config --config.model.moe.router=sigmoid_bias      (with the router's own options)
  frugalmoe config --config=ling_2:mini:laptop --format=json"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `frugalmoe config`."""
    add_config_flag(parser, required=False)
    parser.add_argument("--changed", action="store_true", help="only fields that are not at their default")
    parser.add_argument("--format", choices=("table", "json"), default="table")


def run(args: argparse.Namespace) -> int:
    """Prints the fields; what is wrong with them comes after them."""
    from frugalmoe.commands import read_config
    from frugalmoe.config import default, override
    from frugalmoe.config.checks import check
    from frugalmoe.config.describe import describe
    from frugalmoe.config.load import typed

    config = typed(override(read_config(args.config) if args.config else default(), args.overrides))
    fields = describe(config)
    if args.changed:
        fields = [field for field in fields if field.value != field.default]
    if args.format == "json":
        print(json.dumps([field._asdict() for field in fields], indent=1))
    else:
        _print(fields)
    check(config)
    return 0


def _print(fields) -> None:
    from rich.table import Table
    from rich.text import Text

    from frugalmoe.console import Console

    table = Table("--config.FIELD", "value", "default", "meaning", box=None, pad_edge=False)
    for field in fields:
        style = "bold" if field.value != field.default else ""
        shown = (field.name, *(_shown(value) for value in (field.value, field.default)), field.meaning)
        table.add_row(*(Text(text, style=style) for text in shown))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _shown(value) -> str:
    return {None: "", "": "''"}.get(value, str(value)) if not isinstance(value, dict) else str(value)
