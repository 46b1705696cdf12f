"""What a routing strategy costs: the time of a training step under every strategy, beside `topk_softmax`.

    python benchmarks/routers_bench.py [--rounds 11] [--routers hash sigmoid_bias ...]

Small layers make routing a large share of the step: 4096 tokens, D=256, 16 experts of F=256, two per token. One round
is a step of every strategy, in turn, in this process. Prints a table; with all strategies it also writes ROUTERS.md.
"""

import argparse
import os
import statistics
import time
from collections.abc import Mapping, Sequence

import flax
import jax
import optax
import report
from measure import HERE, WARM_UP
from sizes import Size
from worker_frugalmoe import Training, training_config

from frugalmoe import sharding
from frugalmoe.errors import UserError
from frugalmoe.files import write_generated
from frugalmoe.routing import strategies

SIZE = Size(experts=16, top_k=2, expert_dim=256, layers=2, vocabulary=512)
BASE = "topk_softmax"
ONE = f"{BASE}, K=1"  # what strategies for one expert per token are compared with
TARGET = 1.15
NEEDS = {"relu": {"model.moe.losses.l1": 1.0}}  # what a strategy does not run without


def overrides(name: str) -> dict[str, object]:
    """The config of a strategy: two experts per token, or one where its own rules ask for it."""
    if name == ONE:
        return {"model.moe.num_experts_per_token": 1, "model.moe.options.renormalize": False}
    for k in (2, 1):
        values = {"model.moe.router": name, "model.moe.num_experts_per_token": k, **NEEDS.get(name, {})}
        try:
            training_config(SIZE, False, values)
            return values
        except UserError as rule:
            broken = rule
    raise broken


def base_of(name: str) -> str:
    return ONE if overrides(name)["model.moe.num_experts_per_token"] == 1 else BASE


def measure(names: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of each counted step, by strategy."""
    seconds = {name: [] for name in names}
    mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1))
    with jax.set_mesh(mesh):
        trainings = {name: Training(SIZE, False, mesh, overrides(name)) for name in names}
        for i in range(WARM_UP + rounds):
            batch = trainings[names[0]].batch()
            for name, training in trainings.items():
                began = time.perf_counter()
                training.step(batch)
                if i >= WARM_UP:
                    seconds[name].append(time.perf_counter() - began)
    return seconds


def markdown(seconds: Mapping[str, Sequence[float]]) -> str:
    """The slowest first; then the names of those above the target."""
    ratio = {n: statistics.median(a / b for a, b in zip(s, seconds[base_of(n)])) for n, s in seconds.items()}
    rows = [
        [name, base_of(name), f"{statistics.median(seconds[name]) * 1e3:.0f}", f"{ratio[name]:.2f}"]
        for name in sorted(seconds, key=ratio.get, reverse=True)
    ]
    slow = [name for name in ratio if ratio[name] > TARGET]
    verdict = f"Above {TARGET}: {', '.join(slow) if slow else 'none'}."
    return report.table(["strategy", "compared with", "step, ms", "times its base"], rows) + "\n\n" + verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="counted steps of every strategy")
    parser.add_argument("--routers", nargs="+", choices=strategies.names(), help="default: all of them")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds={args.rounds}: must be at least 1")
    names = args.routers or list(strategies.names())
    load_before = os.getloadavg()[0]
    seconds = measure(list(dict.fromkeys([*map(base_of, names), *names])), args.rounds)
    versions = {"jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__}
    machine = report.machine(load_before, args.rounds, versions)
    text = "\n".join(f"- {name}: {value}" for name, value in machine.items()) + "\n\n" + markdown(seconds)
    print(text)
    if not args.routers:
        write_generated(HERE / "ROUTERS.md", text)


if __name__ == "__main__":
    main()
