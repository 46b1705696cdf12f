"""From a trained model on, as DiLoCo begins: which outer rate, and is radial averaging ahead of the mean of 16 islands?

Command:   for s in 0 1 2; do
             frugalmoe train --config=study --config.model.dim=64 --config.model.num_layers=3 \
               --config.model.dense_dim=128 --config.model.num_heads=2 --config.model.num_kv_heads=1 \
               --config.model.moe.num_experts=8 --config.model.moe.expert_dim=64 --config.data.sequence_length=64 \
               --config.train.steps=256 --config.train.eval_every=0 --config.train.seed=10$s \
               --workdir=runs/islands_trained_from/$s
           done
           frugalmoe ablate experiments/islands_trained.py
Cost:      3 runs of 0.26 M tokens, and 18 of 0.10 M, islands under a virtual clock in one process.

Islands share the batch of a step and meet each 8 steps, 12 times. `nesterov_r` is SGD with Nesterov momentum 0.9 and
rate r outside, of eight islands; all others take the mean of the islands' parameters, or their radial mean.
"""

from frugalmoe.ablate import Study

FROM = "runs/islands_trained_from/{seed}"


def islands(count: int, merge: str = "mean", rate: float = 1.0, momentum: float = 0.0) -> dict:
    section = {"virtual": count, "round_steps": 8, "merge": merge, "learning_rate": rate, "momentum": momentum}
    return {f"islands.{name}": value for name, value in section.items()}


ARMS = {
    "together": {},
    "m8_mean": islands(8),
    **{f"m8_nesterov_{rate}": islands(8, rate=rate, momentum=0.9) for rate in (0.1, 0.7)},
    "m16_mean": islands(16),
    "m16_radial": islands(16, "radial"),
}

STUDY = Study(
    question="From a trained model on: which outer rate, and is radial averaging ahead of the mean of 16 islands?",
    expectation=(
        "DiLoCo (2311.08105) begins with a trained model, and with rate 0.7 and momentum 0.9 it loses nothing with 8 "
        "workers; Decoupled DiLoCo (2604.21428) has radial-directional averaging above the mean by 1.3 points at 8 "
        "learners and 1.8 at 16. In experiments/islands.py, at the beginning of a training, islands lose 0.6 nats and "
        "more, no rate with momentum is ahead of the mean, and radial is behind it. From a trained model on the loss "
        "of training apart should be far smaller, and both might turn."
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
        "train.steps": 96,
        "optim.warmup_steps": 8,
        "train.eval_every": 0,
    },
    arms=ARMS,
    origins={name: FROM for name in ARMS},
    baseline="together",
    varies=("islands",),
)
