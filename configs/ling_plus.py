"""Ling-Plus: 290B parameters, 28.8B active.

Command:  frugalmoe train --config=configs/ling_plus.py \\
    --config.data.path=TEXTS --config.data.tokenizer=tokenizer.json
Architecture and recipe: arXiv 2503.05139 sections 3.2-3.4 and the published configuration.
"""

from ml_collections import ConfigDict

from frugalmoe.config import default, with_mode


def get_config(arg: str | None = None) -> ConfigDict:
    c = default()
    c.name = "ling_plus"
    c.data.sequence_length = 4096
    c.data.tokenizer = "tokenizer.json"
    c.model.vocab_size = 126_464
    c.model.rope_theta = 10_000.0
    c.model.norm_head = True
    c.model.init_std = 0.006
    c.model.compute_dtype = "bfloat16"
    c.model.remat = "full"
    c.model.moe.router = "topk_softmax"
    c.model.moe.options.softmax = "before"
    c.model.moe.options.renormalize = True
    c.model.moe.losses = {"load_balance": 0.015, "z": 1e-4}
    c.optim.warmup_steps = 2000
    c.model.dim = 5376
    c.model.num_layers = 88
    c.model.num_heads = 56
    c.model.num_kv_heads = 8
    c.model.head_dim = 96
    c.model.moe.num_experts = 64
    c.model.moe.num_experts_per_token = 4
    c.model.moe.expert_dim = 3072
    c.model.moe.num_shared_experts = 1
    c.optim.learning_rate = 2.4e-4
    c.train.batch_size = 8960
    c.train.steps = 245_000
    c.checkpoint.every_steps = 500
    return with_mode(c, arg)
