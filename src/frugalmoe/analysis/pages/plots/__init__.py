"""Pictures of a run. Each function returns a matplotlib Figure, or None where the run lacks what it shows."""

from frugalmoe.analysis.pages.plots.budgets import loss_for_money, tokens_for_money
from frugalmoe.analysis.pages.plots.change import effects, saturation
from frugalmoe.analysis.pages.plots.experts import (
    co_activation,
    domain_heatmaps,
    domain_intervals,
    island_loads,
    vocabulary_specialisation,
)
from frugalmoe.analysis.pages.plots.style import (
    GREY,
    INK,
    NARROW,
    OKABE_ITO,
    STYLE,
    UNNAMED,
    WIDE,
    emphasis,
    legend,
    lines,
    short,
    styled,
)
from frugalmoe.analysis.pages.plots.training import (
    auxiliary_losses,
    balance,
    expert_load,
    goodput,
    loss_curves,
    noise_floor,
    optimization,
    rounds,
    speed,
)

__all__ = [
    "GREY",
    "INK",
    "NARROW",
    "OKABE_ITO",
    "STYLE",
    "UNNAMED",
    "WIDE",
    "auxiliary_losses",
    "balance",
    "co_activation",
    "domain_heatmaps",
    "domain_intervals",
    "effects",
    "emphasis",
    "expert_load",
    "goodput",
    "island_loads",
    "legend",
    "lines",
    "loss_curves",
    "loss_for_money",
    "noise_floor",
    "optimization",
    "rounds",
    "saturation",
    "short",
    "speed",
    "styled",
    "tokens_for_money",
    "vocabulary_specialisation",
]
