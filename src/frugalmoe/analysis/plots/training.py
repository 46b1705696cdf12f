"""Pictures of training: loss, speed, expert load and balance over steps.

Letters: S logged steps, L layers, E experts.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from frugalmoe.analysis import load
from frugalmoe.analysis.plots.style import (
    GREY,
    OKABE_ITO,
    grid,
    layer_lines,
    legend,
    lines,
    log_ratio,
    noisy_line,
    ratio_bar,
    ratio_norm,
    reference,
    styled,
)
from frugalmoe.analysis.runs import Loads, Run, Series

MAX_BINS = 160  # columns of a heatmap over steps


@styled
def loss_curves(run: Run) -> Figure | None:
    """Training loss and validation loss per domain over steps."""
    curves = [(d, run.metrics[f"eval/loss/{d}"]) for d in run.domains if f"eval/loss/{d}" in run.metrics]
    train = run.metrics.get("loss/ce")
    if train is None and not curves:
        return None
    figure = Figure(figsize=(9, 3.8))
    axes = figure.subplots()
    if train is not None:
        noisy_line(axes, train, GREY, "training batches")
    for (domain, series), color in zip(curves, OKABE_ITO * (1 + len(curves) // len(OKABE_ITO))):
        axes.plot(*series, color=color, marker="o", markersize=4, label=f"validation: {domain}")
    lines(axes, "optimizer step", "cross-entropy (nats per token)")
    _zoom_past_start(axes, train)
    legend(axes)
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


@styled
def speed(run: Run) -> Figure | None:
    """Training throughput over steps."""
    if "speed/tokens_per_second" not in run.metrics:
        return None
    series = run.series("speed/tokens_per_second")
    figure = Figure(figsize=(9, 2.6))
    axes = figure.subplots()
    axes.plot(*series, color=OKABE_ITO[0])
    reference(axes, float(np.nanmedian(series.values)), "median")
    axes.set_ylim(0, 1.1 * np.nanmax(series.values))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    lines(axes, "optimizer step", "training tokens per second")
    legend(axes)
    return figure


@styled
def expert_load(loads: Loads) -> Figure:
    """One heatmap per layer: expert by step, coloured by load / uniform load."""
    steps_S, ratio_SLE = _binned_ratio(loads)
    experts = ratio_SLE.shape[-1]
    figure, all_axes = grid(len(loads.layers_L), 2 if len(loads.layers_L) <= 6 else 4, 0.6 + min(1.6, 0.1 * experts))
    norm = ratio_norm(ratio_SLE)
    image = None
    for axes, layer, ratio_SE in zip(all_axes, loads.layers_L, np.moveaxis(ratio_SLE, 1, 0)):
        image = axes.pcolormesh(steps_S, np.arange(experts), log_ratio(ratio_SE).T, norm=norm, cmap="PuOr_r")
        axes.set_title(f"layer {layer}")
    all_axes[0].invert_yaxis()  # shared: expert 0 on top, as in the other pictures
    all_axes[0].xaxis.set_major_locator(MaxNLocator(3, integer=True))
    all_axes[0].yaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.supxlabel("optimizer step", fontsize=10)
    figure.supylabel("expert", fontsize=10)
    ratio_bar(figure, image, all_axes, "load / uniform load")
    return figure


def _binned_ratio(loads: Loads) -> tuple[np.ndarray, np.ndarray]:
    """Mean step and load ratio [bins, L, E] of at most MAX_BINS runs of successive logged steps."""
    parts = np.array_split(np.arange(len(loads.steps_S)), min(len(loads.steps_S), MAX_BINS))
    counts = np.stack([loads.counts_SLE[p].sum(0) for p in parts])
    with np.errstate(invalid="ignore"):
        return np.array([loads.steps_S[p].mean() for p in parts]), counts / counts.mean(-1, keepdims=True)


@styled
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
        layer_lines(axes, layers)
        if name == "max_violation":
            reference(axes, noise_floor(run), "sampling noise of\na uniform router")
        else:
            experts = run.config["model"]["moe"]["num_experts"]
            reference(axes, float(np.log(experts)), f"undecided router\n(ln {experts})")
        axes.set_ylim(0)
        lines(axes, "", label)
        legend(axes)
    axes.set_xlabel("optimizer step")
    return figure


def noise_floor(run: Run) -> float:
    """Max violation that sampling alone gives in one optimizer step of this run."""
    moe = run.config["model"]["moe"]
    tokens = run.config["train"]["batch_size"] * run.config["data"]["sequence_length"]
    return load.violation_floor(moe["num_experts"], tokens * moe["num_experts_per_token"])
