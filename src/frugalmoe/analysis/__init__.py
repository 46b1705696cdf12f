"""What notebooks import: load a run, measure its routing, draw it, report it.

| question | module |
|---|---|
| are the experts evenly used? | `load` |
| how sure is the router, and of what? | `scores` |
| do experts have domains, words? | `specialisation`, `vocabulary` |
| which experts go together, within and across layers? | `coactivation` |
| when does routing settle? | `dynamics` |
| are experts alike? | `similarity` of `load_experts` |
| does it matter for the loss? | `intervene` with `interventions` |

Their measures are pure functions on arrays; each docstring has the formula and what chance alone gives. `uncertainty`
has the bootstrap over documents or seeds, `information` entropies and mutual information. Gradient shares and the gap
between training-rule and causal evaluation need more than a trace and are not here.
"""

from frugalmoe.analysis import (
    coactivation,
    dynamics,
    information,
    interventions,
    load,
    plots,
    scores,
    similarity,
    specialisation,
    uncertainty,
    vocabulary,
)
from frugalmoe.analysis.effects import Effect, effects_table, intervene
from frugalmoe.analysis.interventions import Demote, Mask, RandomChoice
from frugalmoe.analysis.probe import Probe
from frugalmoe.analysis.report import write_report
from frugalmoe.analysis.runs import Loads, Run, Series, load_run
from frugalmoe.analysis.table import summary_table
from frugalmoe.analysis.trace import Trace, load_trace
from frugalmoe.analysis.tracing import write_trace
from frugalmoe.analysis.weights import Experts, load_experts

__all__ = [
    "Demote",
    "Effect",
    "Experts",
    "Loads",
    "Mask",
    "Probe",
    "RandomChoice",
    "Run",
    "Series",
    "Trace",
    "coactivation",
    "dynamics",
    "effects_table",
    "information",
    "intervene",
    "interventions",
    "load",
    "load_experts",
    "load_run",
    "load_trace",
    "plots",
    "scores",
    "similarity",
    "specialisation",
    "summary_table",
    "uncertainty",
    "vocabulary",
    "write_report",
    "write_trace",
]
