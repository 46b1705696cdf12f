"""Pictures of change: routing over training, and the loss under interventions.

Letters: S checkpoints, L layers, N tokens.
"""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from frugalmoe.analysis.lab.effects import Effect
from frugalmoe.analysis.measures.uncertainty import Estimate
from frugalmoe.analysis.pages.plots.style import (
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
from frugalmoe.analysis.stored.trace import Trace

FEWEST = 3  # checkpoints; between two there is one line, which says nothing of when


@styled
def saturation(trace: Trace, width: float = WIDE) -> Figure | None:
    """Saturation per layer with its 95% band and chance level, and churn between successive checkpoints; None for a
    trace of fewer than three.
    """
    if len(trace.steps_S) < FEWEST:
        return None
    found, chance_SL = trace.saturation()
    changed = trace.churn()
    figure = Figure(figsize=(width, 5.2))
    above, below = figure.subplots(2, sharex=True)
    middle_S = (trace.steps_S[1:] + trace.steps_S[:-1]) / 2
    shades = np.linspace(0.05, 0.85, len(trace.layers_L))
    for l, (layer, shade) in enumerate(zip(trace.layers_L, shades)):
        color = matplotlib.colormaps["cividis"](shade)
        label = f"layer {layer}" if len(trace.layers_L) <= 8 or l in (0, len(trace.layers_L) - 1) else "_"
        _band(above, trace.steps_S, found, l, color, label)
        _band(below, middle_S, changed, l, color, "_")
        named = "chance at the same loads" if l == len(trace.layers_L) - 1 else "_"
        above.plot(trace.steps_S, chance_SL[:, l], color=color, linewidth=1, linestyle=(0, (4, 3)), label=named)
    tokens, documents = found_on(trace)
    above.set_ylim(0, 1.02)
    below.set_ylim(0, 1.1 * np.nanmax(changed.value))
    lines(above, "", "saturation: share of the\nlast checkpoint's experts")
    lines(below, "optimizer step", "churn: 1 − Jaccard overlap\nof successive checkpoints")
    for axes in (above, below):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    between = " " if width >= WIDE else "\n"
    points = f"{len(trace.steps_S)} checkpoints, {tokens:,} held-out tokens of {documents:,} documents;"
    above.set_title(f"{points}{between}bands: 95% intervals", color=GREY)
    legend(figure, above)
    return figure


def found_on(trace: Trace) -> tuple[int, int]:
    """Returns how many (tokens, documents) a trace was made of."""
    unit_N = trace.probes[-1].unit_ids_N
    return len(unit_N), int(unit_N.max()) + 1


def _band(axes, x_S: np.ndarray, found: Estimate, l: int, color: object, label: str) -> None:
    axes.plot(x_S, found.value[:, l], color=color, marker="o", markersize=4, label=label)
    axes.fill_between(x_S, found.low[:, l], found.high[:, l], color=color, alpha=0.2, linewidth=0)


@styled
def effects(found: Sequence[Effect], width: float = WIDE) -> Figure:
    """A row per intervention: the change of each domain's loss with its 95% interval over documents. Of many domains
    those with the largest and the smallest change are named.
    """
    interventions = list(dict.fromkeys(str(e.intervention) for e in found))
    domains = list(dict.fromkeys(e.domain for e in found))
    changes = {d: np.nanmean([e.change.value for e in found if e.domain == d]) for d in domains}
    ranked = sorted((d for d in domains if d != "all"), key=lambda d: -changes[d])
    colour = {"all": INK} | emphasis(ranked, [c for c in OKABE_ITO if c != "#000000"])
    figure = Figure(figsize=(width, 1.1 + len(interventions) * (0.25 + 0.13 * len(domains))))
    axes = figure.subplots()
    for e in found:
        d = domains.index(e.domain)
        y = interventions.index(str(e.intervention)) + (d - (len(domains) - 1) / 2) * 0.75 / len(domains)
        first = str(e.intervention) == interventions[0] and colour[e.domain] != UNNAMED
        label = f"{short(e.domain)} (n = {e.tokens:,} in {e.documents:,} documents)" if first else "_"
        axes.hlines(y, e.change.low, e.change.high, color=colour[e.domain], linewidth=2)
        axes.plot(
            e.change.value, y, "D" if e.domain == "all" else "o", color=colour[e.domain], markersize=4, label=label
        )
    if others := list(colour.values()).count(UNNAMED):
        axes.plot([], [], "o", color=UNNAMED, markersize=4, label=f"{others} other domains")
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yticks(range(len(interventions)), [short(name, 40) for name in interventions])
    axes.set_ylim(len(interventions) - 0.5, -0.5)
    axes.set_xlabel("change of held-out loss (nats per token); right of 0: worse")
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    legend(figure, axes)
    return figure
