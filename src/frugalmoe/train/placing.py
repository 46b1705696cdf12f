"""Batches on the mesh: which rows are a process's own, and where they go.

Letters: A micro-batches of a step, B sequences, T time.
"""

import jax
import numpy as np

from frugalmoe import sharding
from frugalmoe.config import Config
from frugalmoe.data.batches import Batch


def own_rows(mesh: jax.sharding.Mesh, config: Config) -> np.ndarray:
    """Returns the rows of a step's batch that this process's devices work on; the same ones of each micro-batch."""
    shape = (config.train.accumulate_steps, micro_batch(config), config.data.sequence_length)
    rows_AB = np.arange(config.train.batch_size).reshape(shape[:2])
    return rows_AB[:, sharding.own_indices(mesh, shape, "ABT", "B")].reshape(-1)


def put_rows(mesh: jax.sharding.Mesh, batch: Batch, letters: str, config: Config) -> Batch:
    """Puts micro-batches, of which each process has its own rows, on the mesh."""
    b, size = letters.index("B"), micro_batch(config)
    return Batch(*(sharding.put(mesh, a, letters, (*a.shape[:b], size, *a.shape[b + 1 :])) for a in batch))


def put_batch(mesh: jax.sharding.Mesh, batch: Batch, letters: str) -> Batch:
    """Puts a batch that this process has whole on the mesh; `letters` are those of its arrays, as "BT"."""
    return Batch(*(sharding.put(mesh, a, letters) for a in batch))


def micro_batch(config: Config) -> int:
    """Returns the sequences of a micro-batch, over all devices."""
    return config.train.batch_size // config.train.accumulate_steps
