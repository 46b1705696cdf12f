"""Studies: arms that differ in declared fields, over paired seeds, compared with statistics.

In Python `run_study(Study(...), "runs/mine")` trains what is missing, `write_study_report("runs/mine")` reports it. An
arm may hold a `Router` itself as its `model.moe.router`.
"""

from frugalmoe.ablate.comparison import Comparison, load_comparison
from frugalmoe.ablate.publish import publish_study
from frugalmoe.ablate.report import write_study_report
from frugalmoe.ablate.runner import run_study
from frugalmoe.ablate.scaling import fit_study
from frugalmoe.ablate.study import Study, load_study, shrunk

__all__ = [
    "Comparison",
    "Study",
    "fit_study",
    "load_comparison",
    "load_study",
    "publish_study",
    "run_study",
    "shrunk",
    "write_study_report",
]
