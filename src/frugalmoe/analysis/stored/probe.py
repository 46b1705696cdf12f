"""Routing of held-out tokens: what a run writes at its end (probe.npz) and a trace holds for each checkpoint.

Letters: L MoE layers, N tokens, E experts, K experts per token.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from frugalmoe import npz
from frugalmoe.errors import UserError


class Probe(NamedTuple):
    """Routing of held-out tokens at one time of a run, padding left out."""

    token_ids_N: np.ndarray
    domain_ids_N: np.ndarray
    unit_ids_N: np.ndarray  # what is resampled: the document, 0, 1, ...; in older runs the row, or its document
    loss_N: np.ndarray  # nats, of predicting the next token; NaN where there is none to predict
    selected_LNE: np.ndarray  # bool
    layers_L: np.ndarray  # index in the whole network
    positions_N: np.ndarray  # in the document's part of the row
    next_ids_N: np.ndarray | None = None  # -1 where there is none; None in older runs, as the next
    predicted_ids_N: np.ndarray | None = None


def load_probe(path: Path) -> Probe:
    columns = read_columns(path, "probe")
    with damage(path, "probe"):
        return make(columns)


def read_columns(path: Path, kind: str) -> dict[str, np.ndarray]:
    """Every array of an .npz file; the file's damage is one line."""
    with damage(path, kind):
        return npz.read(path)


@contextlib.contextmanager
def damage(path: Path, kind: str) -> Iterator[None]:
    """Turns what a damaged file raises into a `UserError` that names it."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, LookupError, MemoryError, OSError, TypeError, ValueError) as e:
        raise UserError(f"{path}: not a readable {kind} ({type(e).__name__}: {' '.join(str(e).split())})") from e


def make(columns: Mapping[str, np.ndarray]) -> Probe:
    """Returns the probe from the columns of `train.evaluate.probe_columns`, which are padded."""
    real_N = columns["segment_ids"] > 0
    selected_LNE = np.unpackbits(columns["selected"], axis=-1, count=int(columns["num_experts"])).astype(bool)
    optional = lambda name: columns[name][real_N] if name in columns else None
    token_ids_N, domain_N, positions_N = (columns[n][real_N] for n in ("token_ids", "domain_ids", "positions"))
    target_N = columns["has_target"][real_N] if "has_target" in columns else np.ones(len(token_ids_N), bool)
    next_ids_N = optional("next_ids")
    return Probe(
        token_ids_N=token_ids_N,
        domain_ids_N=domain_N,
        unit_ids_N=_units(columns, real_N),
        loss_N=np.where(target_N, columns["loss"][real_N], np.nan),
        selected_LNE=selected_LNE[:, real_N],
        layers_L=columns["layers"],
        positions_N=positions_N,
        next_ids_N=None if next_ids_N is None else np.where(target_N, next_ids_N, -1),
        predicted_ids_N=optional("predicted_ids"),
    )


def _units(columns: Mapping[str, np.ndarray], real_N: np.ndarray) -> np.ndarray:
    """Documents: their tokens are not independent of each other. Where they are unknown, rows that hold one domain
    each, else the documents' parts in the rows.
    """
    if "documents" in columns:
        key_N = columns["documents"][None, real_N]
    else:
        row_N = (np.arange(real_N.size) // int(columns["row_length"]))[real_N]
        domain_N = columns["domain_ids"][real_N]
        mixed = np.unique(np.stack([row_N, domain_N]), axis=1).shape[1] > np.unique(row_N).size
        key_N = np.stack([row_N, columns["segment_ids"][real_N], domain_N]) if mixed else row_N[None]
    return np.unique(key_N, axis=1, return_inverse=True)[1].reshape(-1)
