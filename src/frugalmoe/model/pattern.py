"""The network as a pattern: which kind of block each layer is, and how layers are gathered into scans.

It holds no array and no parameter.
"""

import dataclasses
import functools
from typing import NamedTuple

from frugalmoe.schema import Model

FEED_FORWARDS = ("dense", "moe")
DEPTHS = "mixture_of_depths"

# The parameters of blocks, and of what wraps them, are stacked in order of depth under these names.
NAMES = {
    ("dense", ""): "dense_blocks",
    ("moe", ""): "moe_blocks",
    ("dense", DEPTHS): "dense_depths",
    ("moe", DEPTHS): "moe_depths",
}


@dataclasses.dataclass(frozen=True)
class BlockKind:
    """What a block is made of."""

    attention: str  # a name of `attention.kinds`
    feed_forward: str  # one of FEED_FORWARDS
    wrapper: str = ""  # what decides which tokens pass it; empty: all do
    norm_position: str = "before"  # as model.norm_position
    multiplier: float = 1.0  # as model.multipliers.residual


class Segment(NamedTuple):
    """Layers that are one scan: `repeats` times the blocks of `unit`, one after the other."""

    first: int  # index in the whole network of the first layer
    unit: tuple[BlockKind, ...]
    repeats: int

    @property
    def end(self) -> int:
        """Index in the whole network of what follows its last layer."""
        return self.first + self.repeats * len(self.unit)

    @property
    def feed_forwards(self) -> tuple[str, ...]:
        """Those of its layers, each once."""
        return tuple(dict.fromkeys(kind.feed_forward for kind in self.unit))


def attention_names(attention: str) -> tuple[str, ...]:
    """The names in model.attention, in its order; a name may come more than once."""
    return tuple(name.strip() for name in attention.split(","))


def short(name: str) -> str:
    """The name under which a kind's options and parameters are kept: the last part of a path or a dotted module."""
    return name.removesuffix(".py").replace("/", ".").split(".")[-1]


@functools.lru_cache(64)
def layers(config: Model) -> tuple[BlockKind, ...]:
    """The kind of every layer, from the first to the last.

    Behind the first layers, which are dense, the last of each `moe_every` has experts. The last of each `every` dense
    blocks is wrapped by mixture of depths, and the last of each `every` MoE blocks.
    """
    attention, depths, dense = attention_names(config.attention), config.mixture_of_depths, config.num_dense_layers
    same = {"norm_position": config.norm_position, "multiplier": config.multipliers.residual}
    # Equal kinds are one object: `segments` compares them very often.
    found, kind = [], functools.cache(functools.partial(BlockKind, **same))
    count = dict.fromkeys(FEED_FORWARDS, 0)
    for layer in range(config.num_layers):
        feed_forward = "dense" if layer < dense or (layer - dense + 1) % config.moe_every else "moe"
        count[feed_forward] += 1
        wrapper = DEPTHS if depths.capacity and count[feed_forward] % depths.every == 0 else ""
        found.append(kind(attention[layer % len(attention)], feed_forward, wrapper))
    return tuple(found)


def segments(config: Model) -> list[Segment]:
    """The network in order of depth, in as few scans as the shortest repeating units of the first dense layers and of
    those behind them allow.
    """
    found, kinds, first, dense = [], layers(config), 0, config.num_dense_layers
    while first < len(kinds):
        same = kinds[first : dense if first < dense else len(kinds)]
        size = next(n for n in range(1, len(same) + 1) if same[n:] == same[:-n])
        found.append(Segment(first, tuple(same[:size]), len(same) // size))
        first += size * (len(same) // size)
    return found


def has_experts(config: Model) -> bool:
    """Whether any layer has."""
    return bool(moe_layers(config))


def has_dense(config: Model) -> bool:
    """Whether any layer has a dense feed-forward."""
    return len(moe_layers(config)) < config.num_layers


def moe_layers(config: Model) -> list[int]:
    """Index in the whole network of each layer with experts."""
    return [i for i, kind in enumerate(layers(config)) if kind.feed_forward == "moe"]


def wrapped_layers(config: Model) -> list[int]:
    """Index in the whole network of each block that some tokens skip."""
    return [i for i, kind in enumerate(layers(config)) if kind.wrapper]
