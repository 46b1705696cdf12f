"""What does a slow island cost when rounds end after so many steps, and what when they end after a time?

Command:   frugalmoe ablate experiments/islands_stragglers.py
Cost:      27 runs of 0.13 to 0.26 M tokens, four islands under a virtual clock in one process.

Found:     rounds of time read 1.74 and 3.72 times as many tokens, as the closed form says, and are 0.54 and 0.88 nats
           ahead in equal time. Weights by tokens are ahead of the plain mean, by 0.03 nats with one slow island and by
           0.30 with speeds of 1 : 1/2 : 1/4 : 1/8; `edit` with step_ratio = 0.5 is 0.03 behind it.

A round of `steps` is 32 updates of each island, one of `time` 32 virtual seconds. `slow` has one island of four at half
speed, `slow8` speeds of 1 : 1/2 : 1/4 : 1/8. In `as_slowest` all islands have the speed of the slowest: what equal
steps would have made of the same time, with a whole schedule.
"""

from frugalmoe.ablate import Study

AVERAGE = {"islands.learning_rate": 1.0, "islands.momentum": 0.0}  # the outer parameters are the mean of the islands'
SLOW, SLOW8 = "1,1,1,2", "1,2,4,8"  # virtual seconds of a step
STEP_RATIO = {"islands.merge_options": {"step_ratio": 0.5}}  # as A-EDiT has it


def steps(seconds: str) -> dict:
    return {"islands.virtual": 4, "islands.round_steps": 32, "islands.virtual_seconds": seconds, **AVERAGE}


def timed(seconds: str, merge: str = "mean", **more: object) -> dict:
    return {**steps(seconds), "islands.round_seconds": 32.0, "islands.merge": merge, **more}


STUDY = Study(
    question="What does a slow island cost when rounds end after so many steps, and what when they end after a time?",
    expectation=(
        "EDiT (2412.07210) reports 66.1% more throughput with rounds of time where one worker in 250 is slow by a "
        "factor of 1.66 in a step. By the closed form of docs/islands.md, who waits for one island of half the speed "
        "keeps 4 / 2 of 3.5, so rounds of time are 75% faster; with speeds of 1 : 2 : 4 : 8 they are 3.75 times as "
        "fast. In equal time the loss should follow the tokens, a little less where few islands made most of them; "
        "weights by tokens should be ahead of the plain mean the more the speeds differ."
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
        "train.steps": 256,
        "train.eval_every": 0,
    },
    arms={
        "even": steps("1"),
        "slow_steps": steps(SLOW),
        "slow_as_slowest": timed("2"),
        "slow_time": timed(SLOW),
        "slow_time_tokens": timed(SLOW, "tokens"),
        "slow_time_edit": timed(SLOW, "edit", **STEP_RATIO),
        "slow8_as_slowest": timed("8"),
        "slow8_time": timed(SLOW8),
        "slow8_time_tokens": timed(SLOW8, "tokens"),
    },
    baseline="even",
    varies=("islands",),
    metrics=(
        "eval/loss/mean",
        "islands/seconds",
        "islands/tokens",
        "islands/tokens_per_second",
        "islands/share_trained",
        "router/max_violation",
        "router/entropy",
    ),
)
