"""Held-out loss per domain, and the routing of the probe tokens.

Letters: B sequences, T time, L MoE layers, E experts, N tokens (all rows of the probe, one after the other).
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from frugalmoe import sharding
from frugalmoe.data import Dataset
from frugalmoe.data.batches import Batch
from frugalmoe.train.step import Evaluated, State


class Scores(NamedTuple):
    loss: dict[str, float]  # nats per token, by domain, and their mean
    bits_per_byte: dict[str, float]
    stats: dict[str, np.ndarray]  # routing statistics [L, ...] summed over all domains


def put_batch(mesh: jax.sharding.Mesh, batch: Batch, letters: str) -> Batch:
    return Batch(*(sharding.put(mesh, a, letters) for a in batch))


def batches_of(data: Dataset, domain: str, config) -> Iterable[Batch]:
    """Whole sequences of one domain; the batch size is that of a training micro-batch."""
    size = config.train.batch_size // config.train.accumulate_steps
    return data.eval_batches(domain, size, config.train.eval_batches)


def evaluate(
    eval_step: Callable, state: State, data: Dataset, config, mesh: jax.sharding.Mesh, trace: list | None = None
) -> Scores:
    """Every domain's loss on its held-out documents. With `trace`, appends (batch, Evaluated) of every batch to it."""
    loss, bits, stats = {}, {}, None
    token_bytes = data.tokenizer.token_bytes
    for domain in data.domains:
        nats = targets = size = 0.0
        for batch in batches_of(data, domain, config):
            out: Evaluated = jax.device_get(eval_step(state.params, state.router_state, put_batch(mesh, batch, "BT")))
            nats += float(out.ce_BT.sum(dtype=np.float64))
            targets += int(batch.loss_mask_BT.sum())
            size += int(token_bytes[batch.targets_BT[batch.loss_mask_BT]].sum())
            stats = out.stats if stats is None else jax.tree.map(np.add, stats, out.stats)
            if trace is not None:
                trace.append((batch, out))
        loss[domain] = nats / max(targets, 1)
        bits[domain] = nats / np.log(2) / max(size, 1)
    loss["mean"] = float(np.mean(list(loss.values())))
    bits["mean"] = float(np.mean(list(bits.values())))
    return Scores(loss, bits, stats)


def write_probe(path: Path, trace: list[tuple[Batch, Evaluated]], layers: list[int], num_experts: int) -> None:
    """Which expert got which held-out token, beside the token, its domain and its loss: see analysis.runs."""
    flat = lambda name: np.concatenate([getattr(batch, name).reshape(-1) for batch, _ in trace])
    selected_LNE = np.concatenate([e.selected_LBTE.reshape(len(layers), -1, num_experts) for _, e in trace], axis=1)
    np.savez_compressed(
        path,
        token_ids=flat("tokens_BT"),
        domain_ids=flat("domain_ids_BT"),
        segment_ids=flat("segment_ids_BT"),
        positions=flat("positions_BT"),
        loss=np.concatenate([e.ce_BT.reshape(-1) for _, e in trace]).astype(np.float32),
        has_target=flat("loss_mask_BT"),
        selected=np.packbits(selected_LNE, axis=-1),
        layers=np.array(layers),
        num_experts=num_experts,
        row_length=trace[0][0].tokens_BT.shape[1],
    )
