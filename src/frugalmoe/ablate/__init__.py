"""Studies: arms that differ in declared fields, over paired seeds, compared with statistics.

In Python `run_study(Study(...), "runs/mine")` trains what is missing, `write_study_report("runs/mine")` reports it. An
arm may hold a `Router` itself as its `model.moe.router`.
"""

import importlib

_HOME = {
    "Comparison": "comparison",
    "Study": "study",
    "load_comparison": "comparison",
    "load_study": "study",
    "publish_study": "publish",
    "run_study": "runner",
    "shrunk": "study",
    "write_study_report": "report",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    """Imported where used: the command line lists its commands without loading what trains and draws."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
