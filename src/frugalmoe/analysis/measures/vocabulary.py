"""Do experts have words? How routing depends on the token itself. Information is in nats.

The id may be the input token's, the next token's (ground truth) or the predicted one's: OLMoE's three views.

Letters: N tokens, E experts, V distinct token ids, U units.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import scipy.special

from frugalmoe.analysis.measures.information import entropy, miller_madow, mutual_information
from frugalmoe.analysis.measures.uncertainty import Estimate, mean


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


class Shares(NamedTuple):
    """Vocabulary specialisation of each id and expert."""

    ids_V: np.ndarray
    seen_V: np.ndarray  # occurrences
    share_VE: np.ndarray


def vocabulary_shares(selected_NE: np.ndarray, token_ids_N: np.ndarray, *, least: int = 8) -> Shares:
    """VS(e, x) = N(x, e) / N(x): share of the occurrences of id x that expert e got, for ids seen `least` times.

    OLMoE, section 5.4 (Muennighoff et al., arXiv 2409.02060). Chance: the expert's share of all tokens, K / E at
    uniform load.
    """
    ids_V, index_N, seen_V = np.unique(token_ids_N, return_inverse=True, return_counts=True)
    kept_V = seen_V >= least
    routed_VE = np.stack([np.bincount(index_N, s_N, len(ids_V)) for s_N in selected_NE.T], axis=1)[kept_V]
    return Shares(ids_V[kept_V], seen_V[kept_V], routed_VE / seen_V[kept_V, None])


def vocabulary_specialisation(
    selected_NE: np.ndarray, token_ids_N: np.ndarray, *, least: int = 8, shuffles: int = 10, seed: int = 0
) -> tuple[float, float]:
    """Returns (mean over ids of the share of the id's favourite expert, what shuffled ids give).

    The favourite of few occurrences is high by chance; the shuffle keeps loads and frequencies and pays for that.
    """
    favourite = lambda ids_N: float(vocabulary_shares(selected_NE, ids_N, least=least).share_VE.max(-1).mean())
    rng = np.random.default_rng(seed)
    if not (np.unique(token_ids_N, return_counts=True)[1] >= least).any():
        return float("nan"), float("nan")
    return favourite(token_ids_N), float(np.mean([favourite(rng.permutation(token_ids_N)) for _ in range(shuffles)]))


def predictability(selected_NE: np.ndarray, token_ids_N: np.ndarray, unit_N: np.ndarray) -> tuple[Estimate, float]:
    """How like a table of ids a layer is: share of a token's experts that its id's commonest experts are, and chance.

    The commonest experts of an id, as many as the token has, are counted on half of the units and tried on the other
    half, and the other way round; an id that the counts do not have gets the commonest experts of all. Chance: always
    those. The interval is over units.
    """
    hit_N, plain_N = np.empty(len(token_ids_N)), np.empty(len(token_ids_N))
    _, index_N = np.unique(token_ids_N, return_inverse=True)
    for half in (0, 1):
        tried_N = unit_N % 2 == half
        counted = np.flatnonzero(~tried_N)
        loads_E = selected_NE[counted].mean(0) if len(counted) else np.zeros(selected_NE.shape[1])
        table_VE = np.stack([np.bincount(index_N[counted], s[counted], index_N.max() + 1) for s in selected_NE.T], 1)
        scores_NE = table_VE[index_N[tried_N]] + 1e-3 * loads_E  # loads break ties
        hit_N[tried_N] = _hits(scores_NE, selected_NE[tried_N])
        plain_N[tried_N] = _hits(np.broadcast_to(loads_E, scores_NE.shape), selected_NE[tried_N])
    return mean(hit_N, unit_N), float(np.nanmean(plain_N))


def _hits(scores_NE: np.ndarray, selected_NE: np.ndarray) -> np.ndarray:
    """Share of a token's K experts that are among the K largest scores; NaN where K is 0."""
    k_N = selected_NE.sum(-1)
    rank_NE = np.argsort(np.argsort(-scores_NE, axis=-1, kind="stable"), axis=-1, kind="stable")
    both_N = np.sum((rank_NE < k_N[:, None]) & selected_NE, axis=-1)
    return np.divide(both_N, k_N, out=np.full(k_N.shape, np.nan), where=k_N > 0)


CLASSES = ("letters, capital first", "letters", "digits", "punctuation", "white space", "mixed or no text")


def token_classes(texts: Iterable[str]) -> np.ndarray:
    """The class of each token's text, a position in `CLASSES`: a cheap stand-in for a tagger. Outer spaces are ignored
    unless there is nothing else.
    """
    return np.array([_class(text) for text in texts], np.int64)


def _class(text: str) -> int:
    inside = text.strip()
    if not inside:
        return 4 if text else 5
    if inside.isalpha():
        return 0 if inside[0].isupper() else 1
    if inside.isdigit():
        return 2
    return 3 if not any(c.isalnum() or c == "\ufffd" for c in inside) else 5
