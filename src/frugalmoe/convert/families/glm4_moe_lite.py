"""GLM-4.7-Flash (Zhipu AI, 2026): attention and routing of DeepSeek-V3."""

import dataclasses

from frugalmoe.convert.contract import Family
from frugalmoe.convert.families import deepseek_v3
from frugalmoe.convert.keys import Keys
from frugalmoe.schema import Model

_DENSE = "first_k_dense_replace"  # read where there is no `mlp_layer_types`


def _types(dense: int, layers: int) -> list[str]:
    return ["dense"] * dense + ["sparse"] * (layers - dense)


def _ours(keys: Keys) -> dict:
    """Dense layers are the first ones."""
    layers = keys.layers()
    types = keys.get("mlp_layer_types", _types(min(keys.integer(_DENSE, 1), layers), layers))
    dense = types.count("dense") if isinstance(types, list) else 0
    if types != _types(dense, layers):
        rule = f"is not implemented but as dense for the first and sparse for the rest of the {layers} layers"
        raise keys.refused("mlp_layer_types", types, rule)
    return deepseek_v3.FAMILY.more_ours(keys) | {"num_dense_layers": dense}


def _theirs(model: Model) -> dict:
    return deepseek_v3.FAMILY.more_theirs(model) | {"mlp_layer_types": _types(model.num_dense_layers, model.num_layers)}


FAMILY: Family = dataclasses.replace(
    deepseek_v3.FAMILY,
    about="Zhipu AI: GLM-4.7-Flash",
    architecture="Glm4MoeLiteForCausalLM",
    keys=tuple(key for key in deepseek_v3.FAMILY.keys if key.theirs != _DENSE),
    more_ours=_ours,
    more_theirs=_theirs,
)
