"""Hunyuan-A13B (Tencent, 2025): softmax over all experts and one shared, queries and keys normalised after rotation."""

from frugalmoe.convert import rope
from frugalmoe.convert.contract import Family, Key
from frugalmoe.convert.parts import (
    ATTENTION,
    BIASES,
    ENDS,
    FIXED,
    HEAD_DIM,
    KEYS,
    LAYER,
    NORMS,
    TIED,
    Row,
    experts,
    swiglu,
)

_OF_LAYERS = {"num_experts": ("num_local_experts",), "moe_topk": ("num_experts_per_tok",)}


def _ours(keys):
    """A list has a number for each layer; these must be the same."""
    found, layers = {}, keys.layers()
    for name, also in _OF_LAYERS.items():
        value = keys.get(name, 1, also)
        each = value if isinstance(value, list) else [value] * layers
        if len(each) != layers or any(one != each[0] for one in each):
            raise keys.refused(name, value, f"is not implemented but as one number for all {layers} layers")
        found[name] = each[0] if each else 0
    return {"moe.num_experts": found["num_experts"], "moe.num_experts_per_token": found["moe_topk"]}


FAMILY = Family(
    about="Tencent: Hunyuan-A13B",
    architecture="HunYuanMoEV1ForCausalLM",
    keys=(*KEYS, HEAD_DIM, *BIASES, Key("intermediate_size", "moe.expert_dim")),
    settings={
        "qk_norm": "rotated",
        "moe.router": "topk_softmax",
        "moe.num_shared_experts": 1,
        "rope_kinds": (*rope.KINDS, "dynamic"),
    },
    fixed=FIXED,
    inert={"eod_token_id": "of texts", "pretraining_tp": "how it was trained"},
    more_ours=_ours,
    more_theirs=lambda model: {"num_experts": model.moe.num_experts, "moe_topk": model.moe.num_experts_per_token},
    rows=(
        *ENDS,
        *NORMS,
        *(row for row in ATTENTION if "norm" not in row.theirs),
        Row(LAYER + "self_attn.query_layernorm.weight", "attention/query_norm/scale"),
        Row(LAYER + "self_attn.key_layernorm.weight", "attention/key_norm/scale"),
        Row(LAYER + "mlp.gate.wg.weight", "moe/router/kernel_DE"),
        *experts("mlp"),
        *swiglu("mlp.shared_mlp", "moe/shared"),
    ),
    same=TIED,
)
