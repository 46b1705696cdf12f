"""Paired comparison of arms: each seed is one pair, with the same start and the same batches in both arms.

The interval is Student's t over the paired differences. A percentile bootstrap over seeds is reported beside it: with
n = 3 it is the range of the three values, which holds the true mean of a symmetric distribution with probability
1 - 2 / 2^3 = 75%, not 95%. Verdicts are made at a family-wise error of 5% over the arms of
a study, by the step-down procedure of Holm (1979).
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES, EXACT = 10_000, 5  # 5 ** 5 = 3,125 resamples of five seeds


class Paired(NamedTuple):
    """An arm against the baseline, over the seeds that both have; differences are arm - baseline."""

    n: int
    mean: float
    half_width: float  # of the t interval; NaN for n < 2
    bootstrap: tuple[float, float]  # NaN for n < 2
    p: float  # two-sided paired t test, not corrected; NaN for n < 2
    adjusted_p: float  # by Holm over the arms of the study


def compare(values: Mapping[str, Mapping[int, float]], baseline: str) -> dict[str, Paired]:
    """{arm: {seed: value}} -> each other arm's comparison with the baseline."""
    base = values.get(baseline, {})
    found = {}
    for arm, by_seed in values.items():
        seeds = sorted(by_seed.keys() & base.keys())
        if arm != baseline and seeds:
            found[arm] = paired(np.array([by_seed[s] - base[s] for s in seeds]))
    adjusted = holm([f.p for f in found.values()])
    return {arm: f._replace(adjusted_p=p) for (arm, f), p in zip(found.items(), adjusted)}


def paired(differences: np.ndarray) -> Paired:
    n, mean = len(differences), float(differences.mean())
    if n < 2:
        return Paired(n, mean, np.nan, (np.nan, np.nan), np.nan, np.nan)
    error = float(differences.std(ddof=1)) / n**0.5
    half_width = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    p = (1.0 if mean == 0 else 0.0) if error == 0 else float(2 * stats.t.sf(abs(mean) / error, n - 1))
    return Paired(n, mean, half_width, bootstrap(differences), p, np.nan)


def bootstrap(differences: np.ndarray) -> tuple[float, float]:
    """Percentile interval of the mean over resampled seeds (Efron 1979); over all resamples where they are few."""
    n = len(differences)
    if n <= EXACT:
        chosen = np.array(list(itertools.product(range(n), repeat=n)))
    else:
        chosen = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    low, high = np.quantile(differences[chosen].mean(axis=1), tails, method="inverted_cdf")
    return float(low), float(high)


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted for the number of comparisons; NaN stays NaN and is not counted."""
    p = np.array(p, float)
    adjusted, running = np.full(len(p), np.nan), 0.0
    order = [i for i in np.argsort(p) if np.isfinite(p[i])]
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p[i]))
        adjusted[i] = running
    return adjusted.tolist()


def reaches(steps: np.ndarray, losses: np.ndarray, target: float) -> float:
    """The first step at which a curve, read linearly between its points, is at or below the target; NaN if never."""
    below = np.flatnonzero(losses <= target)
    if not below.size:
        return np.nan
    i = below[0]
    if i == 0:
        return float(steps[0])
    share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def judge(result: Paired) -> str:
    """better, worse, not distinguishable, identical, or one seed; less is better."""
    if result.n < 2:
        return "one seed"
    if result.mean == 0 and result.half_width == 0:
        return "identical"
    if result.adjusted_p >= 1 - CONFIDENCE:
        return "not distinguishable"
    return "better" if result.mean < 0 else "worse"


def verdict(result: Paired, unit: str = "nats") -> str:
    """`judge` with its figures, one honest line."""
    word, size = judge(result), f"{abs(result.mean):.4f}"
    if word == "one seed":
        return f"one seed: {size} {unit} {'better' if result.mean < 0 else 'worse'}, no interval"
    if word == "identical":
        return f"identical at n={result.n}"
    if word == "not distinguishable":
        return f"not distinguishable at n={result.n} ({result.mean:+.4f} ± {result.half_width:.4f} {unit})"
    return f"{word} by {size} ± {result.half_width:.4f} {unit} (n={result.n})"
