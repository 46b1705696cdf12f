"""The contract between a kind of attention and the blocks, the cache of generation, the FLOP count and the checks.

A kind is one file in `kinds/` that ends with `ATTENTION = Attention(...)`. Its `layer` makes one layer's parameters,
each by `sharding.parameter` with letters and role, and is called as

    layer(x_BTD, prepared, segment_ids_BT, cache, start) -> (y_BTD, cache)

In training and evaluation `cache` and `start` are None: a token sees itself and earlier tokens of its segment. In
generation the T tokens (at most `PIECE`) go into the cache at places start, start + 1, ... of their sequence, and each
sees itself and the places before it. `start`, int32 [] or [B], may fall behind the end of the piece before, whose last
tokens were padding: nothing of them may be seen.

Every kind is held to the laws in `frugalmoe.laws.attention`: `frugalmoe laws --attention=NAME`.

Letters: B batch, T time, C slots of a cache, D model.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax import Array

from frugalmoe.schema import Model

PIECE = 512  # tokens that a cache is given at one time, at most
Cache = Any  # a pytree of arrays [B, ...], each with one axis of slots behind B


class Flops(NamedTuple):
    """Two per weight or channel that is multiplied; see `cost.flops`."""

    projections: float  # of a token, whatever it attends to
    products: float  # of a token and one key that it sees


class Shared(NamedTuple):
    """What mesh axes divide: names (field and value, as messages print them) and numbers."""

    heads: tuple[str, int]  # by tensor, and what a device has of them by context
    kv_heads: tuple[str, int]  # by tensor; by context too, or context is a multiple of them
    stored: Mapping[str, int] = {}  # by fsdp * expert * context, beside model.dim


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """A kind without options."""


def mean_causal(config: Model, options: Any, length: int) -> float:
    """Every token sees itself and all before it."""
    return (length + 1) / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """A kind of attention. `options` below is always an instance of its `options`."""

    about: str  # what it does, in one line
    paper: str  # "Authors, title, arXiv id, equation or section"
    layer: Callable[[Array, Model, Any, float], Any]  # (key, config, options, deviation of the output's weights)
    prepare: Callable[[Array, Model, Any], Any]  # (positions_BT, ...) -> arrays [B, T, ...], once for all layers
    # (config, options, batch, slots) -> of one layer. With more slots it is the same cache, padded at the end of C.
    empty_cache: Callable[[Model, Any, int, int], Cache]
    flops: Callable[[Model, Any], Flops]
    mesh: Callable[[Model, Any], Shared]
    seen: Callable[[Model, Any, int], float] = mean_causal  # keys that a token of a sequence of that length sees, mean
    check: Callable[[Model, Any], str | None] = lambda config, options: None  # "FIELD=VALUE: RULE" that is broken
    options: type = NoOptions  # frozen dataclass with defaults; the comment beside a field is its meaning
    # Whether outputs depend on how far apart tokens are, and not on where their document begins.
    relative: Callable[[Model, Any], bool] = lambda config, options: True
    # Options, beside the defaults, that the laws run with.
    cases: tuple[Mapping[str, Any], ...] = dataclasses.field(default=(), compare=False)
    name: str = ""  # set by `get`
