"""How evenly the experts are used: measures of counts c of token slots per expert, over the last axis.

Leading axes (layers, steps, sequences) stay. What the trainer logs, such as max violation, is computed by
`routing.stats` here too. Intervals: `uncertainty.bootstrap(measure, counts_UE)`.

Letters: E experts, K experts per token, N tokens, M devices, B sequences. In formulas, n = sum(c)
is the number of slots.
"""

import numpy as np

from frugalmoe.analysis.measures.information import entropy
from frugalmoe.routing import stats


def _logged(counts_E: np.ndarray, name: str) -> np.ndarray:
    return np.asarray(stats.metrics({"counts": counts_E, "tokens": 0, "assigned": 0})[name])


def max_violation(counts_E: np.ndarray) -> np.ndarray:
    """max(c) / mean(c) - 1 (Wang et al., arXiv 2408.15664): 0 balanced, E - 1 collapsed. Floor: `violation_floor`.

    Of one step's counts it is MaxVio_batch, of counts summed over an evaluation MaxVio_global.
    """
    return _logged(counts_E, "max_violation")


def violation_floor(num_experts: int, slots: float) -> float:
    """Max violation that sampling alone gives a uniform random router: 0.8 sqrt(2 ln(E) E / n), n = K N slots.

    The mean maximum of E near-Gaussian counts; 0.8 is a rounded fit (simulated: 0.61 at E = 4 to 0.88 at E = 256).
    """
    return 0.8 * float(np.sqrt(2 * np.log(num_experts) * num_experts / slots))


def min_violation(counts_E: np.ndarray) -> np.ndarray:
    """1 - min(c) / mean(c): 0 balanced, 1 where an expert gets nothing. The floor is about that of max violation."""
    return 1 - counts_E.min(-1) / counts_E.mean(-1)


def min_max_ratio(counts_E: np.ndarray) -> np.ndarray:
    """min(c) / max(c): 1 balanced."""
    return counts_E.min(-1) / counts_E.max(-1)


def dead_experts(counts_E: np.ndarray) -> np.ndarray:
    """How many experts have c < 0.01 mean(c)."""
    return _logged(counts_E, "dead_experts")


def idle_steps(counts_SE: np.ndarray) -> np.ndarray:
    """Logged steps [..., E] since each expert's last token, of counts [..., S, E]; S where it never had one."""
    return np.argmax(
        np.concatenate([counts_SE[..., ::-1, :], np.ones_like(counts_SE[..., :1, :])], axis=-2) > 0, axis=-2
    )


def variation(counts_E: np.ndarray) -> np.ndarray:
    """Coefficient of variation, std(c) / mean(c); CV^2 = E sum(p^2) - 1 with p = c / n. Floor: `variation_floor`."""
    return counts_E.std(-1) / counts_E.mean(-1)


def variation_floor(num_experts: int, num_experts_per_token: int, tokens: float) -> float:
    """CV that sampling alone gives K of E uniformly drawn: sqrt((E - K) / (K N)).

    c is binomial over N tokens with q = K / E: var(c) / mean(c)^2 = N q (1 - q) / (N q)^2 = (1 - q) / (N q).
    """
    return float(np.sqrt((num_experts - num_experts_per_token) / (num_experts_per_token * tokens)))


def gini(counts_E: np.ndarray) -> np.ndarray:
    """sum_ij |c_i - c_j| / (2 E n): 0 balanced, 1 - 1/E collapsed.

    Sampling alone gives about CV / sqrt(pi), because two Gaussians of deviation s differ by 2 s / sqrt(pi) on average.
    """
    differences = np.abs(counts_E[..., :, None] - counts_E[..., None, :]).sum((-2, -1))
    return differences / (2 * counts_E.shape[-1] * counts_E.sum(-1))


def effective_experts(counts_E: np.ndarray) -> np.ndarray:
    """exp(H(p)): E where the load is uniform, 1 where one expert gets everything.

    Sampling alone takes about E (E - 1) / (2 n) off.
    """
    return np.exp(entropy(counts_E))


def inverse_simpson(counts_E: np.ndarray) -> np.ndarray:
    """1 / sum(p^2): effective experts with more weight on the busy ones; E / (1 + CV^2)."""
    return counts_E.sum(-1) ** 2 / (counts_E.astype(np.float64) ** 2).sum(-1)


def by_device(counts_E: np.ndarray, devices: int) -> np.ndarray:
    """Counts [..., M] of equal blocks of consecutive experts, for group max violation and the next two."""
    return counts_E.reshape(*counts_E.shape[:-1], devices, -1).sum(-1)


def imbalance_score(counts_M: np.ndarray, tokens: float) -> np.ndarray:
    """Returns (max - min of the devices' load) / N (MoGE, Tang et al., arXiv 2505.21411)."""
    return (counts_M.max(-1) - counts_M.min(-1)) / tokens


def straggler_slowdown(counts_M: np.ndarray) -> np.ndarray:
    """max / mean of the devices' load: by how much the busiest device delays a layer; 1 + its max violation."""
    return 1 + max_violation(counts_M)


def padding_waste(counts_E: np.ndarray, slots_per_expert: float) -> np.ndarray:
    """1 - n / (E C): share of a capacity-limited batch's rows that hold no token; counts after drops."""
    return 1 - counts_E.sum(-1) / (counts_E.shape[-1] * slots_per_expert)


def sequence_violation(selected_NE: np.ndarray, sequence_N: np.ndarray) -> np.ndarray:
    """Max violation within each sequence [B]; its mean is what a sequence-wise balance loss controls.

    A sequence has few slots, so compare with `violation_floor` at the slots of one sequence.
    """
    counts_BE = np.stack([np.bincount(sequence_N, s_N) for s_N in selected_NE.T], axis=-1)
    return max_violation(counts_BE[counts_BE.sum(-1) > 0])


def fan_out(selected_NE: np.ndarray) -> np.ndarray:
    """Experts of each token [N]; the mean is the realised K. Compare routers of variable fan-out at equal means."""
    return selected_NE.sum(-1)
