"""Pictures of what experts do: domains, words, and pairs of experts.

Letters: L layers, G domains, E experts, N tokens, V distinct token ids.
"""

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from frugalmoe.analysis import coactivation, vocabulary
from frugalmoe.analysis.plots.style import (
    INK,
    OKABE_ITO,
    grid,
    legend,
    lines,
    log_ratio,
    ratio_bar,
    ratio_norm,
    reference,
    styled,
)
from frugalmoe.analysis.probe import Probe
from frugalmoe.analysis.specialisation import Specialisation, excess


@styled
def domain_heatmaps(found: Specialisation, layers: np.ndarray, domains: list[str]) -> Figure:
    """One heatmap per layer: domain by expert, coloured by share / chance."""
    experts = found.share_LGE.shape[-1]
    figure, all_axes = grid(len(layers), 2 if experts <= 16 or len(layers) > 6 else 1, 0.4 + 0.25 * len(domains))
    ratio_LGE = found.share_LGE / found.chance_L[:, None, None]
    norm = ratio_norm(ratio_LGE)
    image = None
    for axes, layer, ratio_GE, share_GE in zip(all_axes, layers, ratio_LGE, found.share_LGE):
        image = axes.imshow(log_ratio(ratio_GE), norm=norm, cmap="PuOr_r", aspect="auto")
        axes.set_title(f"layer {layer}")
        axes.set_yticks(range(len(domains)), domains)
        axes.set_xticks(range(0, experts, 1 if experts <= 16 else 8))
        if experts <= 8:
            _write_percentages(axes, share_GE, np.abs(norm(log_ratio(ratio_GE)) - 0.5) > 0.35)
    figure.supxlabel("expert", fontsize=10)
    ratio_bar(figure, image, all_axes, "share of tokens / chance")
    return figure


def _write_percentages(axes: Axes, share_GE: np.ndarray, dark_GE: np.ndarray) -> None:
    for (g, e), share in np.ndenumerate(share_GE):
        color = "white" if dark_GE[g, e] else INK
        axes.text(e, g, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)


@styled
def domain_intervals(found: Specialisation, layers: np.ndarray, domains: list[str]) -> Figure:
    """Shares of the most specialised layer with bootstrap intervals and the chance level; at most 16 experts."""
    layer = found.top[0]
    groups, experts = found.share_LGE.shape[1:]
    shown_E = np.sort(np.argsort(-np.nanmax(np.abs(excess(found.share_LGE)[layer]), axis=0))[:16])
    figure = Figure(figsize=(9, 3.4))
    axes = figure.subplots()
    for g, domain in enumerate(domains):
        x_E = np.arange(shown_E.size) + (g - (groups - 1) / 2) * 0.7 / groups
        share_E, low_E, high_E = (100 * a[layer, g, shown_E] for a in (found.share_LGE, found.low_LGE, found.high_LGE))
        label = f"{domain} (n = {found.tokens_G[g]:,})"
        color = OKABE_ITO[g % len(OKABE_ITO)]
        axes.vlines(x_E, low_E, high_E, color=color, linewidth=2)
        axes.plot(x_E, share_E, "o", color=color, markersize=4, label=label)
    reference(axes, 100 * found.chance_L[layer], "chance (K / E)")
    axes.set_xticks(range(shown_E.size), map(str, shown_E))
    axes.set_ylim(0)
    selection = "" if shown_E.size == experts else f" (the {shown_E.size} most specialised of {experts})"
    lines(axes, f"expert of layer {layers[layer]}{selection}", "share of the domain's tokens (%)")
    legend(axes)
    return figure


@styled
def co_activation(probe: Probe) -> Figure | None:
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
    figure, all_axes = grid(len(ratio_LEE), 4, 2.2)
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
def vocabulary_specialisation(probe: Probe) -> Figure | None:
    """Per layer: share of an id's occurrences that its favourite expert gets, and what shuffled ids give."""
    views = {"input token": probe.token_ids_N, "next token": probe.next_ids_N, "predicted token": probe.predicted_ids_N}
    views = {name: ids_N for name, ids_N in views.items() if ids_N is not None}
    figure = Figure(figsize=(9, 3.4))
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
    legend(axes)
    return figure
