"""The terminal: one kind of `Console` for tables, progress and notes."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import rich.console
from rich.progress import Progress

from frugalmoe.interrupts import silence


class Console(rich.console.Console):
    """Prints names, paths and text as they are: no markup, no emoji codes, no colours for numbers.

    Where its reader has gone, as in `frugalmoe train | head`, it goes quiet and the program goes on.
    """

    def __init__(self, **settings: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        silence(sys.stderr if self.stderr else sys.stdout)


@contextlib.contextmanager
def bar(progress: bool) -> Iterator[Progress]:
    """A progress bar on a terminal; nothing elsewhere."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not (progress and console.is_terminal), transient=True) as shown:
        yield shown
