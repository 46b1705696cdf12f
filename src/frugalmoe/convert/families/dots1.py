"""dots.llm1 (2506.05767): queries and keys normalized by head, routed as DeepSeek-V3."""

from frugalmoe.convert import window
from frugalmoe.convert.contract import Family, Key
from frugalmoe.convert.parts import BIASES, BLOCKS, DEEPSEEK, DEEPSEEK_FFN, FIXED, HEAD_DIM, KEYS, TIED


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
        *BIASES,
        *DEEPSEEK,
        Key("first_k_dense_replace", "num_dense_layers", 0),
        Key("norm_topk_prob", "moe.options.renormalize", False),
    ),
    settings={"qk_norm": "head", "moe.router": "sigmoid_bias"},
    fixed={
        **FIXED,
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "moe_layer_freq": (1,),
    },
    more_ours=_ours,
    more_theirs=lambda model: {k: v for k, v in window.by_layer_theirs(model).items() if k != window.USED},
    rows=(*BLOCKS, *DEEPSEEK_FFN),
    same=TIED,
)
