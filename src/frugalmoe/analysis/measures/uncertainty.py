"""How sure a measure is: bootstrap intervals over units, p-values of shuffles.

Letters: N tokens, U units, R bootstrap samples, P shuffles, X and Y any further axes. A unit is what is drawn
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
    *sums_UX: np.ndarray,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    centred: bool = False,
) -> Estimate:
    """Percentile bootstrap (Efron, 1979) of `statistic(*totals)`, where a total is a sum over units.

    Units are drawn again with replacement, the same draws for every array. `statistic` maps totals [..., X] to
    [..., Y]. `centred` takes the resamples' mean off and puts the value in its place, for a statistic that resampling
    biases, as it does information. Cost: samples * units * X multiplications.
    """
    sums_UX = [np.asarray(s, np.float64) for s in sums_UX]
    value = np.asarray(statistic(*(s.sum(0) for s in sums_UX)))
    units = len(sums_UX[0])
    if units < 2:
        return Estimate(value, np.full(value.shape, np.nan), np.full(value.shape, np.nan))
    times_RU = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), samples).astype(np.float64)
    drawn_RY = statistic(*(np.tensordot(times_RU, s, 1) for s in sums_UX))
    low, high = np.quantile(drawn_RY, [0.5 - level / 2, 0.5 + level / 2], axis=0)
    shift = value - drawn_RY.mean(0) if centred else 0.0
    return Estimate(value, low + shift, high + shift)


def over_units(value_NX: np.ndarray, unit_N: np.ndarray) -> np.ndarray:
    """Sums [U, X] in float64 over the tokens of each unit 0..U-1; every unit has a token."""
    order_N = np.argsort(unit_N, kind="stable")
    tokens_U = np.bincount(unit_N)
    return np.add.reduceat(value_NX[order_N], np.cumsum(tokens_U) - tokens_U, axis=0, dtype=np.float64)


def mean(value_XN: np.ndarray, unit_N: np.ndarray, **options: int | float) -> Estimate:
    """Mean over tokens (the last axis, NaN left out) of a measure of each token, with its interval over units."""
    value_NX = np.moveaxis(np.asarray(value_XN, np.float64), -1, 0)
    known_NX = np.isfinite(value_NX)
    sums, counts = over_units(np.where(known_NX, value_NX, 0), unit_N), over_units(known_NX, unit_N)
    return bootstrap(_ratio, sums, counts, **options)


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(sums, counts, out=np.full(np.shape(sums), np.nan), where=np.asarray(counts) > 0)


def p_value(null_P: np.ndarray, observed: np.ndarray | float) -> np.ndarray:
    """Share of shuffles that did at least as well as the data, the data among them: (1 + #) / (1 + P)."""
    return (1 + np.sum(null_P >= observed - 1e-12, axis=0)) / (1 + len(null_P))
