"""How to train several seeds on CPU cores: one after the other, `lax.map`, `jax.vmap`, or a process per core.

Command:  python benchmarks/seeds.py [--rounds=5] [--config=configs/study.py] [--config.x=...]
All modes are alive at one time and take turns, so that what slows the machine down slows all of them. `processes` are
one process per core that train at the same time. Printed: median milliseconds for one step of every run, how many
times as fast as one after the other (median of the ratios within a round), and the CPU time of all threads.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

RUNS, STEPS = 4, 4  # a round trains every run so many steps


def worker(mode: str, runs: int, spec: str, overrides: list[str]) -> None:
    """Answers each line of stdin with the seconds of one round, on the clock and of all its threads."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from frugalmoe import sharding
    from frugalmoe.config import load, settle
    from frugalmoe.data import Batch, open_data
    from frugalmoe.fields import to_dict
    from frugalmoe.train.objective import knobs
    from frugalmoe.train.placing import put_batch
    from frugalmoe.train.step import init, make_train_step

    config = load(spec, overrides)
    data = open_data(config.data, batch_size=config.train.batch_size, seed=0)
    config = settle(config, data.tokenizer.size, 1)
    mesh = sharding.make_mesh(to_dict(config.mesh))
    with jax.set_mesh(mesh):
        step = make_train_step(config)
        one = jax.tree.map(lambda a: sharding.put(mesh, a, ""), knobs(config))
        batches = [Batch(*(x[None] for x in data.batch(i))) for i in range(STEPS)]
        if mode == "one":
            program = jax.jit(step, donate_argnums=0)
            states, args = [init(config) for _ in range(runs)], (one,)
            fed = [put_batch(mesh, b, "ABT") for b in batches]
        else:
            stack = lambda tree: jax.tree.map(lambda a: jnp.stack([a] * runs), tree)
            mapped = jax.vmap(step) if mode == "vmap" else lambda *xs: jax.lax.map(lambda x: step(*x), xs)
            program, states, args = jax.jit(mapped, donate_argnums=0), [stack(init(config))], (stack(one),)
            fed = [put_batch(mesh, Batch(*(np.stack([x] * runs) for x in b)), ".ABT") for b in batches]
        for warm in (True, False):
            for _ in range(2) if warm else iter(sys.stdin.readline, ""):
                began, cpu = time.perf_counter(), time.process_time()
                for batch in fed:
                    for i in range(len(states)):
                        states[i], metrics = program(states[i], batch, *args)
                jax.block_until_ready((states, metrics))
                print("warm" if warm else f"{time.perf_counter() - began} {time.process_time() - cpu}", flush=True)


def start(mode: str, runs: int, cores: set[int], spec: str, overrides: list[str]) -> subprocess.Popen:
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    command = [sys.executable, __file__, "--worker", mode, str(runs), f"--config={spec}", *overrides]
    process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
    os.sched_setaffinity(0, own)
    for _ in range(2):
        process.stdout.readline()
    return process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/study.py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    plain = [o.removeprefix("--config.") for o in overrides]
    if args.worker:
        return worker(args.worker[0], int(args.worker[1]), args.config, plain)
    cores = os.sched_getaffinity(0)
    modes = {mode: [start(mode, RUNS, cores, args.config, overrides)] for mode in ("one", "map", "vmap")}
    modes["processes"] = [start("one", RUNS // len(cores), {core}, args.config, overrides) for core in cores]
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    cpu: dict[str, list[float]] = {mode: [] for mode in modes}
    for _ in range(args.rounds):
        for mode, processes in modes.items():
            for process in processes:
                process.stdin.write("go\n")
                process.stdin.flush()
            answers = [[float(x) for x in process.stdout.readline().split()] for process in processes]
            seconds[mode].append(max(wall for wall, _ in answers))
            cpu[mode].append(sum(used for _, used in answers))
    for mode, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["one"], values))
        wall, used = (1e3 * statistics.median(x) / STEPS for x in (values, cpu[mode]))
        print(f"{mode:10s} {wall:8.1f} ms   {ratio:.2f}x   {used:8.1f} ms of CPU", flush=True)
    for processes in modes.values():
        for process in processes:
            process.stdin.close()
            process.wait()


if __name__ == "__main__":
    main()
