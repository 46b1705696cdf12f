"""Pictures of a study, in the style of `frugalmoe.analysis.pages.plots`; each is drawn at a width in inches."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from frugalmoe.ablate.comparison import Comparison
from frugalmoe.analysis.pages.plots import (
    GREY,
    INK,
    OKABE_ITO,
    UNNAMED,
    WIDE,
    emphasis,
    legend,
    lines,
    short,
    styled,
)
from frugalmoe.metrics import titled

LONGEST_BAR = 6  # times the largest difference of a seed: a longer interval ends in an arrow


def colours(c: Comparison) -> dict[str, str]:
    """Returns {arm: colour}: the baseline black, then the arms in order of their result. Where there are more arms than
    colours, the middle ones are grey, for one looks for the best and the worst.
    """
    others = sorted(c.arms[1:], key=lambda a: (np.isnan(c.mean(c.metric, a)), c.mean(c.metric, a)))
    return {c.arms[0]: INK, **emphasis(others, [colour for colour in OKABE_ITO if colour != "#000000"])}


@styled
def differences(c: Comparison, width: float = WIDE) -> Figure | None:
    """Draws each arm's paired difference to the baseline, the best on top: a tick per seed, the mean, and the interval
    that decides.
    """
    arms = sorted((a for a in c.paired if c.paired[a].n), key=lambda a: c.paired[a].mean)
    if not arms:
        return None
    figure = Figure(figsize=(width, 1.1 + 0.3 * len(arms)))
    axes = figure.subplots()
    base, colour = c.final(c.metric, c.arms[0]), colours(c)
    seeds = {arm: [v - base[s] for s, v in c.final(c.metric, arm).items() if s in base] for arm in arms}
    limit = LONGEST_BAR * max(abs(d) for differences in seeds.values() for d in differences) or 1.0
    for y, arm in enumerate(arms):
        result = c.paired[arm]
        ends = np.array([result.mean - result.half_width, result.mean + result.half_width])
        if result.n > 1:
            axes.hlines(y, *np.clip(ends, -limit, limit), color=colour[arm])
        for end in ends[np.abs(ends) > limit]:
            axes.plot(np.sign(end) * limit, y, ">" if end > 0 else "<", color=colour[arm], markersize=5)
        axes.plot(seeds[arm], np.full(len(seeds[arm]), y), "|", color=GREY, markersize=9)
        axes.plot(result.mean, y, "o", color=colour[arm], markersize=5)
    axes.axvline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    longest = 40 if width >= WIDE else 16
    axes.set_yticks(range(len(arms)), [f"{short(a, longest)} (n = {c.paired[a].n})" for a in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel(f"difference to {short(c.arms[0])}:\n{titled(c.metric)}; left: better")
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    return figure


@styled
def learning_curves(c: Comparison, width: float = WIDE) -> Figure | None:
    """Draws held-out loss over training, and its paired difference to the baseline; bands are the range over seeds."""
    baseline = c.curves(c.arms[0])
    if not baseline or max(len(steps) for steps, _ in baseline.values()) < 2:
        return None
    rows, columns = (1, 2) if width >= WIDE else (2, 1)
    figure = Figure(figsize=(width, 0.6 + 2.8 * rows))
    left, right = figure.subplots(rows, columns)
    for arm, colour in colours(c).items():
        curves = c.curves(arm)
        common = [seed for seed in curves if seed in baseline and len(curves[seed][0]) == len(baseline[seed][0])]
        if not common:
            continue
        values = np.array([curves[seed][1] for seed in common])
        _band(left, curves[common[0]][0], values, colour, f"{short(arm)} (n = {len(common)})")
        if arm != c.arms[0]:
            _band(right, curves[common[0]][0], values - np.array([baseline[s][1] for s in common]), colour, "_")
    right.axhline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    lines(left, "optimizer step", titled(c.metric))
    lines(right, "optimizer step", f"difference to {short(c.arms[0])}")
    _label_unnamed(left, c)
    legend(figure, left)
    return figure


@styled
def balance(c: Comparison, width: float = WIDE) -> Figure | None:
    """Draws max violation of training batches, mean over layers; None for a study of dense models."""
    figure = Figure(figsize=(width, 3.0))
    axes = figure.subplots()
    for arm, colour in colours(c).items():
        curves = list(c.violations(arm).values())
        if curves and len({len(steps) for steps, _ in curves}) == 1:
            _band(axes, curves[0][0], np.array([values for _, values in curves]), colour, short(arm))
    if not axes.lines:
        return None
    lines(axes, "optimizer step", "max violation\n(max load / mean − 1)")
    axes.set_ylim(0)
    _label_unnamed(axes, c)
    legend(figure, axes)
    return figure


def _band(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    """Draws the mean over the first axis and its range; for an unnamed arm a thin line behind the others."""
    if colour == UNNAMED:
        axes.plot(steps, values.mean(0), color=colour, linewidth=0.8, zorder=1)
        return
    axes.plot(steps, values.mean(0), color=colour, label=label)
    axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)


def _label_unnamed(axes: Axes, c: Comparison) -> None:
    if count := list(colours(c).values()).count(UNNAMED):
        axes.plot([], [], color=UNNAMED, linewidth=0.8, label=f"{count} others")
