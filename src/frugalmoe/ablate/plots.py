"""Pictures of a study, in the style of `frugalmoe.analysis.plots`."""

import functools
from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from frugalmoe.ablate.comparison import Comparison
from frugalmoe.analysis.plots import GREY, INK, OKABE_ITO, STYLE

UNNAMED = "#bbbbbb"


def _styled(draw: Callable) -> Callable:
    @functools.wraps(draw)
    def styled(comparison: Comparison) -> Figure | None:
        with matplotlib.rc_context(STYLE):
            return draw(comparison)

    return styled


def colours(c: Comparison) -> dict[str, str]:
    """The baseline black, then the arms in order of their result. Where there are more than colours, those in the
    middle are grey: the best and the worst are looked for.
    """
    others = sorted((a for a in c.arms[1:]), key=lambda a: (np.isnan(c.mean(c.metric, a)), c.mean(c.metric, a)))
    free = [colour for colour in OKABE_ITO if colour != "#000000"]
    best, worst = len(free) - len(free) // 2, len(free) // 2
    ends = others if len(others) <= len(free) else [*others[:best], *others[-worst:]]
    named = dict(zip(ends, free))
    return {c.arms[0]: INK, **{a: named.get(a, UNNAMED) for a in others}}


@_styled
def differences(c: Comparison) -> Figure | None:
    """Each arm's paired difference to the baseline: a dot per seed, the mean, and its t interval; best on top."""
    arms = sorted(c.paired, key=lambda a: c.paired[a].mean)
    if not arms:
        return None
    figure = Figure(figsize=(9, 1.1 + 0.38 * len(arms)))
    axes = figure.subplots()
    base = c.final(c.metric, c.arms[0])
    colour = colours(c)
    for y, arm in enumerate(arms):
        result, values = c.paired[arm], c.final(c.metric, arm)
        seeds = [values[s] - base[s] for s in values if s in base]
        if np.isfinite(result.half_width):
            axes.hlines(y, result.mean - result.half_width, result.mean + result.half_width, color=colour[arm])
        axes.plot(seeds, np.full(len(seeds), y), "|", color=GREY, markersize=10)
        axes.plot(result.mean, y, "o", color=colour[arm], markersize=6)
    axes.axvline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(arms)), [f"{a} (n = {c.paired[a].n})" for a in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel(f"difference to {c.arms[0]} in {c.metric}  (left: better)")
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    return figure


@_styled
def learning_curves(c: Comparison) -> Figure | None:
    """Held-out loss over training, and its paired difference to the baseline; bands: the range over seeds."""
    baseline = c.curves(c.arms[0])
    if not baseline or max(len(steps) for steps, _ in baseline.values()) < 2:
        return None
    figure = Figure(figsize=(9, 3.6))
    left, right = figure.subplots(1, 2)
    for arm, colour in colours(c).items():
        curves = c.curves(arm)
        common = [seed for seed in curves if seed in baseline and len(curves[seed][0]) == len(baseline[seed][0])]
        if not common:
            continue
        values = np.array([curves[seed][1] for seed in common])
        _band(left, curves[common[0]][0], values, colour, f"{arm} (n = {len(common)})")
        if arm != c.arms[0]:
            _band(right, curves[common[0]][0], values - np.array([baseline[s][1] for s in common]), colour, "_")
    right.axhline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    for axes, label in ((left, c.metric), (right, f"difference\nto {c.arms[0]}")):
        axes.set(xlabel="optimizer step", ylabel=label)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
    _label_unnamed(left, c)
    figure.legend(loc="outside upper left", ncols=4)
    return figure


@_styled
def balance(c: Comparison) -> Figure | None:
    """Max violation of training batches, mean over layers; None for a study of dense models."""
    figure = Figure(figsize=(9, 3.2))
    axes = figure.subplots()
    for arm, colour in colours(c).items():
        curves = list(c.violations(arm).values())
        if curves and len({len(steps) for steps, _ in curves}) == 1:
            _band(axes, curves[0][0], np.array([values for _, values in curves]), colour, arm)
    if not axes.lines:
        return None
    axes.set(xlabel="optimizer step", ylabel="max violation", ylim=(0, None))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    _label_unnamed(axes, c)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _band(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    """Mean over the first axis, and its range; of an unnamed arm a thin line behind the others."""
    if colour == UNNAMED:
        axes.plot(steps, values.mean(0), color=colour, linewidth=0.8, zorder=1)
        return
    axes.plot(steps, values.mean(0), color=colour, label=label)
    axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)


def _label_unnamed(axes: Axes, c: Comparison) -> None:
    if count := list(colours(c).values()).count(UNNAMED):
        axes.plot([], [], color=UNNAMED, linewidth=0.8, label=f"{count} others")
