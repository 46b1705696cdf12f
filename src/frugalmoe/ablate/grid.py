"""A table of a study's report."""

from collections.abc import Sequence
from typing import NamedTuple


class Grid(NamedTuple):
    """A table that is written as HTML and as markdown."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    text_columns: int = 1
