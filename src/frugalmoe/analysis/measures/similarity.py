"""How alike experts are: their router rows, their weights, what they compute; and whether the router knows it.

Letters: N tokens, E experts, D model, F expert hidden, I outputs. The same N tokens go through every expert.
"""

import numpy as np
import scipy.optimize


def cosine_floor(dim: int) -> float:
    """Standard deviation of the cosine of two random directions, 1 / sqrt(D): larger values are alike."""
    return dim**-0.5


def router_similarity(kernel_DE: np.ndarray) -> np.ndarray:
    """Cosine of the router's columns [E, E]; the diagonal is NaN. Floor: `cosine_floor(D)`."""
    return _off_diagonal(_unit(kernel_DE.T) @ _unit(kernel_DE.T).T)


def weight_similarity(neuron_EFD: np.ndarray) -> np.ndarray:
    """Mean cosine of the neurons of two experts, matched one to one for the largest sum, [E, E]; diagonal NaN.

    Neurons have no order, so that unmatched weights of the same function look unrelated. Cost: E^2 / 2 assignments of
    F neurons. Matching chooses the best of many, so that unrelated experts are not at 0: floor by `matched_floor`.
    """
    unit_EFD = _unit(neuron_EFD)
    experts = len(unit_EFD)
    value_EE = np.full((experts, experts), np.nan)
    for i in range(experts):
        for j in range(i):
            value_EE[i, j] = value_EE[j, i] = _matched(unit_EFD[i] @ unit_EFD[j].T)
    return value_EE


def matched_floor(hidden: int, dim: int, *, samples: int = 8, seed: int = 0) -> float:
    """Mean of `weight_similarity` of Gaussian experts of F neurons in D dimensions."""
    rng = np.random.default_rng(seed)
    draw = lambda: _unit(rng.standard_normal((hidden, dim)))
    return float(np.mean([_matched(draw() @ draw().T) for _ in range(samples)]))


def _matched(cosine_FF: np.ndarray) -> float:
    return float(cosine_FF[scipy.optimize.linear_sum_assignment(-cosine_FF)].mean())


def linear_cka(output_ENI: np.ndarray) -> np.ndarray:
    """||Yi' Yj||_F^2 / (||Yi' Yi||_F ||Yj' Yj||_F) of centred outputs, [E, E] (Kornblith et al., arXiv 1905.00414);
    diagonal NaN. 1: equal up to rotation and scale. Not 0 for unrelated experts: floor by `cka_floor`.
    """
    centred_ENI = output_ENI - output_ENI.mean(1, keepdims=True)
    experts = len(centred_ENI)
    cross_EE = np.array([[np.sum((a.T @ b) ** 2) for b in centred_ENI] for a in centred_ENI]).reshape(experts, experts)
    own_E = np.sqrt(np.diag(cross_EE))
    return _off_diagonal(cross_EE / np.outer(own_E, own_E))


def cka_floor(output_ENI: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """`linear_cka` with the tokens of each expert in an order of their own: what N tokens give by chance."""
    rng = np.random.default_rng(seed)
    return linear_cka(np.stack([rng.permutation(y_NI) for y_NI in output_ENI]))


def pairwise_output_similarity(output_ENI: np.ndarray) -> np.ndarray:
    """Cosine of two experts' outputs on the same token, mean over tokens, [E, E]; diagonal NaN. Lower: less redundant.

    The mean over pairs is PES (SimBal, arXiv 2506.14038). Floor for directions without relation: 0 with standard
    deviation 1 / sqrt(N O).
    """
    unit_ENI = _unit(output_ENI)
    return _off_diagonal(np.einsum("ino,jno->ij", unit_ENI, unit_ENI) / output_ENI.shape[1])


def alignment(probs_NE: np.ndarray, output_ENI: np.ndarray) -> float:
    """Correlation over tokens and experts of p(e | n) and ||f_e(x_n)||, each less its expert's mean.

    Does the router choose experts that respond strongly (the premise of AoE, arXiv 2501.13074)? Floor: 0 with standard
    deviation about 1 / sqrt(N E).
    """
    norm_NE = np.linalg.norm(output_ENI, axis=-1).T
    a, b = probs_NE - probs_NE.mean(0), norm_NE - norm_NE.mean(0)
    return float(np.sum(a * b) / np.sqrt(np.sum(a**2) * np.sum(b**2)))


def off_diagonal_mean(value_EE: np.ndarray) -> float:
    """Mean over pairs of different experts."""
    return float(np.nanmean(value_EE))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


def _off_diagonal(value_EE: np.ndarray) -> np.ndarray:
    value_EE = value_EE.copy()
    np.fill_diagonal(value_EE, np.nan)
    return value_EE
