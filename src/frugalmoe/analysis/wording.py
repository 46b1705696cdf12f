"""Numbers and lists as text, for tables, pictures and pages."""

import math
from collections.abc import Sequence


def number(value: float | None, digits: int = 3) -> str:
    """Returns a number with so many significant digits, thousands separated; a dash for what is not there."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def percent(fraction: float) -> str:
    return f"{round(100 * fraction, 1) + 0.0:.1f}%" if math.isfinite(fraction) else "–"  # + 0.0: no minus zero


def spread(low: str, high: str) -> str:
    """Returns two formatted ends as a range, or one value where they read the same."""
    return low if low == high else f"{low} to {high}"


def p_value(p: float) -> str:
    return f"p = {p:.3f}" if p > 0.001 else "p ≤ 0.001"


def count(value: float | None) -> str:
    """Returns a number with a unit of thousands: 1234567 becomes 1.23 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value is not None and value >= size:
            return f"{number(value / size)} {unit}"
    return number(value)


def listed(items: Sequence[object]) -> str:
    """Returns the items as `a, b and c`."""
    items = [str(i) for i in items]
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
