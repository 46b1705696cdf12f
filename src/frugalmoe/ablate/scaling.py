"""A study as the points of a law: fitted to the arms that are trained, it foretells those that are not.

`fit.json` in the study's directory holds the fit and what was foretold, and is written once: an arm that has begun when
it is written is not foretold, and a second fit needs the first to be moved away.
"""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from frugalmoe.ablate.comparison import Comparison, load_comparison
from frugalmoe.ablate.grid import Grid
from frugalmoe.analysis.wording import count, number
from frugalmoe.cost import TRAIN_FACTOR
from frugalmoe.cost.laws import Fit, Point, fit_loss, how_far, loss_at, read_fit, size_of, write_fit
from frugalmoe.cost.laws.fitted import Trial, best_size, profile
from frugalmoe.errors import UserError
from frugalmoe.files import read_json

FILE = "fit.json"
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


def fit_study(workdir: str | Path) -> Path:
    """Fits the law of size and tokens to the trained arms of a study, foretells the others, and writes `fit.json`.

    Raises `UserError` before it writes: where there is one, for an arm that has begun and is not complete, and for too
    few sizes.
    """
    c = load_comparison(workdir)
    path = c.workdir / FILE
    if path.exists():
        raise UserError(f"{path}: was made at {read_json(path).get('made', '?')}; move it away to fit again")
    if not c.metric.startswith(("eval/loss/", "validation/loss/")):
        raise UserError(f"{c.workdir}: metrics={c.metric!r}: a law is fitted to a loss in nats")
    trained = [arm for arm in c.arms if c.final(c.metric, arm)]
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
    path = c.workdir / FILE
    if not path.is_file():
        return []
    fit, beside = read_fit(path), read_json(path)
    foretold = [_foretold(c, fit, beside)] if beside.get("foretold") else []
    return [_law(fit), *foretold, *_profiles(c, fit), *_best(fit)]


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
