"""Granite-MoE with shared experts. Ling 1 is the same model, but for NormHead and the multipliers."""

import dataclasses

from frugalmoe.convert.contract import Family
from frugalmoe.convert.families import granitemoe
from frugalmoe.convert.keys import Keys
from frugalmoe.convert.parts import LAYER, Row
from frugalmoe.schema import Model


def _ours(keys: Keys) -> dict:
    """Shared experts are counted in units of a routed one."""
    shared, width = keys.integer("shared_intermediate_size", 0), keys.integer("intermediate_size")
    if not width or shared % width:
        raise keys.refused("shared_intermediate_size", shared, f"must be a multiple of intermediate_size={width}")
    return granitemoe.FAMILY.more_ours(keys) | {"moe.num_shared_experts": shared // width}


def _theirs(model: Model) -> dict:
    shared = {"shared_intermediate_size": model.moe.num_shared_experts * model.moe.expert_dim}
    return granitemoe.FAMILY.more_theirs(model) | shared


FAMILY: Family = dataclasses.replace(
    granitemoe.FAMILY,
    about="IBM: Granite MoE with shared experts",
    architecture="GraniteMoeSharedForCausalLM",
    more_ours=_ours,
    more_theirs=_theirs,
    rows=(
        *granitemoe.FAMILY.rows,
        Row(LAYER + "shared_mlp.input_linear.weight", "moe/shared/gate_up_D2F"),
        Row(LAYER + "shared_mlp.output_linear.weight", "moe/shared/down_FD"),
    ),
)
