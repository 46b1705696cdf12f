"""How likely a model finds texts: what the suite and lm-eval ask of it.

Letters: B sequences, T time.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from frugalmoe import sharding
from frugalmoe.config import Config
from frugalmoe.data.batches import Batch
from frugalmoe.data.tokenizer import Tokenizer
from frugalmoe.errors import UserError
from frugalmoe.model.causality import parts
from frugalmoe.train.objective import without_knobs
from frugalmoe.train.placing import micro_batch, put_batch
from frugalmoe.train.program import PROGRAMS_KEPT
from frugalmoe.train.step import State, make_eval_step
from frugalmoe.train.weights import Weights

_SHORTEST = 32  # rows are padded to this length, or to it times a power of two, so that few are compiled


class Asked(NamedTuple):
    """A text whose tokens from `first` on are scored, given those before them."""

    ids: np.ndarray  # int32 [n], n >= 2
    first: int  # from 1 to n


class Scored(NamedTuple):
    log_probability: float  # nats, of all scored tokens
    greedy: bool  # whether each is the most likely one of all ids, the lowest of equals


def score(
    config: Config,
    weights: State | Weights,
    mesh: jax.sharding.Mesh,
    asked: Sequence[Asked],
    done: Callable[[int], None] | None = None,
) -> list[Scored]:
    """Returns what the model says of each text, in their order; the mesh must be in context. Raises as `check`.

    A batch has as many tokens as a micro-batch of the config, or one row of a device where rows are longer. The rows
    are the same whatever the batches are. `done` is told how many rows each batch had.
    """
    check(config)
    devices, budget = sharding.axis_size(*sharding.BATCH_AXES), micro_batch(config) * config.data.sequence_length
    run = _compiled(without_knobs(config))
    found: dict[int, Scored] = {}
    for length, members in _by_length(asked).items():
        rows = min(max(budget // length // devices, 1), -(-len(members) // devices)) * devices
        for at in range(0, len(members), rows):
            chosen = members[at : at + rows]
            batch = _batch([asked[i] for i in chosen], rows, length)
            placed, first_row = put_batch(mesh, batch, "BT"), sharding.put(mesh, np.int32(at), "")
            ce_BT, predicted_BT = sharding.fetch(run(weights.params, weights.router_state, placed, first_row))
            nats_B = ce_BT.sum(axis=1, dtype=np.float64)
            greedy_B = ((predicted_BT == batch.targets_BT) | ~batch.loss_mask_BT).all(axis=1)
            found |= {i: Scored(-float(nats), bool(same)) for i, nats, same in zip(chosen, nats_B, greedy_B)}
            if done is not None:
                done(len(chosen))
    return [found[i] for i in range(len(asked))]


def check(config: Config) -> None:
    """Raises `UserError` for a model in which a token's likelihood depends on what follows it, or on other texts."""
    for part, level in parts(config.model, False, 1).items():
        if level != "safe":
            rule = "a text has no likelihood of its own where experts of a token depend on later tokens or other texts"
            raise UserError(f"{part}: {rule} in evaluation (causal={level})")


def whole_text(config: Config, tokenizer: Tokenizer, text: str) -> Asked:
    """All of a document's text, without its end, behind what training put in front of a document.

    Where that is nothing the first token is given.
    """
    ids = tokenizer.encode(text)
    if config.data.document_start == "end_of_text" or len(ids) < 2:
        ids = np.append(tokenizer.eos, ids)
    return Asked(ids.astype(np.int32), 1)


@functools.lru_cache(PROGRAMS_KEPT)
def _compiled(config: Config) -> Callable:
    step = make_eval_step(config, trace=True)

    def losses_and_predictions(params: dict, router_state: dict, batch: Batch, first_row: jax.Array):
        out = step(params, router_state, batch, first_row=first_row)
        return out.ce_BT, out.predicted_BT

    return jax.jit(losses_and_predictions)


def _by_length(asked: Sequence[Asked]) -> dict[int, list[int]]:
    """Padded length -> the numbers of the texts that have it, shortest first."""
    groups: dict[int, list[int]] = {}
    for i in sorted(range(len(asked)), key=lambda i: len(asked[i].ids)):
        length = _SHORTEST
        while length < len(asked[i].ids) - 1:
            length *= 2
        groups.setdefault(length, []).append(i)
    return groups


def _batch(asked: Sequence[Asked], rows: int, length: int) -> Batch:
    """Each text is one document in a row of its own; rows and places beyond them are padding."""
    columns = {name: np.zeros((rows, length), np.int32) for name in Batch._fields}
    columns["loss_mask_BT"] = np.zeros((rows, length), bool)
    for row, (ids, first) in enumerate(asked):
        n = len(ids) - 1
        columns["tokens_BT"][row, :n], columns["targets_BT"][row, :n] = ids[:-1], ids[1:]
        columns["segment_ids_BT"][row, :n], columns["positions_BT"][row, :n] = 1, np.arange(n)
        columns["loss_mask_BT"][row, first - 1 : n] = True
    return Batch(**columns)
