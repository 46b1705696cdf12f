"""A study as the points of a law: fitted to the arms that are trained, it foretells those that are not.

`fit.json` in the study's directory holds the fit and what was foretold, and is written once: an arm that has begun when
it is written is not foretold, and a second fit needs the first to be moved away.

`leverage.json` holds the law of compute, activation and granularity, which foretells nothing and is written each time.
"""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from frugalmoe.ablate.comparison import Comparison, load_comparison
from frugalmoe.ablate.grid import Grid
from frugalmoe.analysis.wording import count, number
from frugalmoe.config import override, read, resolve
from frugalmoe.cost import TRAIN_FACTOR
from frugalmoe.cost.laws import (
    Fit,
    Point,
    Shaped,
    ShapedFit,
    fit_loss,
    fit_shaped,
    how_far,
    how_far_of,
    leverage_of,
    loss_at,
    published,
    read_fit,
    read_shaped,
    size_of,
    write_fit,
    write_shaped,
)
from frugalmoe.cost.laws.fitted import Trial, best_size, profile
from frugalmoe.errors import UserError
from frugalmoe.files import read_json
from frugalmoe.model import pattern

FILE, LEVERAGE = "fit.json", "leverage.json"
FITS = ("size", "leverage")  # laws that a study's runs are fitted with
FROM = 0.3  # of the steps: what comes before is warmup and what no power describes
AT_EQUAL_COMPUTE = (0.25, 1.0, 4.0)  # of the largest run of the fit


def points(c: Comparison, arms: Sequence[str]) -> list[Point]:
    """Returns the losses of complete runs: where the learning rate was constant also those of evaluations on the way,
    each of which is the end of a shorter run. Runs that diverged have none.
    """
    found, steps, batch = [], c.study["steps"], c.study["tokens_per_step"]
    for arm in arms:
        size, finals = size_of(c.study["forward_flops"][arm]), c.final(c.metric, arm)
        for seed, loss in finals.items():
            found.append(Point(arm, seed, size, steps * batch, loss))
            if c.study.get("constant_rate") and seed in c.curves(arm):
                at, losses = c.curves(arm)[seed]
                found += [
                    Point(arm, seed, size, float(step) * batch, float(value))
                    for step, value in zip(at, losses)
                    if FROM * steps <= step < steps
                ]
    return found


def shaped(c: Comparison, arms: Sequence[str]) -> list[Shaped]:
    """Returns the losses of `points` with compute C = 3 M D, activation and granularity: 1 and 1 for dense models."""
    found = []
    for arm in arms:
        config = override(override(read(c.study["base"]), c.study["overrides"]), c.study["arms"][arm])
        model = resolve(config).model
        shape = (1.0, 1.0)
        if pattern.has_experts(model):
            shape = (published.activation_ratio(model), published.granularity(model))
        found += [Shaped(arm, p.seed, TRAIN_FACTOR * p.size * p.tokens, *shape, p.loss) for p in points(c, [arm])]
    return found


def trials(comparisons: Sequence[Comparison], field: str) -> list[Trial]:
    """Returns the losses of arms of one or several studies over a field in which they differ, for `fit_power`.

    A field of the config, as `optim.learning_rate`, or `batch`, the tokens of a step. Compute is that of each point.
    """
    found = []
    for c in comparisons:
        values = {arm: _value(c.study, arm, field) for arm in c.arms}
        if unknown := [arm for arm, value in values.items() if value is None]:
            raise UserError(f"{c.workdir}: {field}: not among the fields that arm {unknown[0]!r} or the study sets")
        found += [
            Trial(TRAIN_FACTOR * p.size * p.tokens, float(values[p.arm]), p.seed, p.loss) for p in points(c, c.arms)
        ]
    return found


def _value(study: dict[str, Any], arm: str, field: str) -> float | None:
    if field == "batch":
        return study["tokens_per_step"]
    return study["arms"][arm].get(field, study["overrides"].get(field))


