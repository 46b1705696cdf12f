"""What bad batches do to a run, with the guard and without, on the page docs/guard.md.

    python benchmarks/guard_trials.py [--config=configs/quickstart.py:laptop] [--seeds=2] [--scale=1]

Three trials, each of real runs in this process:

- how far losses and gradients of runs without a fault are above their means, in the guard's own measure, and how many
  batches it skips there, for three settings;
- held-out loss of runs in which one batch, or 32 in a row, are random tokens, with the guard and with
  `guard.policy=stop`, each seed;
- the bits of the state after 24 steps with the guard on and off, and with a program that has no choice in it, for each
  optimizer and schedule.

The tables go between the markers of docs/guard.md, with the date and the command. `--scale=0.1` makes a tenth of all
steps, to try the command, and writes no page.

Cost: six minutes of CPU time with two seeds, 50 s more for each other one, and 2 GB of memory.
"""

import argparse
import contextlib
import datetime
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from overheads_bench import Quiet, without_guard

from frugalmoe import sharding
from frugalmoe.commands import set_up_training
from frugalmoe.config import Config, load, settle
from frugalmoe.config.checks import check_devices
from frugalmoe.data import Batch, Dataset, open_data
from frugalmoe.files import write_generated
from frugalmoe.train import guard
from frugalmoe.train.loop import train
from frugalmoe.train.objective import knobs
from frugalmoe.train.placing import put_batch
from frugalmoe.train.program import Program
from frugalmoe.train.rundir import read_rows
from frugalmoe.train.step import State, init, make_train_step

PAGE = Path(__file__).parents[1] / "docs/guard.md"
# Runs without a fault: what is changed, and steps.
CALM = {
    "as it is": ((), 600),
    "batches of 2 sequences, rate 0.01": (("train.batch_size=2", "optim.learning_rate=0.01"), 1000),
    "batches of 1 sequence": (("train.batch_size=1",), 1500),
}
STEPS, SAVE_EVERY, FIRST = 300, 50, 150  # of the runs with noise; the position of its first batch
NOISE = {"none": 0, "one batch of noise": 1, "32 batches of noise": 32}
UPDATES = 24
OPTIMIZERS = {
    "AdamW, constant": ("optim.schedule=constant",),
    "AdamW, cosine": ("optim.schedule=cosine",),
    "AdamW, wsd": ("optim.schedule=wsd",),
    "AdamW, wsd, two micro-batches": ("train.accumulate_steps=2",),
    "SGD, wsd": ("optim.name=sgd",),
    "Muon, wsd": ("optim.name=muon",),
}


class Shown(Quiet):
    """A progress that shows nothing, as `train` opens one."""

    def __init__(self, *ignored: object) -> None: ...

    def __enter__(self) -> "Shown":
        return self

    def __exit__(self, *error: object) -> None: ...


class Seen(NamedTuple):
    """A batch's loss and the logarithm of its gradient norm, in deviations above the mean; None before the guard has
    as many updates as it asks for.
    """

    loss: float | None
    gradient: float | None


@contextlib.contextmanager
def watched(config: Config) -> Iterator[list[Seen]]:
    """What the guard of a run sees of each batch."""
    step, seen = Program.step, []

    def apart(value: float, mean: float, variance: float, least: float) -> float:
        return float((value - mean) / max(np.sqrt(variance), least))

    def stepped(self: Program, batch: Batch, again: bool = False) -> object:
        before = jax.device_get(self.state.guard)
        report = step(self, batch, again)
        given = jax.device_get({name: report.metrics[name] for name in ("loss/total", "optim/gradient_norm")})
        loss, norm = given.values()
        if before.updates >= config.guard.after:
            of_loss = apart(loss, before.loss_mean, before.loss_variance, guard.LEAST_LOSS)
            log_norm = np.log(norm)
            seen.append(
                Seen(of_loss, apart(log_norm, before.gradient_mean, before.gradient_variance, guard.LEAST_GRADIENT))
            )
        return report

    Program.step = stepped
    try:
        yield seen
    finally:
        Program.step = step


@contextlib.contextmanager
def noisy(positions: Sequence[int], vocabulary: int) -> Iterator[None]:
    """The batches of these positions are tokens drawn evenly from all."""
    batch_of = Dataset.batch

    def batch(self: Dataset, position: int, *given: object) -> Batch:
        found = batch_of(self, position, *given)
        if position not in positions:
            return found
        drawn = np.random.default_rng(position).integers(0, vocabulary, (2, *found.tokens_BT.shape)).astype(np.int32)
        return found._replace(tokens_BT=drawn[0], targets_BT=drawn[1] * found.loss_mask_BT)

    Dataset.batch = batch
    try:
        yield
    finally:
        Dataset.batch = batch_of


class Trials(NamedTuple):
    """A config, and where its runs are made."""

    name: str
    folder: Path
    scale: float

    def config(self, *fields: str) -> Config:
        return load(self.name, ["train.trackers=", "train.eval_every=0", *fields])

    def steps(self, count: int) -> int:
        return max(round(count * self.scale), UPDATES)

    def run(self, name: str, config: Config) -> tuple[float, Counter]:
        """Held-out loss of a run, and how many events of each kind there were."""
        workdir = self.folder / name.replace(" ", "_").replace(",", "")
        loss = train(config, workdir, progress=Shown)["eval"]["loss"]["mean"]
        events = workdir / "events.jsonl"
        return loss, Counter(row["kind"] for row in (read_rows(events) if events.exists() else ()))


