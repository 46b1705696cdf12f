"""Tokens per second of generation beside transformers: the same published model, prefill and decoding apart.

    python benchmarks/decode_bench.py [--rounds 7] [--batches 1 8] [--dtypes float32 bfloat16] [--torch-python PYTHON]

A model of 99 M parameters (Qwen3-MoE with random weights) is written by transformers and converted. Prompts of 128
tokens, then 32 tokens, greedy, each looked at as it comes. Each framework is a process with all cores; in a round all
take their turn, and a ratio is the median over rounds of the ratio within one. With all batches and dtypes the part
between the markers of DECODING.md is written anew.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import report
import sizes
from measure import HERE, WARM_UP, Model, Worker

from frugalmoe.files import write_generated

SIZE = dict(experts=16, top_k=2, expert_dim=384, layers=8, dim=512, heads=8, kv_heads=4, head_dim=64, time=128)
BATCHES, DTYPES, PEERS = (1, 8), ("float32", "bfloat16"), ("grouped_mm", "eager")
ACTIONS = ("prefill", "decode")


def measure(size: sizes.Size, dtype: str, rounds: int, torch_python: str, place: Path) -> tuple[dict, dict]:
    """({label: {action: seconds of each counted round}}, versions)."""
    theirs = [(f"transformers, {name}", torch_python, "worker_decode_torch.py", f"{dtype}:{name}") for name in PEERS]
    ours = ("frugalmoe", sys.executable, "worker_decode_frugalmoe.py", f"{dtype}:auto")
    seconds, versions, workers = {}, {}, []
    try:
        for label, python, script, name in (*theirs, ours):  # the first writes the model
            model = Model(label, python, script, f"{name}:{place / 'model'}", size)
            workers.append(Worker(model, place / f"{len(workers)}.log"))
            versions |= workers[-1].answer()["versions"]
        for action in ACTIONS:
            for number in range(WARM_UP + rounds):
                for worker in workers:
                    found = worker.do(action)["seconds"]
                    if number >= WARM_UP:
                        seconds.setdefault(worker.model.label, {}).setdefault(action, []).append(found)
    finally:
        for worker in workers:
            worker.stop()
    return seconds, versions


def rows(size: sizes.Size, dtype: str, seconds: dict) -> list[list[str]]:
    """One row for each framework; the ratio says how many times as fast as it ours is."""
    tokens = {"prefill": size.sequences * size.time, "decode": size.sequences * sizes.NEW}
    table = []
    for label, of_action in seconds.items():
        speed = {a: tokens[a] / statistics.median(of_action[a]) for a in ACTIONS}
        faster = {a: statistics.median(t / o for t, o in zip(of_action[a], seconds["frugalmoe"][a])) for a in ACTIONS}
        cells = [f"{n}" for a in ACTIONS for n in (f"{speed[a]:.0f}", f"{faster[a]:.2f}")]
        table.append([dtype, str(size.sequences), label, *cells])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has torch and transformers")
    args = parser.parse_args()
    load_before, table, versions = os.getloadavg()[0], [], {}
    with tempfile.TemporaryDirectory() as place:
        for dtype in args.dtypes:
            for batch in args.batches:
                size = sizes.Size(**SIZE, sequences=batch, vocabulary=16384)
                seconds, found = measure(size, dtype, args.rounds, args.torch_python, Path(place))
                table += rows(size, dtype, seconds)
                versions |= found
                print(*table[-3:], sep="\n", flush=True)
    machine = report.machine(load_before, args.rounds, versions)
    header = ["dtype", "batch", "", "prefill, tokens/s", "ours is faster by", "decoding, tokens/s", "ours is faster by"]
    text = "\n".join(f"- {name}: {value}" for name, value in machine.items()) + "\n\n" + report.table(header, table)
    print(text)
    if set(BATCHES) <= set(args.batches) and set(DTYPES) <= set(args.dtypes):
        write_generated(HERE / "DECODING.md", text)


if __name__ == "__main__":
    main()
