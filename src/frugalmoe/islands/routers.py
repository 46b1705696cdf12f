"""The state of routers between islands: flat for the directory, merged by each strategy's own rule."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from frugalmoe.routing import strategies
from frugalmoe.schema import MoE

_STATE = "router_state"  # what a layer, or a stack of layers, calls it


def flatten(router_state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns float32 host arrays by their paths, joined by `/`; layers stay stacked."""
    found = {}
    for name, value in router_state.items():
        inner = flatten(value) if isinstance(value, Mapping) else {"": np.asarray(value, np.float32)}
        found |= {f"{name}/{rest}" if rest else name: array for rest, array in inner.items()}
    return dict(sorted(found.items()))


def unflatten(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the nested dicts that `flatten` made flat."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *path, last = name.split("/")
        inside = tree
        for part in path:
            inside = inside.setdefault(part, {})
        inside[last] = array
    return tree


def merger(moe: MoE) -> Callable[[Sequence[Mapping[str, np.ndarray]], Sequence[float]], dict[str, np.ndarray]]:
    """Returns (flat states, weights) -> the flat state of all together, by `Router.merge`."""
    router = strategies.get(moe.router)

    def merged(states: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
        first = states[0]
        if _STATE in first:
            return {_STATE: router.merge([state[_STATE] for state in states], weights, moe)}
        return {name: merged([state[name] for state in states], weights) for name in first}

    return lambda states, weights: flatten(merged([unflatten(state) for state in states], weights))
