"""What Ling 1 and 2.0 share: names of their own, and one tensor for queries, keys and values.

Letters: H query heads, h key-value heads, d channels of a head.
"""

import numpy as np

from frugalmoe.convert import parts
from frugalmoe.convert.contract import Form, Key, Row
from frugalmoe.convert.parts import HEAD_DIM, LAYER, NORMS
from frugalmoe.schema import Model


def _split(tensor: np.ndarray, model: Model) -> tuple[np.ndarray, ...]:
    """Rows of all query heads, then of key heads, then of value heads."""
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return tuple(np.split(tensor, [queries, queries + keys]))


TOGETHER = Form(_split, lambda pieces, model: np.concatenate(pieces))

BLOCKS = (
    Row("model.word_embeddings.weight", "embed_VD"),
    Row("model.norm.weight", "final_norm/scale"),
    Row("lm_head.weight", "head_DV"),
    *NORMS,
    Row(
        LAYER + "attention.query_key_value.weight",
        ("attention/query_DHd", "attention/key_Dhd", "attention/value_Dhd"),
        TOGETHER,
    ),
    Row(
        LAYER + "attention.query_key_value.bias",
        ("attention/query_bias_Hd", "attention/key_bias_hd", "attention/value_bias_hd"),
        TOGETHER,
    ),
    Row(LAYER + "attention.dense.weight", "attention/out_HdD"),
    Row(LAYER + "attention.query_layernorm.weight", "attention/query_norm/scale"),
    Row(LAYER + "attention.key_layernorm.weight", "attention/key_norm/scale"),
)
KEYS = (
    *parts.KEYS,
    HEAD_DIM,
    Key("use_qkv_bias", "qkv_bias", False),
    Key("intermediate_size", "dense_dim", 0),
    Key("first_k_dense_replace", "num_dense_layers", 0),
    Key("moe_intermediate_size", "moe.expert_dim"),
    Key("num_experts", "moe.num_experts"),
    Key("num_shared_experts", "moe.num_shared_experts", 0),
    Key("num_experts_per_tok", "moe.num_experts_per_token"),
)
FIXED = {
    **parts.FIXED,
    "use_bias": (False,),
    "use_rmsnorm": (True,),
}
INERT = {"embedding_dropout": "in training alone", "output_dropout": "in training alone"}
