"""Granite-MoE: softmax over the chosen experts, and four multipliers (as in Granite 3.0's released code)."""

from frugalmoe.convert.contract import Family, Key
from frugalmoe.convert.parts import BIASES, BLOCKS, FIXED, HEAD_DIM, KEYS, LAYER, TIED, Row


def _ours(keys):
    """The factor on scores; where it is that of every model, it is left to the width of a head."""
    scores = keys.get("attention_multiplier", 1.0)
    return {"multipliers.scores": 0.0 if scores == HEAD_DIM.default(keys) ** -0.5 else scores}


FAMILY = Family(
    about="IBM: Granite 3.0 and 3.1 MoE, 1B-A400M, 3B-A800M",
    architecture="GraniteMoeForCausalLM",
    keys=(
        *KEYS,
        HEAD_DIM,
        *BIASES,
        Key("intermediate_size", "moe.expert_dim"),
        Key("num_local_experts", "moe.num_experts", also=("num_experts",)),
        Key("num_experts_per_tok", "moe.num_experts_per_token"),
        Key("embedding_multiplier", "multipliers.embedding", 1.0),
        Key("residual_multiplier", "multipliers.residual", 1.0),
        Key("logits_scaling", "multipliers.logits", 1.0),
    ),
    settings={"moe.router": "topk_softmax"},
    fixed=FIXED,
    more_ours=_ours,
    more_theirs=lambda model: {"attention_multiplier": model.multipliers.scores or model.head_dim**-0.5},
    rows=(
        *BLOCKS,
        Row(LAYER + "block_sparse_moe.router.layer.weight", "moe/router/kernel_DE"),
        Row(LAYER + "block_sparse_moe.input_linear.weight", "moe/gate_up_ED2F"),
        Row(LAYER + "block_sparse_moe.output_linear.weight", "moe/down_EFD"),
    ),
    same=TIED,
)
