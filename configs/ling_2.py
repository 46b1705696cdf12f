"""Ling 2.0: mini (16.3B parameters, 1.43B active; the default), flash (103B, 6.1B active) and 1t (1000B, 51B active).

Command:  frugalmoe train --config=configs/ling_2.py:mini \\
    --config.data.path=TEXTS --config.data.tokenizer=tokenizer.json
Architecture and recipe: arXiv 2510.22115 table 1 and sections 2-3. Their multi-token-prediction
layer is added by --config.model.multi_token_prediction.depth=1.
"""

from ml_collections import ConfigDict

from frugalmoe.config import default, with_size

SIZES = {
    "mini": {
        "name": "ling_mini_2",
        "model.dim": 2048,
        "model.num_layers": 20,
        "model.num_dense_layers": 1,
        "model.dense_dim": 5120,
        "model.num_heads": 16,
        "model.num_kv_heads": 4,
        "model.moe.expert_dim": 512,
        "optim.learning_rate": 3.36e-4,
        "train.batch_size": 4400,
        "train.steps": 1_100_000,
    },
    "flash": {
        "name": "ling_flash_2",
        "model.dim": 4096,
        "model.num_layers": 32,
        "model.num_dense_layers": 1,
        "model.dense_dim": 9216,
        "model.num_heads": 32,
        "model.num_kv_heads": 4,
        "model.moe.expert_dim": 1024,
        "optim.learning_rate": 2.61e-4,
        "train.batch_size": 8352,
        "train.steps": 585_000,
    },
    "1t": {
        "name": "ling_1t",
        "model.dim": 8192,
        "model.num_layers": 80,
        "model.num_dense_layers": 4,
        "model.dense_dim": 18_432,
        "model.num_heads": 64,
        "model.num_kv_heads": 8,
        "model.moe.expert_dim": 2048,
        "optim.learning_rate": 1.86e-4,
        "train.batch_size": 18_144,
        "train.steps": 269_000,
    },
}


def get_config(arg: str | None = None) -> ConfigDict:
    c = default()
    c.data.sequence_length = 4096
    c.data.tokenizer = "tokenizer.json"
    c.model.vocab_size = 157_184
    c.model.head_dim = 128
    c.model.qk_norm = "head"
    c.model.rope_fraction = 0.5
    c.model.init_std = 0.006
    c.model.compute_dtype = "bfloat16"
    c.model.remat = "full"
    c.model.moe.router = "sigmoid_bias"
    c.model.moe.options.num_groups = 8
    c.model.moe.options.groups_per_token = 4
    c.model.moe.options.scale = 2.5
    c.model.moe.options.update = "zero_mean"
    c.model.moe.num_experts = 256
    c.model.moe.num_experts_per_token = 8
    c.model.moe.num_shared_experts = 1
    c.model.moe.losses = {"z": 3.5e-6}
    c.optim.warmup_steps = 2000
    c.optim.schedule = "constant"
    c.checkpoint.every_steps = 500
    return with_size(c, SIZES, arg)
