"""What does a 64-expert model with about 100M active parameters learn on one GPU?

Command:  frugalmoe train --config=configs/small.py --config.data.path=TEXTS
Bring text, or say --config.data.path=mixed: at 32,768 tokens of vocabulary the quickstart corpus is too small for it.
"""

from ml_collections import ConfigDict

from frugalmoe.config import default, with_mode


def get_config(arg: str | None = None) -> ConfigDict:
    c = default()
    c.name = "small"
    c.data.tokenizer = "bpe:32768"
    c.data.sequence_length = 1024
    c.model.vocab_size = 32_832
    c.model.dim = 768
    c.model.num_layers = 12
    c.model.num_dense_layers = 1
    c.model.dense_dim = 2304
    c.model.num_heads = 12
    c.model.num_kv_heads = 4
    c.model.head_dim = 64
    c.model.qk_norm = "head"
    c.model.tie_embeddings = True
    c.model.compute_dtype = "bfloat16"
    c.model.moe.num_experts = 64
    c.model.moe.num_experts_per_token = 8
    c.model.moe.expert_dim = 256
    c.model.moe.num_shared_experts = 1
    c.optim.learning_rate = 6e-4
    c.optim.warmup_steps = 500
    c.train.batch_size = 256
    c.train.accumulate_steps = 8
    c.train.steps = 10_000
    c.train.eval_every = 1000
    c.checkpoint.every_steps = 500
    return with_mode(c, arg)
