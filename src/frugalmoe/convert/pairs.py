"""The order of rotated channels: pairs (2 i, 2 i + 1) in some published weights, halves (i, i + d / 2) in ours.

Letters: d rotated channels of a head, J the other axis.
"""

import numpy as np


def halves(channels: np.ndarray) -> np.ndarray:
    """Pairs [..., d, J] as halves: the first of each pair, then the second."""
    return np.concatenate([channels[..., 0::2, :], channels[..., 1::2, :]], axis=-2)


def pairs(channels: np.ndarray) -> np.ndarray:
    """The way back."""
    first, second = np.split(channels, 2, axis=-2)
    return np.stack([first, second], axis=-2).reshape(channels.shape)
