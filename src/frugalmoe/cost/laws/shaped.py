"""The law of a loss in compute, activation and granularity, fitted to runs, and the leverage over dense that it holds.

L(C, A, G) = floor + a (EL C / C0)^-alpha: a mixture of experts has the loss of a dense model of EL times its compute.

    ln EL = ln Ahat (base + per_decade log10(C / C0) + curvature (log2 G)^2 + slope log2 G),  Ahat = (A + s) / (1 + s)

is the law of efficiency leverage (arXiv 2507.17702; `published.leverage`) with the compute told from C0, the geometric
mean of the points, and with exactly 1 for dense models, A = 1, where the paper's has up to 1.6% more or less. Constants
that the runs do not vary are not fitted: base needs two values of A, and s four, else it is the paper's; per_decade
needs half a decade of C; slope needs two values of G and curvature three, of runs with experts. Fit and bands are those
of `fitted`: Huber's loss of log loss, many starts, weights of arms and seeds drawn anew.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from frugalmoe.cost.laws import published
from frugalmoe.cost.laws.fitted import BAND, DRAWS, Estimate, Law, draw_weights, minimize
from frugalmoe.errors import UserError
from frugalmoe.files import read_json, write_json

CONSTANTS = ("log_floor", "log_a", "alpha", "base", "per_decade", "curvature", "slope", "log_start")
BOUNDS = ((-20.0, None), (-20.0, 20.0), (0.0, 10.0), *[(-20.0, 20.0)] * 4, (math.log(1e-4), 0.0))
START = math.log(published.LEVERAGE.start)
SCALES = ("compute", "activation", "granularity")
DECADE = 0.5  # of compute, from which on its effect on leverage is fitted


class Shaped(NamedTuple):
    """One measured loss of a model of some shape."""

    arm: str
    seed: int
    compute: float  # C, FLOPs
    activation: float  # A, in (0, 1]; 1 for dense models
    granularity: float  # G; 1 for dense models, where it does nothing
    loss: float  # nats per token


class Band(NamedTuple):
    """A value with its 90% band, of the constants."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class ShapedFit:
    """A fitted law of compute, activation and granularity."""

    constants: tuple[float, ...]  # CONSTANTS
    center: float  # C0
    free: tuple[str, ...]  # constants that were fitted
    draws: tuple[tuple[float, ...], ...]
    ranges: Mapping[str, tuple[float, float]]  # SCALES -> what it was fitted on
    spread: float  # root mean square error of log loss
    points: int
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    source: str = ""

    def constant(self, name: str) -> Band:
        """Returns a constant with its band; of one that was not fitted a band without width."""
        i = CONSTANTS.index(name)
        low, high = np.percentile([draw[i] for draw in self.draws], BAND)
        return Band(self.constants[i], float(low), float(high))


