"""Pictures of a run. Each function returns a matplotlib Figure, or None where the run lacks what it shows.

Letters as in `routing.py`, and S logged steps. Colours: Okabe-Ito for domains, cividis for layers (depth is ordered),
purple-to-orange around a white middle for ratios; all three survive colour blindness and grey printing.
"""

import functools
from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from frugalmoe.analysis import routing
from frugalmoe.analysis.runs import Loads, Probe, Run, Series

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
INK, GREY = "#222222", "#777777"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
    "text.parse_math": False,  # a domain may be called "$x$"
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
}
MAX_BINS = 160  # columns of a heatmap over steps


def _styled(draw: Callable) -> Callable:
    @functools.wraps(draw)
    def styled(*args):
        with matplotlib.rc_context(STYLE):
            return draw(*args)

    return styled


# ---------------------------------------------------------------- helpers


def _lines(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _layer_lines(axes: Axes, layers: dict[int, Series]) -> None:
    """Draws a line per layer, dark to bright with depth; names at most 8 of them."""
    named = set(np.array(list(layers))[np.linspace(0, len(layers) - 1, min(len(layers), 8)).round().astype(int)])
    for (layer, series), shade in zip(layers.items(), np.linspace(0.05, 0.85, len(layers))):
        label = f"layer {layer}" if layer in named else "_"  # matplotlib leaves "_" out of the legend
        _noisy_line(axes, series, matplotlib.colormaps["cividis"](shade), label)


def _legend(axes: Axes) -> None:
    """Beside the axes, so that it never hides a line."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _noisy_line(axes: Axes, series: Series, color: object, label: str) -> None:
    """A faint line of every value and a strong one of the running mean over a fortieth of them."""
    width = max(1, len(series.values) // 40)
    if width == 1:
        axes.plot(*series, color=color, label=label)
        return
    axes.plot(*series, color=color, alpha=0.25, linewidth=0.8)
    mean = np.convolve(series.values, np.full(width, 1 / width), "valid")
    middle = (width - 1) // 2
    axes.plot(series.steps[middle : middle + len(mean)], mean, color=color, label=label)


def _reference(axes: Axes, y: float, text: str) -> None:
    axes.axhline(y, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=text)


def _ratio_norm(ratio: np.ndarray) -> TwoSlopeNorm:
    """A log2 scale symmetric around 1 (white), 1.5, 2 or 4 times wide: just wide enough for the data, up to 4."""
    widest = np.nanquantile(np.abs(np.log2(np.clip(ratio, 0.25, 4))), 0.999)
    limit = next((x for x in np.log2([1.5, 2]) if x >= widest), 2.0)
    return TwoSlopeNorm(0, -limit, limit)


def _ratio_bar(figure: Figure, image: ScalarMappable, axes: list[Axes], label: str) -> None:
    ticks = np.linspace(image.norm.vmin, image.norm.vmax, 5 if image.norm.vmax == 2 else 3)
    pad = 0.12 / figure.get_figheight()
    bar = figure.colorbar(image, ax=axes, location="top", ticks=ticks, extend="both", aspect=40, shrink=0.5, pad=pad)
    bar.ax.set_xticklabels([f"{2**t:.2g}×" for t in ticks])
    bar.set_label(label)


def _log_ratio(ratio: np.ndarray) -> np.ndarray:
    return np.log2(np.clip(ratio, 2.0**-6, 2.0**6))


def _grid(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """`count` axes that share their scales, in rows of up to `columns`; `height` of a row in inches."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(9, 1.2 + rows * height))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for spare in axes[count:]:
        spare.remove()
    for i, kept in enumerate(axes[:count]):
        kept.label_outer()
        kept.tick_params(labelbottom=i >= count - columns)  # also above a place that stays empty
    return figure, list(axes[:count])


# ---------------------------------------------------------------- training


@_styled
def loss_curves(run: Run) -> Figure | None:
    """Training loss and validation loss per domain over steps."""
    curves = [(d, run.metrics[f"eval/loss/{d}"]) for d in run.domains if f"eval/loss/{d}" in run.metrics]
    train = run.metrics.get("loss/ce")
    if train is None and not curves:
        return None
    figure = Figure(figsize=(9, 3.8))
    axes = figure.subplots()
    if train is not None:
        _noisy_line(axes, train, GREY, "training batches")
    for (domain, series), color in zip(curves, OKABE_ITO * (1 + len(curves) // len(OKABE_ITO))):
        axes.plot(*series, color=color, marker="o", markersize=4, label=f"validation: {domain}")
    _lines(axes, "optimizer step", "cross-entropy (nats per token)")
    _zoom_past_start(axes, train)
    _legend(axes)
    return figure


def _zoom_past_start(axes: Axes, train: Series | None) -> None:
    """Cuts the first fall off the y axis, which otherwise flattens everything that comes later; says so."""
    if train is None or len(train.values) < 40:
        return
    low, high = axes.get_ylim()
    top = np.nanmax(train.values[len(train.values) // 20 :])
    if np.isfinite(top) and top + 0.1 * (top - low) < high - 0.2 * (high - low):
        axes.set_ylim(low, top + 0.1 * (top - low))
        axes.set_title("the first steps lie above the picture", color=GREY, loc="right")


@_styled
def speed(run: Run) -> Figure | None:
    """Training throughput over steps."""
    if "speed/tokens_per_second" not in run.metrics:
        return None
    series = run.series("speed/tokens_per_second")
    figure = Figure(figsize=(9, 2.6))
    axes = figure.subplots()
    axes.plot(*series, color=OKABE_ITO[0])
    _reference(axes, float(np.nanmedian(series.values)), "median")
    axes.set_ylim(0, 1.1 * np.nanmax(series.values))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    _lines(axes, "optimizer step", "training tokens per second")
    _legend(axes)
    return figure


# ---------------------------------------------------------------- balance


@_styled
def expert_load(loads: Loads) -> Figure:
    """One heatmap per layer: expert by step, coloured by load / uniform load."""
    steps_S, ratio_SLE = _binned_ratio(loads)
    experts = ratio_SLE.shape[-1]
    figure, all_axes = _grid(len(loads.layers_L), 2 if len(loads.layers_L) <= 6 else 4, 0.6 + min(1.6, 0.1 * experts))
    norm = _ratio_norm(ratio_SLE)
    image = None
    for axes, layer, ratio_SE in zip(all_axes, loads.layers_L, np.moveaxis(ratio_SLE, 1, 0)):
        image = axes.pcolormesh(steps_S, np.arange(experts), _log_ratio(ratio_SE).T, norm=norm, cmap="PuOr_r")
        axes.set_title(f"layer {layer}")
    all_axes[0].invert_yaxis()  # shared: expert 0 on top, as in the other pictures
    all_axes[0].xaxis.set_major_locator(MaxNLocator(3, integer=True))
    all_axes[0].yaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.supxlabel("optimizer step", fontsize=10)
    figure.supylabel("expert", fontsize=10)
    _ratio_bar(figure, image, all_axes, "load / uniform load")
    return figure


def _binned_ratio(loads: Loads) -> tuple[np.ndarray, np.ndarray]:
    """Mean step and load ratio [bins, L, E] of at most MAX_BINS runs of successive logged steps."""
    parts = np.array_split(np.arange(len(loads.steps_S)), min(len(loads.steps_S), MAX_BINS))
    counts = np.stack([loads.counts_SLE[p].sum(0) for p in parts])
    with np.errstate(invalid="ignore"):
        return np.array([loads.steps_S[p].mean() for p in parts]), counts / counts.mean(-1, keepdims=True)


@_styled
def balance(run: Run) -> Figure | None:
    """Max violation and router entropy per layer over steps, with the noise floor and ln E."""
    panels = [
        ("max_violation", "max violation\n(max load / mean load − 1)"),
        ("entropy", "router entropy\n(nats)"),
    ]
    panels = [(run.layers(name), name, label) for name, label in panels if run.layers(name)]
    if not panels:
        return None
    figure = Figure(figsize=(9, 0.4 + 2.6 * len(panels)))
    for axes, (layers, name, label) in zip(figure.subplots(len(panels), squeeze=False, sharex=True).ravel(), panels):
        _layer_lines(axes, layers)
        if name == "max_violation":
            _reference(axes, noise_floor(run), "sampling noise of\na uniform router")
        else:
            experts = run.config["model"]["moe"]["num_experts"]
            _reference(axes, float(np.log(experts)), f"undecided router\n(ln {experts})")
        axes.set_ylim(0)
        _lines(axes, "", label)
        _legend(axes)
    axes.set_xlabel("optimizer step")
    return figure


def noise_floor(run: Run) -> float:
    """Max violation that sampling alone gives in one optimizer step of this run."""
    moe = run.config["model"]["moe"]
    tokens = run.config["train"]["batch_size"] * run.config["data"]["sequence_length"]
    return routing.violation_floor(moe["num_experts"], tokens * moe["num_experts_per_token"])


# ---------------------------------------------------------------- specialisation


@_styled
def domain_heatmaps(found: routing.Specialisation, layers: np.ndarray, domains: list[str]) -> Figure:
    """One heatmap per layer: domain by expert, coloured by share / chance."""
    experts = found.share_LGE.shape[-1]
    figure, all_axes = _grid(len(layers), 2 if experts <= 16 or len(layers) > 6 else 1, 0.4 + 0.25 * len(domains))
    ratio_LGE = found.share_LGE / found.chance_L[:, None, None]
    norm = _ratio_norm(ratio_LGE)
    image = None
    for axes, layer, ratio_GE, share_GE in zip(all_axes, layers, ratio_LGE, found.share_LGE):
        image = axes.imshow(_log_ratio(ratio_GE), norm=norm, cmap="PuOr_r", aspect="auto")
        axes.set_title(f"layer {layer}")
        axes.set_yticks(range(len(domains)), domains)
        axes.set_xticks(range(0, experts, 1 if experts <= 16 else 8))
        if experts <= 8:
            _write_percentages(axes, share_GE, np.abs(norm(_log_ratio(ratio_GE)) - 0.5) > 0.35)
    figure.supxlabel("expert", fontsize=10)
    _ratio_bar(figure, image, all_axes, "share of tokens / chance")
    return figure


def _write_percentages(axes: Axes, share_GE: np.ndarray, dark_GE: np.ndarray) -> None:
    for (g, e), share in np.ndenumerate(share_GE):
        color = "white" if dark_GE[g, e] else INK
        axes.text(e, g, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)


@_styled
def domain_intervals(found: routing.Specialisation, layers: np.ndarray, domains: list[str]) -> Figure:
    """Shares of the most specialised layer with bootstrap intervals and the chance level; at most 16 experts."""
    layer = found.top[0]
    groups, experts = found.share_LGE.shape[1:]
    shown_E = np.sort(np.argsort(-np.nanmax(np.abs(routing.excess(found.share_LGE)[layer]), axis=0))[:16])
    figure = Figure(figsize=(9, 3.4))
    axes = figure.subplots()
    for g, domain in enumerate(domains):
        x_E = np.arange(shown_E.size) + (g - (groups - 1) / 2) * 0.7 / groups
        share_E, low_E, high_E = (100 * a[layer, g, shown_E] for a in (found.share_LGE, found.low_LGE, found.high_LGE))
        label = f"{domain} (n = {found.tokens_G[g]:,})"
        color = OKABE_ITO[g % len(OKABE_ITO)]
        axes.vlines(x_E, low_E, high_E, color=color, linewidth=2)
        axes.plot(x_E, share_E, "o", color=color, markersize=4, label=label)
    _reference(axes, 100 * found.chance_L[layer], "chance (K / E)")
    axes.set_xticks(range(shown_E.size), map(str, shown_E))
    axes.set_ylim(0)
    selection = "" if shown_E.size == experts else f" (the {shown_E.size} most specialised of {experts})"
    _lines(axes, f"expert of layer {layers[layer]}{selection}", "share of the domain's tokens (%)")
    _legend(axes)
    return figure


@_styled
def co_activation(probe: Probe) -> Figure | None:
    """One heatmap per layer: how often expert j goes with expert i, over what independent choices would give."""
    if (probe.selected_LNE.sum(-1) < 2).all():
        return None
    ratios = []
    for selected_NE in probe.selected_LNE:
        observed_EE, expected_EE = routing.co_activation(selected_NE)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios.append(observed_EE / expected_EE)
    ratio_LEE = np.stack(ratios)
    if not np.isfinite(ratio_LEE).any():
        return None
    figure, all_axes = _grid(len(ratio_LEE), 4, 2.2)
    norm = _ratio_norm(np.where(np.isfinite(ratio_LEE), ratio_LEE, 1))
    colours = matplotlib.colormaps["PuOr_r"].with_extremes(bad="#dddddd")
    image = None
    for axes, layer, ratio_EE in zip(all_axes, probe.layers_L, ratio_LEE):
        image = axes.imshow(_log_ratio(ratio_EE), norm=norm, cmap=colours)
        axes.set_title(f"layer {layer}")
    all_axes[0].yaxis.set_major_locator(MaxNLocator(4, integer=True))
    all_axes[0].xaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.supxlabel("also chosen: expert j", fontsize=10)
    figure.supylabel("given expert i", fontsize=10)
    _ratio_bar(figure, image, all_axes, "observed / independent")
    return figure
