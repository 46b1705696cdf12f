"""ERNIE 4.5 (Baidu, technical report 2025): softmax over all experts, a balance bias for the choice. It rotates channel
2 i with 2 i + 1, ours i with i + d / 2: queries and keys have their channels in another order.

Letters: E experts, d channels of a head.
"""

from frugalmoe.convert.contract import Family, Form, Key
from frugalmoe.convert.pairs import HEADS
from frugalmoe.convert.parts import (
    DENSE,
    ENDS,
    FIXED,
    HEAD_DIM,
    KEYS,
    LAYER,
    NORMS,
    ROUTER,
    TIED,
    WIDTHS,
    Row,
    experts,
    swiglu,
)

BIAS = Form(lambda tensor, model: (tensor[0],), lambda pieces, model: pieces[0][None])  # [1, E]


def _ours(keys):
    """Dense layers are the first ones."""
    layers = keys.layers()
    keys.fix("moe_layer_end_index", (-1, layers - 1))
    return {}


FAMILY = Family(
    about="Baidu: ERNIE 4.5 21B-A3B, 300B-A47B, of text",
    architecture="Ernie4_5_MoeForCausalLM",
    keys=(
        *(key._replace(default=True) if key.theirs == "tie_word_embeddings" else key for key in KEYS),
        HEAD_DIM,
        *WIDTHS,
        Key("moe_layer_start_index", "num_dense_layers", 1),
        Key("moe_num_experts", "moe.num_experts"),
        Key("moe_num_shared_experts", "moe.num_shared_experts", 2),
        Key("moe_k", "moe.num_experts_per_token", 6),
    ),
    settings={"rope_theta": 500_000.0, "moe.router": "sigmoid_bias", "moe.options.score": "softmax"},
    fixed={**FIXED, "use_bias": (False,), "moe_layer_interval": (1,), "moe_norm_min": (1e-12,)},
    more_ours=_ours,
    rows=(
        *ENDS,
        *NORMS,
        Row(LAYER + "self_attn.q_proj.weight", "attention/query_DHd", HEADS),
        Row(LAYER + "self_attn.k_proj.weight", "attention/key_Dhd", HEADS),
        Row(LAYER + "self_attn.v_proj.weight", "attention/value_Dhd"),
        Row(LAYER + "self_attn.o_proj.weight", "attention/out_HdD"),
        *DENSE,
        *ROUTER,
        Row(LAYER + "mlp.moe_statics.e_score_correction_bias", "moe/router_state/bias_E", BIAS),
        *experts("mlp"),
        *swiglu("mlp.shared_experts", "moe/shared"),
    ),
    same=TIED,
)
