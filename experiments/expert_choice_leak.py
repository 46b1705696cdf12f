"""How much of expert choice's training loss is the future that it reads?

Command:   frugalmoe ablate experiments/expert_choice_leak.py --jobs=2
Cost:      9 runs of 0.61 M tokens.
"""

from frugalmoe.ablate import Study

STUDY = Study(
    question="How much of expert choice's training loss is the future that it reads?",
    expectation=(
        "An expert ranks all tokens of a sequence: a token's routing depends on later ones (Zhou et al., 2202.09368; "
        "2603.11535 has 2.910 with pools of 2 k tokens and 2.841 with 64 k, evaluated causally). On random tokens "
        "sequence-level expert choice goes below the entropy floor. Expected: a training loss that flatters, and a "
        "gap to causal evaluation; expert threshold, its causal form, without the gap."
    ),
    base="configs/study.py",
    arms={
        "token_choice": {},
        "expert_choice": {"model.moe.router": "expert_choice"},
        "expert_threshold": {"model.moe.router": "expert_threshold"},
    },
    baseline="token_choice",
    varies=("model.moe.router",),
    metrics=("eval/loss/mean", "train/loss", "router/active_per_token", "router/max_violation", "router/entropy"),
    evaluate_with=True,  # the weights of one arm under the causal router of another
)
