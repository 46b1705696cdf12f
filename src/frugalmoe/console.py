"""The terminal: one kind of `Console` for tables, progress and notes."""

import sys
from typing import Any

import rich.console

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