def calm(trials: Trials) -> Iterator[tuple[str, ...]]:
    """How far runs without a fault are above their means."""
    for name, (fields, steps) in CALM.items():
        config = trials.config(*fields, f"train.steps={trials.steps(steps)}", "checkpoint.every_steps=0")
        with watched(config) as seen:
            _, events = trials.run(name, config)
        most = [max(column) for column in zip(*seen)] if seen else [float("nan")] * 2
        yield name, f"{trials.steps(steps):,}", *(f"{value:.1f}" for value in most), str(events["skipped"])


def noise(trials: Trials, seeds: int) -> Iterator[tuple[str, ...]]:
    """Held-out loss where batches are noise, with a guard and without; and whether both have the same bits without."""
    steps, first = trials.steps(STEPS), trials.steps(STEPS) * FIRST // STEPS
    for name, count in NOISE.items():
        losses: dict[str, list[float]] = {"stop": [], "skip": []}
        events: Counter = Counter()
        for seed in range(seeds):
            for policy in losses:
                config = trials.config(
                    f"train.steps={steps}", f"train.seed={seed}", f"guard.policy={policy}",
                    f"checkpoint.every_steps={SAVE_EVERY}", "checkpoint.keep_last=2",
                )  # fmt: skip
                with noisy(range(first, first + count), data_of(config).tokenizer.size):
                    loss, found = trials.run(f"{name} {policy} {seed}", config)
                losses[policy].append(loss)
                events += found
        counts = ", ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in sorted(events.items()))
        yield name, *map(spread, losses.values()), counts or "none"


def spread(values: Sequence[float]) -> str:
    """The mean, and the least and the most."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def data_of(config: Config) -> Dataset:
    return open_data(config.data, batch_size=config.train.batch_size, seed=config.train.seed, progress=False)


def bits(trials: Trials) -> Iterator[tuple[str, ...]]:
    """What the guard changes of a state after some updates from batches without a fault."""
    for name, fields in OPTIMIZERS.items():
        config = trials.config(*fields, f"train.steps={UPDATES}", "optim.warmup_steps=4")
        data = data_of(config)
        config = settle(config, data.tokenizer.size, 1)
        on, off = (after(config, data, skips=skips) for skips in (True, False))
        with without_guard():
            unchosen = after(config, data, skips=True)
        yield name, differing(on, off), differing(on, unchosen)


def after(config: Config, data: Dataset, *, skips: bool) -> State:
    """The state after the updates, of a program that is compiled anew."""
    mesh, given = jax.sharding.get_mesh(), knobs(config)
    given = given._replace(limits=given.limits._replace(skips=np.bool_(skips)))
    given = jax.tree.map(lambda number: sharding.put(mesh, number, ""), given)
    step, state = jax.jit(make_train_step(config), donate_argnums=0), init(config)
    for position in range(UPDATES):
        rows = data.batch(position)
        batch = Batch(*(column.reshape(config.train.accumulate_steps, -1, *column.shape[1:]) for column in rows))
        state, _ = step(state, put_batch(mesh, batch, "ABT"), given)
    return jax.device_get(state)


def differing(ours: State, theirs: State) -> str:
    """How many arrays differ of two states, by name of what they are."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    unlike = [not np.array_equal(a, b) for a, b in pairs]
    return f"{sum(unlike)} of {len(unlike)} arrays differ" if any(unlike) else f"all {len(unlike)} arrays are equal"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]
    return "\n".join(lines)


def text(trials: Trials, seeds: int, command: str) -> str:
    """The part of the page that is generated."""
    limits, began, cpu = trials.config().guard, time.perf_counter(), time.process_time()
    of_loss, of_gradient = f"{limits.loss_deviations:g}", f"{limits.gradient_deviations:g}"
    columns = "run", "updates", f"loss (limit {of_loss})", f"log of the gradient norm (limit {of_gradient})", "skipped"
    parts = [table(columns, calm(trials))]
    steps, first = trials.steps(STEPS), trials.steps(STEPS) * FIRST // STEPS
    parts.append(
        f"Held-out loss in nats after {steps} steps, mean (least to most) of {seeds} seeds, with batches of random "
        f"tokens from position {first} on (checkpoints every {SAVE_EVERY} steps), and the events of all seeds:"
    )
    parts.append(table(("", "`guard.policy=stop`", "with the guard", "events"), noise(trials, seeds)))
    parts.append(f"Parameters, optimizer, routers and guard after {UPDATES} updates without a fault:")
    parts.append(table(("optimizer", "guard on and off", "guard on, and no choice in the program"), bits(trials)))
    took = f"{time.perf_counter() - began:.0f} s, {time.process_time() - cpu:.0f} s of CPU time"
    parts.insert(0, f"{datetime.date.today()}, {os.cpu_count()} cores, {took}: `{command}`.")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py:laptop")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="share of all steps that is made; below 1: no page")
    args = parser.parse_args()
    command = " ".join(["python", "benchmarks/guard_trials.py", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(args.config, Path(folder), args.scale)
        set_up_training(trials.config())
        with jax.set_mesh(sharding.make_mesh(check_devices(trials.config(), 1))):
            written = text(trials, args.seeds, command)
    print(written)
    if args.scale >= 1:
        write_generated(PAGE, written)


if __name__ == "__main__":
    main()
