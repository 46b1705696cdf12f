"""What goes wrong with one expert per token?

Command:   frugalmoe ablate experiments/top1_pitfalls.py --jobs=2
Cost:      15 runs of 0.61 M tokens.

With K = 1 a renormalised weight is 1 whatever the router says, so that the loss gives the router no gradient.
Strategies refuse such a config; this study takes the check away to show what it prevents.
"""

import dataclasses

from frugalmoe.ablate import Study
from frugalmoe.routing import strategies

UNCHECKED = dataclasses.replace(
    strategies.get("topk_softmax"), name="topk_softmax_unchecked", check=lambda config: None
)
TOP_2 = {
    "model.moe.router": "topk_softmax",
    "model.moe.num_experts": 16,
    "model.moe.num_experts_per_token": 2,
    "model.moe.expert_dim": 128,
}

STUDY = Study(
    question="What goes wrong with one expert per token?",
    expectation=(
        "With weights renormalised at K = 1 the router's gradient is zero: it stays near its random start and follows "
        "the balance loss alone, so it should do no better than a frozen one. Switch (2101.03961) keeps the "
        "probability as weight, Llama 4 scales the input with a sigmoid. Top-2 of half the width is expected ahead: "
        "1.867 (GShard top-2) against 1.881 (Switch) in 2401.06066."
    ),
    base="configs/study.py",
    overrides={
        "model.moe.router": "switch_top1",
        "model.moe.num_experts": 8,
        "model.moe.num_experts_per_token": 1,
        "model.moe.expert_dim": 256,
    },
    arms={
        "switch": {},
        "renormalised": {"model.moe.router": UNCHECKED},
        "frozen_random": {"model.moe.router": "frozen_random"},
        "llama4": {"model.moe.router": "llama4"},
        "top_2": TOP_2,
    },
    baseline="switch",
    varies=(
        "model.moe.router",
        "model.moe.num_experts",
        "model.moe.num_experts_per_token",
        "model.moe.expert_dim",
    ),
)
