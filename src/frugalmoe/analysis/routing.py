"""Measures of routing, pure functions on arrays. Entropies and information are in nats.

Letters: L layers, N tokens, E experts, K experts per token, G domains, V distinct token ids, U units. A unit is what is
drawn independently, a row or a document: tokens of one unit share its topic, so resampling tokens one by one would
call everything significant.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import scipy.special

# ---------------------------------------------------------------- balance


def max_violation(counts_E: np.ndarray) -> np.ndarray:
    """max(c) / mean(c) - 1 over the last axis (Wang et al., arXiv 2408.15664): 0 balanced, E - 1 collapsed."""
    return counts_E.max(-1) / counts_E.mean(-1) - 1


def violation_floor(num_experts: int, slots: float) -> float:
    """Max violation that sampling alone gives a uniform random router: 0.8 sqrt(2 ln(E) E / slots), slots = K N.

    The mean maximum of E near-Gaussian counts; 0.8 is a rounded fit (simulated: 0.61 at E = 4 to 0.88 at E = 256).
    """
    return 0.8 * float(np.sqrt(2 * np.log(num_experts) * num_experts / slots))


def entropy(counts_E: np.ndarray) -> np.ndarray:
    """H = -sum p ln p of p = c / sum(c), over the last axis."""
    p_E = counts_E / counts_E.sum(-1, keepdims=True)
    return -np.sum(p_E * np.log(p_E, out=np.zeros_like(p_E), where=p_E > 0), axis=-1)


def effective_experts(counts_E: np.ndarray) -> np.ndarray:
    """exp(H) of the load: E where it is uniform, 1 where one expert gets everything."""
    return np.exp(entropy(counts_E))


def gini(counts_E: np.ndarray) -> np.ndarray:
    """sum_ij |c_i - c_j| / (2 E sum(c)): 0 balanced, 1 - 1/E collapsed."""
    differences = np.abs(counts_E[..., :, None] - counts_E[..., None, :]).sum((-2, -1))
    return differences / (2 * counts_E.shape[-1] * counts_E.sum(-1))


# ---------------------------------------------------------------- domains


class Units(NamedTuple):
    """What every statistic of domains needs to know of the tokens."""

    routed_LUE: np.ndarray  # tokens of the unit that the expert got; float64, for fast products
    tokens_U: np.ndarray
    domain_U: np.ndarray


def group_units(selected_LNE: np.ndarray, domain_N: np.ndarray, unit_N: np.ndarray) -> Units:
    """Sums tokens over units 0..U-1. Each unit must lie in one domain."""
    tokens_U = np.bincount(unit_N)
    domain_U = np.zeros(tokens_U.size, domain_N.dtype)
    domain_U[unit_N] = domain_N
    if (domain_U[unit_N] != domain_N).any():
        raise ValueError("a unit holds tokens of two domains")
    order_N = np.argsort(unit_N, kind="stable")
    starts_U = np.cumsum(tokens_U) - tokens_U
    routed_LUE = np.stack([np.add.reduceat(s_NE[order_N], starts_U, dtype=np.float64) for s_NE in selected_LNE])
    return Units(routed_LUE, tokens_U, domain_U)


def domain_shares(units: Units, num_domains: int) -> np.ndarray:
    """Share [L, G, E] of a domain's tokens routed to each expert: N(e, g) / N(g). Chance level K / E.

    Domain specialisation as OLMoE defines it (Muennighoff et al., arXiv 2409.02060, section 5.3). NaN for a domain
    without tokens.
    """
    member_GU = np.arange(num_domains)[:, None] == units.domain_U
    with np.errstate(invalid="ignore"):
        return (member_GU @ units.routed_LUE) / (member_GU @ units.tokens_U)[:, None]


def share_interval(
    units: Units, num_domains: int, *, samples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval (low, high), each [L, G, E], of `domain_shares`: units drawn again per domain.

    NaN for a domain of fewer than two units.
    """
    rng = np.random.default_rng(seed)
    layers, _, experts = units.routed_LUE.shape
    interval = np.full((2, layers, num_domains, experts), np.nan)
    for g in np.unique(units.domain_U):
        member = units.domain_U == g
        size = member.sum()
        if size < 2:
            continue
        times_BU = rng.multinomial(size, np.full(size, 1 / size), samples).astype(np.float64)
        share_LBE = times_BU @ units.routed_LUE[:, member] / (times_BU @ units.tokens_U[member])[:, None]
        interval[:, :, g] = np.quantile(share_LBE, [0.5 - level / 2, 0.5 + level / 2], axis=1)
    return interval[0], interval[1]


