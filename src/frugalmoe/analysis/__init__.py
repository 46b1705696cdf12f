"""What notebooks import: load a run, measure its routing, draw it, report it."""

from frugalmoe.analysis import plots, routing
from frugalmoe.analysis.report import write_report
from frugalmoe.analysis.runs import Loads, Probe, Run, Series, load_run
from frugalmoe.analysis.table import summary_table

__all__ = ["Loads", "Probe", "Run", "Series", "load_run", "plots", "routing", "summary_table", "write_report"]
