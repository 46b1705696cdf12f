"""All causal strategies in one table, at equal active FLOPs.

Command:   frugalmoe ablate experiments/league.py --jobs=2
Cost:      three runs of 0.61 M tokens for each strategy that does not declare a leak.

The arms are the catalogue: a new strategy is in the league without an edit here. Each keeps its defaults; what its
paper adds to the loss, or cannot do without, is in `OWN`.
"""

from frugalmoe.ablate import Study
from frugalmoe.routing import strategies
from frugalmoe.schema import MoE

TOP_1 = {"model.moe.num_experts": 8, "model.moe.num_experts_per_token": 1, "model.moe.expert_dim": 256}
NO_BALANCE = {"model.moe.losses.load_balance": 0.0}
OWN = {
    "switch_top1": TOP_1,
    "llama4": TOP_1,
    "sigmoid_bias": NO_BALANCE,
    "quantile_balance": NO_BALANCE,
    "longcat": NO_BALANCE,
    "noisy_topk": {**NO_BALANCE, "model.moe.losses.importance": 0.1, "model.moe.losses.load": 0.1},
    "norm_logits": {**NO_BALANCE, "model.moe.losses.adaptive_balance": 0.01},
    "similarity_preserving": {**NO_BALANCE, "model.moe.losses.orthogonality": 0.1},
    "relu": {**NO_BALANCE, "model.moe.losses.l1": 1.0},
    # the paper's weights are not known to us
    "lpr": {
        **NO_BALANCE,
        "model.moe.losses.prototype_diversity": 0.01,
        "model.moe.losses.prototype_alignment": 0.01,
        "model.moe.losses.latent_kl": 0.001,
    },
    "stochastic_warmup": {"model.moe.options.steps": 75},
    "recurrent": {"model.moe.options.hidden": 32},  # at the default of 128 it multiplies 43% of all the rest
    "zaya": {"model.moe.options.hidden": 16},  # likewise
}


def is_causal(name: str) -> bool:
    router = strategies.get(name)
    return router.claim("causal", MoE(options=router.options())) != "leak"


STUDY = Study(
    question="Which causal routing strategy is best at equal active FLOPs, and which differences are real?",
    expectation=(
        "Published gaps between balance mechanisms and gates are small: 2.892-2.898 at 195 M active and 10 B tokens "
        "(2603.11535), with expert threshold ahead at 2.844; five cosine variants 33.93-34.72 PPL against 32.76 linear "
        "(2604.14419). Expected: most are not distinguishable at n = 3; random and hashed routers are clearly behind."
    ),
    base="configs/study.py",
    arms={name: {"model.moe.router": name, **OWN.get(name, {})} for name in strategies.names() if is_causal(name)},
    baseline="topk_softmax",
    varies=(
        "model.moe.router",
        "model.moe.losses",
        "model.moe.num_experts",
        "model.moe.num_experts_per_token",
        "model.moe.expert_dim",
    ),
    tolerance=0.05,  # what the gates themselves multiply: 3% with cosines or recurrent states
    metrics=(
        "eval/loss/mean",
        "eval/bits_per_byte/mean",
        "router/max_violation",
        "router/entropy",
        "router/drop_rate",
        "router/active_per_token",
    ),
)
