"""Kinds of attention, one file each. A new file in this folder is a new kind; nothing else is edited.

Only a kind that a config names is imported: a file that somebody is still writing stops nobody else.
"""

from typing import Any

from frugalmoe.found import Kind
from frugalmoe.model import pattern
from frugalmoe.model.attention.contract import Attention
from frugalmoe.schema import Model

_KIND = Kind(__name__, "ATTENTION", Attention, "model.attention", "kind of attention")
names, get = _KIND.names, _KIND.get


def options_of(config: Model, name: str) -> Any:
    """The options of a kind: those that the config names, else the kind's defaults."""
    given = config.attention_options.get(pattern.short(name))
    return get(name).options() if given is None else given
