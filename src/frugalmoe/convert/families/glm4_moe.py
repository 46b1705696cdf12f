"""GLM-4.5 (2508.06471): grouped attention, half of each head rotated, routed as DeepSeek-V3. Ling 2.0 is the same model
under other names.
"""

from frugalmoe.convert.contract import Family, Key
from frugalmoe.convert.further import COPIES, FURTHER
from frugalmoe.convert.parts import BLOCKS, DENSE, FIXED, HEAD_DIM, KEYS, LAYER, ROUTER, TIED, Row, experts, swiglu

FAMILY = Family(
    about="Zhipu AI: GLM-4.5, 4.6",
    architecture="Glm4MoeForCausalLM",
    keys=(
        *KEYS,
        HEAD_DIM,
        Key("attention_bias", "qkv_bias", False),
        Key("intermediate_size", "dense_dim"),
        Key("first_k_dense_replace", "num_dense_layers", 1),
        Key("moe_intermediate_size", "moe.expert_dim"),
        Key("n_routed_experts", "moe.num_experts", also=("num_local_experts",)),
        Key("n_shared_experts", "moe.num_shared_experts", 0),
        Key("num_experts_per_tok", "moe.num_experts_per_token"),
        Key("n_group", "moe.options.num_groups", 1),
        Key("topk_group", "moe.options.groups_per_token", 1),
        Key("routed_scaling_factor", "moe.options.scale", 1.0),
        Key("norm_topk_prob", "moe.options.renormalize", True),
    ),
    settings={"rope_fraction": 0.5, "moe.router": "sigmoid_bias"},
    fixed=FIXED,
    inert={
        "num_nextn_predict_layers": "the files say it themselves",
        "num_mtp_layers": "the same, by another name",
    },
    more_ours=lambda keys: {"qk_norm": "head" if keys.flag("use_qk_norm") else "none"},
    more_theirs=lambda model: {"use_qk_norm": model.qk_norm == "head"},
    rows=(
        *BLOCKS,
        *DENSE,
        *ROUTER,
        Row(LAYER + "mlp.gate.e_score_correction_bias", "moe/router_state/bias_E"),
        *experts("mlp"),
        *swiglu("mlp.shared_experts", "moe/shared"),
        *FURTHER,
    ),
    same={**TIED, **COPIES},
)
