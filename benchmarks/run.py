"""Speed and memory of a training step on this machine: frugalmoe, its own dense model, Hugging Face transformers.

    python benchmarks/run.py [--torch-python PYTHON] [--rounds N] [--quick]

Writes RESULTS.md (between its markers) and results.json beside this file; --quick runs few small models and writes
nothing. The full run takes about twenty minutes; nothing else should run meanwhile.
"""

import argparse
import json
import os
import sys

import report
from measure import HERE, Measured, Model, measure
from sizes import Size

from frugalmoe.files import write_generated

SIZES = (Size(experts=8, top_k=2, expert_dim=512), Size(experts=64, top_k=8, expert_dim=128))
GROWTH = tuple(Size(experts=e, top_k=2, expert_dim=512) for e in (16, 32, 64, 128))  # each beside 8 experts
FAMILIES = ("mixtral", "olmoe", "qwen3_moe")
IMPLEMENTATIONS = ("eager", "grouped_mm")
OURS, DENSE = "frugalmoe", "frugalmoe, dense"


def ours(size: Size, dense: bool = False, label: str = "") -> Model:
    label = label or (DENSE if dense else OURS)
    return Model(label, sys.executable, "worker_frugalmoe.py", "dense" if dense else "moe", size)


def peers(size: Size, torch_python: str) -> list[Model]:
    moe = [
        Model(f"{family}, {how}", torch_python, "worker_torch.py", f"{family}:{how}", size)
        for family in FAMILIES
        for how in IMPLEMENTATIONS
    ]
    return [*moe, Model("llama (dense)", torch_python, "worker_torch.py", "llama", size)]


def compare(size: Size, torch_python: str, rounds: int) -> dict[str, Measured | str]:
    return measure([ours(size), ours(size, dense=True), *peers(size, torch_python)], rounds)


def growth(size: Size, base: Size, rounds: int) -> dict[str, Measured | str]:
    return measure([ours(base, label="base"), ours(size, label="grown")], rounds, updates=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has torch and transformers")
    parser.add_argument("--rounds", type=int, default=11, help="counted steps of every model")
    parser.add_argument("--quick", action="store_true", help="few and small models, two rounds, no files")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds={args.rounds}: must be at least 1")
    return args


def main() -> None:
    args = arguments()
    rounds = 2 if args.quick else args.rounds
    shrink = Size.smaller if args.quick else (lambda size: size)
    load_before = os.getloadavg()[0]
    compared, grown = {}, {}
    for size in map(shrink, SIZES[:1] if args.quick else SIZES):
        print(f"comparing {size.name}", flush=True)
        compared[size] = compare(size, args.torch_python, rounds)
    for size in map(shrink, GROWTH[:1] if args.quick else GROWTH):
        print(f"growth to {size.name}", flush=True)
        grown[size] = growth(size, shrink(SIZES[0]), rounds)
    machine = report.machine(load_before, rounds, report.versions(compared))
    text = report.markdown(machine, compared, grown, OURS)
    print(text)
    if not args.quick:
        write_generated(HERE / "RESULTS.md", text)
        data = report.as_json(machine, compared, grown)
        (HERE / "results.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
