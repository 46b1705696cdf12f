"""Do experts have domains? How routing depends on the domain of a document. Information is in nats.

Letters: L layers, N tokens, E experts, K experts per token, G domains, U units (see `uncertainty`).
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from frugalmoe.analysis.measures.information import entropy, mutual_information
from frugalmoe.analysis.measures.uncertainty import bootstrap, over_units, p_value


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
    return Units(np.stack([over_units(s_NE, unit_N) for s_NE in selected_LNE]), tokens_U, domain_U)


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
    layers, _, experts = units.routed_LUE.shape
    interval = np.full((2, layers, num_domains, experts), np.nan)
    share = lambda routed_LE, tokens: routed_LE / np.expand_dims(tokens, (-2, -1))
    for g in np.unique(units.domain_U):
        member = units.domain_U == g
        routed_ULE = np.moveaxis(units.routed_LUE[:, member], 1, 0)
        interval[:, :, g] = bootstrap(
            share, routed_ULE, units.tokens_U[member], samples=samples, level=level, seed=seed
        )[1:]
    return interval[0], interval[1]


def excess(share_LGE: np.ndarray) -> np.ndarray:
    """share(e | g) less its mean over domains: an expert that is busy everywhere is not specialised."""
    return share_LGE - np.nanmean(share_LGE, axis=1, keepdims=True)


def divergence(share_LGE: np.ndarray) -> np.ndarray:
    """KL [L, G] of a domain's slots over experts from uniform: ln E - H(e | g). 0 as chance, ln E one expert only.

    Noise floor: about (E - 1) / (2 n) for n slots of the domain (half a chi-square of E - 1 degrees over n).
    """
    return np.log(share_LGE.shape[-1]) - entropy(share_LGE)


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
    shuffled_YL, largest_Y = np.empty((shuffles, len(information_L))), np.empty(shuffles)
    for i in range(shuffles):
        other = units._replace(domain_U=rng.permutation(units.domain_U))
        shuffled_YL[i] = domain_information(other, num_domains)
        largest_Y[i] = np.nanmax(excess(domain_shares(other, num_domains)))
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
        shuffled_L=shuffled_YL.mean(0),
        p_L=p_value(shuffled_YL, information_L),
        domain_entropy=float(entropy(tokens_G)),
        top=tuple(int(i) for i in np.unravel_index(np.nanargmax(excess_LGE), excess_LGE.shape)),
        p_top=float(p_value(largest_Y, np.nanmax(excess_LGE))),
        units_G=np.bincount(units.domain_U, minlength=num_domains),
        tokens_G=tokens_G,
    )
