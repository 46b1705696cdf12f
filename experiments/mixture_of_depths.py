"""Is it better to let tokens skip blocks than to have fewer blocks?

Command:   frugalmoe ablate experiments/mixture_of_depths.py --jobs=2
Cost:      12 runs of 0.61 M tokens.
"""

from frugalmoe.ablate import Study

STUDY = Study(
    question="Is it better to let tokens skip blocks than to have fewer blocks?",
    expectation=(
        "Mixture of depths (Raposo et al., 2404.02258), at its best with an eighth of the tokens in every other block, "
        "matches the baseline at equal training FLOPs with a fraction of the FLOPs per forward pass. Its training "
        "selection leaks and its evaluation is causal. Expected: better than half of the blocks, which costs about as "
        "much, and near all of them; a training loss that flatters a little."
    ),
    base="configs/study.py",
    arms={
        "4_blocks": {},
        "2_blocks": {"model.num_layers": 2},
        "an_eighth_passes": {"model.mixture_of_depths.capacity": 0.125},  # of every other block
        "half_passes": {"model.mixture_of_depths.capacity": 0.5},
    },
    baseline="4_blocks",
    varies=("model.num_layers", "model.mixture_of_depths"),
    overrides={"model.num_dense_layers": 0},
    metrics=("eval/loss/mean", "train/loss", "depth/share", "depth/predictor_accuracy", "router/max_violation"),
    equal_flops=False,  # what a skipped block saves is the question
)
