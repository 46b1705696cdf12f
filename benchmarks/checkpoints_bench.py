"""What checksums cost a run: `python benchmarks/checkpoints_bench.py [--config=FILE] [--rounds=5] [--every=60]`.

In each round blocks of training steps are timed one after the other in this process: without a save, with one whose
files get no checksums, and with one as a run makes it, waited for at the end of the block, so that all that the
thread of the save takes from the steps is in it. Blocks are of one step and of `--every` steps. A ratio is the median
over rounds of the ratio within a round, of wall time and of CPU time, which other programs disturb less.

2026-11-30, two cores shared with other programs, 9.6 MB of arrays: with a save every 60 steps, the interval of
configs/quickstart.py, checksums take 0.4% more CPU time than none, and saves with them 1.3% more than no save (wall
time: 0.4% more than no save, 4 rounds); with a save after every step 2.0% more CPU time than saves without checksums.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from frugalmoe import sharding
from frugalmoe.config import load
from frugalmoe.config.checks import check_devices
from frugalmoe.data import Batch
from frugalmoe.schema import Checkpoint
from frugalmoe.train import checkpoint, checksums
from frugalmoe.train.placing import put_batch
from frugalmoe.train.step import init, make_train_step

MODES = ("no save", "no checksums", "checksums")


@contextlib.contextmanager
def without_checksums(off: bool) -> Iterator[None]:
    write = checksums.write
    if off:
        checksums.write = lambda step: None
    try:
        yield
    finally:
        checksums.write = write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py:laptop")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--every", type=int, default=60, help="steps between two saves")
    args = parser.parse_args()
    config = load(args.config, ["model.vocab_size=4096"])
    mesh = sharding.make_mesh(check_devices(config, 1))
    rng = np.random.default_rng(0)
    shape = (1, config.train.batch_size, config.data.sequence_length)
    ids = rng.integers(0, config.model.vocab_size, shape, dtype=np.int32)
    places = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    ones = np.ones(shape, np.int32)
    rows = Batch(ids, np.roll(ids, -1, -1), ones, places, ones > 0, np.zeros_like(ones))
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        train_step = jax.jit(make_train_step(config), donate_argnums=0)
        batch, state, number = put_batch(mesh, rows, "ABT"), init(config), 0
        with checkpoint.open_manager(Path(folder), Checkpoint(keep_last=1)) as manager:

            def block(steps: int, mode: str) -> tuple[float, float]:
                nonlocal state, number
                began, cpu = time.perf_counter(), time.process_time()
                if mode != "no save":
                    number += 1
                    checkpoint.save(manager, number, state)
                    blocked.setdefault(mode, []).append(time.perf_counter() - began)
                for _ in range(steps):
                    state, _ = train_step(state, batch)
                jax.block_until_ready(state)
                manager.wait_until_finished()
                return time.perf_counter() - began, time.process_time() - cpu

            blocked: dict[str, list[float]] = {}
            for mode in MODES * 2:
                block(1, mode)
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            print(f"{args.config}: {size / 1e6:.1f} MB of arrays in a checkpoint")
            for steps in (1, args.every):
                blocked.clear()
                times: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
                for _ in range(args.rounds * (10 if steps == 1 else 1)):
                    for mode in MODES:
                        with without_checksums(mode == "no checksums"):
                            times[mode].append(block(steps, mode))
                print(f"a save every {steps} steps:")
                for kind, name in enumerate(("wall", "CPU")):
                    of = {mode: [pair[kind] for pair in times[mode]] for mode in MODES}
                    ratios = [
                        f"{a} over {b} {statistics.median(x / y for x, y in zip(of[a], of[b], strict=True)):.3f}"
                        for a, b in (("checksums", "no checksums"), ("checksums", "no save"))
                    ]
                    seconds = [f"{mode} {statistics.median(values):.3f} s" for mode, values in of.items()]
                    print(f"  {name}: {', '.join(seconds + ratios)}")
                print("  the loop waits", {mode: f"{statistics.median(t) * 1e3:.0f} ms" for mode, t in blocked.items()})


if __name__ == "__main__":
    main()
