"""Passages of held-out text whose tokens are coloured by the expert that they went to, as HTML.

Letters: L MoE layers, N tokens, E experts.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from frugalmoe.analysis.pages.page import Html, folded, join, tag, text
from frugalmoe.analysis.stored.probe import Probe
from frugalmoe.analysis.wording import listed, percent
from frugalmoe.data.tokenizer import Tokenizer

# Light tints of Okabe-Ito: dark text keeps a contrast of 7 to 1 or more on each. The number under a token says the
# same to eyes that cannot tell them apart, and where there is no colour.
TINTS = ("#8fc1ec", "#f6bd94", "#8fdcc0", "#f0c4e0", "#f2d06b", "#dcf3ff", "#d29db9", "#cfcfcf")
TOKENS, PASSAGES, LAYERS = 90, 3, 6


class Passage(NamedTuple):
    domain: str
    tokens_N: np.ndarray  # positions in the probe


def passages(probe: Probe, domains: Sequence[str]) -> list[Passage]:
    """The beginning of the longest held-out document of each domain, of at most three domains."""
    found = []
    for g in np.unique(probe.domain_ids_N):
        at_N = np.flatnonzero(probe.domain_ids_N == g)
        units, sizes = np.unique(probe.unit_ids_N[at_N], return_counts=True)
        longest = at_N[probe.unit_ids_N[at_N] == units[sizes.argmax()]]
        found.append((sizes.max(), Passage(domains[g], longest[:TOKENS])))
    return [passage for _, passage in sorted(found, key=lambda f: -f[0])[:PASSAGES]]


def coloured(probe: Probe, tokenizer: Tokenizer, domains: Sequence[str]) -> Html:
    """A part for each layer, of which one is shown at a time, with its legend and its passages."""
    shown = passages(probe, domains)
    layers = np.unique(np.linspace(0, len(probe.layers_L) - 1, min(len(probe.layers_L), LAYERS)).round().astype(int))
    open_at = layers[len(layers) // 2]
    return join(
        folded(f"Layer {probe.layers_L[l]}", _layer(probe, l, tokenizer, shown), "passage", bool(l == open_at))
        for l in layers
    )


def _layer(probe: Probe, l: int, tokenizer: Tokenizer, shown: Sequence[Passage]) -> Html:
    selected_NE = probe.selected_LNE[l]
    every_NE = selected_NE[np.concatenate([p.tokens_N for p in shown])]
    used_E = every_NE.sum(0)
    named = [int(e) for e in np.argsort(-used_E, kind="stable")[: len(TINTS)] if used_E[e]]
    tint = dict(zip(named, TINTS))
    keys = [_swatch(f"expert {e}: {percent(used_E[e] / len(every_NE))} of these tokens", tint[e]) for e in named]
    if others := int((used_E > 0).sum()) - len(named):
        keys.append(tag("span", f"without colour: {others} others", "key"))
    parts = [tag("p", join(keys, ""))]
    for domain, tokens_N in shown:
        pieces = zip(_pieces(tokenizer, probe.token_ids_N[tokens_N]), selected_NE[tokens_N])
        marked = join((_token(piece, np.flatnonzero(of_E), used_E, tint) for piece, of_E in pieces), "")
        parts += [tag("p", tag("strong", domain)), tag("div", marked, "passage")]
    return join(parts)


def _swatch(what: str, colour: str) -> Html:
    return Html(f'<span class="key" style="background:{colour}">{text(what)}</span>')


def _token(piece: str, experts: np.ndarray, used_E: np.ndarray, tint: dict[int, str]) -> Html:
    """A token over the number of its most particular expert: the one that fewest tokens of the passages have."""
    if not len(experts):
        return Html(f'<ruby title="no expert">{text(piece)}<rt>–</rt></ruby>')
    coloured = [e for e in experts if int(e) in tint]
    expert = int(min(coloured or experts, key=lambda e: used_E[e]))
    style = f' style="background:{tint[expert]}"' if expert in tint else ""
    every = f"expert{'s' * (len(experts) > 1)} {listed(experts)}"
    return Html(f'<ruby{style} title="{text(every)}">{text(piece)}<rt>{expert}</rt></ruby>')


def _pieces(tokenizer: Tokenizer, ids_N: np.ndarray) -> Iterator[str]:
    """The text that each token adds to those before; a mark for one that adds none of its own."""
    before, start = "", 0
    for i, token in enumerate(ids_N):
        if token == tokenizer.eos:
            yield "▪"
            before, start = "", i + 1
            continue
        now = tokenizer.decode(ids_N[start : i + 1])
        if now.endswith("\ufffd") or not now.startswith(before):  # a part of a character
            yield "·"
            continue
        yield now[len(before) :].replace("\n", "⏎\n") or "·"
        before = now
