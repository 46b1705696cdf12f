"""Ling 1: lite (16.8B parameters, 2.75B active; the default) and plus (290B, 28.8B active).

Command:  frugalmoe train --config=configs/ling_1.py:lite \\
    --config.data.path=TEXTS --config.data.tokenizer=tokenizer.json
Architecture and recipe: arXiv 2503.05139 sections 3.2-3.4 and the published configurations. 9T tokens: batches grow
from 2,560 to 8,960 sequences, and the rate is halved after about 60% of the tokens. How long they grow is not said
there: taken are the about 500B tokens of Ling 2.0 (arXiv 2510.22115). Nor does it give a rate and a batch of lite:
those below follow its scaling laws (figure 12) at 9T tokens, rounded to seven micro-batches, and grow as those of plus.
Other batches need --config.train.ramp_from=0 --config.train.ramp_batches=0, or a ramp of their own.
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
        "train.batch_size": 4480,
        "train.ramp_from": 1280,
        "train.ramp_batches": 48_000,  # 503B tokens
        "train.steps": 511_000,
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
        "train.ramp_from": 2560,
        "train.ramp_batches": 24_000,  # 503B tokens
        "train.steps": 255_500,
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
    c.optim.schedule = "constant"
    c.optim.drop_after = 0.616  # of the updates: 5.4T tokens
    c.train.accumulate_steps = 7
    c.checkpoint.every_steps = 500
    return with_size(c, SIZES, arg)
