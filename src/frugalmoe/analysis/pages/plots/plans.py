"""Pictures of plans: what a run costs against how long it takes."""

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from frugalmoe.analysis.pages.plots.style import INK, WIDE, emphasis, legend, lines, styled
from frugalmoe.cost.planning import Found, Plan


def pareto(plans: list[Plan]) -> list[Plan]:
    """Returns the plans that no other beats in both time and price, the fastest first."""
    front: list[Plan] = []
    for p in sorted(plans, key=lambda p: (p.hours, p.price)):
        if not front or p.price < front[-1].price:
            front.append(p)
    return front


@styled
def cost_against_time(found: Found, currency: str, width: float = WIDE) -> Figure:
    """Draws every plan with a price: a colour and a line for each kind of device or mix, over numbers of devices;
    the chosen plan with its range; the front of those that none beats in both.
    """
    plans = [p for p in found.plans if p.price]
    kinds: dict[str, list[Plan]] = {}
    for p in sorted(plans, key=lambda p: p.hours):
        kinds.setdefault(" + ".join(part.offer.entry.name for part in p.parts), []).append(p)
    ranked = sorted(kinds, key=lambda kind: min(p.price for p in kinds[kind]))
    colour = emphasis(ranked)
    figure = Figure(figsize=(width, 4.2))
    axes = figure.subplots()
    for kind in ranked:
        days, prices = [p.hours / 24 for p in kinds[kind]], [p.price for p in kinds[kind]]
        axes.plot(days, prices, "o-", color=colour[kind], markersize=4, linewidth=1, label=kind)
    front = pareto(plans)
    style = {"color": INK, "linewidth": 3, "alpha": 0.25, "zorder": 1, "label": "none is faster and cheaper"}
    axes.plot([p.hours / 24 for p in front], [p.price for p in front], **style)
    if (best := found.best).price:
        axes.errorbar(
            best.hours / 24, best.price, yerr=[[best.price * (1 - best.low)], [best.price * (best.high - 1)]],
            fmt="s", color=INK, markersize=7, capsize=4, fillstyle="none", label=f"chosen: {best.name}, with its range",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log")
    plain = FuncFormatter(lambda value, _: f"{value:,.12g}" if value < 1e6 else f"{value / 1e6:,.12g} M")
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e4 else (1,)))
        axis.set_major_formatter(plain)
        axis.set_minor_formatter(NullFormatter())
    lines(axes, "days", f"price ({currency})")
    legend(figure, axes)
    return figure
