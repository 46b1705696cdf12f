"""The weights of a run's checkpoint, for whatever is done with a trained model."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax

from frugalmoe import sharding
from frugalmoe.config import RECORD, Config, resolve, runnable
from frugalmoe.data.tokenizer import Tokenizer, load_from
from frugalmoe.errors import UserError
from frugalmoe.train import checkpoint
from frugalmoe.train.step import abstract


class Weights(NamedTuple):
    """What a model computes with: a state without the optimizer's."""

    params: dict
    router_state: dict


def load_model(run: Path, step: int | None = None) -> tuple[Config, Weights, Tokenizer, jax.sharding.Mesh]:
    """The config, weights and tokenizer of a run directory's checkpoint, the newest by default, on one device."""
    if not (run / RECORD).is_file():
        raise UserError(f"{run}: not a run directory (it holds no {RECORD})")
    config = resolve(runnable(run / RECORD))
    tokenizer = load_from(run / "tokenizer")
    if not config.model.vocab_size:
        size = -(-tokenizer.size // 64) * 64
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
    mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])
    with checkpoint.open_manager(run, config.checkpoint) as manager, jax.set_mesh(mesh):
        if manager.latest_step() is None:
            raise UserError(f"{run}: holds no checkpoint yet")
        items = ("params", "router_state")
        if step is None:
            state, *_ = checkpoint.restore_newest(manager, abstract(config), items)
        elif step in manager.all_steps():
            state = checkpoint.restore(manager, step, abstract(config), items)
            state = state if checkpoint.is_finite(state, items) else None
        else:
            raise UserError(f"{run}: no checkpoint of step {step}; valid: {sorted(manager.all_steps())}")
        if state is None:
            which = "no checkpoint" if step is None else f"not the checkpoint of step {step}"
            raise UserError(f"{run}: holds finite numbers in {which}, so there is no model")
    return config, Weights(state.params, state.router_state), tokenizer, mesh
