"""What follows a config file's name: a size, where the file has several, and a mode, which is none or `laptop`."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from frugalmoe.config.load import override
from frugalmoe.errors import UserError, did_you_mean

LAPTOP = "laptop"


def with_size(c: ConfigDict, sizes: Mapping[str, Mapping[str, Any]], arg: str | None) -> ConfigDict:
    """Returns the config at the size and in the mode that `arg` names: SIZE, MODE or SIZE:MODE.

    `sizes` has the fields that each size sets, dotted; the first is the default. A config file holds them as a literal
    at its top level under the name SIZES, so that they are known without running it.
    """
    first, colon, rest = (arg or next(iter(sizes))).partition(":")
    if first == LAPTOP and not colon:
        first, rest = next(iter(sizes)), LAPTOP
    if first not in sizes:
        raise UserError(f"--config=...:{arg}: unknown size; {did_you_mean(first, sizes)}, each also with :{LAPTOP}")
    return with_mode(override(c, sizes[first]), rest if colon or rest else None)


def with_mode(c: ConfigDict, arg: str | None) -> ConfigDict:
    """Returns `c` itself, or its laptop mode: the same recipe at a size that two cores train in a minute."""
    if arg is None:
        return c
    if arg != LAPTOP:
        raise UserError(f"--config=...:{arg}: unknown mode; valid: {LAPTOP}")
    m, moe = c.model, c.model.moe
    c.name += "-laptop"
    m.vocab_size = 0
    m.dim, m.num_heads, m.num_kv_heads, m.head_dim = 64, 4, min(m.num_kv_heads, 2), 16
    m.num_layers, m.num_dense_layers = 3, min(m.num_dense_layers, 1)
    m.moe_every = min(m.moe_every, 2)
    m.dense_dim = 128 if m.num_dense_layers or m.moe_every > 1 else 0
    m.init_std, m.compute_dtype, m.remat = 0.02, "float32", "none"
    moe.num_experts, moe.expert_dim = min(moe.num_experts, 16), 32
    moe.num_experts_per_token = min(moe.num_experts_per_token, 4)
    c.data.tokenizer, c.data.sequence_length = "bytes", 128
    c.optim.learning_rate, c.optim.warmup_steps = 3e-3, 20
    c.train.steps, c.train.batch_size, c.train.accumulate_steps = 100, 16, 1
    if c.train.ramp_from:  # a size more, which is a program more
        c.train.accumulate_steps, c.train.ramp_from, c.train.ramp_batches = 2, 8, 20
    c.train.eval_every, c.train.eval_rows = 0, 64
    c.checkpoint.every_steps = 0
    return c
