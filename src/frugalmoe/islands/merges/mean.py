"""The mean of the contributions, as in DiLoCo."""

import numpy as np

from frugalmoe.islands.contract import Merge, Merged, Offered, Options, weights


def merge(offered: Offered, history: dict, options: Options) -> Merged:
    """Every contribution counts alike, whatever is in it."""
    weight_M = weights(offered, options, np.ones(len(offered.islands)))
    return Merged(np.repeat(weight_M[:, None], len(offered.tensors), axis=1))


MERGE = Merge(about="the mean (DiLoCo, arXiv 2311.08105)", rule=merge)
