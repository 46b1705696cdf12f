"""Laws of the loss that are fitted to runs: robust, with bands, and never to what is not finite.

M is a model's size, forward FLOPs per token without its head (`size_of`); D is tokens; C = 3 M D is compute. Two forms:

| form | loss, nats per token |
|---|---|
| size and tokens | floor + a (M / M0)^-alpha + b (D / D0)^-beta            (Hoffmann et al., 2203.15556, approach 3) |
| compute | floor + a (C / C0)^-alpha |

M0, D0, C0 are the geometric means of the points, so that a and b are nats at the middle of them. The fit is of
logarithms under Huber's loss, from many starts. Its band comes from weights: every arm and every seed gets one, drawn
from an exponential distribution of mean 1, and a point has the product of its two (Owen & Eckles 2012). A seed is drawn
for all arms at once, since they share its batches; no arm is ever left out whole, which would leave too few sizes.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

from frugalmoe.cost.flops import TRAIN_FACTOR
from frugalmoe.errors import UserError

DELTA = 1e-3  # of Huber's loss, in log loss: beyond it an error counts linearly
DRAWS = 200
BAND = (5.0, 95.0)  # percent
NOT_OF_SIZE = ("head", "multi-token prediction")


# constants -> (log losses of the points, their slopes [constants, points])
Law = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Point(NamedTuple):
    """One measured loss."""

    arm: str
    seed: int
    size: float  # M, FLOPs
    tokens: float  # D
    loss: float  # nats per token


class Form(NamedTuple):
    """A law's form: its scales (what it is a law of) and how many values a point must differ in of each."""

    scales: Callable[[float, float], tuple[float, ...]]  # (M, D) -> the law's arguments
    names: tuple[str, ...]
    needed: tuple[tuple[str, int], ...]  # (field of Point, least number of different values)


FORMS = {
    "size and tokens": Form(lambda m, d: (m, d), ("size", "tokens"), (("size", 3), ("tokens", 3))),
    "compute": Form(lambda m, d: (TRAIN_FACTOR * m * d,), ("compute",), (("size", 2),)),
}


class Estimate(NamedTuple):
    """A loss with its 90% band: of the constants, and of runs about the law."""

    loss: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law. Constants are (log floor, log a, alpha, log b, beta ...), centers the M0, D0, C0."""

    form: str
    constants: tuple[float, ...]
    centers: tuple[float, ...]
    draws: tuple[tuple[float, ...], ...]
    ranges: Mapping[str, tuple[float, float]]  # size, tokens -> what it was fitted on
    spread: float  # root mean square error of log loss
    points: int
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    source: str = ""  # the study

    @property
    def floor(self) -> float:
        """Returns the loss that no size and no number of tokens goes below."""
        return math.exp(self.constants[0])

    def terms(self) -> dict[str, tuple[float, float]]:
        """Returns {scale: (nats at the middle of the points, exponent)}."""
        pairs = zip(self.constants[1::2], self.constants[2::2])
        return {name: (math.exp(log_a), alpha) for name, (log_a, alpha) in zip(FORMS[self.form].names, pairs)}


def size_of(parts: Mapping[str, float]) -> float:
    """Returns M from `forward_flops` by part: without the head, whose share is large in small models only."""
    return sum(flops for part, flops in parts.items() if part not in NOT_OF_SIZE)


def fit_loss(points: Iterable[Point], form: str = "size and tokens", source: str = "") -> Fit:
    """Returns the law through points, with `DRAWS` draws of its constants.

    Raises `UserError` for a point that is not finite or positive, for too few different sizes or tokens, and where the
    fit finds no minimum.
    """
    points = sorted(points)
    _check(points, form)
    x, y, centers = _arrays(points, form)
    best = min((_minimize(start, x, y, np.ones(len(y))) for start in _starts(x, y)), key=lambda found: found.fun)
    if not (np.isfinite(best.x).all() and np.isfinite(best.fun)):
        raise UserError(f"{source or 'fit'}: no finite law goes through these {len(points)} points")
    rng = np.random.default_rng(0)
    draws = [_minimize(best.x, x, y, draw_weights(points, rng)).x for _ in range(DRAWS)]
    errors = _predicted(best.x, x) - y
    return Fit(
        form=form,
        constants=tuple(map(float, best.x)),
        centers=centers,
        draws=tuple(tuple(map(float, draw)) for draw in draws if np.isfinite(draw).all()),
        ranges={name: _range(getattr(p, name) for p in points) for name in ("size", "tokens")},
        spread=float(np.sqrt(np.mean(errors**2))),
        points=len(points),
        arms=tuple(sorted({p.arm for p in points})),
        seeds=tuple(sorted({p.seed for p in points})),
        source=source,
    )


def _range(values: Iterable[float]) -> tuple[float, float]:
    values = list(values)
    return float(min(values)), float(max(values))


def _check(points: Sequence[Point], form: str) -> None:
    if form not in FORMS:
        raise UserError(f"form={form!r}: must be one of {', '.join(FORMS)}")
    for p in points:
        for name in ("size", "tokens", "loss"):
            if not (math.isfinite(value := getattr(p, name)) and value > 0):
                raise UserError(f"fit: {p.arm} seed {p.seed}: {name}={value}: must be finite and positive")
    for name, least in FORMS[form].needed:
        found = len({getattr(p, name) for p in points})
        if found < least:
            arms = ", ".join(sorted({p.arm for p in points})) or "no arm"
            rule = f"must differ in at least {least} values, there are {found}; runs of {arms}"
            raise UserError(f"fit: {name}: a law of {form} needs more runs: {rule}")
    constants = 1 + 2 * len(FORMS[form].names)
    if len(points) <= constants:
        raise UserError(f"fit: {len(points)} points: a law of {form} has {constants} constants and needs more points")


def _arrays(points: Sequence[Point], form: str) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """Returns logs of the scales over their centers [scales, points], of the losses [points], and the centers."""
    logs = np.log([FORMS[form].scales(p.size, p.tokens) for p in points]).T
    centers = logs.mean(axis=1, keepdims=True)
    return logs - centers, np.log([p.loss for p in points]), tuple(map(float, np.exp(centers[:, 0])))


def _predicted(constants: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Returns log loss: log(exp(floor) + sum of exp(log_a - alpha x))."""
    return np.logaddexp.reduce(_logs(constants, x), axis=0)


