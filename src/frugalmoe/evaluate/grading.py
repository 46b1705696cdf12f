"""The suite that is ours: what a model chooses, beside chance, with no text but that of `suite/`, and no network."""

import functools
import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import scipy.stats

from frugalmoe.config import Config
from frugalmoe.console import bar
from frugalmoe.data.tokenizer import Tokenizer
from frugalmoe.errors import UserError
from frugalmoe.evaluate import suite
from frugalmoe.evaluate.contract import Square, Task
from frugalmoe.evaluate.scoring import score, whole_text
from frugalmoe.fields import check_integer
from frugalmoe.found import one_line_errors
from frugalmoe.train.step import State
from frugalmoe.train.weights import Weights, load_checkpoint

ITEMS = 400  # of a task: half the interval of an accuracy is then 0.05 at most
_MOST = 100_000
_REPEATS = 1000  # squares in a row that came before: the task has no more
CONFIDENCE = 0.95


class Grade(NamedTuple):
    """How a model did in one task."""

    accuracy: float  # share of items whose right choice is the most likely; of m equal ones each counts 1/m
    low: float  # of the interval of the accuracy, at 95%
    high: float
    chance: float  # accuracy of whoever looks at the choices alone
    margin: float  # nats by which the right choice is more likely than the best other one, mean over items
    items: int


class Graded(NamedTuple):
    """How a checkpoint did in the suite."""

    run: str
    step: int
    suite: str  # fingerprint of all items
    tasks: dict[str, Grade]
    mean: float  # accuracy, over tasks


def grade_run(
    run: str | Path,
    step: int | None = None,
    *,
    names: Sequence[str] = (),
    items: int = ITEMS,
    devices: int | None = None,
    progress: bool = False,
) -> Graded:
    """Returns how a run's checkpoint, the newest by default, does in tasks of the suite, all by default.

    names: of tasks, or paths of files that define one. items: of each task, at most; rounded up to whole squares. The
    devices and the bar are as in `evaluate`. Raises `UserError` for a task that is none and for no checkpoint.
    """
    check_integer("--items", items, least=1)
    if items > _MOST:
        raise UserError(f"--items={items}: must be at most {_MOST}")
    chosen = {name: made(suite.get(name), items) for name in names or suite.names()}
    config, weights, tokenizer, mesh, step = load_checkpoint(Path(run), step, devices or jax.device_count())
    with jax.set_mesh(mesh), bar(progress) as shown:
        rows = sum(len(square.contexts) ** 2 for squares in chosen.values() for square in squares)
        done = functools.partial(shown.advance, shown.add_task("scoring", total=rows))
        grades = grade(config, weights, tokenizer, mesh, chosen, done)
    if broken := [name for name, found in grades.items() if not math.isfinite(found.margin)]:
        raise UserError(f"{run}: the scores of {', '.join(broken)} at step {step} are not finite")
    mean = float(np.mean([found.accuracy for found in grades.values()]))
    return Graded(str(run), step, fingerprint(chosen), grades, mean)


def made(task: Task, items: int) -> list[Square]:
    """Returns a task's squares with at least so many contexts together, or all that it has. The same in every process.

    Raises `UserError` for a task of another's file that makes something else.
    """
    rng = random.Random(f"frugalmoe {Path(task.name).stem}")
    found: dict[Square, None] = {}
    with one_line_errors(f"--suite={task.name!r}", task.name):
        for square in itertools.islice(task.squares(rng), 100 * items + _REPEATS):
            _check(task, square)
            found.setdefault(square)
            if len(found) * task.choices >= items:
                break
    if not found:
        raise UserError(f"--suite={task.name!r}: makes no square")
    return list(found)


def _check(task: Task, square: Square) -> None:
    def refuse(rule: str) -> None:
        raise UserError(f"--suite={task.name!r}: {square!r}: {rule}")

    texts = (*square.contexts, *square.choices)
    if not all(isinstance(text, str) and text.strip() for text in texts):
        refuse("contexts and choices must be texts")
    if not len(set(square.contexts)) == len(set(square.choices)) == task.choices or len(texts) != 2 * task.choices:
        refuse(f"must have {task.choices} contexts and as many choices, all different")
    if any(a != b and b.startswith(a) for a in square.choices for b in square.choices):
        refuse("no choice may be the beginning of another")


def grade(
    config: Config,
    weights: State | Weights,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    tasks: dict[str, list[Square]],
    done: Callable[[int], None] | None = None,
) -> dict[str, Grade]:
    """Returns the grade of each task; the mesh must be in context. All texts go through the model in common batches.

    A text is scored whole, so that no token has to end where a context does: the context's part is that of all choices.
    """
    texts = [c + choice for squares in tasks.values() for s in squares for c in s.contexts for choice in s.choices]
    asked = [whole_text(config, tokenizer, text) for text in texts]
    scores = iter([found.log_probability for found in score(config, weights, mesh, asked, done)])
    grades = {}
    for name, squares in tasks.items():
        sizes = [len(square.contexts) for square in squares]
        grades[name] = graded([np.array(list(itertools.islice(scores, n * n))).reshape(n, n) for n in sizes])
    return grades


def graded(scores: Sequence[np.ndarray]) -> Grade:
    """Returns the grade for the scores [contexts, choices] of each square.

    The interval is Jeffreys' (Brown, Cai and DasGupta 2001, section 3.1), as if items were independent.
    """
    right, margins = [], []
    for square in scores:
        own = np.diagonal(square)
        others = np.where(np.eye(len(square), dtype=bool), -np.inf, square)
        ties = (square == square.max(axis=1, keepdims=True)).sum(axis=1)
        right += list((own == square.max(axis=1)) / np.maximum(ties, 1))  # none is equal to NaN
        margins += list(own - others.max(axis=1))
    n, hits = len(right), math.fsum(right)
    low, high = scipy.stats.beta.interval(CONFIDENCE, hits + 0.5, n - hits + 0.5)
    low, high = (float(low) if hits else 0.0), (float(high) if hits < n else 1.0)
    return Grade(hits / n, low, high, 1 / len(scores[0]), float(np.mean(margins)), n)


def fingerprint(tasks: dict[str, list[Square]]) -> str:
    """Of the texts: equal where the suite asks the same."""
    text = json.dumps({Path(name).stem: squares for name, squares in tasks.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
