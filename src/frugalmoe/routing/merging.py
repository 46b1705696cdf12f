"""How the states of replicas that trained apart become one: a rule per entry of a router's state.

| rule | of entries e_i with weights w_i | for |
|---|---|---|
| mean | sum of w_i e_i / sum of w_i | what steps add to: biases, thresholds, prices, running means |
| maximum | the largest, value by value | how long something has been averaged: the mean of averages knows as much |
| equal | the common value; refused where they differ | what no step of one replica alone may move |

Merging is a pure function of host arrays. It keeps dtypes and shapes, does not depend on the order of replicas nor on
whether some were merged before (with the sum of their weights), and gives equal states back bit for bit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from frugalmoe.errors import UserError

Arrays = Mapping[str, Any]


def mean(values: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """The mean with these weights, in float64, as a distance from the first: equal values give themselves."""
    first, total = np.float64(values[0]), math.fsum(weights)
    moved = sum(weight / total * (np.float64(value) - first) for value, weight in zip(values, weights, strict=True))
    return (first + moved).astype(values[0].dtype)


def maximum(values: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    return np.max(np.stack(values), axis=0)


def equal(values: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    if any(not np.array_equal(value, values[0]) for value in values[1:]):
        raise UserError("replicas differ in a value that must be equal in all of them")
    return values[0]


RULES: dict[str, Callable[[Sequence[np.ndarray], Sequence[float]], np.ndarray]] = {
    "mean": mean,
    "maximum": maximum,
    "equal": equal,
}


def checked(states: Sequence[Arrays], weights: Sequence[float]) -> list[dict[str, np.ndarray]]:
    """The states as host arrays. Raises `UserError` for what cannot be merged."""
    if not states or len(states) != len(weights):
        raise UserError(f"{len(states)} states and {len(weights)} weights: there must be one weight for each state")
    if not _are_weights(weights):
        raise UserError(f"weights of replicas {weights!r}: must be finite numbers, none negative, and not all 0")
    held = [{name: np.asarray(value) for name, value in state.items()} for state in states]
    for name in sorted({name for state in held for name in state}):
        kinds = {(state[name].dtype, state[name].shape) if name in state else None for state in held}
        if len(kinds) > 1:
            raise UserError(f"router state {name!r}: replicas hold it in different types or shapes, or not at all")
        if held[0][name].dtype != np.float32:
            raise UserError(f"router state {name!r}: is {held[0][name].dtype}, must be float32")
        if not all(np.all(np.isfinite(state[name])) for state in held):
            raise UserError(f"router state {name!r}: a replica holds a value that is not finite")
    return held


def _are_weights(weights: Sequence[float]) -> bool:
    try:
        return all(0 <= w < math.inf for w in weights) and 0 < math.fsum(weights) < math.inf
    except (TypeError, OverflowError):  # no numbers, or more than a float holds
        return False


def by_rules(rules: Mapping[str, str], states: Sequence[Arrays], weights: Sequence[float]) -> dict[str, np.ndarray]:
    """One state from those of `checked`, entry by entry; `rules` names the rule of each entry."""
    merged = {}
    for name in states[0]:
        if rules.get(name) not in RULES:
            raise UserError(f"router state {name!r}: the strategy names no rule to merge it, of {', '.join(RULES)}")
        try:
            merged[name] = RULES[rules[name]]([state[name] for state in states], weights)
        except UserError as e:
            raise UserError(f"router state {name!r}: {e}") from e
    return merged
