"""Which optimizer should islands have inside, AdamW or Muon?

Command:   frugalmoe ablate experiments/islands_inner.py
Cost:      12 runs of 0.20 M tokens, islands under a virtual clock in one process.

Found:     Muon, by 0.158 ± 0.042 nats with four islands; but it is ahead by 0.125 ± 0.035 without islands, and what
           training apart costs differs by no more than three seeds can tell (0.450 with AdamW, 0.418 with Muon).

`m4` are four islands that share the batch and meet each 32 steps. Muon's updates have the size of AdamW's
(2502.16982), so that both have one learning rate.
"""

from frugalmoe.ablate import Study

AVERAGE = {"islands.learning_rate": 1.0, "islands.momentum": 0.0}  # the outer parameters are the mean of the islands'


ISLANDS = {"islands.virtual": 4, "islands.round_steps": 32, **AVERAGE}
MUON = {"optim.name": "muon"}

STUDY = Study(
    question="Which optimizer should islands have inside, AdamW or Muon?",
    expectation=(
        "MuLoCo (2505.23725) has Muon inside ahead of AdamW at every number of workers, and the loss against training "
        "together smaller with it from three workers on, at 150 M to 3.1 B parameters: its deltas agree more. Here all "
        "is the beginning of a training, in which experiments/islands.py has AdamW's islands far behind."
    ),
    base="configs/study.py",
    overrides={
        "model.dim": 64,
        "model.num_layers": 3,
        "model.dense_dim": 128,
        "model.num_heads": 2,
        "model.num_kv_heads": 1,
        "model.moe.num_experts": 8,
        "model.moe.expert_dim": 64,
        "data.sequence_length": 64,
        "train.steps": 192,
        "train.eval_every": 0,
    },
    arms={
        "adamw": {},
        "adamw_m4": ISLANDS,
        "muon": MUON,
        "muon_m4": {**MUON, **ISLANDS},
    },
    baseline="adamw",
    varies=("optim.name", "islands"),
)
