"""Qwen3 (2505.09388), dense: queries and keys normalized by head, a window in later layers of some versions."""

from frugalmoe.convert import window
from frugalmoe.convert.contract import Family, Key
from frugalmoe.convert.parts import BIASES, BLOCKS, DENSE, FIXED, HEAD_DIM, KEYS, TIED


def _ours(keys):
    layers, first = keys.layers(), keys.integer("max_window_layers", 28)
    types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    return {"num_dense_layers": layers, **window.by_layer_ours(keys, types, keys.flag(window.USED))}


FAMILY = Family(
    about="Alibaba: Qwen3 0.6B to 32B",
    architecture="Qwen3ForCausalLM",
    keys=(*KEYS, HEAD_DIM, *BIASES, Key("intermediate_size", "dense_dim")),
    settings={"qk_norm": "head"},
    fixed=FIXED,
    more_ours=_ours,
    more_theirs=window.by_layer_theirs,
    rows=(*BLOCKS, *DENSE),
    same=TIED,
)
