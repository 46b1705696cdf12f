"""What the machinery around a step costs: `python benchmarks/overheads_bench.py [--rounds=7] [--restarts=5]`.

First, in each round, blocks of `--steps` training steps in turn in this process: the bare program, which returns the
next state alone, so that XLA drops statistics, norms and checks for finite values, and which the guard skips nothing
in; the whole program, whose report nobody reads; and the loop of `frugalmoe train`, with its data, checks, logs and
ledger. A ratio is the median over rounds of the ratio within a round, and that of the fastest blocks, of wall time and
of CPU time, which other programs disturb less. What saves and their checksums cost is in `checkpoints_bench.py`.

Then, with a warm cache of compiled programs, a run that was killed is started again as a process of its own, until its
first step has ended, `--restarts` times: seconds by kind, from the ledger of the run.

2026-11-30, two cores. configs/quickstart.py, 2 steps a block, 7 rounds with no other work, twice: CPU time of the
whole program over the bare one 1.015 and 1.005 in the median, the loop over that 1.020 and 0.982; the clock told
nothing. The update alone, the fastest: wall 8.4 ms without a guard, 8.6 with it, 9.3 with the parameters' norm, 12.4
with a late choice, as the guard made it before. quickstart:laptop, blocks of 20 steps of 33 ms, 9 rounds: 1.138 (CPU
1.101) and 1.119 (CPU 1.145). Before that change, one core free, 9 and 7 rounds: quickstart 4.2% (CPU 3.3%), and the
loop 0.6% less (CPU 0.2% more); quickstart:laptop, blocks of 15 steps of 36 ms, 5.1% (CPU 10.6%) and 11.4% (CPU
18.4%), as the host's part of a step weighs there. Restart to the end of the first step, laptop, 4 times: 3.26 s in
the median, of which imports 1.05, setup 0.53, tracing 1.13, compiling (reading the cache) 0.34, the step 0.20.
2026-12-01, with the faster step: configs/quickstart.py, 2 steps a block, 9 rounds with no other work: 1.021 (CPU
1.016), the loop over that 1.022 (CPU 1.013); quickstart:laptop, 7 rounds: 1.165 (CPU 1.126). Restart, laptop, 5
times: 3.89 s, of which imports 1.14, setup 0.55, tracing 1.57, compiling 0.45, the step 0.19; quickstart, 4 times:
5.28 s, of which tracing 1.90.
"""

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import optax
from jax import Array

from frugalmoe import sharding
from frugalmoe.commands import set_up_training
from frugalmoe.config import load
from frugalmoe.config.checks import check_devices
from frugalmoe.train import goodput, guard, optim, step
from frugalmoe.train.loop import Run, Steps, opened
from frugalmoe.train.objective import Knobs
from frugalmoe.train.step import State, make_train_step


class Quiet:
    """A progress that shows nothing."""

    def say(self, text: str) -> None: ...

    def update(self, *numbers: float) -> None: ...


@contextlib.contextmanager
def without_guard() -> Iterator[None]:
    """The step's program takes every update: what the guard looks at is dropped."""
    chosen, unless = guard.chosen, guard.unless
    guard.chosen = lambda skipped, after, before: after
    guard.unless = lambda skipped, update, before, *given: update(before, *given)
    try:
        yield
    finally:
        guard.chosen, guard.unless = chosen, unless


def blocks(run: Run, steps: int) -> dict[str, Callable[[], None]]:
    """What makes so many steps, by name. Each has its own state, since a step takes the memory of the one before."""
    whole = make_train_step(run.config)
    with without_guard():
        of_state = make_train_step(run.config)
        bare = jax.jit(lambda *given: of_state(*given)[0], donate_argnums=0)
        loop = Steps([run], lambda: lambda step: False, Quiet())
        batch = loop.program.next_batch()
        states = {name: jax.tree.map(jax.numpy.copy, run.state) for name in ("bare", "whole")}
        states["bare"] = bare(states["bare"], batch, run.knobs)
    programs = {"bare": bare, "whole": jax.jit(lambda *given: whole(*given), donate_argnums=0)}

    def alone(name: str) -> None:
        for _ in range(steps):
            found = programs[name](states[name], batch, run.knobs)
            states[name] = found if name == "bare" else found[0]
        jax.block_until_ready(states[name])

    def in_loop() -> None:
        loop.until(loop.step + steps)

    return {"bare": lambda: alone("bare"), "whole": lambda: alone("whole"), "loop": in_loop}


