"""Held-out loss per domain, and the routing of the probe tokens.

Letters: B sequences, T time, L MoE layers, E experts, N tokens (all rows of the probe, one after the other).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from frugalmoe import sharding
from frugalmoe.config import Config
from frugalmoe.data import Dataset
from frugalmoe.data.batches import Batch
from frugalmoe.train.placing import micro_batch, put_batch
from frugalmoe.train.step import Evaluated, State
from frugalmoe.train.weights import Weights


class Traced(NamedTuple):
    """One evaluated batch."""

    batch: Batch
    documents_BT: np.ndarray
    out: Evaluated


class Scores(NamedTuple):
    loss: dict[str, float]  # nats per token, by domain, and their mean
    bits_per_byte: dict[str, float]
    targets: dict[str, int]  # tokens that were predicted, by domain
    bytes: dict[str, int]  # of UTF-8 text that they stand for
    stats: dict[str, np.ndarray]  # routing statistics [L, ...] summed over all domains
    depths: dict[str, np.ndarray]  # the same of the blocks that mixture of depths routes; empty without


def _batch_size(config: Config, mesh: jax.sharding.Mesh) -> int:
    """Returns the rows of an evaluation batch: a training micro-batch, or less where fewer rows are evaluated."""
    devices = sharding.axis_size(*sharding.BATCH_AXES, mesh=mesh)
    return min(micro_batch(config), -(-config.train.eval_rows // devices) * devices)


def evaluate(
    eval_step: Callable,
    state: State | Weights,
    data: Dataset,
    config: Config,
    mesh: jax.sharding.Mesh,
    trace: list[Traced] | None = None,
    *,
    done: Callable[[int], None] | None = None,
) -> Scores:
    """Every domain's loss on the first `train.eval_rows` rows of its held-out documents.

    The rows, and what a router draws for each, are the same whatever batches, micro-batches and devices they are
    computed in. With `trace`, appends what it saw of every batch to it; `done` is told how many rows each batch had.
    """
    loss, bits, tokens, sizes = {}, {}, {}, {}
    stats = None  # (of the routers, of mixture of depths)
    size_of_batch = _batch_size(config, mesh)
    for domain in data.domains:
        nats, targets = 0.0, 0
        size = data.eval_bytes(domain, config.train.eval_rows)
        rows = (domain, size_of_batch, config.train.eval_rows)
        for number, (batch, documents_BT) in enumerate(zip(data.eval_batches(*rows), data.eval_documents(*rows))):
            first_row = np.int32(number * size_of_batch)
            placed = put_batch(mesh, batch, "BT")
            out: Evaluated = sharding.fetch(
                eval_step(state.params, state.router_state, placed, first_row=sharding.put(mesh, first_row, ""))
            )
            nats += float(out.ce_BT.sum(dtype=np.float64))
            targets += int(batch.loss_mask_BT.sum())
            found = (out.stats, out.depths)
            stats = found if stats is None else jax.tree.map(np.add, stats, found)
            if done is not None:
                done(int(batch.segment_ids_BT.any(axis=1).sum()))
            if trace is not None:
                trace.append(Traced(batch, documents_BT, out))
        loss[domain] = nats / max(targets, 1)
        bits[domain] = float(nats / np.log(2) / max(size, 1))
        tokens[domain], sizes[domain] = targets, size
    loss["mean"] = float(np.mean(list(loss.values())))
    bits["mean"] = float(np.mean(list(bits.values())))
    return Scores(loss, bits, tokens, sizes, *stats)


def limited(config: Config, domains: int, tokens: int) -> Config:
    """Returns the config with as many held-out rows per domain as come nearest to so many tokens, at least one."""
    rows = max(1, round(tokens / (domains * config.data.sequence_length)))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, eval_rows=rows))


def write_probe(path: Path, trace: list[Traced], layers: list[int], num_experts: int) -> None:
    """Writes which expert got which held-out token, with the token, its domain and its loss: see
    `analysis.stored.probe`.
    """
    np.savez_compressed(path, **probe_columns(trace, layers, num_experts))


def probe_columns(trace: list[Traced], layers: list[int], num_experts: int) -> dict[str, np.ndarray]:
    """Returns what a probe or a trace holds: one entry per token, or [L, N, ...], padding included (segment 0)."""
    flat = lambda arrays: np.concatenate([a.reshape(-1) for a in arrays])
    column = lambda name: flat(getattr(t.batch, name) for t in trace)
    selected_LNE = np.concatenate([t.out.selected_LBTE.reshape(len(layers), -1, num_experts) for t in trace], axis=1)
    return {
        "token_ids": column("tokens_BT"),
        "next_ids": column("targets_BT"),
        "predicted_ids": flat(t.out.predicted_BT for t in trace),
        "domain_ids": column("domain_ids_BT"),
        "documents": flat(t.documents_BT for t in trace),
        "segment_ids": column("segment_ids_BT"),
        "positions": column("positions_BT"),
        "loss": flat(t.out.ce_BT for t in trace).astype(np.float32),
        "has_target": column("loss_mask_BT"),
        "selected": np.packbits(selected_LNE, axis=-1),
        "layers": np.array(layers),
        "num_experts": np.array(num_experts),
        "row_length": np.array(trace[0].batch.tokens_BT.shape[1]),
    }
