"""Llama (2407.21783), dense: every layer has a feed-forward of its own."""

from frugalmoe.convert.contract import Family, Key
from frugalmoe.convert.parts import BIASES, BLOCKS, DENSE, FIXED, HEAD_DIM, KEYS, TIED

FAMILY = Family(
    about="Meta: Llama 2, 3",
    architecture="LlamaForCausalLM",
    keys=(*KEYS, HEAD_DIM, *BIASES, Key("intermediate_size", "dense_dim")),
    fixed={**FIXED, "mlp_bias": (False,)},
    inert={"pretraining_tp": "how it was trained"},
    more_ours=lambda keys: {"num_dense_layers": keys.layers()},
    rows=(*BLOCKS, *DENSE),
    same=TIED,
)