def fit_shaped(points: Iterable[Shaped], source: str = "") -> ShapedFit:
    """Returns the law through points, with `DRAWS` draws of its constants.

    Raises `UserError` for a point that is not finite and positive or has A > 1, for fewer than three values of C or two
    of A, and for fewer points than constants.
    """
    points = sorted(points)
    _check(points)
    free = _free(points)
    center = math.exp(np.mean(np.log([p.compute for p in points])))
    y, law = np.log([p.loss for p in points]), _law(points, center, free)
    bounds = [BOUNDS[CONSTANTS.index(name)] for name in free]
    solve = lambda start, weights: minimize(start, law, y, weights, bounds)
    best = min((solve(start, np.ones(len(y))) for start in _starts(y, free)), key=lambda found: found.fun)
    if not (np.isfinite(best.x).all() and np.isfinite(best.fun)):
        raise UserError(f"{source or 'fit'}: no finite law goes through these {len(points)} points")
    rng = np.random.default_rng(0)
    draws = [solve(best.x, draw_weights(points, rng)).x for _ in range(DRAWS)]
    whole = lambda found: tuple(float(found[free.index(name)]) if name in free else _fixed(name) for name in CONSTANTS)
    return ShapedFit(
        constants=whole(best.x),
        center=center,
        free=free,
        draws=tuple(whole(draw) for draw in draws if np.isfinite(draw).all()),
        ranges={name: _range([getattr(p, name) for p in points]) for name in SCALES},
        spread=float(np.sqrt(np.mean((law(best.x)[0] - y) ** 2))),
        points=len(points),
        arms=tuple(sorted({p.arm for p in points})),
        seeds=tuple(sorted({p.seed for p in points})),
        source=source,
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    return float(min(values)), float(max(values))


def _fixed(name: str) -> float:
    return START if name == "log_start" else 0.0


def _check(points: Sequence[Shaped]) -> None:
    for p in points:
        for name in (*SCALES, "loss"):
            if not (math.isfinite(value := getattr(p, name)) and value > 0):
                raise UserError(f"fit: {p.arm} seed {p.seed}: {name}={value}: must be finite and positive")
        if p.activation > 1:
            raise UserError(f"fit: {p.arm} seed {p.seed}: activation={p.activation}: must be at most 1")
    for name, least in (("compute", 3), ("activation", 2)):
        if (found := len({getattr(p, name) for p in points})) < least:
            rule = f"must differ in at least {least} values, there are {found}"
            raise UserError(f"fit: {name}: a law of compute, activation and granularity needs more runs: {rule}")
    if len(points) <= (count := len(_free(points))):
        raise UserError(f"fit: {len(points)} points: the law has {count} constants here and needs more points")


def _free(points: Sequence[Shaped]) -> tuple[str, ...]:
    computes = [p.compute for p in points]
    cuts = len({p.granularity for p in points if p.activation < 1})
    varied = {
        "per_decade": bool(computes) and math.log10(max(computes) / min(computes)) >= DECADE,
        "curvature": cuts >= 3,
        "slope": cuts >= 2,
        "log_start": len({p.activation for p in points}) >= 4,
    }
    return tuple(name for name in CONSTANTS if varied.get(name, True))


def _starts(y: np.ndarray, free: Sequence[str]) -> list[np.ndarray]:
    found = []
    for share in (0.2, 0.5, 0.8, 0.95):
        floor = share * math.exp(y.min())
        rest = math.log(max(math.exp(y.mean()) - floor, 1e-3))
        for alpha in (0.05, 0.2, 0.5):
            for base in (0.0, -0.5):
                start = {"log_floor": math.log(floor), "log_a": rest, "alpha": alpha, "base": base}
                found.append(np.array([start.get(name, _fixed(name)) for name in free]))
    return found


def _law(points: Sequence[Shaped], center: float, free: Sequence[str]) -> Law:
    """Returns log losses and their slopes as functions of the free constants."""
    x, activation, parts = _arguments(
        [p.compute for p in points], [p.activation for p in points], [p.granularity for p in points], center
    )
    rows = [CONSTANTS.index(name) for name in free]

    def law(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        constants = np.array([_fixed(name) for name in CONSTANTS])
        constants[rows] = values
        return tuple(part if part.ndim == 1 else part[rows] for part in _predicted(constants, x, activation, parts))

    return law


def _arguments(
    compute: Sequence[float], activation: Sequence[float], granularity: Sequence[float], center: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns log C / C0, A and the terms that the exponent's constants multiply [4, points]."""
    x, cut = np.log(np.asarray(compute) / center), np.log2(granularity)
    return x, np.asarray(activation), np.stack([np.ones_like(x), x / math.log(10), cut**2, cut])


def _log_leverage(
    constants: np.ndarray, activation: np.ndarray, parts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ln EL, ln Ahat and the exponent."""
    start = math.exp(constants[7])
    saturated, exponent = np.log((activation + start) / (1 + start)), (constants[3:7, None] * parts).sum(axis=0)
    return saturated * exponent, saturated, exponent


def _predicted(
    constants: np.ndarray, x: np.ndarray, activation: np.ndarray, parts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    leverage, saturated, exponent = _log_leverage(constants, activation, parts)
    floor, log_a, alpha, start = *constants[:3], math.exp(constants[7])
    power = log_a - alpha * (x + leverage)
    total = np.logaddexp(floor, power)
    share = np.exp(power - total)
    of_start = exponent * start * (1 / (activation + start) - 1 / (1 + start))
    slopes = np.concatenate([
        np.exp(floor - total)[None], share[None], (-share * (x + leverage))[None],
        -share * alpha * saturated * parts, (-share * alpha * of_start)[None],
    ])  # fmt: skip
    return total, slopes


# What a fit says.


def leverage_of(fit: ShapedFit, activation: float, granularity: float, compute: float) -> Band:
    """Returns how many times as much compute a dense model needs for the loss of the shape at `compute`."""
    _, a, parts = _arguments([compute], [activation], [granularity], fit.center)
    of = lambda constants: math.exp(_log_leverage(np.array(constants), a, parts)[0][0])
    return _banded(of(fit.constants), [of(draw) for draw in fit.draws])


def loss_of(fit: ShapedFit, compute: float, activation: float, granularity: float) -> Estimate:
    """Returns the loss with its band: of the constants, and of runs about the law."""
    x, a, parts = _arguments([compute], [activation], [granularity], fit.center)
    of = lambda constants: float(_predicted(np.array(constants), x, a, parts)[0][0])
    noise = np.random.default_rng(1).normal(0.0, fit.spread, len(fit.draws))
    return Estimate(*_banded(math.exp(of(fit.constants)), np.exp([of(draw) for draw in fit.draws] + noise)))


def _banded(value: float, drawn: Sequence[float]) -> Band:
    low, high = np.percentile(drawn, BAND)
    return Band(value, min(float(low), value), max(float(high), value))


def how_far_of(fit: ShapedFit, compute: float, activation: float, granularity: float) -> str:
    """Returns in words how far an estimate is from the runs of the fit, and which effects they do not tell."""
    times = {}
    for name, value in zip(SCALES, (compute, activation, granularity)):
        low, high = fit.ranges[name]
        times[name] = max(value / high, low / value, 1.0) if name != "granularity" or activation < 1 else 1.0
    parts = [f"{value:,.3g} times the {name}" for name, value in times.items() if value > 1]
    runs = f"{len(fit.arms)} arms" + (f" of {fit.source}" if fit.source else "")
    unknown = [name for name in CONSTANTS if name not in fit.free]
    said = f"extrapolates {', '.join(parts)} of the {runs}" if parts else f"within the {runs}"
    return said + (f"; not fitted: {', '.join(unknown)}" if unknown else "")


# Its file.


def write_shaped(path: str | Path, fit: ShapedFit, **beside: Any) -> None:
    """Writes a fit, whole or not at all; `beside`: further fields, which `read_shaped` does not need."""
    write_json(Path(path), {**dataclasses.asdict(fit), **beside})


def read_shaped(path: str | Path) -> ShapedFit:
    """Returns the fit of a file. Raises `UserError` that names file and field for one that is missing or damaged."""
    found = read_json(Path(path))
    rules = {
        "constants": lambda v: _numbers(v, len(CONSTANTS)),
        "draws": lambda v: isinstance(v, list) and bool(v) and all(_numbers(draw, len(CONSTANTS)) for draw in v),
        "center": lambda v: _numbers([v], 1) and v > 0,
        "free": lambda v: isinstance(v, list) and set(v) <= set(CONSTANTS),
        "ranges": lambda v: isinstance(v, dict) and set(v) == set(SCALES) and all(_numbers(r, 2) for r in v.values()),
        "spread": lambda v: _numbers([v], 1) and v >= 0,
        "points": lambda v: type(v) is int and v > 0,
        "arms": lambda v: isinstance(v, list),
        "seeds": lambda v: isinstance(v, list),
        "source": lambda v: isinstance(v, str),
    }
    for name, holds in rules.items():
        if not (isinstance(found, dict) and name in found and holds(found[name])):
            raise UserError(f"{path}: {name}: missing or damaged; `frugalmoe report STUDY --fit=leverage` writes it")
    fields = {name: tuple(found[name]) if isinstance(found[name], list) else found[name] for name in rules}
    fields["draws"] = tuple(map(tuple, found["draws"]))
    return ShapedFit(**fields | {"ranges": {name: tuple(pair) for name, pair in found["ranges"].items()}})


def _numbers(value: object, count: int) -> bool:
    number = lambda item: isinstance(item, int | float) and not isinstance(item, bool) and math.isfinite(item)
    return isinstance(value, list) and len(value) == count and all(map(number, value))
