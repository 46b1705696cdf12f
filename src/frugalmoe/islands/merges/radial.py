"""Radial-directional averaging: the mean of the lengths times the direction of the mean of the directions.

The plain mean of M contributions that are nearly at right angles is shorter than each of them by sqrt(M); this one is
as long as they are (Decoupled DiLoCo, arXiv 2604.21428).
"""

import dataclasses

import numpy as np

from frugalmoe.islands.contract import Merge, Merged, Offered, Options, by_tokens, norms, weights

CANCELLED = 1e-4  # a mean direction that is shorter is none: float32 sums, good to 1e-7, would make it of rounding
NEGLIGIBLE = (
    1e-30  # times the longest: a contribution that is shorter has no direction, so that coefficients are finite
)
AVERAGED = ("embedding", "head")  # roles whose rows differ in how many tokens moved them: the weighted mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Radial(Options):
    per_step: bool = True  # weigh by tokens * tokens / steps, as Decoupled DiLoCo does, and not by tokens


def merge(offered: Offered, history: dict, options: Radial) -> Merged:
    """Of a tensor's contributions v with weights w that sum to 1, from inner products alone:

        (sum of w |v|) phi(sum of w phi(v)),    phi(x) = x / |x|, phi(0) = 0

    For embedding and head, by role, the sum of w v.
    """
    weight_M = weights(offered, options, by_tokens(offered, options.per_step))
    averaged_Q = np.array([tensor.role in AVERAGED for tensor in offered.tensors], bool)
    coefficients_QM = np.where(averaged_Q[:, None], weight_M, _radial(offered.gram_QMM, weight_M))
    return Merged(coefficients_QM.T)


def _radial(gram_QMM: np.ndarray, weight_M: np.ndarray) -> np.ndarray:
    """Coefficients [Q, M] of tensors."""
    norm_QM = norms(gram_QMM)
    directed = norm_QM > NEGLIGIBLE * norm_QM.max(-1, keepdims=True)
    inverse_QM = np.divide(1, norm_QM, out=np.zeros_like(norm_QM), where=directed)
    to_unit_QM = weight_M * inverse_QM  # the mean direction is the sum of these times v
    cosine_QMM = gram_QMM * inverse_QM[:, :, None] * inverse_QM[:, None, :]
    length_Q = np.sqrt(np.maximum(np.einsum("m,qmn,n->q", weight_M, cosine_QMM, weight_M), 0))
    # What is cancelled is measured against the weight of those that have a direction at all.
    whole_Q = (weight_M * directed).sum(-1)
    kept_Q = length_Q > CANCELLED * whole_Q
    radius_Q = norm_QM @ weight_M
    scale_Q = np.divide(radius_Q, length_Q, out=np.zeros_like(length_Q), where=kept_Q)
    return scale_Q[:, None] * to_unit_QM


MERGE = Merge(
    about="radial-directional averaging, RDA (Decoupled DiLoCo, arXiv 2604.21428)", rule=merge, options=Radial
)
