"""The one style of all pictures, and the parts that they share.

Colours: Okabe-Ito for domains and arms, cividis for layers (depth is ordered), purple-to-orange around a white middle
for ratios; all three survive colour blindness and grey printing. There are eight: of more things those at both ends
are named and the rest is grey, so that no colour stands for two.

Every picture is drawn at two widths, for a page and for a telephone: its first argument is what it shows, `width` the
inches. Legends stand above the axes in as many columns as fit.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from frugalmoe.analysis.stored.runs import Series

# Its yellow cannot be seen on white: in its place a wine red (of Tol's muted scheme).
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#000000")
INK, GREY, UNNAMED = "#222222", "#777777", "#bbbbbb"
WIDE, NARROW = 9.0, 4.6  # inches
LONGEST_LABEL = 28  # characters; a longer name is cut in the middle
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


def styled(draw: Callable) -> Callable:
    """Draws in `STYLE` without changing it for others."""

    @functools.wraps(draw)
    def in_style(*args, **options):
        with matplotlib.rc_context(STYLE):
            return draw(*args, **options)

    return in_style


def emphasis(ranked: Sequence[str], palette: Sequence[str] = OKABE_ITO) -> dict[str, str]:
    """Colours of names that are in order of what they show; where there are more than colours, the middle is grey."""
    best, worst = len(palette) - len(palette) // 2, len(palette) // 2
    ends = ranked if len(ranked) <= len(palette) else [*ranked[:best], *ranked[-worst:]]
    return dict.fromkeys(ranked, UNNAMED) | dict(zip(ends, palette))


def short(name: object, longest: int = LONGEST_LABEL) -> str:
    """A name that fits beside a picture, on one line."""
    kept = "".join(c if c.isprintable() else " " for c in str(name))
    half = (longest - 1) // 2
    return kept if len(kept) <= longest else f"{kept[:half]}…{kept[-half:]}"


def lines(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def layer_lines(axes: Axes, layers: Mapping[int, Series]) -> None:
    """Draws a line per layer, dark to bright with depth; names at most 8 of them."""
    named = set(np.array(list(layers))[np.linspace(0, len(layers) - 1, min(len(layers), 8)).round().astype(int)])
    for (layer, series), shade in zip(layers.items(), np.linspace(0.05, 0.85, len(layers))):
        label = f"layer {layer}" if layer in named else "_"  # matplotlib leaves "_" out of the legend
        noisy_line(axes, series, matplotlib.colormaps["cividis"](shade), label)


def legend(figure: Figure, axes: Axes | Iterable[Axes]) -> None:
    """Above the axes, in as many columns as the width has room for: it hides no line and leaves no screen."""
    handles: dict[str, object] = {}
    for a in [axes] if isinstance(axes, Axes) else axes:
        handles |= {label: handle for handle, label in zip(*a.get_legend_handles_labels()) if label not in handles}
    if handles:
        widest = 0.5 + 0.075 * max(len(line) for label in handles for line in label.split("\n"))  # inches
        columns = int(np.clip((figure.get_figwidth() - 0.2) // widest, 1, len(handles)))
        figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(handles) // columns))
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=columns, borderaxespad=0.2)


def noisy_line(axes: Axes, series: Series, color: object, label: str) -> None:
    """A faint line of every value and a strong one of the running mean over a fortieth of them."""
    width = max(1, len(series.values) // 40)
    if width == 1:
        axes.plot(*series, color=color, label=label)
        return
    axes.plot(*series, color=color, alpha=0.25, linewidth=0.8)
    mean = np.convolve(series.values, np.full(width, 1 / width), "valid")
    middle = (width - 1) // 2
    axes.plot(series.steps[middle : middle + len(mean)], mean, color=color, label=label)


def reference(axes: Axes, y: float, text: str, dashes: tuple[int, int] = (4, 3)) -> None:
    axes.axhline(y, color=INK, linewidth=1, linestyle=(0, dashes), label=text)


def ratio_norm(ratio: np.ndarray) -> TwoSlopeNorm:
    """A log2 scale symmetric around 1 (white), 1.5, 2 or 4 times wide: just wide enough for the data, up to 4."""
    widest = np.nanquantile(np.abs(np.log2(np.clip(ratio, 0.25, 4))), 0.999)
    limit = next((x for x in np.log2([1.5, 2]) if x >= widest), 2.0)
    return TwoSlopeNorm(0, -limit, limit)


def ratio_bar(figure: Figure, image: ScalarMappable, axes: list[Axes], label: str) -> None:
    ticks = np.linspace(image.norm.vmin, image.norm.vmax, 5 if image.norm.vmax == 2 else 3)
    pad, shrink = 0.12 / figure.get_figheight(), 0.5 if figure.get_figwidth() >= WIDE else 0.9
    bar = figure.colorbar(image, ax=axes, location="top", ticks=ticks, extend="both", aspect=40, shrink=shrink, pad=pad)
    bar.ax.set_xticklabels([f"{2**t:.2g}×" for t in ticks])
    bar.set_label(label)


def log_ratio(ratio: np.ndarray) -> np.ndarray:
    return np.log2(np.clip(ratio, 2.0**-6, 2.0**6))


def grid(count: int, columns: int, height: float, width: float) -> tuple[Figure, list[Axes]]:
    """`count` axes that share their scales, in rows of up to `columns`, half as many in a narrow picture; `height` of a
    row in inches.
    """
    columns = min(columns if width >= WIDE else -(-columns // 2), count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width, 1.2 + rows * height))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for spare in axes[count:]:
        spare.remove()
    for i, kept in enumerate(axes[:count]):
        kept.label_outer()
        kept.tick_params(labelbottom=i >= count - columns)  # also above a place that stays empty
    return figure, list(axes[:count])
