"""Which experts does a small MoE language model use for nineteen kinds of text in eight languages and three of code?

Command:   frugalmoe train --config=configs/mixed.py
Data:      `mixed`, which fetches 158 MB of Debian packages once and takes a minute to build, and `quickstart`: 222 MB.
Cost:      8.2 M tokens, about 40 minutes of two CPU cores, reckoned from the quickstart's speed and not measured.
"""

from ml_collections import ConfigDict

from frugalmoe.config import default, with_mode


def get_config(arg: str | None = None) -> ConfigDict:
    c = default()
    c.name = "mixed"
    c.data.sources = {name: {"path": name} for name in ("mixed", "quickstart")}
    c.data.tokenizer = "bpe:8192"
    c.data.sequence_length = 256
    c.model.dim = 192
    c.model.num_layers = 4
    c.model.num_dense_layers = 1
    c.model.dense_dim = 512
    c.model.num_heads = 6
    c.model.num_kv_heads = 2
    c.model.qk_norm = "head"
    c.model.moe.num_experts = 32
    c.model.moe.num_experts_per_token = 4
    c.model.moe.expert_dim = 96
    c.model.moe.num_shared_experts = 1
    c.optim.learning_rate = 3e-3
    c.train.batch_size = 16
    c.train.steps = 2000
    c.train.eval_every = 500
    c.checkpoint.every_steps = 500
    return with_mode(c, arg)
