"""How does the loss depend on compute, on the share of experts that a token uses, and on how finely they are cut?

Commands:  frugalmoe ablate experiments/leverage.py
           frugalmoe report runs/leverage --fit=leverage    (fits L(C, A, G), and the leverage over dense)
Cost:      42 runs of 1.02 M tokens: an hour of one CPU core. Not trained whole; ten of them, seed 0 of width 48
           and of three arms of width 96, are in tests/leverage_runs.

The learning rate is constant after the warmup, so that the loss at any step is that of a run which ends there: one run
gives all its numbers of tokens.
"""

from frugalmoe.ablate import Study


def width(dim: int) -> dict:
    """The base at another width, as in experiments/isoflop.py."""
    return {
        "model.dim": dim,
        "model.dense_dim": 2 * dim,
        "model.head_dim": dim // 4,
        "optim.learning_rate": 0.192 / dim,
    }


def experts(dim: int, total: int, active: int) -> dict:
    """As many FLOPs whatever the numbers: `active` experts are as wide together as a dense feed-forward, 2 dim."""
    return width(dim) | {
        "model.num_dense_layers": 1,
        "model.moe.num_experts": total,
        "model.moe.num_experts_per_token": active,
        "model.moe.expert_dim": 2 * dim // active,
    }


def arms(dim: int) -> dict:
    """Dense; A of 1/2, 1/8, 1/32 with G = 2; G of 1, 4, 8 with A = 1/8."""
    return {
        f"dense_{dim}": width(dim) | {"model.num_dense_layers": 4},
        **{f"active_{total // 2}th_{dim}": experts(dim, total, 2) for total in (4, 16, 64)},
        **{f"cut_{active}_{dim}": experts(dim, 8 * active, active) for active in (1, 4, 8)},
    }


STUDY = Study(
    question="How does the loss depend on compute, on the share of active experts, and on how finely they are cut?",
    expectation=(
        "Greater Leverage (2507.17702) fits 300 models of 3e18 to 3e20 FLOPs: leverage over dense grows as fewer "
        "experts are active, grows with compute, and is largest at a granularity of about 12. A million times below, "
        "its law says 0.6 to 0.9, less than a dense model. Expected here: a leverage slightly above 1, and a loss "
        "that falls with granularity."
    ),
    base="configs/study.py",
    overrides={
        "optim.schedule": "constant",
        "train.steps": 500,
        "train.eval_every": 50,
        # One weight rule for every K, as in experiments/granularity.py: K = 1 needs weights that are not renormalized.
        "model.moe.options": {"renormalize": False, "scale": 8.0},
    },
    arms=arms(48) | arms(96),
    baseline="dense_48",
    varies=(
        "model.dim", "model.dense_dim", "model.head_dim", "model.num_dense_layers", "model.moe.num_experts",
        "model.moe.num_experts_per_token", "model.moe.expert_dim", "optim.learning_rate",
    ),
    equal_flops=False,
)  # fmt: skip
