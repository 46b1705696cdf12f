"""Does training apart cost an MoE more than a dense model, and what becomes of experts when islands see other domains?

Command:   frugalmoe ablate experiments/islands_domains.py
Cost:      24 runs of 0.26 M tokens, four islands under a virtual clock in one process.

Found:     it costs both the same (0.424 and 0.429 nats; the difference is -0.005 ± 0.046). Islands of one domain each
           lose 0.22 nats more, nearly all of it in code, which is unlike the rest; and experts know less of domains
           then, not more, as was expected: the balance loss spreads each domain over all of them.

Four sources in turn: row n of the data is of domain n mod 4. With four streams each island reads one domain
(`domains`), with 64 all of them (`mixed`). `h32` meet each 32 steps, `h128` each 128. The dense feed-forward has the
width of the experts that are active.
"""

from frugalmoe.ablate import Study

AVERAGE = {"islands.learning_rate": 1.0, "islands.momentum": 0.0}  # the outer parameters are the mean of the islands'
DENSE = {"model.num_dense_layers": 3}
DOMAINS = ("code", "literature", "novel", "speeches")


def islands(steps: int, streams: int) -> dict:
    return {"islands.virtual": 4, "islands.round_steps": steps, "islands.streams": streams, **AVERAGE}


STUDY = Study(
    question=(
        "Does training apart cost an MoE more than a dense model, and what becomes of experts when islands see other "
        "domains?"
    ),
    expectation=(
        "Nothing published tells MoE from dense here (Decoupled DiLoCo, 2604.21428, says that local balancing cannot "
        "be optimized globally). The experts of two islands that part at the start need not mean the same, so that "
        "their mean is worth less: more loss than dense, and more with more steps between meetings. With one domain "
        "for each island the balance loss spreads each domain over all experts, so that experts should know less of "
        "domains than after training together."
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
        "data.sources": {name: {"path": f"quickstart:{name}", "weight": 0.25} for name in DOMAINS},
        "train.steps": 256,
        "train.eval_every": 0,
    },
    arms={
        "together": {},
        "mixed_h32": islands(32, 64),
        "mixed_h128": islands(128, 64),
        "domains_h32": islands(32, 4),
        "domains_h128": islands(128, 4),
        "dense_together": DENSE,
        "dense_mixed_h32": {**DENSE, **islands(32, 64)},
        "dense_domains_h32": {**DENSE, **islands(32, 4)},
    },
    baseline="together",
    varies=("islands", "model.num_dense_layers"),
    tolerance=0.05,  # the router's own product
)
