"""What a router's own numbers say: probabilities, logits, biases and combine weights of each token.

Measures are per token [..., N]; `uncertainty.mean(measure, unit_N)` gives the mean with its interval.

Letters: N tokens, E experts, K experts per token.
"""

import numpy as np
import scipy.optimize
import scipy.special


def router_entropy(probs_NE: np.ndarray) -> np.ndarray:
    """-sum_e p ln p: ln E where the router is undecided, 0 where it is certain."""
    return scipy.special.entr(probs_NE).sum(-1)


def margin(scores_NE: np.ndarray, k: int) -> np.ndarray:
    """s_(k) - s_(k+1), sorted from the largest: how far the choice is from another one. Low margins make churn."""
    sorted_NE = np.sort(scores_NE, axis=-1)
    return sorted_NE[..., -k] - sorted_NE[..., -k - 1]


def top_ratio(probs_NE: np.ndarray) -> np.ndarray:
    """p_(1) / p_(2) (Skywork-MoE, Wei et al., arXiv 2406.06563): 1 where the first choice is no better."""
    sorted_NE = np.sort(probs_NE, axis=-1)
    return sorted_NE[..., -1] / sorted_NE[..., -2]


def mass_captured(probs_NE: np.ndarray, selected_NE: np.ndarray) -> np.ndarray:
    """sum of p over the chosen experts: at most 1; K / E for an undecided router."""
    return np.sum(probs_NE * selected_NE, axis=-1)


def weight_effective(weight_NK: np.ndarray) -> np.ndarray:
    """exp(H(w / sum w)): how many of its experts a token really mixes, 1 to K; NaN where it has none."""
    total_N1 = weight_NK.sum(-1, keepdims=True)
    p_NK = np.divide(weight_NK, total_N1, out=np.full(weight_NK.shape, np.nan), where=total_N1 > 0)
    return np.exp(scipy.special.entr(p_NK).sum(-1))


def logit_scale(logits_NE: np.ndarray) -> dict[str, float]:
    """max |z|, root mean square of z, and mean logsumexp(z)^2, which is the z-loss (Zoph et al., arXiv 2202.08906).

    Reference: (ln E)^2 for logits of zero.
    """
    lse_N = scipy.special.logsumexp(logits_NE, axis=-1)
    return {
        "max_abs": float(np.abs(logits_NE).max()),
        "rms": float(np.sqrt(np.mean(np.square(logits_NE)))),
        "mean_lse_sq": float(np.mean(lse_N**2)),
    }


def override_rate(scores_NE: np.ndarray, bias_E: np.ndarray, k: int) -> np.ndarray:
    """Tokens whose K largest scores are not the same experts with the balance bias as without it, as 0 or 1."""
    top = lambda s: np.sort(np.argpartition(-s, k - 1, axis=-1)[..., :k], axis=-1)
    return np.any(top(scores_NE) != top(scores_NE + bias_E), axis=-1).astype(np.float64)


def bias_spread(bias_E: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation and range of a balance bias; compare the range with `margin`."""
    return {"mean": float(bias_E.mean()), "std": float(bias_E.std()), "range": float(np.ptp(bias_E))}


def optimality(scores_NE: np.ndarray, selected_NE: np.ndarray) -> float:
    """Sum of scores of the chosen experts over that of the best balanced assignment with the same K; above 1 where
    imbalance buys score.

    The best assignment gives each token K distinct experts and each expert at most ceil(K N / E) tokens: a
    transportation problem, solved as a linear program, whose corners are whole. Cost grows with N E: use some
    thousand tokens.
    """
    tokens, experts = scores_NE.shape
    k = int(selected_NE[0].sum())
    of_token = scipy.sparse.kron(scipy.sparse.eye_array(tokens), np.ones((1, experts)))
    of_expert = scipy.sparse.kron(np.ones((1, tokens)), scipy.sparse.eye_array(experts))
    best = scipy.optimize.linprog(
        -scores_NE.ravel(),
        A_ub=of_expert,
        b_ub=np.full(experts, -(-k * tokens // experts)),
        A_eq=of_token,
        b_eq=np.full(tokens, k),
        bounds=(0, 1),
    )
    return float((scores_NE * selected_NE).sum() / -best.fun)
