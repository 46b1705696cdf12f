"""OLMoE (2409.02060): softmax over all experts, queries and keys normalised over all heads."""

from frugalmoe.convert.contract import Family, Key
from frugalmoe.convert.parts import BIASES, BLOCKS, FIXED, HEAD_DIM, KEYS, ROUTER, TIED, experts

FAMILY = Family(
    about="Ai2: OLMoE 1B-7B",
    architecture="OlmoeForCausalLM",
    keys=(
        *KEYS,
        HEAD_DIM,
        *BIASES,
        Key("intermediate_size", "moe.expert_dim"),
        Key("num_experts", "moe.num_experts", also=("num_local_experts",)),
        Key("num_experts_per_tok", "moe.num_experts_per_token"),
        Key("norm_topk_prob", "moe.options.renormalize", False),
        Key("clip_qkv", "clip_qkv", 0.0),
    ),
    settings={"qk_norm": "full", "moe.router": "topk_softmax"},
    fixed=FIXED,
    more_theirs=lambda model: {"clip_qkv": model.clip_qkv or None},
    rows=(*BLOCKS, *ROUTER, *experts("mlp")),
    same=TIED,
)
