"""Pictures of what experts do: domains, words, and pairs of experts.

Letters: L layers, G domains, M contributions of islands, E experts, N tokens, V distinct token ids.
"""

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from frugalmoe.analysis.measures import coactivation, vocabulary
from frugalmoe.analysis.measures.specialisation import Specialisation, excess
from frugalmoe.analysis.pages.plots.style import (
    INK,
    LONGEST_LABEL,
    OKABE_ITO,
    WIDE,
    grid,
    legend,
    lines,
    log_ratio,
    ratio_bar,
    ratio_norm,
    short,
    styled,
)
from frugalmoe.analysis.stored.probe import Probe
from frugalmoe.analysis.stored.rounds import IslandLoads

TALLEST = 26  # inches of a picture of many domains
MOST_ISLANDS = 60  # in a picture
PAIRS = 18  # of a domain and an expert in the picture of intervals


@styled
def domain_heatmaps(found: Specialisation, layers: np.ndarray, domains: list[str], width: float = WIDE) -> Figure:
    """One heatmap per layer: domain by expert, coloured by share / chance; of many domains and layers, some layers."""
    return _heatmaps(found.share_LGE, found.chance_L, layers, domains, width)


@styled
def island_loads(loads: IslandLoads, width: float = WIDE) -> Figure:
    """One heatmap per layer: island by expert, coloured by load / uniform load; of many islands the busiest."""
    busiest = np.sort(np.argsort(-loads.counts_MLE.sum((1, 2)), kind="stable")[:MOST_ISLANDS])
    counts_LME = np.moveaxis(loads.counts_MLE[busiest], 1, 0)
    share_LME = counts_LME / np.maximum(counts_LME.sum(-1, keepdims=True), 1)
    chance_L = np.full(len(share_LME), 1 / share_LME.shape[-1])
    return _heatmaps(share_LME, chance_L, loads.layers_L, [loads.islands[i] for i in busiest], width)


def _heatmaps(
    share_LGE: np.ndarray, chance_L: np.ndarray, layers: np.ndarray, domains: list[str], width: float
) -> Figure:
    experts, height = share_LGE.shape[-1], 0.4 + 0.25 * max(len(domains), 2)
    columns = 2 if experts <= 16 or len(layers) > 6 else 1
    rows = max(1, int(TALLEST / height))
    room = rows * (columns if width >= WIDE else 1)
    shown_L = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), room)).round().astype(int))
    figure, all_axes = grid(len(shown_L), columns, height, width)
    ratio_LGE = share_LGE / chance_L[:, None, None]
    norm = ratio_norm(ratio_LGE)
    image = None
    for axes, l in zip(all_axes, shown_L):
        image = axes.imshow(log_ratio(ratio_LGE[l]), norm=norm, cmap="PuOr_r", aspect="auto")
        axes.set_title(f"layer {layers[l]}")
        axes.set_yticks(range(len(domains)), [short(d, LONGEST_LABEL if width >= WIDE else 16) for d in domains])
        axes.set_xticks(range(0, experts, _every(experts)))
        if experts <= 8:
            _write_percentages(axes, share_LGE[l], np.abs(norm(log_ratio(ratio_LGE[l])) - 0.5) > 0.35)
    figure.supxlabel("expert", fontsize=10)
    ratio_bar(figure, image, all_axes, "share of tokens / chance")
    return figure


def _every(experts: int) -> int:
    """Distance of ticks that leaves at most 16 of them."""
    return next(step for step in (1, 2, 4, 8, 16, 32, experts) if experts <= 16 * step or step == experts)


def _write_percentages(axes: Axes, share_GE: np.ndarray, dark_GE: np.ndarray) -> None:
    for (g, e), share in np.ndenumerate(share_GE):
        color = "white" if dark_GE[g, e] else INK
        axes.text(e, g, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)


