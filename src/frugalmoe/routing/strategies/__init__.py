"""Routing strategies, one file each. A new file in this folder is a new strategy; nothing else is edited.

Only a strategy that is asked for is imported: a file that somebody is still writing stops nobody else.
"""

from frugalmoe.found import Kind
from frugalmoe.routing.contract import Router

_KIND = Kind(__name__, "ROUTER", Router, "model.moe.router", "routing strategy")
names, get, broken, sound = _KIND.names, _KIND.get, _KIND.broken, _KIND.sound


def loss_names() -> tuple[str, ...]:
    """Every auxiliary loss that some sound strategy returns, sorted: the names that `model.moe.losses` may hold."""
    return tuple(sorted({loss for name in sound() for loss in get(name).about.losses}))
