"""Entropy and mutual information of counts, in nats, with their biases.

Letters: N tokens, U units, E experts, I values of a label.
"""

from typing import NamedTuple

import numpy as np

from frugalmoe.analysis.measures.uncertainty import Estimate, bootstrap


def entropy(counts_E: np.ndarray) -> np.ndarray:
    """H = -sum p ln p of p = c / sum(c), over the last axis. Too small by about (E - 1) / (2 n) for n draws."""
    p_E = counts_E / counts_E.sum(-1, keepdims=True)
    return -np.sum(p_E * np.log(p_E, out=np.zeros_like(p_E), where=p_E > 0), axis=-1)


def mutual_information(counts_IE: np.ndarray) -> np.ndarray:
    """I(label; E) = H(label) + H(E) - H(label, E) of a table of counts (the last two axes).

    Noise floor: too large by about (I - 1)(E - 1) / (2 n) where label and E are independent.
    """
    joint = entropy(counts_IE.reshape(*counts_IE.shape[:-2], -1))
    return entropy(counts_IE.sum(-1)) + entropy(counts_IE.sum(-2)) - joint


def miller_madow(counts_IE: np.ndarray) -> np.ndarray:
    """What to add to `mutual_information`: each entropy gains (occupied cells - 1) / (2 n) (Miller, 1955)."""
    cells = lambda counts, axes: np.count_nonzero(counts, axis=axes)
    x, e, both = cells(counts_IE.sum(-1), -1), cells(counts_IE.sum(-2), -1), cells(counts_IE, (-2, -1))
    return (x + e - both - 1) / (2 * counts_IE.sum((-2, -1)))


class Information(NamedTuple):
    """I(label; expert) over routed slots."""

    corrected: Estimate  # with Miller-Madow's term
    raw: float
    shuffled: float  # mean raw information when labels are exchanged between tokens: the noise floor of `raw`
    label_entropy: float  # the largest that information can be


def label_information(
    selected_NE: np.ndarray, label_N: np.ndarray, unit_N: np.ndarray, *, shuffles: int = 20, seed: int = 0
) -> Information:
    """I(label; expert) for few labels (position, class of token, ...), with an interval over units.

    The shuffle keeps the loads and the labels' frequencies and breaks their tie. For token ids, where a table has
    thousands of rows and resampling is biased, see `vocabulary`.
    """
    labels, label_N = np.unique(label_N, return_inverse=True)
    table_UIE = _tables(selected_NE, label_N, unit_N, len(labels))
    total_IE = table_UIE.sum(0)
    corrected = bootstrap(lambda t: mutual_information(t) + miller_madow(t), table_UIE, centred=True)
    rng = np.random.default_rng(seed)
    one = np.zeros_like(unit_N)
    mixed = [_tables(selected_NE, rng.permutation(label_N), one, len(labels))[0] for _ in range(shuffles)]
    return Information(
        corrected,
        float(mutual_information(total_IE)),
        float(np.mean([mutual_information(t) for t in mixed])),
        float(entropy(total_IE.sum(1))),
    )


def position_buckets(position_N: np.ndarray) -> np.ndarray:
    """Positions 0, 1 to 2, 3 to 6, 7 to 14, ...: each bucket twice as wide as the one before. Labels for
    `label_information`, which shows an expert of first tokens.
    """
    return np.floor(np.log2(position_N + 1)).astype(np.int64)


def _tables(selected_NE: np.ndarray, label_N: np.ndarray, unit_N: np.ndarray, labels: int) -> np.ndarray:
    """Counts [U, I, E] of slots."""
    units = int(unit_N.max()) + 1
    cell_N = unit_N * labels + label_N
    columns = [np.bincount(cell_N, s_N, units * labels) for s_N in selected_NE.T]
    return np.stack(columns, axis=-1).reshape(units, labels, -1)