def excess(share_LGE: np.ndarray) -> np.ndarray:
    """share(e | g) less its mean over domains: an expert that is busy everywhere is not specialised."""
    return share_LGE - np.nanmean(share_LGE, axis=1, keepdims=True)


def mutual_information(counts_XE: np.ndarray) -> np.ndarray:
    """I(X; E) = H(X) + H(E) - H(X, E) of a table of counts (the last two axes); biased upwards by about
    (X - 1)(E - 1) / (2 n) where X and E are independent."""
    joint = entropy(counts_XE.reshape(*counts_XE.shape[:-2], -1))
    return entropy(counts_XE.sum(-1)) + entropy(counts_XE.sum(-2)) - joint


def miller_madow(counts_XE: np.ndarray) -> float:
    """What to add to `mutual_information` of one table: each entropy gains (occupied cells - 1) / (2 n)."""
    cells = [np.count_nonzero(c) for c in (counts_XE.sum(1), counts_XE.sum(0), counts_XE)]
    return (cells[0] + cells[1] - cells[2] - 1) / (2 * counts_XE.sum())


def domain_information(units: Units, num_domains: int) -> np.ndarray:
    """I(domain; expert) [L] over the routed slots."""
    member_GU = np.arange(num_domains)[:, None] == units.domain_U
    return mutual_information(member_GU @ units.routed_LUE)


@dataclasses.dataclass(frozen=True)
class Specialisation:
    """What `specialise` found. A p-value is the share of shuffles that did at least as well, the data among them."""

    share_LGE: np.ndarray
    low_LGE: np.ndarray
    high_LGE: np.ndarray
    chance_L: np.ndarray  # realised K / E
    information_L: np.ndarray
    shuffled_L: np.ndarray  # mean information of shuffled domain labels: the noise floor
    p_L: np.ndarray
    domain_entropy: float  # the largest that information can be
    top: tuple[int, int, int]  # (layer, domain, expert) positions of the largest excess
    p_top: float  # of the largest excess over all layers, domains and experts: the choice of the best is paid for
    units_G: np.ndarray
    tokens_G: np.ndarray


def specialise(units: Units, num_domains: int, *, shuffles: int = 999, seed: int = 0) -> Specialisation:
    """Measures how routing depends on the domain, against the same units with their domain labels shuffled."""
    rng = np.random.default_rng(seed)
    share_LGE = domain_shares(units, num_domains)
    information_L = domain_information(units, num_domains)
    shuffled_PL, largest_P = np.empty((shuffles, len(information_L))), np.empty(shuffles)
    for i in range(shuffles):
        other = units._replace(domain_U=rng.permutation(units.domain_U))
        shuffled_PL[i] = domain_information(other, num_domains)
        largest_P[i] = np.nanmax(excess(domain_shares(other, num_domains)))
    excess_LGE = excess(share_LGE)
    low_LGE, high_LGE = share_interval(units, num_domains, seed=seed)
    tokens_G = np.bincount(units.domain_U, units.tokens_U, num_domains).astype(np.int64)
    mean_k_L = units.routed_LUE.sum((1, 2)) / units.tokens_U.sum()
    return Specialisation(
        share_LGE=share_LGE,
        low_LGE=low_LGE,
        high_LGE=high_LGE,
        chance_L=mean_k_L / units.routed_LUE.shape[-1],
        information_L=information_L,
        shuffled_L=shuffled_PL.mean(0),
        p_L=_p_value(shuffled_PL, information_L),
        domain_entropy=float(entropy(tokens_G)),
        top=tuple(int(i) for i in np.unravel_index(np.nanargmax(excess_LGE), excess_LGE.shape)),
        p_top=float(_p_value(largest_P, np.nanmax(excess_LGE))),
        units_G=np.bincount(units.domain_U, minlength=num_domains),
        tokens_G=tokens_G,
    )


