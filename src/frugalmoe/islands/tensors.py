"""Parameters as a flat dict of host arrays, each of one layer, and what each of them is.

A tensor's name is the path of its leaf joined by `/`; of a leaf that stacks layers, also the number in the stack, as
`moe_blocks/ffn_norm/scale/03`. Names are in one order everywhere: that of sorted paths, then of the stack.
"""

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from frugalmoe.errors import UserError
from frugalmoe.model import pattern
from frugalmoe.model.transformer import declarations, structure
from frugalmoe.schema import Model

STACKS = frozenset({*pattern.NAMES.values(), "multi_token"})  # what the model stacks along a leading axis
_LAYERS_OF = {name: stack for (stack, _), name in pattern.NAMES.items()}  # name -> kind of feed-forward
_ALONE = ("embedding", "head")  # roles that are a layer of their own


class Tensor(NamedTuple):
    """What is known of a tensor without its values."""

    name: str
    size: int  # values in it
    role: str  # as declared: of sharding.ROLES
    layer: str  # what is taken as one where layers are looked at: "moe_blocks/03", "embedding", "final_norm" ...
    shape: tuple[int, ...] = ()


def flatten(params: dict) -> dict[str, np.ndarray]:
    """Returns the parameters as float32 host arrays by name; layers of a stack are views of it."""
    found = {}
    for path, leaf in _leaves(params, ()):
        array = np.asarray(leaf, np.float32)
        found |= {name: _entry(array, index) for name, index in _names(path, array.shape)}
    return found


def unflatten(tensors: Mapping[str, np.ndarray], like: dict) -> dict:
    """Returns parameters with the structure of `like`, whose leaves may be shapes alone; arrays are float32 and new.

    Raises `UserError` that names a tensor that is missing, or that has another shape than in `like`.
    """
    return _unflatten(tensors, like, ())


def _unflatten(tensors: Mapping[str, np.ndarray], like: dict, path: tuple[str, ...]) -> dict:
    made = {}
    for key, leaf in like.items():
        here = (*path, str(key))
        if isinstance(leaf, Mapping):
            made[key] = _unflatten(tensors, leaf, here)
            continue
        made[key] = np.empty(leaf.shape, np.float32)
        for name, index in _names(here, leaf.shape):
            target = _entry(made[key], index)
            if name not in tensors:
                raise UserError(f"tensor {name!r}: missing among {len(tensors)} tensors")
            if np.shape(tensors[name]) != target.shape:
                raise UserError(f"tensor {name!r}: has shape {np.shape(tensors[name])}, must have {target.shape}")
            target[...] = tensors[name]
    return made


def describe(model: Model) -> tuple[Tensor, ...]:
    """Returns what each tensor of a model is, in the order of `flatten`; nothing is allocated."""
    _, params, _ = structure(model)
    declared, found = declarations(model), []
    for path, leaf in _leaves(params, ()):
        role, layers = declared[path].role, _layers(model, path) if path[0] in STACKS else []
        for name, index in _names(path, leaf.shape):
            shape = tuple(leaf.shape if index is None else leaf.shape[1:])
            layer = role if role in _ALONE else path[0] if index is None else layers[index]
            found.append(Tensor(name, math.prod(shape), role, layer, shape))
    return tuple(found)


def _layers(model: Model, path: tuple[str, ...]) -> list[str]:
    """The layer of each entry of the stack that a leaf is: attention of several kinds and what wraps blocks are stacked
    by themselves, and belong to the layer whose part they are.
    """
    stack = path[0]
    if stack not in _LAYERS_OF:
        return [f"{stack}/{i:02}" for i in range(model.multi_token_prediction.depth)]
    kinds = [kind for kind in pattern.layers(model) if kind.feed_forward == _LAYERS_OF[stack]]
    blocks = pattern.NAMES[_LAYERS_OF[stack], ""]
    belongs = lambda kind: True
    if stack != blocks:
        belongs = lambda kind: pattern.NAMES[kind.feed_forward, kind.wrapper] == stack
    elif path[1] == "attention" and len({kind.attention for kind in kinds}) > 1:
        belongs = lambda kind: pattern.short(kind.attention) == path[2]
    return [f"{blocks}/{i:02}" for i, kind in enumerate(kinds) if belongs(kind)]


def fragments(tensors: Sequence[Tensor], count: int) -> tuple[tuple[str, ...], ...]:
    """Returns the names of `count` sets of tensors with about as many values each; every name is in exactly one.

    The largest tensor that is left goes to the set with the fewest values (Graham 1969: at most 4/3 of the best): the
    balanced fragments of Decoupled DiLoCo (arXiv 2604.21428). Ties go by name and by number of the set, so that all
    islands find the same sets. Names of a set are in the order of `tensors`.

    Raises `UserError` where there are fewer tensors than sets.
    """
    if not 1 <= count <= len(tensors):
        raise UserError(f"islands.fragments={count}: must be from 1 to {len(tensors)}, the number of tensors")
    heap = [(0, 0, i) for i in range(count)]  # values, tensors (empty ones have no values), number
    number = {}
    for tensor in sorted(tensors, key=lambda tensor: (-tensor.size, tensor.name)):
        size, held, i = heapq.heappop(heap)
        number[tensor.name] = i
        heapq.heappush(heap, (size + tensor.size, held + 1, i))
    return tuple(tuple(t.name for t in tensors if number[t.name] == i) for i in range(count))


def _leaves(tree: dict, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key in sorted(tree, key=str):
        here = (*path, str(key))
        if isinstance(tree[key], Mapping):
            yield from _leaves(tree[key], here)
        else:
            yield here, tree[key]


def _names(path: tuple[str, ...], shape: tuple[int, ...]) -> list[tuple[str, int | None]]:
    name = "/".join(path)
    return [(f"{name}/{i:02}", i) for i in range(shape[0])] if path[0] in STACKS else [(name, None)]


def _entry(array: np.ndarray, index: int | None) -> np.ndarray:
    """A view of an array, or of one entry of a stack, that is an array even where it holds one value."""
    return array if index is None else array[index : index + 1].reshape(array.shape[1:])
