"""Qwen2-MoE (2407.10671): biases on queries, keys and values, and shared experts behind a gate."""

from frugalmoe.convert import window
from frugalmoe.convert.contract import Family, Form, Key
from frugalmoe.convert.dense import dense_ours, dense_theirs
from frugalmoe.convert.parts import BLOCKS, DENSE, FIXED, HEAD_DIM, KEYS, LAYER, ROUTER, TIED, Row, experts, swiglu

GATE = Form(lambda tensor, model: (tensor[0],), lambda pieces, model: pieces[0][None])  # [1, D]


def _ours(keys):
    shared, width = keys.integer("shared_expert_intermediate_size"), keys.integer("moe_intermediate_size")
    if not width or shared % width or not shared:
        rule = f"must be a multiple of moe_intermediate_size={width}"
        raise keys.refused("shared_expert_intermediate_size", shared, rule)
    first = keys.integer("max_window_layers", 28)
    types = ["full_attention" if layer % 2 or layer >= first else "sliding_attention" for layer in range(keys.layers())]
    of_layers = {**dense_ours(keys), **window.by_layer_ours(keys, types, keys.flag(window.USED))}
    return {"moe.num_shared_experts": shared // width, **of_layers}


def _theirs(model):
    shared = {"shared_expert_intermediate_size": model.moe.num_shared_experts * model.moe.expert_dim}
    return shared | dense_theirs(model) | window.by_layer_theirs(model)


FAMILY = Family(
    about="Alibaba: Qwen1.5-MoE A2.7B, Qwen2 57B-A14B",
    architecture="Qwen2MoeForCausalLM",
    keys=(
        *KEYS,
        HEAD_DIM,
        Key("qkv_bias", "qkv_bias", True),
        Key("moe_intermediate_size", "moe.expert_dim"),
        Key("num_experts", "moe.num_experts", also=("num_local_experts",)),
        Key("num_experts_per_tok", "moe.num_experts_per_token"),
        Key("norm_topk_prob", "moe.options.renormalize", False),
    ),
    settings={"moe.router": "topk_softmax", "moe.shared_gate": True},
    fixed=FIXED,
    more_ours=_ours,
    more_theirs=_theirs,
    rows=(
        *BLOCKS,
        *DENSE,
        *ROUTER,
        *experts("mlp"),
        *swiglu("mlp.shared_expert", "moe/shared"),
        Row(LAYER + "mlp.shared_expert_gate.weight", "moe/shared_gate_D", GATE),
    ),
    same=TIED,
)
