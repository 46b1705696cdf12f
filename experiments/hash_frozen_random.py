"""Does a router have to be learned?

Command:   frugalmoe ablate experiments/hash_frozen_random.py --jobs=2
Cost:      18 runs of 0.61 M tokens.
"""

from frugalmoe.ablate import Study


def router(name: str, **options: object) -> dict:
    return {"model.moe.router": name, **{f"model.moe.options.{k}": v for k, v in options.items()}}


STUDY = Study(
    question="Does a router have to be learned?",
    expectation=(
        "Hash 1.932 against 1.881 for Switch at 100 B tokens (2401.06066); hash, fixed random and top-1 1.1 to 2.2 PPL "
        "behind at 76-84 M parameters (2604.14419); frozen random about equal at GPT-2-small scale (2402.13089). "
        "Expected: learned < frozen, hash < random per token, gaps of 0.03-0.06 nats; hash may lead early in training."
    ),
    base="configs/study.py",
    arms={
        "learned": {},
        "hash": router("hash"),
        "hash_learned_gate": router("hash", gate="learned"),
        "frozen_random": router("frozen_random"),
        "round_robin": router("round_robin"),
        "random": router("random"),
    },
    baseline="learned",
    varies=("model.moe.router",),
)
