"""Which experts work together: pairs within a layer, and paths across layers.

Letters: L layers, N tokens, E experts, K experts per token, U units.
"""

import itertools

import numpy as np

from frugalmoe.analysis.measures.information import entropy, miller_madow, mutual_information
from frugalmoe.analysis.measures.uncertainty import Estimate, bootstrap, over_units


def co_activation(selected_NE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """CA(i, j) = N_ij / N_i, the share of i's tokens that also go to j, [E, E]; and its chance level.

    As in OLMoE's section 5.2 (Muennighoff et al., arXiv 2409.02060), over all pairs of a token's K experts; the
    paper's script counts neighbouring ranks only, K - 1 of the K (K - 1) / 2 pairs.

    Chance: with p the load shares and K the mean choices per token, independent choices give expected_ij =
    (K - 1) p_j / (1 - p_i), which is (K - 1) / (E - 1) at uniform load. The diagonal is NaN, as are rows of experts
    that got no token.
    """
    count_E, both_EE = selected_NE.sum(0), _pairs(selected_NE)
    p_E = count_E / count_E.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        observed_EE = both_EE / count_E[:, None]
        expected_EE = (count_E.sum() / len(selected_NE) - 1) * p_E[None, :] / (1 - p_E[:, None])
    for matrix in (observed_EE, expected_EE):
        np.fill_diagonal(matrix, np.nan)
    return observed_EE, expected_EE


def _pairs(selected_NE: np.ndarray) -> np.ndarray:
    s_NE = selected_NE.astype(np.float32)  # counts are exact up to 2^24 tokens
    return (s_NE.T @ s_NE).astype(np.float64)


def co_activation_interval(selected_NE: np.ndarray, unit_N: np.ndarray, expert: int) -> Estimate:
    """CA(expert, j) for every j [E] with its interval over units; NaN at `expert` itself."""
    with_E = over_units(selected_NE & selected_NE[:, [expert]], unit_N)

    def share(both_E: np.ndarray) -> np.ndarray:
        alone = both_E[..., [expert]]
        share_E = np.divide(both_E, alone, out=np.full(both_E.shape, np.nan), where=alone > 0)
        share_E[..., expert] = np.nan
        return share_E

    return bootstrap(share, with_E)


def npmi(selected_NE: np.ndarray) -> np.ndarray:
    """ln[p_ij / (p_i p_j)] / -ln p_ij [E, E], p over tokens: 1 always together, 0 independent, -1 never together.

    Chance is not 0, because a token's experts are distinct: at uniform load p_ij = K (K - 1) / (E (E - 1)), so that it
    is ln[(K - 1) E / (K (E - 1))] / -ln p_ij, a little below 0. The diagonal is NaN.
    """
    p_E, p_EE = selected_NE.mean(0), _pairs(selected_NE) / len(selected_NE)
    with np.errstate(invalid="ignore", divide="ignore"):
        value_EE = np.log(p_EE / np.outer(p_E, p_E)) / -np.log(p_EE)
    value_EE[(p_EE == 0) & (np.outer(p_E, p_E) > 0)] = -1
    np.fill_diagonal(value_EE, np.nan)
    return value_EE


def path_information(selected_LNE: np.ndarray) -> np.ndarray:
    """I(S^l; S^l+1) [L - 1] over pairs of slots, one of each of two successive layers, with Miller-Madow's term.

    The noise floor after the term is about 0. At most H(e), for layers that repeat each other with K = 1.
    """
    tables = np.stack([a_NE.T.astype(np.float64) @ b_NE for a_NE, b_NE in itertools.pairwise(selected_LNE)])
    return mutual_information(tables) + miller_madow(tables)


def paths(selected_LNE: np.ndarray, *, covering: float = 0.9) -> tuple[int, int, float]:
    """Returns (distinct paths of tokens through all layers, how many of the commonest cover 90% of tokens, exp of
    entropy).

    A path is the set of experts in every layer. With N tokens there are at most N, so compare at equal N.
    """
    packed_NI = np.packbits(selected_LNE, axis=-1).swapaxes(0, 1).reshape(selected_LNE.shape[1], -1)
    counts = np.sort(np.unique(packed_NI, axis=0, return_counts=True)[1])[::-1]
    needed = int(np.searchsorted(np.cumsum(counts), covering * counts.sum() - 1e-9)) + 1
    return len(counts), needed, float(np.exp(entropy(counts)))
