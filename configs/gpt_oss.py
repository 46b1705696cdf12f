"""gpt-oss-20b's network: 20.9B parameters, 3.6B active; every other layer sees the last 128 tokens alone.

Command:   frugalmoe train --config=configs/gpt_oss.py --config.data.path=TEXTS --config.data.tokenizer=tokenizer.json
Network:   OpenAI, gpt-oss model card, arXiv 2508.10925, section 2 and table 1, and the published configuration. Without
           the biases of experts, router and attention's output, and without the clamp in its SwiGLU. The card gives no
           recipe: learning rate, batch and balance loss are ours.
Cost:      `:laptop`: 0.2 M tokens, 95 s of one CPU core's time with start and report (measured beside other programs).
Expected:  `:laptop`: 3.90 bits per byte on held-out documents (2.71 nats per token): a hundred steps on bytes.
"""

from ml_collections import ConfigDict

from frugalmoe.config import default, with_mode


def get_config(arg: str | None = None) -> ConfigDict:
    c = default()
    c.name = "gpt_oss"
    c.data.sequence_length = 4096
    c.data.tokenizer = "tokenizer.json"
    c.model.vocab_size = 201_088
    c.model.dim = 2880
    c.model.num_layers = 24
    c.model.num_heads = 64
    c.model.num_kv_heads = 8
    c.model.head_dim = 64
    c.model.qkv_bias = True
    c.model.attention = "window,grouped"
    c.model.attention_options = {"window": {"window": 128, "sinks": True}, "grouped": {"sinks": True}}
    c.model.rope_theta = 150_000.0
    c.model.rope_scaling.kind = "yarn"
    c.model.rope_scaling.factor = 32.0
    c.model.rope_scaling.original_length = 4096
    c.model.rope_scaling.truncate = False
    c.model.norm_eps = 1e-5
    c.model.compute_dtype = "bfloat16"
    c.model.remat = "full"
    c.model.moe.router = "topk_softmax"
    c.model.moe.options.softmax = "after"
    c.model.moe.num_experts = 32
    c.model.moe.num_experts_per_token = 4
    c.model.moe.expert_dim = 2880
    c.optim.learning_rate = 3e-4
    c.optim.warmup_steps = 2000
    c.train.batch_size = 4096
    c.train.steps = 250_000
    c.checkpoint.every_steps = 500
    c = with_mode(c, arg)
    if arg == "laptop":
        c.model.attention_options.window.window = 32
    return c
