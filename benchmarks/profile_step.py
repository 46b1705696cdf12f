"""Where a training step of frugalmoe spends its time: operations of the compiled step, grouped by what they do.

    python benchmarks/profile_step.py [moe|dense] [SIZE_JSON] [--passes]

SIZE_JSON is as in sizes.py: '{"experts": 128}'. With --passes only the second table is made, as JSON.

Times are sums over threads' operations and overlap on several cores; the wall and CPU time of a step, measured without
the profiler, follow. "in a loop" is work inside a second loop: blocks of experts, chunks of attention or of the head.
The second table is how often the step moves all parameters of the experts through memory, beside how often it must.
"""

import argparse
import collections
import gzip
import json
import re
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from passes import IDEAL, passes
from sizes import Size
from worker_frugalmoe import Training, training_config

from frugalmoe import config, sharding
from frugalmoe.fields import to_dict
from frugalmoe.train.allocator import keep_freed_memory

STEPS = 3
CONTAINERS = ("while", "call", "conditional")  # their time is that of what they hold


def operations(training: Training, batch) -> tuple[collections.Counter, collections.Counter]:
    """Milliseconds of a step by HLO operation, and how often it is executed."""
    milliseconds, executions = collections.Counter(), collections.Counter()
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(STEPS):
                training.step(batch)
        (path,) = Path(directory).rglob("*.trace.json.gz")
        for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]:
            name = event.get("args", {}).get("hlo_op", "while")
            if not name.startswith(CONTAINERS):
                milliseconds[name] += event["dur"] / 1e3 / STEPS
                executions[name] += 1 / STEPS
    return milliseconds, executions


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="?", default="moe", choices=("moe", "dense"))
    parser.add_argument("size", nargs="?", default="{}")
    parser.add_argument("--passes", action="store_true")
    args = parser.parse_args()
    dense, size = args.which == "dense", Size(**json.loads(args.size))
    keep_freed_memory()
    layout = config.settle(training_config(size, dense), None, jax.device_count()).mesh
    mesh = sharding.make_mesh(to_dict(layout))
    with jax.set_mesh(mesh):
        training = Training(size, dense, mesh)
        batch = training.batch()
        program = training.train_step.lower(training.state, batch, training.knobs).compile().as_text()
        training.step(batch)
        spent, executions = operations(training, batch)
        found = {} if dense else passes(program, executions, size)
        if args.passes:
            print(json.dumps(found))
            return
        clocks = []
        for _ in range(7):
            wall, cpu = time.perf_counter(), time.process_time()
            training.step(batch)
            clocks.append((time.perf_counter() - wall, time.process_time() - cpu))
    for name, value in groups(spent, program).most_common(20):
        print(f"{value:8.1f} ms  {name}")
    wall, cpu = np.median(clocks, axis=0)
    print(f"{spent.total():8.1f} ms  in all; a step takes {1e3 * wall:.0f} ms, {1e3 * cpu:.0f} ms of CPU time")
    for name, value in found.items():
        print(f"{value:8.2f} passes, at least {IDEAL.get(name, 0)}  {name}")
    if found:
        print(f"{sum(found.values()):8.2f} passes, at least {sum(IDEAL.values())}  in all")


if __name__ == "__main__":
    main()
