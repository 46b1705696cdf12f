"""Routing strategies, one file each. A new file in this folder is a new strategy; nothing else is edited.

Only a strategy that is asked for is imported: a file that somebody is still writing stops nobody else.
"""

import dataclasses
import importlib
import importlib.util
import pkgutil
import sys
import traceback

from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.routing.contract import Router


def names() -> tuple[str, ...]:
    """The names of all strategies: the files of this folder, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def get(router: str | Router) -> Router:
    """The strategy of that name; a `Router` is returned as it is.

    Raises UserError for a name without a file, and for a file that cannot be imported or ends without a `ROUTER`.
    """
    if isinstance(router, Router):
        return router
    if router not in names():
        raise UserError(f"model.moe.router is {router!r}: no such routing strategy; {did_you_mean(router, names())}")
    full = f"{__name__}.{router}"
    file = importlib.util.find_spec(full).origin
    try:
        module = importlib.import_module(full)
    except (Exception, SystemExit) as e:
        raise UserError(f"model.moe.router={router!r}: {_what(e, file)}") from e
    if not isinstance(getattr(module, "ROUTER", None), Router):
        del sys.modules[full]  # so that it is read again when it is finished
        raise UserError(f"model.moe.router={router!r}: {file}: ends without ROUTER = Router(...)")
    return dataclasses.replace(module.ROUTER, name=router)


def _what(error: BaseException, file: str) -> str:
    """File, line and what is wrong there, on one line."""
    frames = traceback.extract_tb(error.__traceback__)
    lines, message = [None, *(frame.lineno for frame in frames if frame.filename == file)], str(error)
    if isinstance(error, SyntaxError):
        file, lines, message = error.filename or file, [error.lineno], error.msg
    line = f", line {lines[-1]}" if lines[-1] else ""
    return f"{file}{line}: {type(error).__name__}: {' '.join(message.split())}"


def broken() -> dict[str, str]:
    """name -> what is wrong with its file, in one line, of every strategy that `get` refuses. Imports all."""
    found = {}
    for name in names():
        try:
            get(name)
        except UserError as e:
            found[name] = str(e)
    return found


def sound() -> tuple[str, ...]:
    """The names of all strategies but the broken. Imports all."""
    bad = broken()
    return tuple(name for name in names() if name not in bad)


def loss_names() -> tuple[str, ...]:
    """Every auxiliary loss that some sound strategy returns, sorted: the names that `model.moe.losses` may hold."""
    return tuple(sorted({loss for name in sound() for loss in get(name).about.losses}))
