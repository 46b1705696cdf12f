"""MB/s of `frugalmoe data prepare` beside `datasets.map` of Hugging Face, with the same tokenizer and processes.

    python benchmarks/data_bench.py --peer-python /tmp/peer/bin/python [--megabytes 32] [--rounds 3] [--workers 1 2]

The peer's Python needs `datasets` and `tokenizers`. The texts are the sources of Python's standard library, one
document a file, as JSON lines; the tokenizer is a byte-level BPE of 4,096 tokens, trained on them. Each measurement is
a process of its own, in rounds, and its time begins after its imports. Both read the JSON lines and leave tokens on the
disk, as many as the other. Ours also splits off held-out documents by a hash of their texts, finds texts that repeat,
notes how many bytes each token stands for, and hashes what it writes; for that it reads the texts twice.

2026-11-30, two cores with no other work, 3 rounds, 8.1 MB in 690 documents (--megabytes 8), 2,388,095 tokens on both
sides; tokenizers 0.23.3, datasets 4.8.5:

| workers |  | MB/s | MB per CPU second | ours is faster by | by CPU time |
| --- | ---: | ---: | ---: | ---: | ---: |
| 1 | frugalmoe data prepare | 2.94 | 2.93 | 1.00 | 1.00 |
| 1 | datasets.map | 3.26 | 3.26 | 0.92 | 0.91 |
| 2 | frugalmoe data prepare | 5.16 | 3.03 | 1.00 | 1.00 |
| 2 | datasets.map | 4.93 | 3.04 | 1.05 | 0.95 |

At a load of 26 of other work it was 0.95 times as fast by CPU time with one worker and 1.11 with two. Before that, a
document was encoded with the place of each token in it, which few tokenizers need: 0.87 and 0.90 times the peer, in one
round under such load. Most of the time is the tokenizer's own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import report
from measure import HERE

from frugalmoe.data.tokenizer import train_bpe

SIZE = 4096
OURS = "frugalmoe data prepare"


def write_texts(path: Path, limit: int) -> tuple[int, list[str]]:
    """Writes texts of about so many bytes; returns how many there are in all, and the texts."""
    texts, size = [], 0
    for source in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in source.parts or size >= limit:
            continue
        try:
            text = source.read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
        if text.strip():
            texts.append(text)
            size += len(text.encode())
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return size, texts


def measure(command: list[str], log: Path) -> dict:
    """What one process says of itself."""
    with tempfile.TemporaryDirectory() as directory, log.open("a") as errors:
        done = subprocess.run([*command, directory], stdout=subprocess.PIPE, stderr=errors, text=True)
    if done.returncode:
        raise SystemExit(f"{command[1]} ended with exit code {done.returncode}: {log.read_text()[-500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def cells(size: int, runs: list[dict], ours: list[dict]) -> list[str]:
    """MB/s and MB per CPU second, and how many times as fast ours is by both."""
    kinds = ("seconds", "cpu_seconds")
    speeds = [size / 1e6 / statistics.median(run[kind] for run in runs) for kind in kinds]
    return [f"{n:.2f}" for n in (*speeds, *(statistics.median(a[k] / b[k] for a, b in zip(runs, ours)) for k in kinds))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=32.0, help="of text at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=(1, os.cpu_count()))
    parser.add_argument("--peer-python", required=True, help="a Python that has datasets and tokenizers")
    args = parser.parse_args()
    load_before, versions, found, tokens = os.getloadavg()[0], {}, {}, set()
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        size, texts = write_texts(place / "texts.jsonl", int(args.megabytes * 1e6))
        tokenizer = place / "tokenizer"
        tokenizer.mkdir()
        train_bpe(texts, SIZE).save_into(tokenizer)
        ours = [sys.executable, str(HERE / "worker_data_frugalmoe.py")]
        peer = [args.peer_python, str(HERE / "worker_data_datasets.py")]
        for _ in range(args.rounds):
            for workers in dict.fromkeys(args.workers):
                for name, command, where in ((OURS, ours, tokenizer), ("datasets.map", peer, "tokenizer.json")):
                    where = str(tokenizer / where)
                    one = measure([*command, str(place / "texts.jsonl"), where, str(workers)], place / "log")
                    found.setdefault((workers, name), []).append(one)
                    versions |= one["versions"]
                    tokens.add(one["tokens"])
                    print(workers, name, one, flush=True)
    if len(tokens) > 1:
        raise SystemExit(f"not the same tokens: {sorted(tokens)}")
    rows = [[str(w), name, *cells(size, runs, found[w, OURS])] for (w, name), runs in found.items()]
    machine = report.machine(load_before, args.rounds, versions)
    machine["rounds"] = str(args.rounds)
    machine["texts"] = f"{size / 1e6:.1f} MB in {len(texts):,} documents, {tokens.pop():,} tokens"
    header = ["workers", "", "MB/s", "MB per CPU second", "ours is faster by", "by CPU time"]
    print("\n".join(f"- {name}: {value}" for name, value in machine.items()) + "\n\n" + report.table(header, rows))


if __name__ == "__main__":
    main()
