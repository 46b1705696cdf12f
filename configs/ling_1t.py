"""Ling-1T: 1000B parameters, 51B active.

Command:  frugalmoe train --config=configs/ling_1t.py \\
    --config.data.path=TEXTS --config.data.tokenizer=tokenizer.json
Architecture and recipe: arXiv 2510.22115 table 1 and sections 2-3. Without its multi-token-prediction layer.
"""

from ml_collections import ConfigDict

from frugalmoe.config import default, with_mode


def get_config(arg: str | None = None) -> ConfigDict:
    c = default()
    c.name = "ling_1t"
    c.data.sequence_length = 4096
    c.data.tokenizer = "tokenizer.json"
    c.model.vocab_size = 157_184
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
    c.model.dim = 8192
    c.model.num_layers = 80
    c.model.num_dense_layers = 4
    c.model.dense_dim = 18_432
    c.model.num_heads = 64
    c.model.num_kv_heads = 8
    c.model.head_dim = 128
    c.model.moe.expert_dim = 2048
    c.optim.learning_rate = 1.86e-4
    c.train.batch_size = 18_144
    c.train.steps = 269_000
    c.checkpoint.every_steps = 500
    return with_mode(c, arg)
