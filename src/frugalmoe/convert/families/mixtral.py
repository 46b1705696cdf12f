"""Mixtral (2401.04088): softmax over the chosen experts; a sliding window in some versions."""

from frugalmoe.convert.contract import Family, Key
from frugalmoe.convert.parts import BLOCKS, FIXED, HEAD_DIM, KEYS, LAYER, TIED, Row, experts
from frugalmoe.convert.window import all_layers_ours, all_layers_theirs

FAMILY = Family(
    about="Mistral AI: Mixtral 8x7B, 8x22B",
    architecture="MixtralForCausalLM",
    keys=(
        *KEYS,
        HEAD_DIM,
        Key("intermediate_size", "moe.expert_dim"),
        Key("num_local_experts", "moe.num_experts", also=("num_experts",)),
        Key("num_experts_per_tok", "moe.num_experts_per_token"),
    ),
    settings={"rope_theta": 1e6, "moe.router": "topk_softmax", "moe.options.softmax": "after"},
    fixed=FIXED,
    inert={"router_jitter_noise": "noise of training alone"},
    more_ours=all_layers_ours,
    more_theirs=all_layers_theirs,
    rows=(
        *BLOCKS,
        Row(LAYER + "block_sparse_moe.gate.weight", "moe/router/kernel_DE"),
        *experts("block_sparse_moe", ("w1", "w3", "w2")),
    ),
    same=TIED,
)
