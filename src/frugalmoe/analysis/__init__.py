"""What notebooks import: load a run, measure its routing, draw it, report it.

| question | module |
|---|---|
| are the experts evenly used? | `evenness` |
| how sure is the router, and of what? | `scores` |
| do experts have domains, words? | `specialisation`, `vocabulary` |
| which experts go together, within and across layers? | `coactivation` |
| when does routing settle? | `dynamics` |
| are experts alike? | `similarity` of `load_experts` |
| does it matter for the loss? | `intervene` with `interventions` |
| does the router choose well? | `swaps`, by `try_swaps` |
| who moves the router, which experts learn? | `gradients` of `load_gradients` |
| what is a rule that looks ahead worth? | `leak`, by `train_causal_gap` |
| whom does a capacity drop? | `drops` of `load_drops` |

Their measures are pure functions on arrays; each docstring has the formula and what chance alone gives. `uncertainty`
has the bootstrap over documents or seeds, `information` entropies and mutual information.
"""

from frugalmoe.analysis import (
    coactivation,
    drops,
    dynamics,
    evenness,
    gradients,
    information,
    interventions,
    leak,
    plots,
    scores,
    similarity,
    specialisation,
    swaps,
    uncertainty,
    vocabulary,
)
from frugalmoe.analysis.drops import Drops, load_drops
from frugalmoe.analysis.effects import Effect, effects_table, intervene
from frugalmoe.analysis.gradients import Gradients, load_gradients
from frugalmoe.analysis.interventions import Demote, Mask, RandomChoice, Swap
from frugalmoe.analysis.leak import Gap, train_causal_gap
from frugalmoe.analysis.probe import Probe
from frugalmoe.analysis.record import write_trace
from frugalmoe.analysis.report import write_report
from frugalmoe.analysis.runs import Loads, Run, Series, load_run
from frugalmoe.analysis.swaps import SwapGain, try_swaps
from frugalmoe.analysis.table import summary_table
from frugalmoe.analysis.trace import Trace, load_trace
from frugalmoe.analysis.weights import Experts, load_experts

__all__ = [
    "Demote",
    "Drops",
    "Effect",
    "Experts",
    "Gap",
    "Gradients",
    "Loads",
    "Mask",
    "Probe",
    "RandomChoice",
    "Run",
    "Series",
    "Swap",
    "SwapGain",
    "Trace",
    "coactivation",
    "drops",
    "dynamics",
    "effects_table",
    "evenness",
    "gradients",
    "information",
    "intervene",
    "interventions",
    "leak",
    "load_drops",
    "load_experts",
    "load_gradients",
    "load_run",
    "load_trace",
    "plots",
    "scores",
    "similarity",
    "specialisation",
    "summary_table",
    "swaps",
    "train_causal_gap",
    "try_swaps",
    "uncertainty",
    "vocabulary",
    "write_report",
    "write_trace",
]