def fit_study(workdir: str | Path, law: str = FITS[0]) -> Path:
    """Fits a law to the trained arms of a study and returns its file. size: that of size and tokens, which foretells
    the other arms; leverage: that of compute, activation and granularity.

    Raises `UserError` before it writes: where there is one, for an arm that has begun and is not complete, and for too
    few sizes.
    """
    if law not in FITS:
        raise UserError(f"--fit={law}: must be one of {', '.join(FITS)}")
    c = load_comparison(workdir)
    path = c.workdir / FILE
    if law == "size" and path.exists():
        raise UserError(f"{path}: was made at {read_json(path).get('made', '?')}; move it away to fit again")
    if not c.metric.startswith(("eval/loss/", "validation/loss/")):
        raise UserError(f"{c.workdir}: metrics={c.metric!r}: a law is fitted to a loss in nats")
    trained = [arm for arm in c.arms if c.final(c.metric, arm)]
    if law == "leverage":
        write_shaped(c.workdir / LEVERAGE, fit_shaped(shaped(c, trained), source=c.study["name"]), metric=c.metric)
        return c.workdir / LEVERAGE
    others = [arm for arm in c.arms if arm not in trained]
    for arm in others:
        if any((c.workdir / arm).glob("seed_*")):
            rule = "has begun, so that it cannot be foretold; train it to its end, or delete it"
            raise UserError(f"{c.workdir / arm}: {rule}")
    fit = fit_loss(points(c, trained), source=c.study["name"])
    tokens = c.study["steps"] * c.study["tokens_per_step"]
    foretold = {}
    for arm in others:
        size = size_of(c.study["forward_flops"][arm])
        foretold[arm] = {"size": size, "tokens": tokens, **loss_at(fit, size, tokens)._asdict()}
    made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_fit(path, fit, metric=c.metric, foretold=foretold, made=made)
    return path


def grids(c: Comparison) -> list[Grid]:
    """Returns what the report says of a study's fit; nothing where there is none."""
    path, found = c.workdir / FILE, []
    if path.is_file():
        fit, beside = read_fit(path), read_json(path)
        foretold = [_foretold(c, fit, beside)] if beside.get("foretold") else []
        found = [_law(fit), *foretold, *_profiles(c, fit), *_best(fit)]
    if (path := c.workdir / LEVERAGE).is_file():
        fit = read_shaped(path)
        found += [_shaped_law(fit), _leverage(c, fit)]
    return found


def _shaped_law(fit: ShapedFit) -> Grid:
    rows = []
    for name in ("log_floor", "log_a", "alpha", "base", "per_decade", "curvature", "slope", "log_start"):
        band = fit.constant(name)
        shown = [np.exp(v) if name.startswith("log_") else v for v in band]
        known = name in fit.free
        width = f"{shown[1]:.3g} to {shown[2]:.3g}" if known else "not fitted"
        rows.append([name.removeprefix("log_"), f"{shown[0]:.3g}", width])
    note = (
        "loss = floor + a (EL C / C0)^-alpha, EL = Ahat^(base + per_decade log10(C / C0) + curvature (log2 G)^2 + "
        f"slope log2 G), Ahat = (A + start) / (1 + start), C0 = {fit.center:.3g} FLOPs; through {fit.points} losses of "
        f"{len(fit.arms)} arms, {len(fit.seeds)} seed{'s' * (len(fit.seeds) > 1)}. Losses scatter about it by "
        f"{fit.spread:.2%}. Bands of 90% weigh arms and seeds anew; with one seed they know nothing of others."
    )
    return Grid("Law of compute, activation and granularity", ["constant", "value", "90%"], rows, note)


def _leverage(c: Comparison, fit: ShapedFit) -> Grid:
    """Each shape at its largest compute, and one of Ling 2.0 at 1e18 FLOPs, which says how far that would be."""
    shapes = {}
    for p in shaped(c, fit.arms):
        if p.activation < 1:
            shapes[p.arm] = max(shapes.get(p.arm, (0.0, 0.0, 0.0)), (p.compute, p.activation, p.granularity))
    rows = []
    for arm, (compute, activation, cut) in [*shapes.items(), ("as Ling 2.0", (1e18, 9 / 257, 8.0))]:
        band = leverage_of(fit, activation, cut, compute)
        rows.append([
            arm, f"{activation:.1%}", f"{cut:g}", f"{compute:.1e}", f"{band.value:.2f}",
            f"{band.low:.2f} to {band.high:.2f}", f"{published.leverage(activation, cut, compute):.2f}",
            how_far_of(fit, compute, activation, cut),
        ])  # fmt: skip
    note = (
        "How many times as much compute a dense model needs for the same loss, by this fit, and by the law of arXiv "
        "2507.17702 with its own constants, which were fitted at 3e18 to 3e20 FLOPs."
    )
    header = ["arm", "A", "G", "C", "leverage", "90%", "published law", "it"]
    return Grid("Leverage over dense", header, rows, note)


