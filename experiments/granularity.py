"""Do many small experts beat few large ones, at equal active and equal total parameters?

Command:   frugalmoe ablate experiments/granularity.py --jobs=2
Cost:      15 runs of 0.61 M tokens.
"""

from frugalmoe.ablate import Study


def split(factor: int) -> dict:
    """Eight experts of width 256, one per token, each cut into `factor` parts."""
    return {
        "model.moe.num_experts": 8 * factor,
        "model.moe.num_experts_per_token": factor,
        "model.moe.expert_dim": 256 // factor,
    }


STUDY = Study(
    question="Do many small experts beat few large ones, at equal active and equal total parameters?",
    expectation=(
        "DeepSeekMoE (2401.06066) goes from 1.867 (GShard top-2) to 1.808 with fine-grained experts and a shared one "
        "at 100 B tokens; 2402.07871 finds a gain that grows with granularity and saturates. Expected here: 0.01-0.03 "
        "nats per doubling at first, less later, and slower steps with small experts."
    ),
    base="configs/study.py",
    # One weight rule for every K. With K = 1 renormalised weights would give the router no gradient; unnormalised ones
    # sum to about K / E = 1/8 at the start in every arm.
    overrides={"model.moe.options": {"renormalize": False, "scale": 8.0}},
    arms={f"split_{factor}": split(factor) for factor in (1, 2, 4, 8, 16)},
    baseline="split_1",
    varies=("model.moe.num_experts", "model.moe.num_experts_per_token", "model.moe.expert_dim"),
    tolerance=0.08,  # the router's own product: 7% with 128 experts
)
