"""Which layers have experts, as the Qwen families say it: ours are the last of each n behind the first dense ones."""

from typing import Any

from frugalmoe.convert.keys import Keys
from frugalmoe.model import pattern
from frugalmoe.schema import Model


def dense_ours(keys: Keys) -> dict[str, Any]:
    """Fields of our `model`: the last of each `decoder_sparse_step` layers has experts, if not in `mlp_only_layers`."""
    layers, dense, step = keys.layers(), keys.get("mlp_only_layers", []), keys.integer("decoder_sparse_step", 1)
    if not isinstance(dense, list) or not all(type(layer) is int and 0 <= layer < layers for layer in dense):
        raise keys.refused("mlp_only_layers", dense, f"must be a list of layers, from 0 to {layers - 1}")
    if not step:
        raise keys.refused("decoder_sparse_step", step, "must be positive")
    sparse = sorted({*range(step - 1, layers, step)} - {*dense})
    found = layers_ours(keys, sparse, "mlp_only_layers", dense)
    return found | {"dense_dim": keys.integer("intermediate_size", 0)}


def dense_theirs(model: Model) -> dict[str, Any]:
    """The way back."""
    step = 1 if model.num_dense_layers % model.moe_every else model.moe_every
    sparse = pattern.moe_layers(model)
    dense = [layer for layer in range(step - 1, model.num_layers, step) if layer not in sparse]
    width = {"intermediate_size": model.dense_dim or model.dim}
    return {"mlp_only_layers": dense, "decoder_sparse_step": step} | width


def layers_ours(keys: Keys, sparse: list[int], name: str, value: Any) -> dict[str, int]:
    """Fields of our `model` where the layers `sparse`, in order, have experts. Refuses a key's value where none do."""
    layers = keys.layers()
    if not sparse:
        return {"num_dense_layers": layers, "moe_every": 1}
    every = sparse[1] - sparse[0] if len(sparse) > 1 else layers - sparse[0]
    first = sparse[0] + 1 - every
    if first < 0 or sparse != list(range(sparse[0], layers, every)):
        rule = "is not implemented: layers with experts must be the last of each n behind the first dense ones"
        raise keys.refused(name, value, rule)
    return {"num_dense_layers": first, "moe_every": every}
