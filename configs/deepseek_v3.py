"""DeepSeek-V3: 671B parameters, 37B active, multi-head latent attention.

Command:   frugalmoe train --config=configs/deepseek_v3.py \\
    --config.data.path=TEXTS --config.data.tokenizer=tokenizer.json
Network:   DeepSeek-AI, arXiv 2412.19437, section 4.2, and the published configuration, with its module that predicts
           one token further ahead (section 2.2), which adds 11.6B parameters that generation may leave unused.
Recipe:    the same section, with its largest batch from the start and a linear decay where it has a cosine. The further
           token's loss has the coefficient of the first 10T tokens; it is 0.1 for the rest.
Cost:      `:laptop`: 0.2 M tokens, 61 s of one CPU core's time with start and report (measured beside other programs).
Expected:  `:laptop`: 3.81 bits per byte on held-out documents (2.64 nats per token): a hundred steps on bytes.
"""

from ml_collections import ConfigDict

from frugalmoe.config import default, with_mode


def get_config(arg: str | None = None) -> ConfigDict:
    c = default()
    c.name = "deepseek_v3"
    c.data.sequence_length = 4096
    c.data.tokenizer = "tokenizer.json"
    c.model.vocab_size = 129_280
    c.model.dim = 7168
    c.model.num_layers = 61
    c.model.num_dense_layers = 3
    c.model.dense_dim = 18_432
    c.model.attention = "latent"
    c.model.attention_options = {"latent": {"rank": 512, "query_rank": 1536, "rotary_dim": 64, "value_dim": 128}}
    c.model.num_heads = 128
    c.model.num_kv_heads = 128
    c.model.head_dim = 128
    c.model.init_std = 0.006
    c.model.compute_dtype = "bfloat16"
    c.model.remat = "full"
    c.model.multi_token_prediction.depth = 1
    c.model.multi_token_prediction.coefficient = 0.3
    c.model.moe.router = "sigmoid_bias"
    c.model.moe.options.num_groups = 8
    c.model.moe.options.groups_per_token = 4
    c.model.moe.options.scale = 2.5
    c.model.moe.num_experts = 256
    c.model.moe.num_experts_per_token = 8
    c.model.moe.expert_dim = 2048
    c.model.moe.num_shared_experts = 1
    c.model.moe.losses = {"sequence_balance": 1e-4}
    c.optim.learning_rate = 2.2e-4
    c.optim.warmup_steps = 2000
    c.optim.decay_fraction = 0.3
    c.train.batch_size = 15_360
    c.train.steps = 235_000
    c.checkpoint.every_steps = 500
    c = with_mode(c, arg)
    if arg == "laptop":
        c.model.attention_options.latent = {"rank": 32, "query_rank": 48, "rotary_dim": 8, "value_dim": 16}
    return c
