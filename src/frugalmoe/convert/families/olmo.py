"""OLMo 1 (2402.00838), dense: LayerNorm without scale and bias, queries, keys and values clipped in some versions."""

from frugalmoe.convert.contract import Family, Key
from frugalmoe.convert.parts import BIASES, BLOCKS, DENSE, FIXED, HEAD_DIM, KEYS, TIED

FAMILY = Family(
    about="Ai2: OLMo 1B, 7B",
    architecture="OlmoForCausalLM",
    keys=(
        *(key for key in KEYS if key.theirs != "rms_norm_eps"),
        HEAD_DIM,
        *BIASES,
        Key("clip_qkv", "clip_qkv", 0.0),
        Key("intermediate_size", "dense_dim"),
    ),
    settings={"norm": "layer_bare", "norm_eps": 1e-5},
    fixed=FIXED,
    more_ours=lambda keys: {"num_dense_layers": keys.layers()},
    more_theirs=lambda model: {"clip_qkv": model.clip_qkv or None},
    rows=(*BLOCKS, *DENSE),
    same=TIED,
)
