"""`frugalmoe evaluate RUN`."""

import argparse
import json
from typing import Any

from frugalmoe.errors import UserError

SUMMARY = "Score a trained run, on all devices here: loss and bits per byte of held-out text, or what it chooses."
EXAMPLES = """\
  frugalmoe evaluate runs/quickstart
  frugalmoe evaluate runs/quickstart@100 --tokens=20000
  frugalmoe evaluate runs/chat@best --data=talks.jsonl --config.data.kind=chat    (the answers of conversations)
  frugalmoe evaluate runs/quickstart --data=mine.txt --json      (all documents of mine.txt)
  frugalmoe evaluate runs/quickstart --config.data.path=mixed    (the held-out documents of a config's data)
  frugalmoe evaluate runs/quickstart --suite                     (agreement, recall, copying ...: our own tasks)
  frugalmoe evaluate runs/quickstart --suite=recall,mine.py --items=1000"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `frugalmoe evaluate`."""
    parser.add_argument(
        "run",
        metavar="RUN[@STEP]",
        help="a run directory, and which checkpoint: a step, or best (default: the newest)",
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="text of which all documents are scored, as data.path may name it, or a prepared directory, of which the "
        "held-out ones are (default: the run's own held-out data; --config.data.FIELD=VALUE changes their config)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="about how many, spread evenly over domains (default: the run's train.eval_rows rows of a domain of its "
        "own data; all of others)",
    )
    parser.add_argument(
        "--suite",
        nargs="?",
        const="",
        metavar="NAME,...",
        help="instead of text, small tasks that were made here: of a few continuations the most likely one is chosen. "
        "Without names all of them; a name may be the path of a file with TASK = Task(...)",
    )
    parser.add_argument("--items", type=int, metavar="N", help="of a task of --suite, at most (default: 400)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(config=None)  # overrides are of the run's config, and --config is no flag


def run(args: argparse.Namespace) -> int:
    """Prints the loss of each domain, or the accuracy of each task."""
    _check(args)
    found, show = _suite(args) if args.suite is not None else _text(args)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        from frugalmoe.console import Console

        Console().print(show)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises `UserError` for flags that do not go together."""
    of_text = {"--data": args.data, "--tokens": args.tokens, "--config.*": args.overrides or None}
    for flag, value in of_text.items() if args.suite is not None else ():
        if value is not None:
            raise UserError(f"{flag}: is of the evaluation on text, and cannot be given with --suite")
    if args.items is not None and args.suite is None:
        raise UserError(f"--items={args.items}: is of --suite, which is not given")


def _text(args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    from frugalmoe.evaluate import evaluate
    from frugalmoe.train.weights import run_and_step

    directory, step = run_and_step(args.run)
    found = evaluate(directory, step, data=args.data, overrides=args.overrides, tokens=args.tokens, progress=True)
    return found._asdict(), _table_of_text(found)


def _table_of_text(found):
    from rich.text import Text

    table = _table(found, "domain", "tokens", "bytes", "loss (nats per token)", "bits per byte")
    for domain, loss in found.loss.items():
        if domain == "mean" and len(found.targets) == 1:
            continue
        counts = (f"{n[domain]:,}" if domain in n else "" for n in (found.targets, found.bytes))
        table.add_row(Text(domain), *counts, f"{loss:.4f}", f"{found.bits_per_byte[domain]:.4f}")
    return table


def _suite(args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    from frugalmoe.evaluate.grading import ITEMS, grade_run
    from frugalmoe.train.weights import run_and_step

    directory, step = run_and_step(args.run)
    names, items = tuple(filter(None, args.suite.split(","))), ITEMS if args.items is None else args.items
    found = grade_run(directory, step, names=names, items=items, progress=True)
    as_json = found._asdict() | {"tasks": {name: grade._asdict() for name, grade in found.tasks.items()}}
    return as_json, _table_of_suite(found)


def _table_of_suite(found):
    from rich.text import Text

    table = _table(found, "task (of our suite)", "items", "chance", "accuracy", "95% interval", "margin (nats)")
    for name, grade in found.tasks.items():
        interval = f"{grade.low:.3f} to {grade.high:.3f}"
        numbers = (f"{grade.items:,}", f"{grade.chance:.3f}", f"{grade.accuracy:.3f}", interval, f"{grade.margin:+.3f}")
        table.add_row(Text(name), *numbers)
    if len(found.tasks) > 1:
        table.add_row("mean", "", "", f"{found.mean:.3f}", "", "")
    return table


def _table(found, first: str, *others: str):
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, title=Text(f"{found.run}, step {found.step:,}"), title_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
