"""`frugalmoe data prepare` and `frugalmoe data show`."""

import argparse
import itertools
import os
from pathlib import Path

from frugalmoe.commands import add_config_flag, load_config
from frugalmoe.errors import UserError

COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")  # of segments in turn

SUMMARY = "Tokenise a data set, look at its rows."
EXAMPLES = """\
  frugalmoe data prepare --config=configs/quickstart.py --output=prepared/quickstart
  frugalmoe data prepare --config=configs/quickstart.py --config.data.path=texts/ --config.data.tokenizer=bytes
  frugalmoe data show --config=configs/quickstart.py --split=validation --count=4"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `prepare` and `show`, each with its flags."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="prepare|show")
    summary = "Read, split and tokenise; an interrupted one goes on where it was."
    prepare = actions.add_parser("prepare", help=summary, description=summary, allow_abbrev=False)
    prepare.set_defaults(parser=prepare)
    add_config_flag(prepare)
    prepare.add_argument("--output", type=Path, help="a new directory for data.path (default: the cache)")
    prepare.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="threads (default: the cores, %(default)s)"
    )
    summary = "Print rows as the model sees them, a colour per document."
    show = actions.add_parser("show", help=summary, description=summary, allow_abbrev=False)
    show.set_defaults(parser=show)
    add_config_flag(show)
    show.add_argument("--split", choices=("train", "validation"), default="train")
    show.add_argument("--count", type=int, default=4, help="rows, of each domain for validation (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Prepares or shows the data of a config."""
    return {"prepare": _prepare, "show": _show}[args.action](args)


def _prepare(args: argparse.Namespace) -> int:
    """Prepares and prints where the data is and how much there is of each domain; a validation set of one's own too."""
    from frugalmoe.data.batches import check_validation, held_out_data, prepared_path
    from frugalmoe.data.prepare import prepare

    if args.workers < 1:
        raise UserError(f"--workers={args.workers}: must be at least 1")
    config = load_config(args)
    if config.data.validation.path:
        check_validation(config.data)
    directory = prepare(config.data, args.output, args.workers)
    directories = [directory]
    if config.data.validation.path:
        own = held_out_data(config.data, str(directory))
        directories.append(prepared_path(own) or prepare(own, workers=args.workers))
    for path in directories:
        _print_prepared(path)
    return 0


def _print_prepared(directory: Path) -> None:
    from rich.table import Table

    from frugalmoe.console import Console
    from frugalmoe.data.shards import read_manifest

    manifest = read_manifest(directory)
    table = Table("domain", "split", "documents", "tokens", "bytes", "bytes/token")
    for domain, sides in manifest["counts"].items():
        for side, count in ((side, count) for side, count in sides.items() if count["documents"]):
            numbers = [f"{count[name]:,}" for name in ("documents", "tokens", "bytes")]
            table.add_row(domain, side, *numbers, f"{count['bytes'] / count['tokens']:.2f}")
    console = Console()
    console.print(table)
    console.print(f"prepared in {directory}", soft_wrap=True)


def _show(args: argparse.Namespace) -> int:
    """Prints `count` rows of the first training batches, or of each domain's validation rows."""
    from frugalmoe.console import Console
    from frugalmoe.data.batches import open_data

    if args.count < 1:
        raise UserError(f"--count={args.count}: must be at least 1")
    config = load_config(args)
    dataset = open_data(config.data, batch_size=1, seed=config.train.seed)
    console = Console()
    console.print(f"domains {', '.join(dataset.domains)}; {dataset.train_tokens:,} training tokens")
    if args.split == "train":
        batches = map(dataset.batch, range(args.count))
    else:
        by_domain = [dataset.eval_batches(domain, 1, args.count) for domain in dataset.domains]
        batches = itertools.chain.from_iterable(by_domain)
    for number, batch in enumerate(batches):
        console.rule(f"row {number}")
        console.print(_render(dataset, batch))
    return 0


def _render(dataset, batch):
    """Returns the segments of a batch of one row: domain, id, text."""
    import numpy as np
    from rich.text import Text

    row = type(batch)(*(column[0] for column in batch))
    text = Text()
    for segment in range(1, row.segment_ids_BT.max() + 1):
        (at,) = np.nonzero(row.segment_ids_BT == segment)
        domain = dataset.domains[row.domain_ids_BT[at[0]]]
        text.append(f"[{segment} {domain}, {len(at)} tokens] ", style="bold reverse")
        decoded = dataset.tokenizer.decode(row.tokens_BT[at])
        shown = "".join(c if c in "\n\t" or c.isprintable() else ascii(c)[1:-1] for c in decoded)
        text.append(shown + "\n", style=COLOURS[segment % len(COLOURS)])
    return text
