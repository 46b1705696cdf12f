"""Can a merge of checkpoints at a constant rate stand for the decay of the rate, and how long should it reach back?

Command:   config="--config=experiments/merge_vs_decay.py"
           for s in 0 1 2; do
             at="--config.train.seed=$s --workdir=runs/merge_from"
             frugalmoe train $config ${at}/constant_$s --config.optim.decay_fraction=0
             for share in 0.2 0.4; do
               frugalmoe train $config ${at}/decay${share}_$s --config.optim.decay_fraction=$share
             done
             merge="frugalmoe checkpoints runs/merge_from/constant_$s merge"
             for n in 4 8 16 24; do $merge --last=$n --to=runs/merge_from/mean${n}_$s; done
             $merge --steps=380,420,460,500 --to=runs/merge_from/few_$s
             $merge --last=16 --weights=1-sqrt --to=runs/merge_from/sqrt_$s
             $merge --last=16 --weights=linear --to=runs/merge_from/linear_$s
           done
           frugalmoe ablate experiments/merge_vs_decay.py
Cost:      9 runs of 0.51 M tokens, and 21 merges.
Found:     a merge stands for the decay: without either the loss is 0.092 nats higher, the means of the last 8 and 16
           checkpoints are where the decay is. How far it reaches back matters most: 80 updates best, 240 worse by
           0.038 nats. Four checkpoints are as good as sixteen over the same reach. Weights that prefer the newest are
           0.016 ahead of the mean, 1-sqrt 0.036 behind it, unlike published: the model still learns fast.

All runs of a seed are one until the decay begins: the same start, the same batches, the same rate. A study trains; here
the models are there already, so that each arm begins with one and takes a single step at a rate that moves no number.
"""

from ml_collections import ConfigDict

from frugalmoe.ablate import Study
from frugalmoe.config import override, read

FROM = "runs/merge_from"


def get_config(arg: str | None = None) -> ConfigDict:
    """The runs that are merged, or decay."""
    fields = {
        "name": "merge_from",
        "model.dim": 64,
        "model.num_layers": 3,
        "model.dense_dim": 128,
        "model.num_heads": 2,
        "model.num_kv_heads": 1,
        "model.moe.num_experts": 8,
        "model.moe.expert_dim": 64,
        "data.sequence_length": 64,
        "optim.learning_rate": 3e-3,
        "optim.final_fraction": 0.0,
        "train.steps": 500,
        "train.eval_every": 0,
        "checkpoint.every_steps": 10,
        "checkpoint.keep_last": 24,
    }
    return override(read("configs/study.py"), fields)


STUDY = Study(
    question=(
        "Can a merge of checkpoints at a constant rate stand for a decay of the rate, and how far should it reach back?"
    ),
    expectation=(
        "WSM (2507.17634) has the mean of checkpoints 1.3 points of benchmarks above decay, although its loss is "
        "slightly higher; what matters most is how long the merge reaches back, then how many checkpoints it has, and "
        "1-sqrt is slightly above the mean. Expected of the loss here: merges far ahead of the last checkpoint and at "
        "most equal to the decay of the same length; too long a reach is worse, for the model still learns fast."
    ),
    base=get_config,
    overrides={
        "optim.learning_rate": 1e-12,
        "optim.schedule": "constant",
        "optim.warmup_steps": 0,
        "train.steps": 1,
        "checkpoint.every_steps": 0,
        "train.eval_rows": 256,
    },
    arms={
        "decay_20": {},  # of the updates after the warmup, the last 92
        "decay_40": {},  # the last 184
        "last": {},  # the constant rate to the end
        "mean_4": {},  # checkpoints of each 10 steps: the merge reaches back 40
        "mean_8": {},
        "mean_16": {},
        "mean_24": {},
        "few_of_16": {},  # as far back as mean_16, each 40 steps
        "sqrt_16": {},
        "linear_16": {},
    },
    origins={
        "decay_20": f"{FROM}/decay0.2_{{seed}}",
        "decay_40": f"{FROM}/decay0.4_{{seed}}",
        "last": f"{FROM}/constant_{{seed}}",
        **{f"mean_{n}": f"{FROM}/mean{n}_{{seed}}" for n in (4, 8, 16, 24)},
        "few_of_16": f"{FROM}/few_{{seed}}",
        "sqrt_16": f"{FROM}/sqrt_{{seed}}",
        "linear_16": f"{FROM}/linear_{{seed}}",
    },
    baseline="decay_20",
    varies=(),
    metrics=("eval/loss/mean", "eval/bits_per_byte/mean", "router/max_violation", "router/entropy"),
)
