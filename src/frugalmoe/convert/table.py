"""Which tensors become which of our arrays, as a table."""

import re
from collections.abc import Mapping

from rich.table import Column, Table

from frugalmoe.console import Console
from frugalmoe.convert.plan import Plan

_TITLES = ("tensors", "shape", "dtype", "our array", "our shape")
_WIDE = 160  # columns where no terminal sets a width: the names are long


def console() -> Console:
    """Returns a terminal, or a file that is wide enough for the table."""
    known = Console()
    return known if known.is_terminal else Console(width=_WIDE)


def of(plan: Plan, dtypes: Mapping[str, str]) -> Table:
    """Returns a row for each of our arrays: its shape, and the tensors of which it is made, with their shape and dtype.

    Names that differ in numbers only share a line.
    """
    table = Table(*(Column(title, overflow="fold") for title in _TITLES))
    for path, leaf in plan.arrays.items():
        groups: dict[tuple, list[str]] = {}
        for tensor, _ in plan.by_path[path]:
            pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor.name)
            groups.setdefault((pattern, tensor.shape, dtypes.get(tensor.name, "none")), []).append(tensor.name)
        for i, ((pattern, shape, dtype), names) in enumerate(groups.items()):
            times = f" ({len(names)})" if len(names) > 1 else ""
            ours = ("/".join(path), str(list(leaf.shape))) if i == 0 else ("", "")
            table.add_row(pattern + times, str(list(shape)), dtype, *ours)
    return table


def count(plan: Plan) -> str:
    """Returns how many numbers a model has, in thousands or millions."""
    size = sum(leaf.size for leaf in plan.arrays.values())
    return f"{size / 1e6:,.1f} M" if size >= 1e6 else f"{size:,}"
