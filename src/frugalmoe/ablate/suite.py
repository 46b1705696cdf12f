"""The suite at the end of each run of a study that asks for it: accuracy and margin beside loss."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from frugalmoe.ablate.results import SUITE
from frugalmoe.config import Config
from frugalmoe.errors import UserError
from frugalmoe.evaluate import scoring, suite
from frugalmoe.evaluate.grading import ITEMS, grade, made
from frugalmoe.files import read_json, write_json
from frugalmoe.train.run import Run

FILE = "suite.json"  # in the run's directory


def wanted(metrics: Sequence[str]) -> list[str]:
    """Returns the tasks that a study's metrics need, none where it asks for none, all for a mean."""
    members = {name.rpartition("/")[2] for name in metrics if name.startswith(SUITE)}
    return [name for name in suite.names() if name in members or "mean" in members]


def check(arms: Mapping[str, Config], metrics: Sequence[str]) -> None:
    """Raises `UserError` where a study asks for tasks of a model in which texts have no likelihood of their own."""
    for name, config in arms.items() if wanted(metrics) else ():
        try:
            scoring.check(config)
        except UserError as e:
            raise UserError(f"metrics={wanted(metrics)[0]!r}: arm {name!r}: {e}") from e


def is_there(directory: Path, metrics: Sequence[str]) -> bool:
    """Whether a run was graded, or needs not be."""
    needed = {name for name in metrics if name.startswith(SUITE)}
    return not needed or ((directory / FILE).is_file() and needed <= read_json(directory / FILE).keys())


def grade_run(run: Run, metrics: Sequence[str]) -> None:
    """Writes suite.json: accuracy and margin of each task that the metrics need, and their means."""
    tasks = {name: made(suite.get(name), ITEMS) for name in wanted(metrics)}
    grades = grade(run.config, run.state, run.data.tokenizer, run.mesh, tasks)
    found = {}
    for kind in ("accuracy", "margin"):
        values = {name: getattr(found, kind) for name, found in grades.items()}
        values["mean"] = float(np.mean(list(values.values())))
        found |= {f"{SUITE}{kind}/{name}": value for name, value in values.items()}
    write_json(run.workdir / FILE, found)