def _law(fit: Fit) -> Grid:
    draws = np.array(fit.draws)
    band = lambda values: " to ".join(f"{v:.3g}" for v in np.percentile(values, (5, 95)))
    rows = [["floor, nats", f"{fit.floor:.4g}", band(np.exp(draws[:, 0])), "–", "–"]]
    for i, (name, (nats, exponent)) in enumerate(fit.terms().items()):
        rows.append([
            f"{name}, nats at {count(fit.centers[i])}", f"{nats:.4g}", band(np.exp(draws[:, 1 + 2 * i])),
            f"{exponent:.4g}", band(draws[:, 2 + 2 * i]),
        ])  # fmt: skip
    note = (
        f"loss = floor + a (M / M0)^-alpha + b (D / D0)^-beta, through {fit.points} losses of {', '.join(fit.arms)}; "
        "M: forward FLOPs per token without the head, D: tokens. Huber's loss on log loss; bands of 90% from "
        f"{len(fit.draws)} draws that weigh arms and seeds anew. Losses scatter about the law by {fit.spread:.2%}."
    )
    return Grid("Law of size and tokens", ["term", "value", "90%", "exponent", "90%"], rows, note)


def _foretold(c: Comparison, fit: Fit, beside: dict[str, Any]) -> Grid:
    rows = []
    for arm, said in beside["foretold"].items():
        seeds = c.final(c.metric, arm)
        measured = float(np.mean(list(seeds.values()))) if seeds else None
        rows.append([
            arm, how_far(fit, said["size"], said["tokens"]), f"{said['loss']:.4f}",
            f"{said['low']:.4f} to {said['high']:.4f}", number(measured, 5) if seeds else "–",
            f"{said['loss'] - measured:+.4f} ({said['loss'] / measured - 1:+.2%})" if seeds else "–",
            ("yes" if said["low"] <= measured <= said["high"] else "no") if seeds else "–",
        ])  # fmt: skip
    header = ["arm", "it", "foretold", "90%", "measured, mean over seeds", "error", "in the band"]
    note = f"Foretold at {beside.get('made', '?')} (UTC), before any step of these arms was trained."
    return Grid("Foretold before it was trained", header, rows, note, text_columns=2)


def _profiles(c: Comparison, fit: Fit) -> list[Grid]:
    """Loss at equal compute, measured: the arms that were trained when the fit was made, where two of them reach it."""
    of_arms = {arm: points(c, [arm]) for arm in c.arms if arm in fit.arms}
    least, most = (TRAIN_FACTOR * fit.ranges["size"][end] * fit.ranges["tokens"][end] for end in (0, 1))
    rows = []
    for compute in np.geomspace(least, most, 8)[1:-1]:
        found = {arm: profile(of_arm, compute) for arm, of_arm in of_arms.items()}
        if sum(map(bool, found.values())) < 2:
            continue
        losses = {arm: float(np.mean([t.loss for t in of_arm])) for arm, of_arm in found.items() if of_arm}
        cells = [f"{losses[arm]:.4f}" if arm in losses else "–" for arm in of_arms]
        rows.append([count(compute), *cells, min(losses, key=losses.get)])
    note = (
        "Means over seeds, linear in log tokens between evaluations; –: beyond the tokens that the fit takes of an arm."
    )
    return [Grid("Loss at equal compute", ["C", *of_arms, "lowest"], rows, note)] if rows else []


def _best(fit: Fit) -> list[Grid]:
    """Nothing where loss does not fall with both."""
    if min(exponent for _, exponent in fit.terms().values()) < 0.01:
        return []
    largest = TRAIN_FACTOR * fit.ranges["size"][1] * fit.ranges["tokens"][1]
    rows = []
    for share in AT_EQUAL_COMPUTE:
        compute = share * largest
        size = best_size(fit, compute)
        tokens = compute / TRAIN_FACTOR / size
        e = loss_at(fit, size, tokens)
        rows.append([count(compute), count(size), count(tokens), f"{e.loss:.3f} ({e.low:.3f} to {e.high:.3f})",
                     how_far(fit, size, tokens)])  # fmt: skip
    note = "The size with the lowest loss at a compute C = 3 M D, by the law."
    return [Grid("Best at equal compute", ["C", "best M", "tokens", "loss", "it"], rows, note)]
