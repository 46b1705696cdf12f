"""Pictures of what money buys."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from frugalmoe.analysis.pages.plots.style import WIDE, emphasis, legend, lines, styled
from frugalmoe.cost.budget import Bought


@styled
def tokens_for_money(rows: Sequence[Bought], width: float = WIDE) -> Figure:
    """Draws tokens over parameters, a line for each kind of device."""
    return _over_size(rows, "tokens", lambda row: (row.tokens, None), width)


@styled
def loss_for_money(rows: Sequence[Bought], width: float = WIDE) -> Figure | None:
    """Draws the expected loss with its band over parameters, a line for each kind of device; None without a fit."""
    rows = [row for row in rows if row.loss]
    if not rows:
        return None
    errors = lambda loss: (loss.loss - loss.low, loss.high - loss.loss)
    return _over_size(rows, "expected loss (nats per token)", lambda row: (row.loss.loss, errors(row.loss)), width)


def _over_size(rows: Sequence[Bought], label: str, value, width: float) -> Figure:
    devices = list(dict.fromkeys(row.device for row in sorted(rows, key=lambda row: -row.tokens)))
    colour = emphasis(devices)
    figure = Figure(figsize=(width, 4.0))
    axes = figure.subplots()
    for i, device in enumerate(devices):
        mine = sorted((row for row in rows if row.device == device), key=lambda row: row.parameters)
        found = [value(row) for row in mine]
        error = None if found[0][1] is None else list(zip(*(band for _, band in found)))
        # beside each other, so that bands can be told apart
        sizes = [row.parameters * 1.04 ** (i - len(devices) / 2) for row in mine]
        axes.errorbar(
            sizes, [v for v, _ in found], yerr=error, fmt="o-", color=colour[device], markersize=4, linewidth=1,
            capsize=3, label=device,
        )  # fmt: skip
    axes.set_xscale("log")
    if label == "tokens":
        axes.set_yscale("log")
    lines(axes, "parameters", label)
    legend(figure, axes)
    return figure
