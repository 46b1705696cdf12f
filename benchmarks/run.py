"""Speed and memory of a training step on this machine: frugalmoe, its own dense model, Hugging Face transformers.

    python benchmarks/run.py [--torch-python PYTHON] [--rounds N] [--quick] [--sizes E/K/F ...]

Writes RESULTS.md (between its markers) and results.json beside this file; --quick runs few small models, --sizes some
of the comparisons and no growth, and neither writes anything. The full run takes the better part of an hour; nothing
else should run meanwhile.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence

import report
from measure import HERE, Measured, Model, measure
from sizes import Size

from frugalmoe.files import write_generated

SIZES = (
    Size(experts=8, top_k=2, expert_dim=512),
    Size(experts=64, top_k=8, expert_dim=128),
    Size(experts=128, top_k=2, expert_dim=512),
    Size(experts=256, top_k=8, expert_dim=128),  # the form of Ling 2.0
)
GROWTH = tuple(Size(experts=e, top_k=2, expert_dim=512) for e in (16, 32, 64, 128))  # each beside 8 experts
FAMILIES = ("mixtral", "olmoe", "qwen3_moe")
IMPLEMENTATIONS = ("eager", "grouped_mm")
LARGE = 50_000_000  # parameters of experts from which on one peer is compared: all models are in memory at one time
COMPILED = "mixtral:grouped_mm:compiled", "llama::compiled"  # by torch.compile
PEER = "mixtral:grouped_mm"  # whose growth is beside ours
OURS, DENSE = "frugalmoe", "frugalmoe, dense"


def ours(size: Size, dense: bool = False, label: str = "") -> Model:
    label = label or (DENSE if dense else OURS)
    return Model(label, sys.executable, "worker_frugalmoe.py", "dense" if dense else "moe", size)


def peers(size: Size, torch_python: str, compiled: Sequence[str]) -> list[Model]:
    large = size.layers * size.experts * 3 * size.dim * size.expert_dim >= LARGE
    moe = [PEER] if large else [f"{family}:{how}" for family in FAMILIES for how in IMPLEMENTATIONS]
    label = lambda name: "llama (dense)" if name == "llama" else name.replace("::", ":").replace(":", ", ")
    return [Model(label(name), torch_python, "worker_torch.py", name, size) for name in (*moe, "llama", *compiled)]


def compare(size: Size, torch_python: str, rounds: int, compiled: Sequence[str]) -> dict[str, Measured | str]:
    return measure([ours(size), ours(size, dense=True), *peers(size, torch_python, compiled)], rounds)


def growth(size: Size, base: Size, torch_python: str, rounds: int) -> dict[str, Measured | str]:
    peer = lambda label, size: Model(label, torch_python, "worker_torch.py", PEER, size)
    of_peer = [peer("peer base", base), peer("peer grown", size)]
    return measure([ours(base, label="base"), ours(size, label="grown"), *of_peer], rounds, updates=True)


def traffic(size: Size) -> dict[str, float] | str:
    """How often a step of ours moves the experts' parameters, by what for: see passes.py; or why it is not known."""
    command = [sys.executable, str(HERE / "profile_step.py"), "moe", size.to_json(), "--passes"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr.strip()[-200:] if done.returncode else json.loads(done.stdout)


def chosen(text: str) -> Size:
    """The size that EXPERTS/TOP_K/EXPERT_DIM means."""
    experts, top_k, expert_dim = map(int, text.split("/"))
    return Size(experts=experts, top_k=top_k, expert_dim=expert_dim)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has torch and transformers")
    parser.add_argument("--rounds", type=int, default=11, help="counted steps of every model")
    parser.add_argument("--quick", action="store_true", help="few and small models, two rounds, no files")
    parser.add_argument(
        "--sizes", nargs="+", type=chosen, metavar="E/K/F", help="compare at these, no growth, no files"
    )
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds={args.rounds}: must be at least 1")
    return args


def main() -> None:
    args = arguments()
    rounds = 2 if args.quick else args.rounds
    shrink = Size.smaller if args.quick else (lambda size: size)
    load_before = os.getloadavg()[0]
    compared, grown, moved = {}, {}, {}
    of_growth = () if args.sizes else GROWTH[:1] if args.quick else GROWTH
    for size in map(shrink, args.sizes or (SIZES[:1] if args.quick else SIZES)):
        print(f"comparing {size.name}", flush=True)
        compared[size] = compare(size, args.torch_python, rounds, COMPILED[1:] if args.quick else COMPILED)
        moved[size] = traffic(size)
    for size in map(shrink, of_growth):
        print(f"growth to {size.name}", flush=True)
        grown[size] = growth(size, shrink(SIZES[0]), args.torch_python, rounds)
    machine = report.machine(load_before, rounds, report.versions(compared))
    text = report.markdown(machine, compared, grown, moved, OURS)
    print(text)
    if not (args.quick or args.sizes):
        write_generated(HERE / "RESULTS.md", text)
        data = report.as_json(machine, compared, grown, moved)
        (HERE / "results.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
