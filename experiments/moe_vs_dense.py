"""Does a mixture of experts beat a dense model of equal active FLOPs, and how much compute does it save?

Command:   frugalmoe ablate experiments/moe_vs_dense.py --jobs=2
Cost:      12 runs of 0.61 M tokens.
"""

from frugalmoe.ablate import Study


def experts(count: int) -> dict:
    return {"model.num_dense_layers": 1, "model.moe.num_experts": count}


STUDY = Study(
    question="Does a mixture of experts beat a dense model of equal active FLOPs, and how much compute does it save?",
    expectation=(
        "At 0.2-0.3 B active parameters and 100 B tokens DeepSeekMoE (2401.06066) reports a loss of 2.060 dense, 1.881 "
        "for Switch and 1.867 for GShard top-2; at 195 M active and 10 B tokens 2603.11535 has 3.002 dense and 2.892 "
        "for top-k. With 0.6 M tokens each expert sees few of them: a smaller gain, and small E may win."
    ),
    base="configs/study.py",
    arms={
        # a feed-forward of width K * expert_dim = 2 * 128 in each layer
        "dense": {"model.num_dense_layers": 4},
        "experts_4": experts(4),
        "experts_16": experts(16),
        "experts_64": experts(64),
    },
    baseline="dense",
    varies=("model.num_dense_layers", "model.moe.num_experts"),
    tolerance=0.05,  # the router's own product: 4% with 64 experts
)
