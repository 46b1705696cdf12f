"""How sure a measure is: bootstrap intervals over units, p-values of shuffles.

Letters: N tokens, U units, Y draws (bootstrap samples, shuffles), I and J any further axis. A unit is what is drawn
independently, a document or a seed: tokens of one document share its topic, so resampling tokens one by one would call
everything significant.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A value with its interval; low and high are NaN where there are fewer than two units."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def __repr__(self) -> str:
        if np.ndim(self.value):
            return f"Estimate(value={self.value!r}, low={self.low!r}, high={self.high!r})"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap(
    statistic: Callable[..., np.ndarray],
    *sums_UI: np.ndarray,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    centred: bool = False,
) -> Estimate:
    """Percentile bootstrap (Efron, 1979) of `statistic(*totals)`, where a total is a sum over units.

    Units are drawn again with replacement, the same draws for every array. `statistic` maps totals [..., I] to
    [..., J]. `centred` takes the resamples' mean off and puts the value in its place, for a statistic that resampling
    biases, as it does information. Cost: samples * units * I multiplications.
    """
    sums_UI = [np.asarray(s, np.float64) for s in sums_UI]
    value = np.asarray(statistic(*(s.sum(0) for s in sums_UI)))
    units = len(sums_UI[0])
    if units < 2:
        return Estimate(value, np.full(value.shape, np.nan), np.full(value.shape, np.nan))
    times_YU = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), samples).astype(np.float64)
    drawn_YJ = statistic(*(np.tensordot(times_YU, s, 1) for s in sums_UI))
    low, high = np.quantile(drawn_YJ, [0.5 - level / 2, 0.5 + level / 2], axis=0)
    shift = value - drawn_YJ.mean(0) if centred else 0.0
    return Estimate(value, low + shift, high + shift)


def over_units(value_NI: np.ndarray, unit_N: np.ndarray) -> np.ndarray:
    """Sums [U, I] in float64 over the tokens of each unit 0..U-1; every unit has a token."""
    order_N = np.argsort(unit_N, kind="stable")
    tokens_U = np.bincount(unit_N)
    return np.add.reduceat(value_NI[order_N], np.cumsum(tokens_U) - tokens_U, axis=0, dtype=np.float64)


def mean(value_IN: np.ndarray, unit_N: np.ndarray, **options: int | float) -> Estimate:
    """Mean over tokens (the last axis, NaN left out) of a measure of each token, with its interval over units."""
    value_NI = np.moveaxis(np.asarray(value_IN, np.float64), -1, 0)
    known_NI = np.isfinite(value_NI)
    sums, counts = over_units(np.where(known_NI, value_NI, 0), unit_N), over_units(known_NI, unit_N)
    return bootstrap(_ratio, sums, counts, **options)


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(sums, counts, out=np.full(np.shape(sums), np.nan), where=np.asarray(counts) > 0)


def p_value(null_Y: np.ndarray, observed: np.ndarray | float) -> np.ndarray:
    """Share of shuffles that did at least as well as the data, the data among them: (1 + #) / (1 + Y)."""
    return (1 + np.sum(null_Y >= observed - 1e-12, axis=0)) / (1 + len(null_Y))
