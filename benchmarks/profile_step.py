"""Where a training step of frugalmoe spends its time: operations of the compiled step, grouped by what they do.

    python benchmarks/profile_step.py [moe|dense]

Times are sums over threads' operations and overlap on several cores; the wall and CPU time of a step, measured without
the profiler, follow. "in a loop" is work inside a second loop: blocks of experts, chunks of attention or of the head.
"""

import collections
import gzip
import json
import re
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from sizes import Size
from worker_frugalmoe import Training, training_config

from frugalmoe import config, sharding
from frugalmoe.fields import to_dict

STEPS = 3
CONTAINERS = ("while", "call", "conditional")  # their time is that of what they hold


def operations(training: Training, batch) -> collections.Counter:
    """Milliseconds of a step by HLO operation."""
    milliseconds = collections.Counter()
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(STEPS):
                training.step(batch)
        (path,) = Path(directory).rglob("*.trace.json.gz")
        for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]:
            name = event.get("args", {}).get("hlo_op", "while")
            if not name.startswith(CONTAINERS):
                milliseconds[name] += event["dur"] / 1e3 / STEPS
    return milliseconds


def groups(milliseconds: collections.Counter, program: str) -> collections.Counter:
    """The same by pass and JAX primitive, which the program's metadata tells."""
    sources = dict(re.findall(r'%?([\w.\-]+) = .*op_name="([^"]*)"', program))
    grouped = collections.Counter()
    for name, value in milliseconds.items():
        source = sources.get(name, name.split(".")[0])
        when = "backward" if "transpose" in source else "forward"
        grouped[f"{when}  {source.split('/')[-1]}{' in a loop' if source.count('while') > 1 else ''}"] += value
    return grouped


def main() -> None:
    which, size = (sys.argv[1:] or ["moe"])[0], Size()
    if which not in ("moe", "dense"):
        sys.exit(f"{which!r}: must be moe or dense")
    layout = config.settle(training_config(size, which == "dense"), None, jax.device_count()).mesh
    mesh = sharding.make_mesh(to_dict(layout))
    with jax.set_mesh(mesh):
        training = Training(size, which == "dense", mesh)
        batch = training.batch()
        program = training.train_step.lower(training.state, batch).compile().as_text()
        training.step(batch)
        spent, clocks = operations(training, batch), []
        for _ in range(7):
            wall, cpu = time.perf_counter(), time.process_time()
            training.step(batch)
            clocks.append((time.perf_counter() - wall, time.process_time() - cpu))
    for name, value in groups(spent, program).most_common(20):
        print(f"{value:8.1f} ms  {name}")
    wall, cpu = np.median(clocks, axis=0)
    print(f"{spent.total():8.1f} ms  in all; a step takes {1e3 * wall:.0f} ms, {1e3 * cpu:.0f} ms of CPU time")


if __name__ == "__main__":
    main()
