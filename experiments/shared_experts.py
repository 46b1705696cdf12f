"""Do shared experts, which every token uses, help at equal active and total parameters?

Command:   frugalmoe ablate experiments/shared_experts.py --jobs=2
Cost:      9 runs of 0.61 M tokens.
"""

from frugalmoe.ablate import Study


def shared(count: int) -> dict:
    """Of 32 experts so many are shared; four are active for a token in all."""
    return {
        "model.moe.num_shared_experts": count,
        "model.moe.num_experts": 32 - count,
        "model.moe.num_experts_per_token": 4 - count,
    }


STUDY = Study(
    question="Do shared experts, which every token uses, help at equal active and total parameters?",
    expectation=(
        "Contested. DeepSeekMoE (2401.06066): taking the shared expert away and adding a routed one costs 1.808 -> "
        "2.414 on Pile; OLMoE (2409.02060) and Yuan 2.0-M32 find no gain from training with one. Expected "
        "here: within 0.005 nats."
    ),
    base="configs/study.py",
    overrides={"model.moe.expert_dim": 64},
    arms={f"shared_{count}": shared(count) for count in (0, 1, 2)},
    baseline="shared_0",
    varies=("model.moe.num_shared_experts", "model.moe.num_experts", "model.moe.num_experts_per_token"),
)
