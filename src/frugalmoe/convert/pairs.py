"""The order of rotated channels: pairs (2 i, 2 i + 1) in some published weights, halves (i, i + d / 2) in ours.

Letters: d rotated channels of a head, J the other axis.
"""

from collections.abc import Callable

import numpy as np

from frugalmoe.convert.contract import Form


def halves(channels: np.ndarray) -> np.ndarray:
    """Pairs [..., d, J] as halves: the first of each pair, then the second."""
    return np.concatenate([channels[..., 0::2, :], channels[..., 1::2, :]], axis=-2)


def pairs(channels: np.ndarray) -> np.ndarray:
    """The way back."""
    first, second = np.split(channels, 2, axis=-2)
    return np.stack([first, second], axis=-2).reshape(channels.shape)


def _by_head(turn: Callable[[np.ndarray], np.ndarray], tensor: np.ndarray, channels: int) -> np.ndarray:
    """Of a matrix or a bias whose rows are the channels of one head after the other."""
    return turn(tensor.reshape(-1, channels, tensor[0].size)).reshape(tensor.shape)


# Of queries and keys whose heads are rotated whole.
HEADS = Form(
    lambda tensor, model: (_by_head(halves, tensor, model.head_dim),),
    lambda pieces, model: _by_head(pairs, pieces[0], model.head_dim),
)
