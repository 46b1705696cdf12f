"""`frugalmoe evaluate RUN`."""

import argparse
import json

SUMMARY = "Score a trained run on held-out text, on all devices here: loss and bits per byte of each domain."
EXAMPLES = """\
  frugalmoe evaluate runs/quickstart
  frugalmoe evaluate runs/quickstart@100 --tokens=20000
  frugalmoe evaluate runs/quickstart --data=mine.txt --json      (all documents of mine.txt)
  frugalmoe evaluate runs/quickstart --config.data.path=mixed    (the held-out documents of a config's data)"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `frugalmoe evaluate`."""
    parser.add_argument("run", metavar="RUN[@STEP]", help="a run directory, and which checkpoint (default: the newest)")
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
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(config=None)  # overrides are of the run's config, and --config is no flag


def run(args: argparse.Namespace) -> int:
    """Prints the loss of each domain."""
    from frugalmoe.evaluate import evaluate
    from frugalmoe.train.weights import run_and_step

    directory, step = run_and_step(args.run)
    found = evaluate(directory, step, data=args.data, overrides=args.overrides, tokens=args.tokens, progress=True)
    if args.json:
        print(json.dumps(found._asdict(), indent=1))
    else:
        _print(found)
    return 0


def _print(found) -> None:
    from rich.table import Table
    from rich.text import Text

    from frugalmoe.console import Console

    table = Table(box=None, pad_edge=False, title=Text(f"{found.run}, step {found.step:,}"), title_justify="left")
    table.add_column("domain")
    for name in ("tokens", "bytes", "loss (nats per token)", "bits per byte"):
        table.add_column(name, justify="right")
    for domain, loss in found.loss.items():
        if domain == "mean" and len(found.targets) == 1:
            continue
        counts = (f"{n[domain]:,}" if domain in n else "" for n in (found.targets, found.bytes))
        table.add_row(Text(domain), *counts, f"{loss:.4f}", f"{found.bits_per_byte[domain]:.4f}")
    Console().print(table)