@styled
def domain_intervals(found: Specialisation, layers: np.ndarray, domains: list[str], width: float = WIDE) -> Figure:
    """The pairs of domain and expert that differ most from the mean over domains, in the most specialised layer: a row
    each, with the bootstrap interval and the chance level.
    """
    layer = found.top[0]
    excess_GE = np.nan_to_num(np.abs(excess(found.share_LGE)[layer]))
    chosen = np.argsort(-excess_GE, axis=None, kind="stable")[:PAIRS]
    pairs = sorted(zip(*np.unravel_index(chosen, excess_GE.shape)), key=lambda ge: -found.share_LGE[layer][ge])
    figure = Figure(figsize=(width, 1.0 + 0.22 * len(pairs)))
    axes = figure.subplots()
    for y, (g, e) in enumerate(pairs):
        share, low, high = (100 * a[layer, g, e] for a in (found.share_LGE, found.low_LGE, found.high_LGE))
        above = share > 100 * found.chance_L[layer]
        axes.hlines(y, low, high, color=OKABE_ITO[1 if above else 0], linewidth=2)
        axes.plot(share, y, "o", color=OKABE_ITO[1 if above else 0], markersize=5)
    axes.axvline(100 * found.chance_L[layer], color=INK, linewidth=1, linestyle=(0, (4, 3)), label="chance (K / E)")
    longest = LONGEST_LABEL if width >= WIDE else 14
    axes.set_yticks(range(len(pairs)), [f"{short(domains[g], longest)} → expert {e}" for g, e in pairs])
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    axes.set_xlim(0)
    between = " " if width >= WIDE else "\n"
    axes.set_xlabel(f"share of the domain's tokens{between}in layer {layers[layer]} (%)")
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    legend(figure, axes)
    return figure


@styled
def co_activation(probe: Probe, width: float = WIDE) -> Figure | None:
    """One heatmap per layer: how often expert j goes with expert i, over what independent choices would give."""
    if (probe.selected_LNE.sum(-1) < 2).all():
        return None
    ratios = []
    for selected_NE in probe.selected_LNE:
        observed_EE, expected_EE = coactivation.co_activation(selected_NE)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios.append(observed_EE / expected_EE)
    ratio_LEE = np.stack(ratios)
    if not np.isfinite(ratio_LEE).any():
        return None
    figure, all_axes = grid(len(ratio_LEE), 4, 2.2, width)
    norm = ratio_norm(np.where(np.isfinite(ratio_LEE), ratio_LEE, 1))
    colours = matplotlib.colormaps["PuOr_r"].with_extremes(bad="#dddddd")
    image = None
    for axes, layer, ratio_EE in zip(all_axes, probe.layers_L, ratio_LEE):
        image = axes.imshow(log_ratio(ratio_EE), norm=norm, cmap=colours)
        axes.set_title(f"layer {layer}")
    all_axes[0].yaxis.set_major_locator(MaxNLocator(4, integer=True))
    all_axes[0].xaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.supxlabel("also chosen: expert j", fontsize=10)
    figure.supylabel("given expert i", fontsize=10)
    ratio_bar(figure, image, all_axes, "observed / independent")
    return figure


@styled
def vocabulary_specialisation(probe: Probe, width: float = WIDE) -> Figure | None:
    """Per layer: share of an id's occurrences that its favourite expert gets, and what shuffled ids give."""
    views = {"input token": probe.token_ids_N, "next token": probe.next_ids_N, "predicted token": probe.predicted_ids_N}
    views = {name: ids_N for name, ids_N in views.items() if ids_N is not None}
    figure = Figure(figsize=(width, 3.2))
    axes = figure.subplots()
    for v, ((name, ids_N), color) in enumerate(zip(views.items(), OKABE_ITO)):
        known_N = ids_N >= 0
        found = [
            vocabulary.vocabulary_specialisation(s[known_N], ids_N[known_N], shuffles=3) for s in probe.selected_LNE
        ]
        shown_L, floor_L = 100 * np.array(found).T
        x_L = np.arange(len(shown_L)) + (v - (len(views) - 1) / 2) * 0.2
        axes.vlines(x_L, floor_L, shown_L, color=color, linewidth=1.5)
        axes.plot(x_L, shown_L, "o", color=color, markersize=5, label=f"by {name} (n = {known_N.sum():,})")
        axes.plot(x_L, floor_L, "_", color=color, markersize=9)
    axes.plot([], [], "_", color=INK, markersize=9, label="the same with shuffled ids")
    axes.set_xticks(range(len(probe.layers_L)), map(str, probe.layers_L))
    axes.set_ylim(0, 102)
    lines(axes, "layer", "occurrences that go to the\nid's favourite expert (%)")
    legend(figure, axes)
    return figure
