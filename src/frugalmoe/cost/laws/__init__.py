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
from frugalmoe.cost.laws.shaped import (
    Shaped,
    ShapedFit,
    fit_shaped,
    how_far_of,
    leverage_of,
    loss_of,
    read_shaped,
    write_shaped,
)

__all__ = [
    "Estimate",
    "Fit",
    "Point",
    "Shaped",
    "ShapedFit",
    "beyond",
    "fit_loss",
    "fit_power",
    "fit_shaped",
    "how_far",
    "how_far_of",
    "leverage_of",
    "loss_at",
    "loss_of",
    "read_fit",
    "read_shaped",
    "size_of",
    "tokens_for",
    "write_fit",
    "write_shaped",
]
