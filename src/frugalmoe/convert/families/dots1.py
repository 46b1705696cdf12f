"""dots.llm1 (2506.05767): queries and keys normalised by head, routed as DeepSeek-V3."""

from frugalmoe.convert import window
from frugalmoe.convert.contract import Family, Key
from frugalmoe.convert.parts import BLOCKS, DENSE, FIXED, HEAD_DIM, KEYS, LAYER, ROUTER, TIED, Row, experts, swiglu


def _ours(keys):
    layers = keys.layers()
    first = keys.integer("max_window_layers", layers)
    return window.by_layer_ours(keys, ["sliding_attention" if i >= first else "full_attention" for i in range(layers)])


FAMILY = Family(
    about="Xiaohongshu: dots.llm1",
    architecture="Dots1ForCausalLM",
    keys=(
        *KEYS,
        HEAD_DIM,
        Key("intermediate_size", "dense_dim"),
        Key("first_k_dense_replace", "num_dense_layers", 0),
        Key("moe_intermediate_size", "moe.expert_dim"),
        Key("n_routed_experts", "moe.num_experts", also=("num_local_experts",)),
        Key("n_shared_experts", "moe.num_shared_experts", 0),
        Key("num_experts_per_tok", "moe.num_experts_per_token"),
        Key("n_group", "moe.options.num_groups", 1),
        Key("topk_group", "moe.options.groups_per_token", 1),
        Key("routed_scaling_factor", "moe.options.scale", 1.0),
        Key("norm_topk_prob", "moe.options.renormalize", False),
    ),
    settings={"qk_norm": "head", "moe.router": "sigmoid_bias"},
    fixed={
        **FIXED,
        "attention_bias": (False,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "moe_layer_freq": (1,),
    },
    more_ours=_ours,
    more_theirs=lambda model: {k: v for k, v in window.by_layer_theirs(model).items() if k != window.USED},
    rows=(
        *BLOCKS,
        *DENSE,
        *ROUTER,
        Row(LAYER + "mlp.gate.e_score_correction_bias", "moe/router_state/bias_E"),
        *experts("mlp"),
        *swiglu("mlp.shared_experts", "moe/shared"),
    ),
    same=TIED,
)
