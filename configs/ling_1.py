"""Ling 1: lite (16.8B parameters, 2.75B active; the default) and plus (290B, 28.8B active).

Command:  frugalmoe train --config=configs/ling_1.py:lite \\
    --config.data.path=TEXTS --config.data.tokenizer=tokenizer.json
Architecture and recipe: arXiv 2503.05139 sections 3.2-3.4 and the published configurations. The paper gives no learning
rate and batch for lite: those below follow its scaling laws (figure 12) at 9T tokens.
"""

from ml_collections import ConfigDict

from frugalmoe.config import default, with_size

SIZES = {
    "lite": {
        "name": "ling_lite",
        "model.dim": 2048,
        "model.num_layers": 28,
        "model.num_heads": 16,
        "model.num_kv_heads": 4,
        "model.head_dim": 128,
        "model.moe.num_experts_per_token": 6,
        "model.moe.expert_dim": 1408,
        "model.moe.num_shared_experts": 2,
        "optim.learning_rate": 3.5e-4,
        "train.batch_size": 4432,
        "train.steps": 496_000,
    },
    "plus": {
        "name": "ling_plus",
        "model.dim": 5376,
        "model.num_layers": 88,
        "model.num_heads": 56,
        "model.num_kv_heads": 8,
        "model.head_dim": 96,
        "model.moe.num_experts_per_token": 4,
        "model.moe.expert_dim": 3072,
        "model.moe.num_shared_experts": 1,
        "optim.learning_rate": 2.4e-4,
        "train.batch_size": 8960,
        "train.steps": 245_000,
    },
}


def get_config(arg: str | None = None) -> ConfigDict:
    c = default()
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
    c.model.moe.num_experts = 64
    c.optim.warmup_steps = 2000
    c.checkpoint.every_steps = 500
    return with_size(c, SIZES, arg)
