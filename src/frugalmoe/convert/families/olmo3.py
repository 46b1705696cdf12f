"""OLMo 3 (Ai2, 2025), dense: OLMo 2 with a window in three of four layers, whose angles are not stretched."""

import dataclasses

from frugalmoe.convert import rope, window
from frugalmoe.convert.contract import Family
from frugalmoe.convert.families import olmo2
from frugalmoe.convert.keys import Keys
from frugalmoe.schema import Model


def _ours(keys: Keys) -> dict:
    layers = keys.layers()
    types = ["full_attention" if layer % 4 == 3 else "sliding_attention" for layer in range(layers)]
    found = window.by_layer_ours(keys, types)
    stretched = {"attention_options.window.rope_scaling": False} if window.WINDOW in found else {}
    return {"num_dense_layers": layers, **found, **stretched}


def _theirs(model: Model) -> dict:
    """`transformers` asks for a width, also where no layer has a window."""
    found = window.by_layer_theirs(model)
    width = found["sliding_window"] or 4096
    return {"sliding_window": width, "layer_types": found["layer_types"], **rope.to_theirs_by_kind(model)}


FAMILY: Family = dataclasses.replace(
    olmo2.FAMILY,
    about="Ai2: OLMo 3 7B, 32B",
    architecture="Olmo3ForCausalLM",
    settings={**olmo2.FAMILY.settings, "rope_theta": 500_000.0, "rope_by_kind": True},
    more_ours=_ours,
    more_theirs=_theirs,
)
