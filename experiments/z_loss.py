"""What does the router's z-loss do at a high learning rate?

Command:   frugalmoe ablate experiments/z_loss.py --jobs=2
Cost:      15 runs of 0.61 M tokens.
"""

from frugalmoe.ablate import Study

STUDY = Study(
    question="What does the router's z-loss do at a high learning rate?",
    expectation=(
        "ST-MoE (2202.08906) adds it for stability with a coefficient of 1e-3 and sees no loss of quality. Expected: "
        "the log-normaliser of the router grows without it and is bounded with it; equal loss up to 1e-3, "
        "worse at 1e-1."
    ),
    base="configs/study.py",
    overrides={"optim.learning_rate": 1e-2},
    arms={f"z_{value:g}": {"model.moe.losses.z": value} for value in (0.0, 1e-4, 1e-3, 1e-2, 1e-1)},
    baseline="z_0",
    varies=("model.moe.losses.z",),
    metrics=("eval/loss/mean", "router/logit_lse", "router/entropy", "router/max_violation"),
)
