"""Tasks of lm-eval (`pip install 'frugalmoe[lm-eval]'`), those that come with it and those of one's own: `--tasks`.

Nothing is downloaded: data must be local, or in the cache of Hugging Face's libraries from before. HF_HUB_OFFLINE=0 and
HF_DATASETS_OFFLINE=0 lift that.
"""

import dataclasses
import difflib
import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from frugalmoe.console import bar
from frugalmoe.errors import UserError, did_you_mean, needs_package
from frugalmoe.evaluate.text import chosen_data
from frugalmoe.fields import check_integer
from frugalmoe.found import one_line_errors
from frugalmoe.train.weights import load_checkpoint

# lm-eval's progress bars give way to ours, and its processes for a standard error to none: a process that JAX runs in
# cannot be forked safely.
_ENVIRONMENT = dict.fromkeys(
    ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "DISABLE_MULTIPROC", "TQDM_DISABLE"), "1"
)
_RESAMPLES = 1000  # for the standard error of what has no formula for it
_FEWSHOT_SEED = 1234  # lm-eval's own
_OPTIONS = ("data.sequence_length", "data.document_start")  # of the run's config, which `--tasks` may change


class Result(NamedTuple):
    """A metric of a task, as lm-eval states it."""

    task: str
    version: str
    shots: int
    items: int
    metric: str  # with its filter, where it has one
    value: float
    error: float | None  # standard error


class Results(NamedTuple):
    run: str
    step: int
    results: list[Result]


def run_tasks(
    run: str | Path,
    step: int | None = None,
    *,
    names: Sequence[str],
    path: str | None = None,
    shots: int | None = None,
    items: int | None = None,
    overrides: Sequence[str] = (),
    chat: bool = False,
    devices: int | None = None,
    progress: bool = False,
) -> Results:
    """Returns what lm-eval finds of a run's checkpoint, the newest by default.

    names: of tasks, groups and tags. path: a directory with tasks of one's own (YAML), in place of lm-eval's. shots:
    examples in front, where a task does not fix them. items: of a task, at most, its first. overrides: of the run's
    config, `data.sequence_length` (the longest text) and `data.document_start`. chat: what a task asks is a message of
    a conversation, which the tokenizer's chat template writes, and examples are turns before it. devices, progress: as
    in `evaluate`. Raises `UserError` without lm-eval, and for tasks that are not there or do something wrong.
    """
    for flag, value in (("--shots", shots), ("--items", items)):
        if value is not None:
            check_integer(flag, value, least=int(flag == "--items"))
    for override in overrides:
        if (name := override.partition("=")[0]) not in _OPTIONS:
            raise UserError(f"--config.{name}: cannot be given with --tasks; valid: {', '.join(_OPTIONS)}")
    data = chosen_data(Path(run), None, overrides)
    if not names:
        raise UserError("--tasks: must name a task")
    prepare()
    loaded = _load(names, path, shots)
    config, weights, tokenizer, mesh, step = load_checkpoint(Path(run), step, devices or jax.device_count())
    config = config if data is None else dataclasses.replace(config, data=data)
    with jax.set_mesh(mesh), bar(progress) as shown, one_line_errors(f"--tasks={','.join(names)}", "lm-eval"):
        from lm_eval.evaluator import evaluate

        from frugalmoe.evaluate.harness import Harnessed

        begin = lambda what, total: functools.partial(shown.advance, shown.add_task(what, total=total))
        model = Harnessed(config, weights, tokenizer, mesh, begin, chat=chat)
        rest = {"limit": items, "bootstrap_iters": _RESAMPLES, "log_samples": False, "apply_chat_template": chat}
        found = evaluate(lm=model, task_dict=loaded, **rest)
    return Results(str(run), step, list(_results(found)))


def prepare() -> None:
    """Sets what must be set before lm-eval and what it needs are imported. Raises `UserError` where it is not there."""
    if importlib.util.find_spec("lm_eval") is None:
        raise needs_package("--tasks", "frugalmoe[lm-eval]")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _load(names: Sequence[str], path: str | None, shots: int | None) -> dict[str, Any]:
    """The tasks with their data."""
    from lm_eval.tasks import TaskManager

    if path is not None and not Path(path).is_dir():
        raise UserError(f"--task-path={path}: no such directory")
    what = f"--tasks={','.join(names)}"
    with one_line_errors(what, path or "lm-eval"):
        manager = TaskManager(include_path=path, include_defaults=path is None)
        if unknown := [name for name in names if name not in manager.all_tasks]:
            valid = manager.all_tasks  # a group's name is one too; with those of lm-eval they are many
            near = valid if len(valid) <= 20 else difflib.get_close_matches(unknown[0], valid, n=5)
            raise UserError(f"--tasks={unknown[0]}: no such task; {did_you_mean(unknown[0], near)}")
        loaded = manager.load(list(names))
    for task in loaded["tasks"].values():
        fixed = task.get_config("num_fewshot")
        if fixed is None or (shots is not None and fixed != 0):
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return loaded


def _results(found: Mapping[str, Any]) -> Iterator[Result]:
    """One row per metric of each task and group."""
    for task, values in found["results"].items():
        items = found["n-samples"].get(task, {}).get("effective", 0)
        head = (task, str(found["versions"].get(task, "")), int(found["n-shot"].get(task) or 0), int(items))
        for name, value in values.items():
            metric, _, chain = name.partition(",")
            if chain and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = values.get(f"{metric}_stderr,{chain}")
                shown = metric if chain == "none" else f"{metric} ({chain})"
                yield Result(*head, shown, float(value), float(error) if isinstance(error, int | float) else None)
