"""Which layers are dense, as the Qwen families say it: ours are the first ones."""

from typing import Any

from frugalmoe.convert.keys import Keys
from frugalmoe.schema import Model


def first_dense_ours(keys: Keys) -> dict[str, Any]:
    """Fields of our `model` from `mlp_only_layers`, which must be the first ones, and `decoder_sparse_step` 1."""
    dense, layers = keys.get("mlp_only_layers", []), keys.layers()
    keys.fix("decoder_sparse_step", (1,))
    if dense != list(range(len(dense) if isinstance(dense, list) else 0)) or len(dense) > layers:
        raise keys.refused("mlp_only_layers", dense, "is not implemented but for the first layers: [], [0], [0, 1] ...")
    return {"num_dense_layers": len(dense), "dense_dim": keys.integer("intermediate_size", 0)}


def first_dense_theirs(model: Model) -> dict[str, Any]:
    """The way back."""
    dense = list(range(model.num_dense_layers))
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1, "intermediate_size": model.dense_dim or model.dim}
