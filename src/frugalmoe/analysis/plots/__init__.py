"""Pictures of a run. Each function returns a matplotlib Figure, or None where the run lacks what it shows."""

from frugalmoe.analysis.plots.change import effects, saturation
from frugalmoe.analysis.plots.experts import (
    co_activation,
    domain_heatmaps,
    domain_intervals,
    vocabulary_specialisation,
)
from frugalmoe.analysis.plots.style import GREY, INK, OKABE_ITO, STYLE, styled
from frugalmoe.analysis.plots.training import balance, expert_load, loss_curves, noise_floor, speed

__all__ = [
    "GREY",
    "INK",
    "OKABE_ITO",
    "STYLE",
    "balance",
    "co_activation",
    "domain_heatmaps",
    "domain_intervals",
    "effects",
    "expert_load",
    "loss_curves",
    "noise_floor",
    "saturation",
    "speed",
    "styled",
    "vocabulary_specialisation",
]
