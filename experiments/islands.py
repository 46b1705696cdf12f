"""What does training apart cost: how often must islands meet, how many may they be, and how should they merge?

Command:   frugalmoe ablate experiments/islands.py --jobs=2
Cost:      51 runs of 0.41 M tokens, islands under a virtual clock in one process.

Found:     training apart costs much at the beginning of a training, and the number of islands more than the steps
           between two meetings: 0.16 to 0.23 nats with two, 0.60 to 0.91 with eight. Each island has a share of the
           batch at the rate of the whole one, and a mean of deltas that agree little is short; no arm has a rate of its
           own. 4 bits are free, and 2 nearly are (0.01 nats behind float32; published: broken). The radial rule is 0.15
           behind the mean (published: ahead), `edit` is equal to it, and Nesterov's momentum has too few rounds: 0.7 of
           the published rates is best and behind the plain mean in two of three seeds, 0.1 has hardly moved.

All arms read the same tokens in the same number of steps: M islands share the batch of a step. `m4_h50` are four
islands that meet each 50 steps. The merge rules, outer steps and bits are tried with eight islands that meet each 50.
"""

from frugalmoe.ablate import Study

AVERAGE = {"islands.learning_rate": 1.0, "islands.momentum": 0.0}  # the outer parameters are the mean of the islands'


def islands(count: int, steps: int, **more: object) -> dict:
    section = {f"islands.{name}": value for name, value in more.items()}
    return {"islands.virtual": count, "islands.round_steps": steps, **AVERAGE, **section}


def nesterov(rate: float) -> dict:
    return islands(8, 50, learning_rate=rate, momentum=0.9)


STUDY = Study(
    question="What does training apart cost: how often must islands meet, how many may they be, how should they merge?",
    expectation=(
        "DiLoCo (2311.08105) loses nothing at 500 steps a round and 8 workers, from a trained model on; here all is "
        "the beginning of a training, where islands drift apart fastest: a loss that grows with the steps of a round "
        "and with the number of islands. Decoupled DiLoCo (2604.21428) has radial-directional averaging above the "
        "mean by 1.3 points at 8 islands, int4 equal to bfloat16, and 2 bits broken. Outer rates of 0.1 to 0.7 with "
        "momentum 0.9 are published; of 8 rounds the momentum sees few."
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
        "train.steps": 400,
        "train.eval_every": 0,
    },
    arms={
        "together": {},
        **{f"m{count}_h{steps}": islands(count, steps) for count in (2, 4, 8) for steps in (10, 50, 200)},
        "nesterov_0.1": nesterov(0.1),
        "nesterov_0.3": nesterov(0.3),
        "nesterov_0.7": nesterov(0.7),
        "radial": islands(8, 50, merge="radial"),
        "edit": islands(8, 50, merge="edit"),
        "int4": islands(8, 50, bits=4),
        "int2": islands(8, 50, bits=2),
    },
    baseline="together",
    varies=("islands",),
)
