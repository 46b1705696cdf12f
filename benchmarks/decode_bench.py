"""Tokens per second of generation and of scoring beside transformers: the same published model.

    python benchmarks/decode_bench.py [--rounds 7] [--batches 1 16] [--dtypes float32] [--threads 2]

A model of 99 M parameters (Qwen3-MoE with random weights) is written by transformers and converted. Prompts of 128
tokens, then 16 tokens, greedy, each looked at as it comes: prefill and decoding apart. Scoring is what tasks of
`frugalmoe evaluate` do with a text: its log-likelihood, and whether each of its tokens is the most likely one, from
logits in float32. The experts of transformers are its `grouped_mm`, its
attention is SDPA; its `eager` loop over experts is no peer here. Each is a process; in a
round all take their turn, and a ratio is the median over rounds of the ratio within one. `--threads` are the peer's:
where others use the machine too, two wait for each other, and one may be faster. Ours has a thread for each core. With
both batches the part between the markers of DECODING.md is written anew.
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
BATCHES = (1, 16)
ACTIONS = {"prefill": "prefill", "decode": "decoding", "score": "scoring"}  # of a worker -> as the table has it


def measure(size: sizes.Size, dtype: str, args: argparse.Namespace, place: Path) -> tuple[dict, dict]:
    """({label: {action: (seconds, CPU seconds) of each counted round}}, versions)."""
    worker = (args.torch_python, "worker_decode_torch.py")
    theirs = [(f"transformers, threads: {n}", *worker, f"{dtype}:{n}") for n in args.threads]
    ours = ("frugalmoe", sys.executable, "worker_decode_frugalmoe.py", f"{dtype}:auto")
    seconds, versions, workers = {}, {}, []
    try:
        for label, python, script, name in (*theirs, ours):  # the first writes the model
            model = Model(label, python, script, f"{name}:{place / 'model'}", size)
            workers.append(Worker(model, place / f"{len(workers)}.log"))
            versions |= workers[-1].answer()["versions"]
        for action in ACTIONS:
            for number in range(WARM_UP + args.rounds):
                for worker in workers:
                    found = worker.do(action)
                    if number >= WARM_UP:
                        both = (found["seconds"], found["cpu_seconds"])
                        seconds.setdefault(worker.model.label, {}).setdefault(action, []).append(both)
    finally:
        for worker in workers:
            worker.stop()
    return seconds, versions


def rows(size: sizes.Size, dtype: str, seconds: dict) -> list[list[str]]:
    """One row for each framework: tokens per second, how many times as fast as it ours is, by wall and by CPU time."""
    given = size.sequences * size.time
    tokens = {"prefill": given, "decode": size.sequences * sizes.NEW, "score": given}
    table = []
    ours = seconds["frugalmoe"]
    for label, theirs in seconds.items():
        cells = []
        for a in ACTIONS:
            wall, cpu = (statistics.median(x[kind] / y[kind] for x, y in zip(theirs[a], ours[a])) for kind in (0, 1))
            speed = tokens[a] / statistics.median(seconds for seconds, _ in theirs[a])
            cells += [f"{speed:.0f}", f"{wall:.2f}", f"{cpu:.2f}"]
        table.append([dtype, str(size.sequences), label, *cells])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32",))
    parser.add_argument("--threads", type=int, nargs="+", default=(os.cpu_count(),), help="of transformers")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has torch and transformers")
    args = parser.parse_args()
    load_before, table, versions = os.getloadavg()[0], [], {}
    with tempfile.TemporaryDirectory() as place:
        for dtype in args.dtypes:
            for batch in args.batches:
                size = sizes.Size(**SIZE, sequences=batch, vocabulary=16384)
                seconds, found = measure(size, dtype, args, Path(place))
                table += rows(size, dtype, seconds)
                versions |= found
                print(*table[-len(seconds) :], sep="\n", flush=True)
    machine = report.machine(load_before, args.rounds, versions)
    of_action = lambda name: [f"{name}, tokens/s", "ours is faster by", "by CPU time"]
    header = ["dtype", "batch", "", *(column for name in ACTIONS.values() for column in of_action(name))]
    text = "\n".join(f"- {name}: {value}" for name, value in machine.items()) + "\n\n" + report.table(header, table)
    print(text)
    if set(BATCHES) <= set(args.batches):
        write_generated(HERE / "DECODING.md", text)


if __name__ == "__main__":
    main()
