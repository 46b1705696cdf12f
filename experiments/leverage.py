"""How does the loss depend on compute, on the share of experts that a token uses, and on how finely they are cut?

Commands:  frugalmoe ablate experiments/leverage.py
           frugalmoe report runs/leverage --fit=leverage    (fits L(C, A, G), and the leverage over dense)
Cost:      45 runs of 0.41 M tokens: some half an hour of a CPU core with no other work. Not trained whole: beside other
           work (2026-11-30) three runs and a part of the fourth took 103 s of CPU time in ten minutes of the clock, and
           the rest was to take 103 minutes.

All arms see as many tokens, to the end of one decay, and compute differs by width alone: points along a run, or of two
widths at their own numbers of tokens, do not lie on one curve of compute. Ten runs of an earlier form of this study, in
tests/leverage_runs, scatter by 3.2% about it (docs/planner.md). Leverage is then how many times as large, in FLOPs of a
token, a dense model has to be. Dense models have a width more, between the two, which shows whether their curve bends.
"""

from frugalmoe.ablate import Study

WIDTHS = (32, 64)


def width(dim: int) -> dict:
    """The base at another width, as in experiments/isoflop.py."""
    return {
        "model.dim": dim,
        "model.dense_dim": 2 * dim,
        "model.head_dim": dim // 4,
        "optim.learning_rate": 0.192 / dim,
    }


def experts(dim: int, share: int, active: int) -> dict:
    """A = 1 / share, G = active. As many FLOPs whatever they are: active experts are together as wide as a dense
    feed-forward, 2 dim. One weight rule for all: K = 1 needs weights that are not renormalized, and times `share` they
    sum to about 1 at the start.
    """
    return width(dim) | {
        "model.num_dense_layers": 1,
        "model.moe.num_experts": share * active,
        "model.moe.num_experts_per_token": active,
        "model.moe.expert_dim": 2 * dim // active,
        "model.moe.options": {"renormalize": False, "scale": float(share)},
    }


STUDY = Study(
    question="How does the loss depend on compute, on the share of active experts, and on how finely they are cut?",
    expectation=(
        "Greater Leverage (2507.17702) fits 300 models of 3e18 to 3e20 FLOPs: leverage over dense grows as fewer "
        "experts are active, grows with compute, and is largest at a granularity of about 12. A million times below, "
        "its law says 0.5 to 0.9, less than a dense model. Expected here, after ten runs of an earlier form: a "
        "leverage of 0.9 to 1.1 that two budgets and three seeds do not tell from 1, more with G = 4 than with G = 1, "
        "and no trend with compute that is wider than its band."
    ),
    base="configs/study.py",
    overrides={"train.steps": 200, "train.eval_every": 100},
    arms={f"dense_{dim}": width(dim) | {"model.num_dense_layers": 4} for dim in (WIDTHS[0], 48, WIDTHS[1])}
    | {
        f"active_{share}th_cut_{active}_{dim}": experts(dim, share, active)
        for dim in WIDTHS
        for share in (2, 8, 32)
        for active in (1, 4)
    },
    baseline="dense_32",
    varies=(
        "model.dim", "model.dense_dim", "model.head_dim", "model.num_dense_layers", "model.moe.num_experts",
        "model.moe.num_experts_per_token", "model.moe.expert_dim", "model.moe.options", "optim.learning_rate",
    ),
    equal_flops=False,
)  # fmt: skip
