"""How should the load of experts be balanced, and what does it cost in loss?

Command:   frugalmoe ablate experiments/balance.py --jobs=2
Cost:      18 runs of 0.61 M tokens.
"""

from frugalmoe.ablate import Study

NO_LOSS = {"model.moe.losses.load_balance": 0.0}


def scope(name: str, **fields: object) -> dict:
    return {"model.moe.load_balance_scope": name, **{f"model.moe.{k}": v for k, v in fields.items()}}


STUDY = Study(
    question="How should the load of experts be balanced, and what does it cost in loss?",
    expectation=(
        "Loss-free balancing (2408.15664): PPL 9.50 with the bias and 9.56 with the loss, max violation 0.04 and 0.72. "
        "At 195 M active and 10 B tokens 2603.11535 has 2.893 without balance, 2.892 with the loss, 2.898 with the "
        "bias. Quantile balancing (kexue.fm 11619) needs no step size. Qiu et al. (2501.11873) gain from the global "
        "scope. Expected here: losses within 0.01, clear differences in max violation."
    ),
    base="configs/study.py",
    arms={
        "none": NO_LOSS,
        "loss_sequence": scope("sequence"),
        "loss_micro": scope("micro_batch", load_balance_group=4),
        "loss_global": scope("global"),
        # softmax scores with normalised weights, as the other arms have: the balance alone differs
        "bias": {**NO_LOSS, "model.moe.router": "sigmoid_bias", "model.moe.options.score": "softmax"},
        "quantile": {**NO_LOSS, "model.moe.router": "quantile_balance", "model.moe.options.score": "softmax"},
    },
    baseline="loss_global",
    varies=(
        "model.moe.router",
        "model.moe.losses",
        "model.moe.load_balance_scope",
        "model.moe.load_balance_group",
    ),
    metrics=(
        "eval/loss/mean",
        "router/max_violation",
        "router/load_entropy",
        "router/dead_experts",
        "router/entropy",
    ),
)
