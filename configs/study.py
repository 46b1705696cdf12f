"""The base of the studies in experiments/: small enough that many arms and seeds can be compared.

Command:   frugalmoe train --config=configs/study.py      (one run; `frugalmoe ablate experiments/NAME.py` for a study)
Cost:      0.61 M tokens; two minutes of one CPU core's time with start and report, four on a busy machine.
Expected:  about 4.01 nats per token, 2.34 bits per byte on held-out documents, after a fourteenth of an epoch.
"""

from ml_collections import ConfigDict

from frugalmoe.config import default, with_mode


def get_config(arg: str | None = None) -> ConfigDict:
    c = default()
    c.name = "study"
    c.data.tokenizer = "bpe:1024"
    c.data.sequence_length = 128
    c.model.dim = 128
    c.model.num_layers = 4
    c.model.num_dense_layers = 1
    c.model.dense_dim = 256
    c.model.num_heads = 4
    c.model.num_kv_heads = 2
    c.model.head_dim = 32
    c.model.qk_norm = "head"
    c.model.moe.num_experts = 16
    c.model.moe.num_experts_per_token = 2
    c.model.moe.expert_dim = 128
    c.optim.learning_rate = 1.5e-3  # at 3e-3 the spread between seeds is three times as large, and the loss higher
    c.optim.warmup_steps = 40
    c.train.steps = 300
    c.train.batch_size = 16
    c.train.eval_every = 50
    c.train.eval_rows = 64
    return with_mode(c, arg)
