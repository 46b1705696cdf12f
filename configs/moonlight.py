"""Moonlight: 16B parameters, 2.2B active, trained with Muon; multi-head latent attention.

Command:   frugalmoe train --config=configs/moonlight.py \\
    --config.data.path=TEXTS --config.data.tokenizer=tokenizer.json
Network:   Liu et al., arXiv 2502.16982, and the published configuration of Moonlight-16B-A3B.
Recipe:    that of the paper for its first 5.2T tokens, at its largest batch: Muon with the RMS of AdamW's updates,
           warmup and a cosine to a tenth of the peak. Left out: the smaller batch of the beginning and the cooldown on
           500B better tokens. Routers are AdamW's here and Muon's there.
Cost:      `:laptop`: 0.2 M tokens, 48 s of one CPU core's time with start and report (measured beside other programs).
Expected:  `:laptop`: 3.73 bits per byte on held-out documents (2.59 nats per token): a hundred steps on bytes.
"""

from ml_collections import ConfigDict

from frugalmoe.config import default, with_mode


def get_config(arg: str | None = None) -> ConfigDict:
    c = default()
    c.name = "moonlight"
    c.data.sequence_length = 8192
    c.data.tokenizer = "tokenizer.json"
    c.model.vocab_size = 163_840
    c.model.dim = 2048
    c.model.num_layers = 27
    c.model.num_dense_layers = 1
    c.model.dense_dim = 11_264
    c.model.attention = "latent"
    c.model.attention_options = {"latent": {"rank": 512, "rotary_dim": 64, "value_dim": 128}}
    c.model.num_heads = 16
    c.model.num_kv_heads = 16
    c.model.head_dim = 128
    c.model.rope_theta = 50_000.0
    c.model.norm_eps = 1e-5
    c.model.compute_dtype = "bfloat16"
    c.model.remat = "full"
    c.model.moe.router = "sigmoid_bias"
    c.model.moe.options.scale = 2.446
    c.model.moe.num_experts = 64
    c.model.moe.num_experts_per_token = 6
    c.model.moe.expert_dim = 1408
    c.model.moe.num_shared_experts = 2
    c.model.moe.losses = {"sequence_balance": 1e-3}
    c.optim.name = "muon"
    c.optim.learning_rate = 4.2e-4
    c.optim.warmup_steps = 2000
    c.optim.schedule = "cosine"
    c.train.batch_size = 4096
    c.train.steps = 155_000
    c.checkpoint.every_steps = 500
    c = with_mode(c, arg)
    if arg == "laptop":
        c.model.attention_options.latent = {"rank": 32, "rotary_dim": 8, "value_dim": 16}
    return c
