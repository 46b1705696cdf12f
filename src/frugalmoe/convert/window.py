"""Sliding windows in config.json: on all layers, or on those that `layer_types` names."""

from collections.abc import Mapping
from typing import Any

from frugalmoe.convert.keys import Keys
from frugalmoe.model import pattern
from frugalmoe.schema import Model

_KINDS = {"full_attention": "grouped", "sliding_attention": "window"}
_FULL = "full_attention"
USED = "use_sliding_window"  # a key of the Qwen families
WINDOW = "attention_options.window.window"


def all_layers_ours(keys: Keys) -> dict[str, Any]:
    """Fields of our `model`: a `sliding_window`, where there is one, is that of every layer."""
    if not (window := keys.get("sliding_window", 0)):
        return {"attention": "grouped"}
    return {"attention": "window", WINDOW: window}


def all_layers_theirs(model: Model) -> dict[str, Any]:
    """The way back."""
    return {"sliding_window": _window(model)}


def by_layer_ours(keys: Keys, layers: list[str], used: bool = True) -> dict[str, Any]:
    """Fields of our `model` from what `layer_types` says of each layer, `layers` where it is absent.

    Where the window is not `used`, or there is none, no layer has one, whatever `layer_types` says.
    """
    window, types = keys.get("sliding_window", 0), keys.get("layer_types", layers)
    if not (used and window):
        types = [_FULL] * len(layers)
    if not isinstance(types, list) or len(types) != len(layers):
        raise keys.refused("layer_types", types, f"must name a kind for each of the {len(layers)} layers")
    if unknown := [name for name in types if name not in tuple(_KINDS)]:
        raise keys.refused("layer_types", unknown[0], f"is not implemented; valid: {', '.join(_KINDS)}")
    kinds = [_KINDS[name] for name in types]
    attention = kinds[:1] if len(set(kinds)) == 1 else kinds
    return {"attention": ",".join(attention)} | ({WINDOW: window} if "window" in kinds else {})


def by_layer_theirs(model: Model) -> dict[str, Any]:
    """The way back."""
    names = {own: name for name, own in _KINDS.items()}
    types = [names.get(kind.attention, kind.attention) for kind in pattern.layers(model)]
    window = _window(model)
    return {USED: window is not None, "sliding_window": window, "layer_types": types}


def _window(model: Model) -> int | None:
    options: Mapping[str, Any] = model.attention_options
    return options["window"].window if "window" in options else None
