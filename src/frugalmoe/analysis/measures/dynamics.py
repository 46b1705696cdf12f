"""How routing changes over training, on fixed tokens: saturation towards the last checkpoint, churn between two.

Measures are per token [..., N]; `uncertainty.mean(measure, unit_N)` gives the mean with its interval.

Letters: S checkpoints, L layers, N tokens, E experts, K experts per token.
"""

import numpy as np

from frugalmoe.analysis.measures.uncertainty import Estimate, mean


def overlap(selected_NE: np.ndarray, reference_NE: np.ndarray) -> np.ndarray:
    """|S_n and R_n| / |R_n| [..., N]: share of the reference's experts that are chosen; NaN where it has none."""
    both_N, size_N = _shared(selected_NE, reference_NE), reference_NE.sum(-1)
    return np.divide(both_N, size_N, out=np.full(both_N.shape, np.nan), where=size_N > 0)


def saturation(selected_SLNE: np.ndarray, unit_N: np.ndarray) -> Estimate:
    """RS(t) = mean_n |E_n(t) and E_n(T)| / K, [S, L], with T the last of the S checkpoints.

    Router saturation of OLMoE, section 5.1 (Muennighoff et al., arXiv 2409.02060). Floor: `saturation_chance`.
    """
    return mean(overlap(selected_SLNE, selected_SLNE[-1:]), unit_N)


def saturation_chance(selected_NE: np.ndarray, reference_NE: np.ndarray) -> np.ndarray:
    """Saturation [...] of choices that ignore the token but keep both loads: sum_e q_e r_e / sum_e r_e.

    q_e, r_e: share of tokens that go to e then and in the reference. K / E at uniform load; more where both prefer the
    same experts, so that a collapsed router looks saturated.
    """
    q_E, r_E = selected_NE.mean(-2), reference_NE.mean(-2)
    return np.sum(q_E * r_E, axis=-1) / r_E.sum(-1)


def beyond_chance(value: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Returns (value - chance) / (1 - chance): 0 for what chance gives, 1 for the reference."""
    return (value - chance) / (1 - chance)


def churn(selected_NE: np.ndarray, later_NE: np.ndarray) -> np.ndarray:
    """1 - |S and S'| / |S or S'| [..., N]: 0 the same experts, 1 none in common; NaN where neither has any.

    Ceiling at uniform load: about 1 - (K / E) / (2 - K / E), which is what unrelated routing gives.
    """
    both_N = _shared(selected_NE, later_NE)
    either_N = selected_NE.sum(-1) + later_NE.sum(-1) - both_N
    return 1 - np.divide(both_N, either_N, out=np.full(both_N.shape, np.nan), where=either_N > 0)


def weighted_churn(gate_NE: np.ndarray, later_NE: np.ndarray) -> np.ndarray:
    """1 - sum min(g, g') / sum max(g, g') over all pairs of token and expert [...]: churn of the combine weights."""
    least, most = np.minimum(gate_NE, later_NE), np.maximum(gate_NE, later_NE)
    return 1 - least.sum((-2, -1)) / most.sum((-2, -1))


def _shared(a_NE: np.ndarray, b_NE: np.ndarray) -> np.ndarray:
    return np.sum(a_NE & b_NE, axis=-1).astype(np.float64)
