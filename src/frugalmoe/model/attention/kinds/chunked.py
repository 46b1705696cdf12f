"""Chunked attention: documents are cut into chunks of equal length, and a token sees earlier ones of its own chunk.

Its cache is that of a window as long as a chunk.
"""

import dataclasses

from jax import Array

from frugalmoe.model.attention.contract import PIECE
from frugalmoe.model.attention.kinds import grouped
from frugalmoe.schema import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(grouped.Options):
    """Options of chunked attention."""

    chunk: int = 128  # tokens of a chunk


def layer(key: Array, config: Model, options: Options, out_std: float) -> grouped.GroupedAttention:
    """The parameters of grouped-query attention."""
    return grouped.GroupedAttention(key, config, options, out_std, window=options.chunk, chunked=True)


def empty_cache(config: Model, options: Options, batch: int, slots: int) -> grouped.Cache:
    """The token at place p lies in slot p % C, so that a piece overwrites what lies before its chunk alone."""
    return grouped.empty_cache(config, options, batch, min(slots, options.chunk + PIECE))


def seen(config: Model, options: Options, length: int) -> float:
    """Mean of t % chunk + 1 over the tokens t of a sequence."""
    whole, rest = divmod(length, options.chunk)
    return (whole * options.chunk * (options.chunk + 1) + rest * (rest + 1)) / 2 / length


def check(config: Model, options: Options) -> str | None:
    """That of grouped-query attention, and a chunk that holds a token."""
    if options.chunk < 1:
        return f"model.attention_options.chunked.chunk={options.chunk}: must be positive"
    return grouped.check(config, options)


ATTENTION = dataclasses.replace(
    grouped.ATTENTION,
    about="as grouped, but a token sees the tokens of its own chunk of a document alone",
    paper="Child et al., Sparse Transformers, 1904.10509, section 4.3, first heads of the fixed pattern; Meta, Llama 4",
    layer=layer,
    empty_cache=empty_cache,
    seen=seen,
    check=check,
    options=Options,
    cases=({"chunk": 5, "sinks": True},),
)