def _p_value(null_P: np.ndarray, observed: np.ndarray | float) -> np.ndarray:
    return (1 + np.sum(null_P >= observed - 1e-12, axis=0)) / (1 + len(null_P))


# ---------------------------------------------------------------- tokens


class TypicalToken(NamedTuple):
    token_id: int
    routed: int  # occurrences that the expert got
    seen: int  # occurrences
    log_odds: float  # by how much the token raises the log-odds of the expert


def typical_tokens(
    selected_NE: np.ndarray, token_ids_N: np.ndarray, expert: int, *, top: int = 8, prior: float = 10
) -> list[TypicalToken]:
    """The ids that an expert gets much more often than other tokens, most typical first.

    Ordered by the log-odds ratio with a prior: with s the expert's share of all tokens, y of n occurrences routed
    to it and m the prior occurrences, ln[(y + m s) / (n - y + m (1 - s))] - ln[s / (1 - s)], so that rare ids must
    earn their place. Ids that chance explains are left out: binomial tail of y or more, Bonferroni over ids and
    experts at 1%.
    """
    share = selected_NE[:, expert].mean()
    if share in (0, 1):
        return []
    seen = np.bincount(token_ids_N)
    ids_V = np.flatnonzero(seen)
    seen_V = seen[ids_V]
    routed_V = np.bincount(token_ids_N[selected_NE[:, expert]], minlength=seen.size)[ids_V]
    odds_V = (routed_V + prior * share) / (seen_V - routed_V + prior * (1 - share))
    log_odds_V = np.log(odds_V) - np.log(share / (1 - share))
    tail_V = np.where(routed_V > 0, scipy.special.bdtrc(routed_V - 1, seen_V, share), 1.0)
    beyond_chance_V = tail_V < 0.01 / (ids_V.size * selected_NE.shape[1])
    best = [v for v in np.argsort(-log_odds_V, kind="stable") if beyond_chance_V[v]][:top]
    return [TypicalToken(int(ids_V[v]), int(routed_V[v]), int(seen_V[v]), float(log_odds_V[v])) for v in best]


def hash_likeness(selected_NE: np.ndarray, token_ids_N: np.ndarray) -> float:
    """How much of the routing the token id explains: I(id; expert) / (H(expert) - mean ln K), Miller-Madow corrected.

    1: an id always gets the same experts, as with a hash router; 0: only the context counts. NaN where all experts
    are always used.
    """
    _, index_N = np.unique(token_ids_N, return_inverse=True)
    counts_VE = np.stack([np.bincount(index_N, s_N, index_N.max() + 1) for s_N in selected_NE.T], axis=1)
    k_N = selected_NE.sum(1)
    mean_log_k = np.sum(k_N * np.log(np.maximum(k_N, 1))) / k_N.sum()
    most = entropy(counts_VE.sum(0)) - mean_log_k
    return float((mutual_information(counts_VE) + miller_madow(counts_VE)) / most) if most > 1e-9 else float("nan")


# ---------------------------------------------------------------- pairs of experts


def co_activation(selected_NE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P(j chosen | i chosen) [E, E] (OLMoE, section 5.2) and what it would be if choices were independent.

    With p the load shares and K the mean choices per token: expected_ij = (K - 1) p_j / (1 - p_i), which is
    (K - 1) / (E - 1) at uniform load. The diagonal is NaN, as are rows of experts that got no token.
    """
    s_NE = selected_NE.astype(np.float32)  # counts are exact up to 2^24 tokens
    count_E = selected_NE.sum(0)
    p_E = count_E / count_E.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        observed_EE = (s_NE.T @ s_NE).astype(np.float64) / count_E[:, None]
        expected_EE = (count_E.sum() / len(s_NE) - 1) * p_E[None, :] / (1 - p_E[:, None])
    for matrix in (observed_EE, expected_EE):
        np.fill_diagonal(matrix, np.nan)
    return observed_EE, expected_EE
