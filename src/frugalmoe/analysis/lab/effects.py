"""`intervene`: what a change of the routing does to the loss of each domain, with intervals over documents.

Letters: N tokens, E experts, L MoE layers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import track
from rich.table import Table

from frugalmoe.analysis.lab.interventions import Intervention, Nothing
from frugalmoe.analysis.lab.lab import TOKENS, Lab, domain_parts, moved
from frugalmoe.analysis.measures.uncertainty import Estimate, mean
from frugalmoe.analysis.stored.probe import Probe
from frugalmoe.analysis.stored.runs import Run
from frugalmoe.analysis.wording import number, percent


class Effect(NamedTuple):
    """The effect of one intervention on one domain, or on "all" tokens."""

    intervention: Intervention
    domain: str
    loss: float  # nats per token, undisturbed
    change: Estimate  # of the loss; positive: worse
    moved: float  # share of tokens with other experts than before, in any layer
    tokens: int
    documents: int


def intervene(
    run: Run | str | Path,
    *interventions: Intervention,
    checkpoint: int | None = None,
    tokens: int = TOKENS,
    progress: bool = True,
) -> list[Effect]:
    """Evaluates a run's checkpoint (the newest) on held-out tokens, undisturbed and under each intervention.

    The same tokens, paired: the change of each token's loss is averaged over a domain, its interval is a bootstrap over
    documents. It includes what later tokens of the document lose through attention. Cost: an evaluation each.
    """
    path = run.path if isinstance(run, Run) else Path(run)
    lab = Lab(path, checkpoint, tokens)
    for intervention in interventions:
        lab.check(intervention)
    before = lab.probe(Nothing())
    effects = []
    for intervention in track(interventions, "interventions", disable=not progress):
        effects += _effects(intervention, before, lab.probe(lab.bind(intervention, before)), lab.data.domains)
    return effects


def _effects(intervention: Intervention, before: Probe, after: Probe, domains: Sequence[str]) -> list[Effect]:
    change_N = after.loss_N - before.loss_N
    moved_N = moved(before, after)
    effects = []
    for domain, of_N, unit_N in domain_parts(before, domains):
        loss, share = float(before.loss_N[of_N].mean()), float(moved_N[of_N].mean())
        change = mean(change_N[of_N], unit_N)
        effects.append(Effect(intervention, domain, loss, change, share, int(of_N.sum()), int(unit_N.max()) + 1))
    return effects


def effects_table(effects: Sequence[Effect]) -> Table:
    """Returns the effects as a table for a terminal or a notebook."""
    table = Table(title="Change of held-out loss, nats per token, with 95% intervals over documents")
    for column in ("intervention", "domain", "loss before", "change", "95% interval", "tokens moved", "n", "documents"):
        table.add_column(column, justify="left" if column in ("intervention", "domain") else "right")
    for e in effects:
        change, low, high = (float(x) for x in e.change)
        interval = f"{low:+.4f} to {high:+.4f}" if np.isfinite(low) else "–"
        cells = (f"{change:+.4f}", interval, percent(e.moved), f"{e.tokens:,}", str(e.documents))
        table.add_row(str(e.intervention), e.domain, number(e.loss, 4), *cells)
    return table
