"""Does routing at random in the first steps prevent early imbalance, and does it matter in the end?

Command:   frugalmoe ablate experiments/stochastic_warmup.py --jobs=2
Cost:      12 runs of 0.61 M tokens.
"""

from frugalmoe.ablate import Study


def warmup(steps: int) -> dict:
    return {"model.moe.router": "stochastic_warmup", "model.moe.options.steps": steps}


STUDY = Study(
    question="Does routing at random in the first steps prevent early imbalance, and does it matter in the end?",
    expectation=(
        "Ling (2503.05139) uses it against early collapse and running out of memory; the report gives no loss. "
        "Expected: max violation at the noise floor at first, no peak in steps 50-200, and an equal final loss."
    ),
    base="configs/study.py",
    arms={"none": {}, "steps_30": warmup(30), "steps_75": warmup(75), "steps_150": warmup(150)},
    baseline="none",
    varies=("model.moe.router",),
    metrics=("eval/loss/mean", "router/max_violation", "router/dead_experts", "router/entropy"),
)
