"""The weights of a run's checkpoint, for whatever is done with a trained model."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax

from frugalmoe import sharding
from frugalmoe.config import RECORD, Config, resolve, runnable, settle
from frugalmoe.data import Dataset, open_data
from frugalmoe.data.tokenizer import Tokenizer, load_from
from frugalmoe.errors import UserError
from frugalmoe.fields import to_dict
from frugalmoe.model.transformer import count_parameters
from frugalmoe.schema import Mesh, Source
from frugalmoe.train import best, checkpoint, memory, rundir, saved
from frugalmoe.train.placing import micro_batch
from frugalmoe.train.step import abstract


class Weights(NamedTuple):
    """What a model computes with: a state without the optimizer's."""

    params: dict
    router_state: dict


class Loaded(NamedTuple):
    """A checkpoint of a run, on the devices that it was asked for."""

    config: Config  # settled
    weights: Weights
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    step: int


def run_and_step(text: str) -> tuple[Path, int | None]:
    """Returns (run directory, step or None) of RUN, RUN@STEP or RUN@best; a directory with an @ in its name is one."""
    name, at, step = text.rpartition("@")
    if not at or Path(text).is_dir():
        return Path(text), None
    return Path(name), named_step(Path(name), step, f"{text}: no such directory, and STEP of RUN@STEP")


def named_step(run: Path, step: str, what: str) -> int:
    """Returns the step that a number, or `best`, names of a run; `what` says in an error where it stands."""
    if step == best.NAME:
        check_run(run)
        return best.step_of(run)
    if not (step.isascii() and step.isdecimal() and len(step) < 10):
        raise UserError(f"{what} must be a whole number, or {best.NAME}")
    return int(step)


def one_step(text: str, flag: str | None) -> tuple[Path, int | None]:
    """As `run_and_step`, where --step may say it too. Raises `UserError` where both do."""
    run, step = run_and_step(text)
    if flag is None:
        return run, step
    if step is not None:
        raise UserError(f"--step={flag}: {text} names a step already")
    return run, named_step(run, flag, f"--step={flag}:")


def check_run(run: Path) -> None:
    """Raises `UserError` for what is no run directory."""
    if not (run / RECORD).is_file():
        raise UserError(f"{run}: not a run directory (it holds no {RECORD})")


def load_model(run: Path, step: int | None = None) -> tuple[Config, Weights, Tokenizer, jax.sharding.Mesh]:
    """Returns config, weights, tokenizer and mesh of a run's checkpoint, the newest by default, on one device."""
    return load_checkpoint(run, step)[:4]


def load_checkpoint(run: Path, step: int | None = None, devices: int = 1) -> Loaded:
    """Returns a run's checkpoint, the newest that is whole and finite by default, with its step. Those that it passes
    over are named in a line each. Raises `Damaged` for a step that is damaged, or where all are.

    devices: how many of those here hold it, each whole, to share the rows of a batch. A micro-batch of the config is
    rounded up to what they can share.
    """
    config, tokenizer, mesh = described(run, devices)
    memory.check(str(run), 4 * count_parameters(config.model)["total"], devices)
    items = ("params", "router_state")
    with checkpoint.open_manager(run, config.checkpoint) as manager, jax.set_mesh(mesh):
        if not saved.entries(run):
            raise UserError(f"{run}: holds no checkpoint yet")
        if step is None:
            state, step, skipped = checkpoint.restore_newest(manager, abstract(config), items)
            if state is None:
                raise saved.damaged(run, *skipped)
        elif step in (there := saved.entries(run)):
            state, skipped = checkpoint.restore_whole(manager, step, abstract(config), items), []
        else:
            raise UserError(f"{run}: no checkpoint of step {step}; valid: {there}")
    saved.tell(saved.lines(run, skipped, step))
    return Loaded(config, Weights(state.params, state.router_state), tokenizer, mesh, step)


def described(run: Path, devices: int = 1) -> tuple[Config, Tokenizer, jax.sharding.Mesh]:
    """Returns config, settled for so many devices, tokenizer and mesh of a run; no checkpoint is looked at."""
    check_run(run)
    config, tokenizer = resolve(runnable(run / RECORD)), load_from(run / "tokenizer")
    unit = devices * config.model.moe.load_balance_group
    rows = -(-micro_batch(config) // unit) * unit
    train = dataclasses.replace(config.train, batch_size=rows * config.train.accumulate_steps)
    config = dataclasses.replace(config, train=train, mesh=Mesh(data=devices))
    config = settle(config, tokenizer.size, devices)
    mesh = sharding.make_mesh(to_dict(config.mesh), jax.devices()[:devices])
    return config, tokenizer, mesh


def open_run_data(run: Path, config: Config) -> Dataset:
    """Returns the data that a run was trained on. Raises `UserError` where they have changed since.

    A published model was trained on others: the data of the run's config, at which it is looked first, become its own.
    """
    data = dataclasses.replace(config.data, validation=Source())  # that set is no part of what the run is about
    data = open_data(data, batch_size=config.train.batch_size, seed=config.train.seed)
    if not (run / "data.json").is_file():
        rundir.describe_data(run, data)
    there = rundir.read_data(run)["fingerprint"]
    if there != data.fingerprint:
        raise UserError(f"{run}: the run's data changed (fingerprint {there} there, {data.fingerprint} now)")
    return data
