"""Ling 2.0 (2510.22115): grouped attention whose projections are one tensor, half of each head rotated, routed as
DeepSeek-V3. GLM-4-MoE is the same model under other names.

Names and meanings as in its published code, github.com/inclusionAI/Ling-V2, models/modeling_bailing_moe_v2.py.
"""

from frugalmoe.convert.bailing import BLOCKS, FIXED, INERT, KEYS
from frugalmoe.convert.contract import Family, Key
from frugalmoe.convert.parts import DENSE, LAYER, ROUTER, Row, experts, swiglu

_MODULE = "model.layers.{mtp}."


def _ours(keys):
    """Its layers include the modules of multi-token prediction. Shared experts have the width of a routed one each."""
    keys.fix("moe_shared_expert_intermediate_size", (keys.integer("moe_intermediate_size"),))
    layers, modules = keys.layers(), keys.integer("num_nextn_predict_layers", 0)
    return {"qk_norm": "head" if keys.flag("use_qk_norm") else "none", "num_layers": layers - modules}


def _theirs(model):
    layers = model.num_layers + model.multi_token_prediction.depth
    return {"use_qk_norm": model.qk_norm == "head", "num_hidden_layers": layers}


FAMILY = Family(
    about="inclusionAI: Ling 2.0 mini, flash, 1T; Ring 2.0",
    architecture="BailingMoeV2ForCausalLM",
    keys=(
        *KEYS,
        Key("n_group", "moe.options.num_groups", 1),
        Key("topk_group", "moe.options.groups_per_token", 1),
        Key("routed_scaling_factor", "moe.options.scale", 1.0),
    ),
    settings={"rope_theta": 600_000.0, "rope_fraction": 1.0, "moe.router": "sigmoid_bias"},
    fixed={
        **FIXED,
        "norm_topk_prob": (True,),
        "score_function": ("sigmoid",),
        "moe_router_enable_expert_bias": (True,),
    },
    inert={
        **INERT,
        "router_dtype": "ours is float32",
        "mtp_loss_scaling_factor": "a coefficient of training",
    },
    more_ours=_ours,
    more_theirs=_theirs,
    rows=(
        *BLOCKS,
        *DENSE,
        *ROUTER,
        Row(LAYER + "mlp.gate.expert_bias", "moe/router_state/bias_E"),
        *experts("mlp"),
        *swiglu("mlp.shared_experts", "moe/shared"),
        Row(_MODULE + "enorm.weight", "embedding_norm/scale"),
        Row(_MODULE + "hnorm.weight", "hidden_norm/scale"),
        Row(_MODULE + "eh_proj.weight", "project_ID"),
        Row(_MODULE + "final_layernorm.weight", "norm/scale"),
    ),
)
