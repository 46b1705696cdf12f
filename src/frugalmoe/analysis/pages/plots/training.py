"""Pictures of training: loss, speed, expert load and balance over steps.

Letters: S logged steps, L layers, E experts.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from frugalmoe import metrics
from frugalmoe.analysis.measures import evenness
from frugalmoe.analysis.pages.plots.style import (
    GREY,
    OKABE_ITO,
    UNNAMED,
    WIDE,
    emphasis,
    grid,
    layer_lines,
    legend,
    lines,
    log_ratio,
    noisy_line,
    ratio_bar,
    ratio_norm,
    reference,
    short,
    styled,
)
from frugalmoe.analysis.stored.runs import Loads, Run, Series

MAX_BINS = 160  # columns of a heatmap over steps
MOST_STARTS = 8  # of a run in a picture

# What the wall time is coloured by: useful, the work around it, and what faults took. Kinds that are not here are grey.
_COLORS = {
    "step": OKABE_ITO[2],
    "tracing": OKABE_ITO[5],
    "compiling": OKABE_ITO[0],
    "data": OKABE_ITO[4],
    "evaluation": OKABE_ITO[3],
    "lost": OKABE_ITO[1],
    "restart": OKABE_ITO[6],
}
_GREYS = {"imports": "#555555", "setup": "#777777", "checkpoint": "#949494", "exchange": "#aaaaaa", "report": "#bbbbbb",
          "idle": "#d0d0d0", "stopped": "#e8e8e8"}  # fmt: skip


@styled
def loss_curves(run: Run, width: float = WIDE) -> Figure | None:
    """Training loss and validation loss per domain over steps; of many domains the hardest and easiest are named."""
    curves = {d: run.metrics[f"eval/loss/{d}"] for d in run.domains if f"eval/loss/{d}" in run.metrics}
    train = run.metrics.get("loss/ce")
    if train is None and not curves:
        return None
    figure = Figure(figsize=(width, 3.6))
    axes = figure.subplots()
    if train is not None:
        noisy_line(axes, train, GREY, "training batches")
    ranked = sorted(curves, key=lambda d: -np.nan_to_num(curves[d].values[-1], nan=-np.inf))  # as the lines lie
    for domain, color in emphasis(ranked).items():
        label = f"validation: {short(domain)}" if color != UNNAMED else "_"
        size, order = (4, 2) if color != UNNAMED else (2, 1)
        axes.plot(*curves[domain], color=color, marker="o", markersize=size, label=label, zorder=order)
    if (others := len(curves) - len(OKABE_ITO)) > 0:
        axes.plot([], [], color=UNNAMED, marker="o", markersize=2, label=f"{others} other domains between them")
    lines(axes, "optimizer step", "cross-entropy (nats per token)")
    _zoom_past_start(axes, train, [series.values[-1] for series in curves.values()])
    legend(figure, axes)
    return figure


def _zoom_past_start(axes: Axes, train: Series | None, ends: list[float]) -> None:
    """Cuts the first fall off the y axis, which otherwise flattens everything that comes later; says so. Where the
    other curves end stays in the picture.
    """
    if train is None or len(train.values) < 40:
        return
    low, high = axes.get_ylim()
    later = np.array([*train.values[len(train.values) // 20 :], *ends])
    top = later[np.isfinite(later)].max(initial=-np.inf)
    if np.isfinite(top) and top + 0.1 * (top - low) < high - 0.2 * (high - low):
        axes.set_ylim(low, top + 0.1 * (top - low))
        axes.set_title("the first steps lie above the picture", color=GREY, loc="right")


@styled
def optimization(run: Run, width: float = WIDE) -> Figure | None:
    """Norms of the gradient and of the parameters, and the learning rate, over steps."""
    return _panels(run, [m.name for m in metrics.prefixed("optim/")], width)


@styled
def auxiliary_losses(run: Run, width: float = WIDE) -> Figure | None:
    """Each loss beside the cross-entropy, before its coefficient, over steps."""
    names = [n for n in run.metrics if n.startswith("loss/") and n not in ("loss/ce", "loss/total")]
    return _panels(run, sorted(names), width)


def _panels(run: Run, names: list[str], width: float) -> Figure | None:
    """A small picture for each of the metrics that the run has, with its own scale."""
    names = [name for name in names if name in run.metrics and np.isfinite(run.metrics[name].values).any()]
    if not names:
        return None
    columns = 2 if width >= WIDE and len(names) > 1 else 1
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(width, 0.4 + 1.9 * rows))
    all_axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axes, name in zip(all_axes, names):
        noisy_line(axes, run.metrics[name], OKABE_ITO[0], "_")
        axes.set_title(metrics.titled(name))
        axes.set_ylim(min(0, axes.get_ylim()[0]))
        lines(axes, "", "")
    for axes in all_axes[len(names) :]:
        axes.remove()
    figure.supxlabel("optimizer step", fontsize=10)
    return figure


@styled
def speed(run: Run, width: float = WIDE) -> Figure | None:
    """Training throughput over steps."""
    if "speed/tokens_per_second" not in run.metrics:
        return None
    series = run.series("speed/tokens_per_second")
    if not np.isfinite(series.values).any():
        return None
    figure = Figure(figsize=(width, 2.4))
    axes = figure.subplots()
    axes.plot(*series, color=OKABE_ITO[0], label="training")
    reference(axes, float(np.nanmedian(series.values)), "median")
    axes.set_ylim(0, 1.1 * np.nanmax(series.values))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    lines(axes, "optimizer step", "tokens per second")
    legend(figure, axes)
    return figure


@styled
def rounds(run: Run, width: float = WIDE) -> Figure | None:
    """Of an island: the seconds of each round in which it trained and waited, and the bytes that it wrote and read."""
    if run.rounds is None:
        return None
    found = run.rounds
    figure = Figure(figsize=(width, 2.4 if width >= WIDE else 4.4))
    times, traffic = figure.subplots(*((1, 2) if width >= WIDE else (2, 1)))
    edges = np.append(found.round_R, found.round_R[-1] + 1) - 0.5
    parts = ("trained", found.trained_R, OKABE_ITO[0]), ("waited", found.waited_R, OKABE_ITO[1])
    base_R = np.zeros(len(found.round_R))
    for label, seconds_R, color in parts:
        times.stairs(base_R + seconds_R, edges, baseline=base_R, fill=True, color=color, label=label)
        base_R = base_R + seconds_R
    of_traffic = ("written", found.written_R, OKABE_ITO[2], 4), ("read", found.read_R, OKABE_ITO[3], 1.5)
    for label, bytes_R, color, thick in of_traffic:  # seen below the other where both are equal
        style = {"color": color, "marker": "o", "markersize": 2 + thick, "linewidth": thick}
        traffic.plot(found.round_R, bytes_R / 1e6, label=label, **style)
    most_MB = max(found.written_R.max(), found.read_R.max()) / 1e6
    for axes, y_label, most in ((times, "seconds", base_R.max()), (traffic, "MB", most_MB)):
        axes.set_ylim(0, 1.05 * most or 1)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        lines(axes, "round", y_label)
    legend(figure, (times, traffic))
    return figure


@styled
def goodput(run: Run, width: float = WIDE) -> Figure | None:
    """Bars of the wall time by kind: of all starts together and, of a run with several, of each with the time before
    it; of many those that took longest.
    """
    if run.goodput is None or not run.goodput.wall:
        return None
    bars = {"all starts": run.goodput.seconds}
    starts = dict(enumerate(run.goodput.by_start, 1)) if len(run.goodput.by_start) > 1 else {}
    longest = sorted(starts, key=lambda n: -sum(starts[n].values()))[:MOST_STARTS]
    bars |= {f"start {n}": starts[n] for n in sorted(longest)}
    figure = Figure(figsize=(width, 1.0 + 0.32 * len(bars)))
    axes = figure.subplots()
    base = np.zeros(len(bars))
    for kind, color in (_COLORS | _GREYS).items():
        seconds = np.array([bar.get(kind, 0.0) for bar in bars.values()])
        if seconds.any():
            label = f"{kind} {100 * run.goodput.seconds.get(kind, 0.0) / run.goodput.wall:.1f}%"
            axes.barh(list(bars), seconds, left=base, color=color, label=label, height=0.7)
        base = base + seconds
    axes.invert_yaxis()
    axes.set_xlabel("seconds of wall time")
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    legend(figure, axes)
    return figure


@styled
def expert_load(loads: Loads, width: float = WIDE) -> Figure:
    """One heatmap per layer: expert by step, coloured by load / uniform load."""
    steps_S, ratio_SLE = _binned_ratio(loads)
    experts = ratio_SLE.shape[-1]
    columns = 2 if len(loads.layers_L) <= 6 else 4
    figure, all_axes = grid(len(loads.layers_L), columns, 0.6 + min(1.6, 0.1 * experts), width)
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
def balance(run: Run, width: float = WIDE) -> Figure | None:
    """Max violation and router entropy per layer over steps, with the noise floor and ln E."""
    experts = run.config["model"]["moe"]["num_experts"]
    panels = [
        (
            "max_violation",
            "max violation\n(max load / mean − 1)",
            noise_floor(run),
            "sampling noise of a uniform router",
        ),
        ("entropy", "router entropy\n(nats)", float(np.log(experts)), f"undecided router (ln {experts})"),
    ]
    panels = [(run.layers(name), *rest) for name, *rest in panels if run.layers(name)]
    if not panels:
        return None
    figure = Figure(figsize=(width, 0.4 + 2.4 * len(panels)))
    all_axes = figure.subplots(len(panels), squeeze=False, sharex=True).ravel()
    for axes, (layers, label, level, text), dashes in zip(all_axes, panels, ((4, 3), (1, 2))):
        layer_lines(axes, layers)
        reference(axes, level, text, dashes)
        axes.set_ylim(0)
        lines(axes, "", label)
    all_axes[-1].set_xlabel("optimizer step")
    legend(figure, all_axes)
    return figure


def noise_floor(run: Run) -> float:
    """Max violation that sampling alone gives in one optimizer step of this run."""
    moe = run.config["model"]["moe"]
    tokens = run.config["train"]["batch_size"] * run.config["data"]["sequence_length"]
    return evenness.violation_floor(moe["num_experts"], tokens * moe["num_experts_per_token"])
