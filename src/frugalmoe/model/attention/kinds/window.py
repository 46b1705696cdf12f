"""Sliding-window attention: grouped-query attention to the last tokens alone.

Its cache is a ring: it holds the window and one piece of tokens that are fed at once, however long the text grows.
"""

import dataclasses

from jax import Array

from frugalmoe.model.attention.contract import PIECE
from frugalmoe.model.attention.kinds import grouped
from frugalmoe.model.rotary import Rotary
from frugalmoe.schema import Model, RopeScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(grouped.Options):
    """Options of sliding-window attention."""

    window: int = 128  # tokens that a token sees: itself and those before it
    rope_scaling: bool = True  # whether model.rope_scaling stretches its angles too; in Olmo 3 it does not


def layer(key: Array, config: Model, options: Options, out_std: float) -> grouped.GroupedAttention:
    """The parameters of grouped-query attention."""
    return grouped.GroupedAttention(key, config, options, out_std, window=options.window)


def prepare(positions_BT: Array, config: Model, options: Options) -> Rotary:
    """The angles of grouped-query attention."""
    scaling = config.rope_scaling if options.rope_scaling else RopeScaling()
    return grouped.prepare(positions_BT, dataclasses.replace(config, rope_scaling=scaling), options)


def empty_cache(config: Model, options: Options, batch: int, slots: int) -> grouped.Cache:
    """The token at place p lies in slot p % C, so that a piece overwrites what lies before its window alone."""
    return grouped.empty_cache(config, options, batch, min(slots, options.window + PIECE))


def seen(config: Model, options: Options, length: int) -> float:
    """Mean of min(t + 1, window) over the tokens t of a sequence."""
    window = min(options.window, length)
    return window * (length - (window - 1) / 2) / length


def check(config: Model, options: Options) -> str | None:
    """That of grouped-query attention, and a window that holds a token."""
    if options.window < 1:
        return f"model.attention_options.window.window={options.window}: must be positive"
    return grouped.check(config, options)


ATTENTION = dataclasses.replace(
    grouped.ATTENTION,
    about="as grouped, but a token sees itself and the window - 1 tokens before it",
    paper="Beltagy et al., Longformer, 2004.05150, section 3.1; on every layer but some: gpt-oss, 2508.10925",
    layer=layer,
    prepare=prepare,
    empty_cache=empty_cache,
    seen=seen,
    check=check,
    options=Options,
    cases=({"window": 5, "sinks": True},),
)
