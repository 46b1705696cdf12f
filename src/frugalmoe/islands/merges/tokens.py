"""The mean of the contributions, weighted by the tokens that each was trained on."""

import dataclasses

import numpy as np

from frugalmoe.islands.contract import Merge, Merged, Offered, Options, by_tokens, weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens(Options):
    per_step: bool = False  # weigh by tokens * tokens / steps, as Decoupled DiLoCo does


def merge(offered: Offered, history: dict, options: Tokens) -> Merged:
    """Weights are tokens over their sum; all are alike where nobody has trained on any."""
    weight_M = weights(offered, options, by_tokens(offered, options.per_step))
    return Merged(np.repeat(weight_M[:, None], len(offered.tensors), axis=1))


MERGE = Merge(
    about="the mean weighted by tokens (as in Decoupled DiLoCo, arXiv 2604.21428)", rule=merge, options=Tokens
)
