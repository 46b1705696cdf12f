"""Granite-MoE with shared experts, where all its multipliers are 1. Ling 1 is the same model, but for NormHead."""

from frugalmoe.convert.contract import Family, Key
from frugalmoe.convert.parts import BLOCKS, FIXED, HEAD_DIM, KEYS, LAYER, TIED, Row


def _ours(keys):
    """Shared experts in units of a routed one, and scores that are scaled by the root of the head's channels."""
    shared, width = keys.integer("shared_intermediate_size", 0), keys.integer("intermediate_size")
    if not width or shared % width:
        raise keys.refused("shared_intermediate_size", shared, f"must be a multiple of intermediate_size={width}")
    keys.fix("attention_multiplier", (HEAD_DIM.default(keys) ** -0.5,))
    return {"moe.num_shared_experts": shared // width}


FAMILY = Family(
    about="IBM: Granite MoE with shared experts",
    architecture="GraniteMoeSharedForCausalLM",
    keys=(
        *KEYS,
        HEAD_DIM,
        Key("intermediate_size", "moe.expert_dim"),
        Key("num_local_experts", "moe.num_experts", also=("num_experts",)),
        Key("num_experts_per_tok", "moe.num_experts_per_token"),
    ),
    settings={"moe.router": "topk_softmax"},
    fixed={
        **FIXED,
        "attention_bias": (False,),
        "embedding_multiplier": (1.0,),
        "logits_scaling": (1.0,),
        "residual_multiplier": (1.0,),
    },
    more_ours=_ours,
    more_theirs=lambda model: {
        "shared_intermediate_size": model.moe.num_shared_experts * model.moe.expert_dim,
        "attention_multiplier": model.head_dim**-0.5,
    },
    rows=(
        *BLOCKS,
        Row(LAYER + "block_sparse_moe.router.layer.weight", "moe/router/kernel_DE"),
        Row(LAYER + "block_sparse_moe.input_linear.weight", "moe/gate_up_ED2F"),
        Row(LAYER + "block_sparse_moe.output_linear.weight", "moe/down_EFD"),
        Row(LAYER + "shared_mlp.input_linear.weight", "moe/shared/gate_up_D2F"),
        Row(LAYER + "shared_mlp.output_linear.weight", "moe/shared/down_FD"),
    ),
    same=TIED,
)