def _logs(constants: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Returns logs of the law's terms [1 + scales, points]."""
    powers = [log_a - alpha * row for log_a, alpha, row in zip(constants[1::2], constants[2::2], x)]
    return np.stack([np.full(x.shape[1], constants[0]), *powers])


def _starts(x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """Returns starts: a floor of so much of the least loss, the rest in equal terms, of several exponents."""
    least, middle, found = math.exp(y.min()), math.exp(y.mean()), []
    for share in (0.2, 0.5, 0.8, 0.95):
        floor = share * least
        rest = math.log(max((middle - floor) / len(x), 1e-3))
        found += [np.array([math.log(floor), *([rest, alpha] * len(x))]) for alpha in (0.1, 0.3, 0.6, 1.0)]
    return found


def _power_law(x: np.ndarray) -> Law:
    """Returns the law of floor and powers at x as `minimize` takes it."""

    def law(constants: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logs = _logs(constants, x)
        total = np.logaddexp.reduce(logs, axis=0)
        share = np.exp(logs - total)  # of each term
        slopes = np.empty((len(constants), x.shape[1]))
        slopes[0], slopes[1::2], slopes[2::2] = share[0], share[1:], -share[1:] * x
        return total, slopes

    return law


def _minimize(start: np.ndarray, x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> optimize.OptimizeResult:
    """Exponents are at least 0, so that more is never worse."""
    bounds = [(-20.0, None), *([(-20.0, 20.0), (0.0, 10.0)] * len(x))]
    return minimize(start, _power_law(x), y, weights, bounds)


def minimize(
    start: np.ndarray, law: Law, y: np.ndarray, weights: np.ndarray, bounds: Sequence[tuple[float, float | None]]
) -> optimize.OptimizeResult:
    """Minimizes the weighted mean of Huber's loss of a law of log losses `y`."""
    weights = weights / weights.sum()

    def objective(constants: np.ndarray) -> tuple[float, np.ndarray]:
        predicted, slopes = law(constants)
        error = predicted - y
        slope = np.clip(error, -DELTA, DELTA)
        slope *= weights  # sums, not products of matrices, whose threads cost more than these few numbers
        value = (slope * error - slope * np.clip(error, -DELTA, DELTA) / 2).sum()
        return value / DELTA, (slopes * slope).sum(axis=1) / DELTA

    return optimize.minimize(
        objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 2000, "ftol": 1e-13}
    )


def draw_weights(points: Sequence[Any], rng: np.random.Generator) -> np.ndarray:
    """Returns a draw: an exponential weight for each arm times one for each seed."""
    arms = {arm: rng.exponential() for arm in sorted({p.arm for p in points})}
    seeds = {seed: rng.exponential() for seed in sorted({p.seed for p in points})}
    return np.array([arms[p.arm] * seeds[p.seed] for p in points])


# What a fit says.


def loss_at(fit: Fit, size: float, tokens: float) -> Estimate:
    """Returns the loss of a model of M `size` after `tokens`, with its band. Runs scatter about the law by `spread`."""
    x = np.log(np.array(FORMS[fit.form].scales(size, tokens)) / fit.centers)[:, None]
    of_draws = np.array([_predicted(np.array(draw), x)[0] for draw in fit.draws])
    noise = np.random.default_rng(1).normal(0.0, fit.spread, len(of_draws))
    low, high = np.percentile(of_draws + noise, BAND)
    loss = float(np.exp(_predicted(np.array(fit.constants), x)[0]))
    return Estimate(loss, min(float(np.exp(low)), loss), max(float(np.exp(high)), loss))


def tokens_for(fit: Fit, size: float, target: float) -> float:
    """Returns how many tokens take a model of M `size` to the loss `target`. Raises `UserError` where none do, naming
    the loss that it goes towards.
    """
    lowest = loss_at(fit, size, 1e30).loss
    if not target > lowest:
        rule = f"must be above {lowest:.4g}, where the fit of {fit.source or 'this study'} has a model of this size end"
        raise UserError(f"--target-loss={target}: {rule}")
    start = fit.ranges["tokens"][0] * 1e-6
    if loss_at(fit, size, start).loss <= target:
        raise UserError(f"--target-loss={target}: is reached before {start:.3g} tokens; the fit says nothing of it")
    gap = lambda log_tokens: loss_at(fit, size, math.exp(log_tokens)).loss - target
    return math.exp(optimize.brentq(gap, math.log(start), math.log(1e30), xtol=1e-9))


def beyond(fit: Fit, size: float, tokens: float) -> dict[str, float]:
    """Returns {size, tokens, compute: how many times outside of what the fit has seen}; 1 within it."""
    found = {}
    for name, value in (("size", size), ("tokens", tokens)):
        low, high = fit.ranges[name]
        found[name] = max(value / high, low / value, 1.0)
    ends = [math.prod(fit.ranges[name][end] for name in ("size", "tokens")) for end in (0, 1)]
    return found | {"compute": max(size * tokens / ends[1], ends[0] / (size * tokens), 1.0)}


def how_far(fit: Fit, size: float, tokens: float) -> str:
    """Returns in words how far an estimate is from the runs of the fit."""
    times = beyond(fit, size, tokens)
    parts = [f"{value:,.3g} times the {name}" for name, value in times.items() if value > 1]
    runs = f"{len(fit.arms)} sizes and {len(fit.seeds)} seeds" + (f" of {fit.source}" if fit.source else "")
    return f"extrapolates {', '.join(parts)} of the {runs}" if parts else f"within the {runs}"


def best_size(fit: Fit, compute: float) -> float:
    """Returns the M of the lowest loss at C `compute`: where alpha a (M / M0)^-alpha = beta b (D / D0)^-beta."""
    if fit.form != "size and tokens":
        raise UserError(f"fit: a law of {fit.form} knows no best size; fit size and tokens")
    (a, alpha), (b, beta) = fit.terms()["size"], fit.terms()["tokens"]
    if not (alpha > 1e-6 and beta > 1e-6):
        raise UserError("fit: loss does not fall with both size and tokens, so that there is no best size")
    size, tokens = fit.centers
    log_ratio = math.log(alpha * a) - math.log(beta * b) + beta * math.log(compute / TRAIN_FACTOR / tokens / size)
    return size * math.exp(log_ratio / (alpha + beta))


# Profiles at equal compute, and the best of a hyper-parameter.


class Trial(NamedTuple):
    """A loss at a compute with one value of a hyper-parameter: a size, a learning rate, a batch."""

    compute: float
    value: float
    seed: int
    loss: float


class Optimum(NamedTuple):
    """Where a parabola through losses over log value has its minimum."""

    compute: float
    value: float
    loss: float


def profile(points: Iterable[Point], compute: float) -> list[Trial]:
    """Returns, for each arm and seed whose runs reach a `compute`, size and loss there: linear between its points in
    log tokens.
    """
    runs: dict[tuple[str, int], list[Point]] = {}
    for point in points:
        runs.setdefault((point.arm, point.seed), []).append(point)
    found = []
    for (_, seed), of_run in sorted(runs.items()):
        of_run = sorted(of_run, key=lambda p: p.tokens)
        tokens, size = [p.tokens for p in of_run], of_run[0].size
        wanted = compute / TRAIN_FACTOR / size
        if tokens[0] <= wanted <= tokens[-1]:
            loss = np.interp(math.log(wanted), np.log(tokens), [p.loss for p in of_run])
            found.append(Trial(compute, size, seed, float(loss)))
    return found


def optimum(trials: Sequence[Trial], weights: Sequence[float] | None = None) -> Optimum:
    """Returns the minimum of a parabola in log value through trials of one compute.

    Raises `UserError` for fewer than three values, for what is not finite, and for a minimum that is no minimum or lies
    outside of the values that were tried: the best of them is then an end, and more must be tried.
    """
    values = sorted({t.value for t in trials})
    at = f"C = {trials[0].compute:.3g}" if trials else "no runs"
    if not all(math.isfinite(n) and n > 0 for t in trials for n in (t.compute, t.value, t.loss)):
        raise UserError(f"optimum at {at}: values and losses must be finite and positive")
    if len(values) < 3:
        shown = ", ".join(f"{v:.3g}" for v in values) or "none"
        raise UserError(f"optimum at {at}: needs three values, has {shown}")
    x, y = np.log([t.value for t in trials]), np.array([t.loss for t in trials])
    center = x.mean()
    c2, c1, c0 = np.polyfit(x - center, y, 2, w=None if weights is None else np.sqrt(weights))
    vertex = -c1 / (2 * c2) + center if c2 > 0 else math.inf
    if not math.log(values[0]) <= vertex <= math.log(values[-1]):
        end = values[0] if y[x == x.min()].mean() < y[x == x.max()].mean() else values[-1]
        raise UserError(f"optimum at {at}: is not between the values; the best is the end {end:.3g}: try beyond it")
    return Optimum(trials[0].compute, float(np.exp(vertex)), float(c0 - c1**2 / (4 * c2)))


class PowerFit(NamedTuple):
    """coefficient * C^exponent, with the exponent's 90% band, through optima."""

    coefficient: float
    exponent: float
    low: float
    high: float
    optima: tuple[Optimum, ...]
    left_out: tuple[str, ...]  # why a compute has no optimum


def fit_power(trials: Iterable[Trial]) -> PowerFit:
    """Returns how the best value goes with compute: one parabola per compute, one line through their minima.

    Works for a learning rate, a batch in tokens, or a size. The band is of weights of seeds, drawn for all computes at
    once. Raises `UserError` with fewer than two computes that have an optimum, saying what each of the others lacks.
    """
    by_compute: dict[float, list[Trial]] = {}
    for trial in trials:
        by_compute.setdefault(trial.compute, []).append(trial)
    optima, left_out = [], []
    for _, of_compute in sorted(by_compute.items()):
        try:
            optima.append(optimum(of_compute))
        except UserError as e:
            left_out.append(str(e))
    if len(optima) < 2:
        raise UserError(f"law of the best value: needs optima at two computes; {'; '.join(left_out) or 'no runs'}")
    exponent, coefficient = _line(optima)
    rng, exponents = np.random.default_rng(0), []
    seeds = sorted({t.seed for group in by_compute.values() for t in group})
    for _ in range(DRAWS):
        weight = {seed: rng.exponential() for seed in seeds}
        drawn = []
        for group in by_compute.values():
            try:
                drawn.append(optimum(group, [weight[t.seed] for t in group]))
            except UserError:
                continue
        if len(drawn) >= 2:
            exponents.append(_line(drawn)[0])
    low, high = np.percentile(exponents, BAND) if exponents else (exponent, exponent)
    return PowerFit(coefficient, exponent, float(low), float(high), tuple(optima), tuple(left_out))


def _line(optima: Sequence[Optimum]) -> tuple[float, float]:
    """Returns exponent and coefficient of a power of compute; the median slope of all pairs (Theil 1950, Sen 1968)."""
    x, y = np.log([o.compute for o in optima]), np.log([o.value for o in optima])
    slopes = [(y[j] - y[i]) / (x[j] - x[i]) for i in range(len(x)) for j in range(i + 1, len(x))]
    slope = float(np.median(slopes))
    return slope, float(np.exp(np.median(y - slope * x)))
