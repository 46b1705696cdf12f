"""Does a mixture of experts gain more over a dense model on many kinds of text than on four?

Command:   frugalmoe ablate experiments/moe_vs_dense_mixed.py --jobs=2
Cost:      9 runs of 0.61 M tokens. Data: 158 MB of Debian packages, fetched once.
"""

from frugalmoe.ablate import Study


def experts(count: int) -> dict:
    return {"model.num_dense_layers": 1, "model.moe.num_experts": count}


STUDY = Study(
    question="Does a mixture of experts gain more over a dense model on many kinds of text than on four?",
    expectation=(
        "OLMoE (2409.02060) finds experts that belong to domains such as GitHub, arXiv and Wikipedia, and a loss for "
        "which a dense model of equal active parameters needs three times the tokens. On four kinds of text in one "
        "language 64 experts are ahead of dense by 0.03 nats, within the noise (moe_vs_dense). Expected: fifteen kinds "
        "in several languages widen the gap at the same number of tokens."
    ),
    base="configs/study.py",
    arms={"dense": {"model.num_dense_layers": 4}, "experts_16": experts(16), "experts_64": experts(64)},
    baseline="dense",
    varies=("model.num_dense_layers", "model.moe.num_experts"),
    overrides={"data.path": "mixed"},
    tolerance=0.05,  # the router's own product: 4% with 64 experts
)
