"""`frugalmoe islands DIR`."""

import argparse
import sys

from frugalmoe.errors import UserError

SUMMARY = (
    "Show the islands that train one model in a directory: how far and how fast each is, who was left out and why."
)
EXAMPLES = """\
  frugalmoe islands /shared/islands
  frugalmoe islands s3://bucket/islands --watch
  frugalmoe islands /shared/islands --format=json

--format=json prints one object: outer_sha256, round, rounds and tokens of all together, merge, bits, members, damaged
(a line for each file that cannot be read), and islands, a list with an object for each: island, status, round, behind,
tokens, tokens_per_second, merged, left_out, note, bytes, streams, device, software, beat, outer_sha256. `status` is
what an island said last (joining, training, waiting, left, complete), or lapsed where the others go on
without it, or unknown; `beat` grows while it lives. What is not known is null. With --watch each look is one line."""
PAUSE = 2.0  # seconds between two looks
_PATIENCE = 3.0  # seconds for which a read is tried again


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `frugalmoe islands`."""
    where = "where they meet, as --islands of `frugalmoe train`: a path, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"
    parser.add_argument("directory", metavar="DIR", help=where)
    parser.add_argument("--format", choices=("table", "json"), default="table", help="default: %(default)s")
    parser.add_argument(
        "--watch", action="store_true", help="look again every two seconds until Ctrl-C; who shows no life is silent"
    )


def run(args: argparse.Namespace) -> int:
    """Prints what the directory shows; a line for each file that is damaged comes before the table."""
    from frugalmoe.islands.store import StoreError, open_store

    store = open_store(args.directory, write=False)
    store.patience = _PATIENCE
    if args.watch:
        return _watch(store, args)
    from frugalmoe.islands.status import look

    try:
        _print(look(store), args)
    except StoreError as error:
        raise UserError(str(error)) from error
    return 0


def _print(seen, args: argparse.Namespace) -> None:
    if args.format == "json":
        print(_json(seen, indent=1))
    else:
        _console().print(_shown(seen, args.directory))


def _console():
    from frugalmoe.console import Console

    return Console(width=None if sys.stdout.isatty() else 2000)  # a line for each island, where a program reads it


def _json(seen, indent: int | None = None) -> str:
    from frugalmoe.files import to_json

    return to_json(seen._asdict() | {"islands": [row._asdict() for row in seen.islands]}, indent=indent)


def _shown(seen, directory: str):
    """What is printed of a directory: damaged files, all together, and a table of the islands."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from frugalmoe.analysis import wording
    from frugalmoe.analysis.wording import number, percent
    from frugalmoe.errors import printable

    known = lambda value, show=str: "–" if value is None else show(value)
    count = lambda whole: f"{whole:,}" if whole < 10_000 else wording.count(whole)
    lines = [f"damaged: {line}" for line in seen.damaged]
    if not seen.islands and seen.round is None:
        return Group(*(Text(printable(line)) for line in (*lines, f"{directory}: no islands yet")))
    if seen.round is None:
        lines.append(f"{directory}: not begun")
    else:
        together = f"round {seen.round:,} of {known(seen.rounds, '{:,}'.format)}, {count(seen.tokens)} tokens merged"
        rule = f"merge {known(seen.merge)}, {known(seen.bits)} bits, {len(seen.members)} members"
        lines += [f"{directory}: {together}; {rule}", f"outer sha256 {seen.outer_sha256}"]
    table = Table(box=None, pad_edge=False)
    for name in ("island", "status"):
        table.add_column(name, no_wrap=True)
    for name in ("round", "behind", "tokens", "tokens/s", "merged", "bytes/round", "streams"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("device", "software", "last left out, or told"):
        table.add_column(name)
    for row in seen.islands:
        numbers = known(row.round), known(row.behind), count(row.tokens), number(row.tokens_per_second, 4)
        shares = known(row.merged, percent), known(row.bytes, count), str(row.streams)
        told = "; ".join(text for text in (row.left_out, row.note) if text)
        cells = (row.island, row.status[:20], *numbers, *shares, row.device, row.software, told)
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return Group(*(Text(printable(line)) for line in lines), table)


def _watch(store, args: argparse.Namespace) -> int:
    """Looks again and again; Ctrl-C is how it ends, and no failure."""
    import contextlib
    import signal
    import threading

    from rich.live import Live
    from rich.text import Text

    from frugalmoe.islands.status import look
    from frugalmoe.islands.store import StoreError

    done, lives, console = threading.Event(), _Lives(), _console()
    redrawn = console.is_terminal and args.format == "table"
    live = Live(console=console, auto_refresh=False, vertical_overflow="visible")
    previous = signal.signal(signal.SIGINT, lambda *_: done.set())
    try:
        with live if redrawn else contextlib.nullcontext():
            while not done.is_set():
                try:
                    seen = lives.marked(look(store))
                    if redrawn:
                        live.update(_shown(seen, args.directory), refresh=True)
                    elif args.format == "json":
                        print(_json(seen), flush=True)
                    else:
                        console.print(_shown(seen, args.directory))
                        sys.stdout.flush()
                except StoreError as error:
                    console.print(Text(str(error)))
                done.wait(PAUSE)
    finally:
        signal.signal(signal.SIGINT, previous)
    return 0


class _Lives:
    """Who shows no sign of life for as long as islands of the directory wait for one, by the clock of this process."""

    def __init__(self):
        self._seen: dict[str, tuple[int, float]] = {}  # island -> beat, and when it was new

    def marked(self, seen):
        import time

        from frugalmoe.islands.records import LIVE

        now, rows = time.monotonic(), []
        for row in seen.islands:
            if row.beat is None or self._seen.get(row.island, (-1, now))[0] != row.beat:
                self._seen[row.island] = row.beat, now
            quiet = now - self._seen[row.island][1] >= (seen.lapse_seconds or float("inf"))
            rows.append(row._replace(status="silent") if quiet and row.status in LIVE else row)
        return seen._replace(islands=tuple(rows))
