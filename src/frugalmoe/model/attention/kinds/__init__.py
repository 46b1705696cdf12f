"""Kinds of attention, one file each. A new file in this folder is a new kind; nothing else is edited.

Only a kind that a config names is imported: a file that somebody is still writing stops nobody else.
"""

import dataclasses
import importlib
import importlib.util
import pkgutil
import sys
import traceback
from typing import Any

from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.model import pattern
from frugalmoe.model.attention.contract import Attention
from frugalmoe.schema import Model


def names() -> tuple[str, ...]:
    """The names of all kinds: the files of this folder, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def get(name: str) -> Attention:
    """The kind of that name.

    Raises `UserError` for a name without a file, and for a file that cannot be imported or ends without an `ATTENTION`.
    """
    what = f"model.attention={name!r}"
    if name not in names():
        raise UserError(f"{what}: no such kind of attention; {did_you_mean(name, names())}")
    full = f"{__name__}.{name}"
    file = importlib.util.find_spec(full).origin
    try:
        module = importlib.import_module(full)
    except (Exception, SystemExit) as e:
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == file]
        line = getattr(e, "lineno", None) or (lines or [0])[-1]
        raise UserError(f"{what}: {file}, line {line}: {type(e).__name__}: {' '.join(str(e).split())}") from e
    if not isinstance(getattr(module, "ATTENTION", None), Attention):
        del sys.modules[full]  # so that it is read again when it is finished
        raise UserError(f"{what}: {file}: ends without ATTENTION = Attention(...)")
    return dataclasses.replace(module.ATTENTION, name=name)


def options_of(config: Model, name: str) -> Any:
    """The options of a kind: those that the config names, else the kind's defaults."""
    given = config.attention_options.get(pattern.short(name))
    return get(name).options() if given is None else given
