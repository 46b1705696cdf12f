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
| what does money train? | `bought`, with a fit of `read_fit` |

The measures lie in `measures`: pure functions on arrays, each with its formula and what chance alone gives. There
`uncertainty` has the bootstrap over documents or seeds, `information` entropies and mutual information. `stored` reads
a run directory, `lab` needs a checkpoint of it, `pages` draws and reports. What a notebook needs is imported from here.
"""

from frugalmoe.analysis.lab import drops, gradients, interventions, leak, swaps
from frugalmoe.analysis.lab.drops import Drops, load_drops
from frugalmoe.analysis.lab.effects import Effect, effects_table, intervene
from frugalmoe.analysis.lab.gradients import Gradients, load_gradients
from frugalmoe.analysis.lab.interventions import Demote, Mask, RandomChoice, Swap
from frugalmoe.analysis.lab.leak import Gap, train_causal_gap
from frugalmoe.analysis.lab.record import open_published, write_trace
from frugalmoe.analysis.lab.swaps import SwapGain, try_swaps
from frugalmoe.analysis.lab.weights import Experts, load_experts
from frugalmoe.analysis.measures import (
    coactivation,
    dynamics,
    evenness,
    information,
    scores,
    similarity,
    specialisation,
    uncertainty,
    vocabulary,
)
from frugalmoe.analysis.pages import plots
from frugalmoe.analysis.pages.report import write_report
from frugalmoe.analysis.pages.table import summary_table
from frugalmoe.analysis.stored.probe import Probe
from frugalmoe.analysis.stored.runs import Loads, Run, Series, load_run
from frugalmoe.analysis.stored.trace import Trace, load_trace
from frugalmoe.cost.budget import bought, load_planned
from frugalmoe.cost.device_catalogue import read as read_catalogue
from frugalmoe.cost.laws import read_fit

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
    "bought",
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
    "load_planned",
    "load_run",
    "load_trace",
    "open_published",
    "plots",
    "read_catalogue",
    "read_fit",
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
