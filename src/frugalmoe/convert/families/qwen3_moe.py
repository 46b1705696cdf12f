"""Qwen3-MoE (2505.09388): softmax over all experts, queries and keys normalised by head."""

from frugalmoe.convert.contract import Family, Key
from frugalmoe.convert.dense import dense_ours, dense_theirs
from frugalmoe.convert.parts import BIASES, BLOCKS, DENSE, FIXED, HEAD_DIM, KEYS, ROUTER, TIED, experts
from frugalmoe.convert.window import WINDOW

FAMILY = Family(
    about="Alibaba: Qwen3 30B-A3B, 235B-A22B",
    architecture="Qwen3MoeForCausalLM",
    keys=(
        *KEYS,
        HEAD_DIM,
        *BIASES,
        Key("moe_intermediate_size", "moe.expert_dim"),
        Key("num_experts", "moe.num_experts", also=("num_local_experts",)),
        Key("num_experts_per_tok", "moe.num_experts_per_token"),
        Key("norm_topk_prob", "moe.options.renormalize", False),
    ),
    settings={"qk_norm": "head", "moe.router": "topk_softmax"},
    fixed=FIXED,
    inert={"max_window_layers": "read by no code of this family"},
    more_ours=lambda keys: {**_window_ours(keys), **dense_ours(keys)},
    more_theirs=lambda model: {**_window_theirs(model), **dense_theirs(model)},
    rows=(*BLOCKS, *DENSE, *ROUTER, *experts("mlp")),
    same=TIED,
)


def _window_ours(keys):
    """A window is that of all layers, and counts with `use_sliding_window` only."""
    window = keys.get("sliding_window", 0)
    if not (keys.flag("use_sliding_window") and window):
        return {"attention": "grouped"}
    return {"attention": "window", WINDOW: window}


def _window_theirs(model):
    options = model.attention_options.get("window")
    return {"use_sliding_window": options is not None, "sliding_window": options and options.window}
