"""Routing strategies, one file each. A new file in this folder is a new strategy; nothing else is edited."""

import dataclasses
import importlib
import pkgutil

from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.routing.contract import Router


def names() -> tuple[str, ...]:
    """The names of all strategies: the files of this folder, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def get(router: str | Router) -> Router:
    """The strategy of that name; a `Router` is returned as it is."""
    if isinstance(router, Router):
        return router
    if router not in names():
        raise UserError(f"model.moe.router is {router!r}: no such routing strategy; {did_you_mean(router, names())}")
    return dataclasses.replace(importlib.import_module(f"{__name__}.{router}").ROUTER, name=router)


def loss_names() -> tuple[str, ...]:
    """Every auxiliary loss that some strategy returns, sorted: the names that `model.moe.losses` may hold."""
    return tuple(sorted({loss for name in names() for loss in get(name).about.losses}))
