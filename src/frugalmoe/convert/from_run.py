"""Runs that are made of another run's checkpoints: one of them alone, or several merged into one.

A merge stands for a decay of the learning rate that was never made: Tian et al. 2025 (WSM), arXiv 2507.17634. With
checkpoints x_0 .. x_k and coefficients c_j that come to 1, sum_j c_j x_j = x_0 + sum_i w_i (x_i - x_(i-1)) with
w_i = sum_(j >= i) c_j: what moved the parameters between two of them counts w_i, as if the rate had been so much lower.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from frugalmoe.config import RECORD, resolve, runnable, settle
from frugalmoe.convert import output
from frugalmoe.errors import UserError
from frugalmoe.fields import check_integer
from frugalmoe.files import write_json
from frugalmoe.routing import strategies
from frugalmoe.routing.contract import Router
from frugalmoe.schema import MoE
from frugalmoe.train import checksums, rundir, saved
from frugalmoe.train.saved import Damaged
from frugalmoe.train.weights import Loaded, Weights, check_run, load_checkpoint

MERGED = "merged.json"  # in the run's directory: what it was made of, and how
_COPIED = ("config.json", "environment.json", "data.json", "history.jsonl", "outside.json", "source.json", MERGED)
_FOLDERS = ("tokenizer", "outside", "source")

# Coefficients of n checkpoints, oldest first, up to a factor, and the decay w_i that they stand for.
COEFFICIENTS: Mapping[str, Callable[[int], list[float]]] = {
    "mean": lambda n: [1.0] * n,  # w_i = 1 - i/n, linear
    "linear": lambda n: [j + 1.0 for j in range(n)],  # w_i = 1 - i (i + 1) / (n (n + 1)): later, and then faster
    "1-sqrt": lambda n: [math.sqrt(j + 1) - math.sqrt(j) for j in range(n)],  # w_i = 1 - sqrt(i/n): at once
}


class Merged(NamedTuple):
    """Several checkpoints as one."""

    last: Loaded  # the newest of them
    weights: Weights
    steps: list[int]  # oldest first
    coefficients: list[float]  # of each; they come to 1


def coefficients(kind: str, count: int) -> list[float]:
    """Returns what each of so many checkpoints counts for, oldest first. Raises `UserError` for an unknown kind."""
    if kind not in COEFFICIENTS:
        raise UserError(f"--weights={kind}: unknown; valid: {', '.join(COEFFICIENTS)}")
    found = COEFFICIENTS[kind](count)
    return [value / math.fsum(found) for value in found]


def merge(run: Path, kind: str, *, last: int | None = None, steps: Sequence[int] | None = None) -> Merged:
    """Returns the last so many checkpoints, or those of some steps, as one: parameters in float64, added up as
    distances from the newest, so that equal ones give themselves; the routers' state by `Router.merge`; no optimizer's.

    Of the last ones a damaged one is passed over, with a line; one that is named raises `Damaged`. Beside what is
    returned, the newest and one other are in memory at one time.
    """
    check_run(run)
    there = saved.entries(run)
    if steps is None:
        check_integer("--last", last, least=1)
    elif unknown := [step for step in steps if step not in there]:
        raise UserError(f"--steps={','.join(map(str, steps))}: no checkpoint of step {unknown[0]}; valid: {there}")
    wanted, count = (there, last) if steps is None else (sorted(set(steps)), len(set(steps)))
    shares = coefficients(kind, count)
    newest, moved, states, taken = None, None, [], []
    for step in reversed(wanted):
        if len(taken) == count:
            break
        try:
            loaded = load_checkpoint(run, step)
        except Damaged as damaged:
            if steps is not None:
                raise
            saved.tell([f"{damaged}; is not merged"])
            continue
        weights = jax.device_get(loaded.weights)
        newest = newest or loaded._replace(weights=weights)
        share = shares[count - 1 - len(taken)]
        part = _distance(weights.params, newest.weights.params, share)
        moved = part if moved is None else jax.tree.map(np.add, moved, part)
        states.append(weights.router_state)
        taken.append(step)
    if len(taken) < count:
        raise UserError(f"--last={last}: the run has {len(taken)} whole checkpoints: {taken[::-1]}")
    params = jax.tree.map(lambda a, b: (a + b).astype(a.dtype), newest.weights.params, moved)
    moe = newest.config.model.moe
    state = _merged_states(strategies.get(moe.router), states, shares[::-1], moe)
    return Merged(newest, Weights(params, state), taken[::-1], shares)


def _distance(params: dict, origin: dict, share: float) -> dict:
    return jax.tree.map(lambda a, b: share * (np.float64(a) - b), params, origin)


def _merged_states(router: Router, states: Sequence[Mapping[str, Any]], shares: Sequence[float], moe: MoE) -> dict:
    """Of trees in which a router's state is what is called so."""
    return {
        name: (
            dict(router.merge([state[name] for state in states], shares, moe))
            if name == "router_state"
            else _merged_states(router, [state[name] for state in states], shares, moe)
        )
        for name in states[0]
    }


def write_merged(run: Path, merged: Merged, kind: str, to: Path) -> None:
    """Writes a new run directory with the merged weights as its step 0, whole or not at all."""
    with output.appearing(to) as directory:
        config = settle(resolve(runnable(run / RECORD)), merged.last.tokenizer.size, None)
        rundir.copy_source(run, directory)
        output.write_run(directory, config, merged.last.tokenizer, merged.weights)
        if (run / "data.json").is_file():
            shutil.copyfile(run / "data.json", directory / "data.json")
        known = {"run": str(run.resolve()), "weights": kind, "steps": merged.steps, "coefficients": merged.coefficients}
        write_json(directory / MERGED, known)


def export(run: Path, step: int, to: Path) -> None:
    """Writes a new run directory with one checkpoint of a run and its record up to there, whole or not at all: it can
    be sampled, evaluated, converted, and gone on from. Raises `Damaged` for a checkpoint that is not whole.
    """
    check_run(run)
    saved.check(run, step)
    with output.appearing(to) as directory:
        for name in _COPIED:
            if (run / name).is_file() and not (run / name).is_symlink():
                shutil.copyfile(run / name, directory / name)
        for name in _FOLDERS:
            if (run / name).is_dir() and not (run / name).is_symlink():
                shutil.copytree(run / name, directory / name, ignore=_links)
        for name in ("metrics.jsonl", "expert_load.jsonl"):
            if (run / name).is_file():
                rows = [row for row in rundir.read_rows(run / name) if row.get("step", step + 1) <= step]
                rundir.write_rows(directory / name, rows)
        shutil.copytree(saved.place(run, step), saved.place(directory, step), ignore=_links)
        if not checksums.are_there(saved.place(directory, step)):
            checksums.write(saved.place(directory, step))
        saved.check(directory, step)


def _links(folder: str, names: list[str]) -> list[str]:
    """What is not copied: links, through which files from anywhere would come along."""
    return [name for name in names if (Path(folder) / name).is_symlink()]
