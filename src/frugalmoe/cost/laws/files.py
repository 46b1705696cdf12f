"""The file of a fit, as `frugalmoe report STUDY --fit` writes it and `frugalmoe plan --target-loss` reads it: JSON.

| field | |
|---|---|
| form | a form of `fitted.FORMS` |
| constants, draws | log floor, log a, alpha, log b, beta: of the fit, and of each draw of its band |
| centers | M0, D0 (or C0) |
| ranges | size, tokens: [least, most] of the points |
| spread, points, arms, seeds, source | of what it was fitted on |
| metric | which loss, nats per token: it means nothing for other data or another tokenizer |
| foretold | arms that were not trained then: size, tokens, loss, low, high |
| made | when, UTC |
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from frugalmoe.cost.laws.fitted import FORMS, Fit
from frugalmoe.errors import UserError
from frugalmoe.files import read_json, write_json


def write_fit(path: str | Path, fit: Fit, **beside: Any) -> None:
    """Writes a fit, whole or not at all; `beside`: further fields, which `read_fit` does not need."""
    write_json(Path(path), {**dataclasses.asdict(fit), **beside})


def read_fit(path: str | Path) -> Fit:
    """Returns the fit of a file, for `loss_at`, `tokens_for` and `how_far`.

    Raises `UserError` that names file and field for one that is missing, damaged or none.
    """
    found = read_json(Path(path))
    if not isinstance(found, dict) or not any(form == found.get("form") for form in FORMS):
        rule = f"form must be one of {', '.join(FORMS)}; `frugalmoe report STUDY --fit` writes one"
        raise UserError(f"{path}: not a fit: {rule}")
    for name, (rule, holds) in _rules(found["form"]).items():
        if name not in found or not holds(found[name]):
            there = repr(found[name])[:60] if name in found else "missing"
            raise UserError(f"{path}: {name}={there}: must be {rule}")
    fields = {field.name: found[field.name] for field in dataclasses.fields(Fit)}
    fields |= {name: tuple(found[name]) for name in ("constants", "centers", "arms", "seeds")}
    fields["ranges"] = {name: tuple(pair) for name, pair in found["ranges"].items()}
    return Fit(**(fields | {"draws": tuple(map(tuple, found["draws"]))}))


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(map(_number, value))


def _pair(value: object) -> bool:
    return _numbers(value, 2) and 0 < value[0] <= value[1]


def _list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is kind for item in value)


def _ranges(value: object) -> bool:
    return isinstance(value, dict) and set(value) == {"size", "tokens"} and all(map(_pair, value.values()))


def _rules(form: str) -> dict[str, tuple[str, Callable[[Any], bool]]]:
    """Returns, by field, the rule and whether a value keeps it."""
    scales = len(FORMS[form].names)
    size = 1 + 2 * scales
    numbers = f"{size} finite numbers, exponents at least 0"
    whole = lambda value: _numbers(value, size) and all(exponent >= 0 for exponent in value[2::2])
    return {
        "constants": (numbers, whole),
        "centers": (f"{scales} positive numbers", lambda v: _numbers(v, scales) and min(v) > 0),
        "draws": (f"lists of {numbers}", lambda v: _list_of(list, v) and all(map(whole, v))),
        "ranges": ("size and tokens, each [least, most]", _ranges),
        "spread": ("a number of at least 0", lambda v: _number(v) and v >= 0),
        "points": ("a positive integer", lambda v: type(v) is int and v > 0),
        "arms": ("names", lambda v: _list_of(str, v)),
        "seeds": ("integers", lambda v: _list_of(int, v)),
        "source": ("text", lambda v: isinstance(v, str)),
    }
