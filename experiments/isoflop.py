"""How does the loss of this mixture of experts fall with size and tokens, and does that foretell a larger run?

Commands:  frugalmoe ablate experiments/isoflop.py --arms=width_32,width_48,width_64,width_96
           frugalmoe report runs/isoflop --fit       (fits these four, and foretells every arm that is not trained)
           frugalmoe ablate experiments/isoflop.py   (trains that one; the report says how far off the foretelling was)
Cost:      15 runs of 1.02 M tokens: some twenty minutes of one CPU core.

The learning rate is constant after the warmup, so that the loss at any step is that of a run which ends there: one run
of a size gives all its numbers of tokens, where a rate that decays would need a run for each (2405.18392).
"""

from frugalmoe.ablate import Study


def width(dim: int) -> dict:
    """The base at another width: layers, heads and experts as many, each as wide in proportion.

    The rate goes with 1 / width. In trials of 200 steps width 32 was best at the largest of 1.5e-3, 3e-3 and 6e-3
    (4.93, 4.55, 4.44 nats), and width 128 better at 1.5e-3 than at 3e-3 (4.39, 4.76).
    """
    return {
        "model.dim": dim,
        "model.dense_dim": 2 * dim,
        "model.head_dim": dim // 4,
        "model.moe.expert_dim": dim,
        "optim.learning_rate": 0.192 / dim,
    }


STUDY = Study(
    question="How does the loss fall with size and tokens, and does that foretell the loss of a larger run?",
    expectation=(
        "A sum of a constant and two powers, with exponents of about 0.34 in parameters and 0.28 in tokens "
        "(Hoffmann et al., 2203.15556, approach 3: dense models of 70 M to 16 B). Ling 2.0 foretells losses within "
        "0.01 nats from five models of 0.5 to 8 B (2510.22115). Here a run ends in its first quarter of an epoch, and "
        "the largest of the four is a hundred thousand times smaller: expected are larger exponents, and the run of "
        "width 160 foretold within 0.05 nats."
    ),
    base="configs/study.py",
    overrides={"optim.schedule": "constant", "train.steps": 500, "train.eval_every": 50},
    arms={f"width_{dim}": width(dim) for dim in (32, 48, 64, 96, 160)},
    baseline="width_32",
    varies=("model.dim", "model.dense_dim", "model.head_dim", "model.moe.expert_dim", "optim.learning_rate"),
    equal_flops=False,
)
