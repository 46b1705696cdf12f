"""Laws of what a model costs and how good it gets: `published`, and `fitted` to a study's runs with its file."""

from frugalmoe.cost.laws.files import read_fit, write_fit
from frugalmoe.cost.laws.fitted import (
    Estimate,
    Fit,
    Point,
    beyond,
    fit_loss,
    fit_power,
    how_far,
    loss_at,
    size_of,
    tokens_for,
)

__all__ = [
    "Estimate",
    "Fit",
    "Point",
    "beyond",
    "fit_loss",
    "fit_power",
    "how_far",
    "loss_at",
    "read_fit",
    "size_of",
    "tokens_for",
    "write_fit",
]
