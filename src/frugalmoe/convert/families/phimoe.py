"""Phi-3.5-MoE (2404.14219; routed as GRIN, 2409.12136): SparseMixer, LayerNorm with biases, a bias on logits.

Released models stretch their angles by `longrope`: factors and size of the angles of all tokens, earlier ones too,
follow from the length of the longest text of a batch. No kind of attention here does that, and it is refused.
"""

from frugalmoe.convert.contract import Family, Key
from frugalmoe.convert.parts import BIASES, BLOCKS, FIXED, HEAD_DIM, KEYS, LAYER, TIED, Row, experts
from frugalmoe.convert.window import all_layers_ours, all_layers_theirs

FAMILY = Family(
    about="Microsoft: Phi-3.5-MoE, but for rope_type='longrope'",
    architecture="PhimoeForCausalLM",
    keys=(
        *KEYS,
        HEAD_DIM,
        *BIASES,
        Key("lm_head_bias", "head_bias", False),
        Key("intermediate_size", "moe.expert_dim"),
        Key("num_local_experts", "moe.num_experts", also=("num_experts",)),
        Key("router_jitter_noise", "moe.options.epsilon", 0.01),
    ),
    settings={
        "norm": "layer",
        "rope_theta": 1e6,
        "rope_kinds": ("default",),
        "moe.router": "sparsemixer",
        "moe.num_experts_per_token": 2,
    },
    fixed={**FIXED, "num_experts_per_tok": (2,)},  # no other number is read
    inert={"input_jitter_noise": "noise of training alone"},
    more_ours=all_layers_ours,
    more_theirs=all_layers_theirs,
    rows=(
        *BLOCKS,
        Row("model.norm.bias", "final_norm/bias"),
        Row("lm_head.bias", "head_bias_V"),
        Row(LAYER + "input_layernorm.bias", "attention_norm/bias"),
        Row(LAYER + "post_attention_layernorm.bias", "ffn_norm/bias"),
        Row(LAYER + "block_sparse_moe.gate.weight", "moe/router/kernel_DE"),
        *experts("block_sparse_moe", ("w1", "w3", "w2")),
    ),
    same=TIED,
)
