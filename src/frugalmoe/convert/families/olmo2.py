"""OLMo 2 (2501.00656), dense: what attention and feed-forward add is normalized, queries and keys over all heads."""

from frugalmoe.convert.contract import Family, Key
from frugalmoe.convert.parts import ATTENTION, BIASES, DENSE, ENDS, FIXED, HEAD_DIM, KEYS, NORMS_AFTER, TIED

FAMILY = Family(
    about="Ai2: OLMo 2 1B to 32B",
    architecture="Olmo2ForCausalLM",
    keys=(*KEYS, HEAD_DIM, *BIASES, Key("intermediate_size", "dense_dim")),
    settings={"qk_norm": "full", "norm_position": "after"},
    fixed=FIXED,
    more_ours=lambda keys: {"num_dense_layers": keys.layers()},
    rows=(*ENDS, *NORMS_AFTER, *ATTENTION, *DENSE),
    same=TIED,
)