def updates(run: Run) -> dict[str, Callable[[], None]]:
    """What makes one update of the optimizer from gradients that are there, by name: without a guard, with it, with it
    and the norm of the parameters, which a step logs, and with a choice between all that was made and all that was.
    """
    config, grads = run.config, jax.tree.map(lambda array: 0.01 * array + 1e-3, run.state.params)
    unless = {
        "update": lambda skipped, update, before, *given: update(before, *given),
        "guarded": guard.unless,
        "with norm": guard.unless,
        "choosing late": lambda skipped, update, before, *given: guard.chosen(skipped, update(before, *given), before),
    }

    def make(name: str) -> Callable[[], None]:
        def updated(state: State, grads: dict, knobs: Knobs) -> tuple[State, Array | None]:
            norm = optax.tree.norm(grads)
            verdict, remembered = guard.judge(state.guard, knobs.limits, state.step, norm, norm)
            trained, frozen = optim.split(state.params, config)
            given = (lambda before, *given: step.updated(*before, *given, config)), (trained, state.opt_state)
            trained, opt_state = unless[name](verdict.skipped, *given, grads, run.knobs.optim, verdict.rate)
            state = state._replace(params=optim.joined(trained, frozen), opt_state=opt_state, guard=remembered)
            return state, optax.tree.norm(state.params) if name == "with norm" else None

        program, held = jax.jit(updated, donate_argnums=0), [jax.tree.map(jax.numpy.copy, run.state)]

        def act() -> None:
            state, reported = program(held.pop(), grads, run.knobs)
            held.append(state)
            jax.block_until_ready((state, reported))

        return act

    return {name: make(name) for name in unless}


def measure(made: dict[str, Callable[[], None]], rounds: int, steps: int) -> None:
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for number in range(rounds + 2):
        for name, act in made.items():
            began, cpu = time.perf_counter(), time.process_time()
            act()
            if number >= 2:  # the first ones compile and warm up
                times[name].append((time.perf_counter() - began, time.process_time() - cpu))
    (first, *others), pairs = times, [("whole", "bare"), ("loop", "whole"), ("loop", "bare")]
    for kind, label in enumerate(("wall", "CPU")):
        of = {name: [pair[kind] for pair in pairs] for name, pairs in times.items()}
        print(f"{label}:", ", ".join(f"{name} {1e3 * min(v) / steps:.1f} ms" for name, v in of.items()), "(fastest)")
        for above, below in pairs if first == "bare" else [(other, first) for other in others]:
            median = statistics.median(a / b for a, b in zip(of[above], of[below]))
            print(f"  {above} over {below}: median {median:.3f}, fastest {min(of[above]) / min(of[below]):.3f}")


def restarts(config: str, flags: list[str], folder: Path, number: int) -> None:
    """Prints the seconds from the start of a process to the end of the first step of a run that goes on."""
    workdir = folder / "restarted"
    command = [sys.executable, "-m", "frugalmoe.cli", "train", f"--config={config}", *flags, f"--workdir={workdir}"]
    rows = lambda: goodput.read(workdir / goodput.FILE)

    def until(done: Callable[[list[goodput.Row]], bool]) -> list[goodput.Row]:
        output = (folder / "log").open("wb")
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            while not done(found := rows()):
                if process.poll() is not None:
                    raise SystemExit((folder / "log").read_text())
                time.sleep(0.02)
            return found
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            output.close()

    until(lambda found: any(row.step >= 6 for row in found))  # a checkpoint is there, every second step
    starts = []
    for _ in range(number):
        before = len({row.start for row in rows()})
        found = until(lambda found, before=before: any(row.start == before and row.first_step for row in found))
        starts.append(next(row for row in found if row.start == before and row.first_step))
    kinds = [kind for kind in goodput.KINDS if any(kind in row.seconds for row in starts)]
    print(f"restart to the end of the first step, {number} times:")
    for kind, of in [("all", [row.first_step for row in starts])] + [
        (kind, [row.seconds.get(kind, 0.0) for row in starts]) for kind in kinds
    ]:
        print(f"  {kind}: median {statistics.median(of):.2f} s, fastest {min(of):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py:laptop")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="in a block")
    parser.add_argument("--restarts", type=int, default=5)
    args = parser.parse_args()
    flags = {"train.steps": 10**6, "train.trackers": "", "checkpoint.every_steps": 2}
    given = [f"{field}={value}" for field, value in flags.items()]
    with tempfile.TemporaryDirectory() as folder:
        if args.rounds:
            config = load(args.config, [*given, "checkpoint.every_steps=0"])
            set_up_training(config)
            mesh = sharding.make_mesh(check_devices(config, 1))
            with jax.set_mesh(mesh), opened(config, Path(folder) / "run") as run:
                print(f"{args.config}: blocks of {args.steps} steps, {args.rounds} rounds")
                measure(blocks(run, args.steps), args.rounds, args.steps)
                print("the update of the optimizer alone")
                measure(updates(run), 10 * args.rounds, 1)
        if args.restarts:
            restarts(args.config, [f"--config.{each}" for each in given], Path(folder), args.restarts)


if __name__ == "__main__":
    main()
