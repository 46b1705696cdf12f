"""`evaluate(run)`: how well a trained model predicts text, by domain, without training."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from frugalmoe.config import override, read, resolve
from frugalmoe.console import bar
from frugalmoe.data import open_data
from frugalmoe.data.shards import is_prepared, read_manifest
from frugalmoe.data.split import ALL
from frugalmoe.errors import UserError
from frugalmoe.fields import check_integer
from frugalmoe.schema import Data
from frugalmoe.train import evaluate as held_out
from frugalmoe.train.program import compiled_eval_step
from frugalmoe.train.weights import check_run, load_checkpoint, open_run_data

_EVERY_ROW = 2**31 - 1


class Evaluation(NamedTuple):
    """How well a checkpoint predicts text."""

    run: str
    step: int  # of the checkpoint
    data: str  # fingerprint of the data
    loss: dict[str, float]  # nats per token, by domain, and their mean
    bits_per_byte: dict[str, float]
    targets: dict[str, int]  # tokens that were predicted, by domain
    bytes: dict[str, int]  # of UTF-8 text that they stand for


def evaluate(
    run: str | Path,
    step: int | None = None,
    *,
    data: str | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    tokens: int | None = None,
    devices: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Returns the loss and the bits per byte of a run's checkpoint, the newest by default.

    Without `data` and `overrides` they are those of the run's own held-out rows, as its summary has them. `data` is a
    source of text as `data.path` may name, of which all documents are scored; of a prepared directory its held-out
    ones. `overrides` change the section `data` of the run's config, and the held-out documents of that are scored.
    tokens: about how many, spread evenly over domains; by default `train.eval_rows` rows of a domain of the run's own
    data, and all rows of others. Rows are the same whatever batches they are computed in.
    devices: those that share the rows, by default all here; the model is whole on each. progress: a bar, on a terminal.

    Raises `UserError` for a checkpoint that is not there or not finite, for data without text, made with another
    tokenizer, or unlike those that the run was trained on where its own are asked for.
    """
    run = Path(run)
    if tokens is not None:
        check_integer("--tokens", tokens, least=1)
    chosen = chosen_data(run, data, overrides)  # what is wrong with them is found before the checkpoint is read
    config, weights, _, mesh, step = load_checkpoint(run, step, devices or jax.device_count())
    eval_step = compiled_eval_step(config)  # one program for all data
    if chosen is None:
        opened = open_run_data(run, config)
    else:
        opened = open_data(chosen, batch_size=config.train.batch_size, seed=config.train.seed)
        train = dataclasses.replace(config.train, eval_rows=_EVERY_ROW)
        config = dataclasses.replace(config, data=chosen, train=train)
    if tokens is not None:
        config = held_out.limited(config, len(opened.domains), tokens)
    with jax.set_mesh(mesh), bar(progress) as shown:
        rows = sum(opened.eval_rows(domain, config.train.eval_rows) for domain in opened.domains)
        task = shown.add_task("evaluating", total=rows)
        done = functools.partial(shown.advance, task)
        scores = held_out.evaluate(eval_step, weights, opened, config, mesh, done=done)
    _check(run, step, scores)
    return Evaluation(str(run), step, opened.fingerprint, *scores[:4])


def chosen_data(run: Path, path: str | None, overrides: Mapping[str, Any] | Sequence[str]) -> Data | None:
    """The data that are asked for, None for the run's own. Their tokenizer is the run's."""
    names = [override.partition("=")[0] for override in overrides]
    for name in names:
        if not name.startswith("data.") or name == "data.tokenizer":
            rule = "an evaluation is of a model with its tokenizer; only the other fields of data.* can be changed"
            raise UserError(f"--config.{name}: {rule}")
    if path is None and not names:
        return None
    other = [name for name in names if name == "data.path" or name.startswith("data.sources")]
    if path is not None and other:
        raise UserError(f"--data={path}: cannot be given with --config.{other[0]}")
    check_run(run)
    config = read(str(run))
    if path is not None or other:
        config = override(
            config, {"data.sources": {}, "data.path": path or "", "data.text_field": "text", "data.kind": "text"}
        )
    config = override(config, {"data.validation.path": ""})
    data = resolve(override(config, overrides)).data
    data = dataclasses.replace(data, tokenizer=str(run / "tokenizer"))
    if path is None:
        return data
    prepared = Path(os.path.expanduser(path))
    fraction = read_manifest(prepared)["validation_fraction"] if is_prepared(prepared) else ALL
    return dataclasses.replace(data, validation_fraction=fraction)


def _check(run: Path, step: int, scores: held_out.Scores) -> None:
    """Raises `UserError` for a result that is none."""
    for domain, targets in scores.targets.items():
        if not targets:
            raise UserError(f"data: domain {domain!r} holds no token to predict")
    if broken := [domain for domain, loss in scores.loss.items() if not np.isfinite(loss)]:
        raise UserError(f"{run}: the loss of {', '.join(broken)} at step {step} is not finite")
