"""What notebooks import: load a run, measure its routing, draw it, report it.

| question | module |
|---|---|
| are the experts evenly used? | `load` |
| how sure is the router, and of what? | `scores` |
| do experts have domains, words? | `specialisation`, `vocabulary` |
| which experts go together, within and across layers? | `coactivation` |
| when does routing settle? | `dynamics` |
| are experts alike? | `similarity` |
| does it matter for the loss? | `interventions` |

Their measures are pure functions on arrays; each docstring has the formula and what chance alone gives. `uncertainty`
has the bootstrap over documents or seeds, `information` entropies and mutual information. Gradient shares and the gap
between training-rule and causal evaluation need more than a trace and are not here.
"""

from frugalmoe.analysis import (
    coactivation,
    dynamics,
    information,
    load,
    plots,
    scores,
    similarity,
    specialisation,
    uncertainty,
    vocabulary,
)
from frugalmoe.analysis.report import write_report
from frugalmoe.analysis.runs import Loads, Probe, Run, Series, load_run
from frugalmoe.analysis.table import summary_table

__all__ = [
    "Loads",
    "Probe",
    "Run",
    "Series",
    "coactivation",
    "dynamics",
    "information",
    "load",
    "load_run",
    "plots",
    "scores",
    "similarity",
    "specialisation",
    "summary_table",
    "uncertainty",
    "vocabulary",
    "write_report",
]
