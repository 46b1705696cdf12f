"""Rules that strategies check their options with. Each returns the broken rule in one line, or None."""

import math
from collections.abc import Iterable

from frugalmoe.errors import did_you_mean
from frugalmoe.schema import MoE


def first(*rules: str | None) -> str | None:
    """The first broken rule, or None."""
    return next((rule for rule in rules if rule), None)


def one_of(field: str, value: str, valid: Iterable[str]) -> str | None:
    valid = tuple(valid)
    return None if value in valid else f"options.{field}={value!r}: unknown; {did_you_mean(str(value), valid)}"


def at_least(field: str, value: float, least: float) -> str | None:
    ok = math.isfinite(value) and value >= least
    return None if ok else f"options.{field}={value!r}: must be at least {least}"


def positive(field: str, value: float) -> str | None:
    ok = math.isfinite(value) and value > 0
    return None if ok else f"options.{field}={value!r}: must be positive"


def decay(field: str, value: float) -> str | None:
    return None if 0 <= value < 1 else f"options.{field}={value!r}: must be in [0, 1)"


def gradient_at_one(config: MoE, normalized: bool, remedy: str) -> str | None:
    """One expert with a weight normalized over itself has the constant weight 1: the router would never learn."""
    if config.num_experts_per_token > 1 or not normalized:
        return None
    return f"num_experts_per_token=1 with normalized weights gives the router no gradient; {remedy}"
