"""Paired comparison of arms: each seed is one pair, with the same start and the same batches in both arms.

Verdicts are made at a family-wise error of 5% over the arms of a study, by paired t tests and the step-down procedure
of Holm (1979). An arm's interval is Student's t at the level that the procedure asked of that arm, so that it touches
zero if and only if the verdict is "not distinguishable". A pair of which one value is not finite has diverged: it
enters nothing but its own count.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

ERROR = 0.05  # of all verdicts of a study together
POWER, MOST_SEEDS = 0.8, 100  # of the test that seeds are counted for; the most that are tried
ROUNDING = 1e-12  # differences below it are those of sums in another order
LARGEST = float(np.finfo(np.float32).max)  # beyond it a loss has overflowed


class Paired(NamedTuple):
    """An arm against the baseline, over the seeds that both have; differences are arm - baseline."""

    n: int  # pairs of finite values
    mean: float  # NaN for n = 0
    deviation: float  # of the differences between seeds; NaN for n < 2, as the next four
    p: float  # two-sided paired t test, not corrected
    adjusted_p: float  # by Holm over the arms of the study
    level: float  # what Holm's procedure compares this p with
    half_width: float  # of the t interval at confidence 1 - level, the one that decides
    diverged: tuple[int, ...] = ()  # seeds of which a value is not finite

    @property
    def confidence(self) -> float:
        return 1 - self.level


def compare(values: Mapping[str, Mapping[int, float]], baseline: str) -> dict[str, Paired]:
    """Returns each arm's comparison with the baseline, from {arm: {seed: value}}; arms without a common seed are left
    out.
    """
    base = values.get(baseline, {})
    found = {}
    for arm, by_seed in values.items():
        seeds = sorted(by_seed.keys() & base.keys())
        if arm != baseline and seeds:
            with np.errstate(over="ignore", invalid="ignore"):  # inf - inf
                differences = np.array([by_seed[s] for s in seeds], float) - np.array([base[s] for s in seeds], float)
            finite = np.abs(differences) < LARGEST
            diverged = tuple(s for s, whole in zip(seeds, finite) if not whole)
            found[arm] = paired(differences[finite])._replace(diverged=diverged)
    p = [f.p for f in found.values()]
    corrected = zip(found.items(), holm(p), levels(p))
    return {arm: _at_level(f, level)._replace(adjusted_p=p) for (arm, f), p, level in corrected}


def paired(differences: np.ndarray) -> Paired:
    """Returns the comparison from finite differences, one per seed; not corrected for other arms."""
    differences = np.where(np.abs(differences) > ROUNDING, differences, 0.0)
    n = len(differences)
    mean = float(differences.mean()) if n else np.nan
    if n < 2:
        return Paired(n, mean, np.nan, np.nan, np.nan, np.nan, np.nan)
    deviation = float(differences.std(ddof=1))
    deviation = deviation if deviation > ROUNDING else 0.0
    if deviation == 0:
        p = 1.0 if mean == 0 else 0.0
    else:
        p = float(2 * stats.t.sf(abs(mean) / (deviation / n**0.5), n - 1))
    return _at_level(Paired(n, mean, deviation, p, p, np.nan, np.nan), ERROR)


def _at_level(found: Paired, level: float) -> Paired:
    """Returns the comparison with the t interval at confidence 1 - level."""
    if found.n < 2:
        return found
    quantile = float(stats.t.isf(level / 2, found.n - 1))
    return found._replace(level=level, half_width=quantile * found.deviation / found.n**0.5)


def holm(p: Sequence[float]) -> list[float]:
    """Returns p values adjusted for the number of comparisons; NaN stays NaN and is not counted."""
    p = np.array(p, float)
    adjusted, running = np.full(len(p), np.nan), 0.0
    order = _ranked(p)
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p[i]))
        adjusted[i] = running
    return adjusted.tolist()


def levels(p: Sequence[float]) -> list[float]:
    """Returns the level that Holm's procedure compares each p with; NaN for NaN.

    The r-th smallest of m (r = 0, 1, ...) meets 5% / (m - r). The first that is not below ends the procedure: its level
    is that of all that follow, which are larger still.
    """
    p = np.array(p, float)
    found, ended, level = np.full(len(p), np.nan), False, ERROR
    order = _ranked(p)
    for rank, i in enumerate(order):
        level = level if ended else ERROR / (len(order) - rank)
        ended = ended or p[i] >= level
        found[i] = level
    return found.tolist()


def _ranked(p: np.ndarray) -> list[int]:
    return [i for i in np.argsort(p, kind="stable") if np.isfinite(p[i])]


@functools.lru_cache
def seeds_needed(effect: float, level: float) -> int | None:
    """Returns the least number of pairs with which a paired t test at `level` finds a difference of `effect` standard
    deviations in 80% of studies; None if it is more than 100.

    Power is P(|T| > t) with T noncentral t of n - 1 degrees and noncentrality effect * sqrt(n) (Cohen 1988, chapter 2),
    here integrated over the distribution of the estimated deviation.
    """
    return next((n for n in range(2, MOST_SEEDS + 1) if _power(n, abs(effect), level) >= POWER), None)


def _power(n: int, effect: float, level: float) -> float:
    """Returns E over s of P(Z > t s - d) + P(Z < -t s - d), with (n - 1) s^2 chi-squared and d = effect * sqrt(n)."""
    shares = (np.arange(400) + 0.5) / 400
    s = np.sqrt(stats.chi2.ppf(shares, n - 1) / (n - 1))
    t, shift = stats.t.isf(level / 2, n - 1), effect * n**0.5
    return float(np.mean(stats.norm.sf(t * s - shift) + stats.norm.cdf(-t * s - shift)))


def reaches(steps: np.ndarray, losses: np.ndarray, target: float) -> float:
    """Returns the first step at which a curve, linear between its points, is at or below the target; NaN if never."""
    below = np.flatnonzero(losses <= target)
    if not below.size:
        return np.nan
    i = below[0]
    if i == 0:
        return float(steps[0])
    share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def judge(result: Paired) -> str:
    """Returns better, worse, not distinguishable, identical, one seed or diverged; less is better."""
    if result.n < 2:
        return "one seed" if result.n else "diverged"
    if result.mean == 0 and result.half_width == 0:
        return "identical"
    if abs(result.mean) <= result.half_width:
        return "not distinguishable"
    return "better" if result.mean < 0 else "worse"


def verdict(result: Paired, unit: str = "nats") -> str:
    """Returns the verdict of `judge` with the figures that it rests on, as one line."""
    word, size = judge(result), figure(abs(result.mean))
    lost = f"; {len(result.diverged)} of {result.n + len(result.diverged)} pairs diverged" if result.diverged else ""
    if word == "diverged":
        return f"no complete pair of runs: {len(result.diverged)} of {len(result.diverged)} diverged"
    if word == "one seed":
        return f"one seed: {size} {unit} {'better' if result.mean < 0 else 'worse'}, no interval{lost}"
    if word == "identical":
        return f"identical at n={result.n}{lost}"
    if word == "not distinguishable":
        interval = f"{result.mean:+.4f} ± {result.half_width:.4f} {unit}"
        seeds = f"about {n}" if (n := needed(result)) else f"more than {MOST_SEEDS}"
        return f"not distinguishable at n={result.n} ({interval}; {seeds} seeds would be needed){lost}"
    return f"{word} by {size} ± {figure(result.half_width)} {unit} (n={result.n}){lost}"


def needed(result: Paired) -> int | None:
    """Returns how many seeds would tell a difference as large as the one seen; None for more than 100."""
    n = seeds_needed(result.mean / result.deviation, result.level) if result.deviation else None
    return n and max(n, result.n + 1)


def figure(value: float) -> str:
    """Returns a value with four decimals, or with two digits where these would show a real difference as 0.0000."""
    return f"{value:.1e}" if 0 < value < 0.00005 else f"{value:.4f}"
