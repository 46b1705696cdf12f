"""`frugalmoe evaluate RUN`."""

import argparse
import json
from typing import Any

from frugalmoe.errors import UserError

SUMMARY = "Score a trained run, on all devices here: loss and bits per byte of held-out text, or what it chooses."
EXAMPLES = """\
  frugalmoe evaluate runs/quickstart
  frugalmoe evaluate runs/quickstart@100 --tokens=20000
  frugalmoe evaluate runs/chat@best --data=talks.jsonl --config.data.kind=chat    (the answers of conversations)
  frugalmoe evaluate runs/quickstart --data=mine.txt --json      (all documents of mine.txt)
  frugalmoe evaluate runs/quickstart --config.data.path=mixed    (the held-out documents of a config's data)
  frugalmoe evaluate runs/quickstart --suite                     (agreement, recall, copying ...: our own tasks)
  frugalmoe evaluate runs/quickstart --suite=recall,mine.py --items=1000
  frugalmoe evaluate runs/quickstart --tasks=mine --task-path=tasks/    (lm-eval, with YAML and data of one's own)"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `frugalmoe evaluate`."""
    parser.add_argument(
        "run",
        metavar="RUN[@STEP]",
        help="a run directory, and which checkpoint: a step, or best (default: the newest)",
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="text of which all documents are scored, as data.path may name it, or a prepared directory, of which the "
        "held-out ones are (default: the run's own held-out data; --config.data.FIELD=VALUE changes their config)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="about how many, spread evenly over domains (default: the run's train.eval_rows rows of a domain of its "
        "own data; all of others)",
    )
    parser.add_argument(
        "--suite",
        nargs="?",
        const="",
        metavar="NAME,...",
        help="instead of text, small tasks that were made here: of a few continuations the most likely one is chosen. "
        "Without names all of them; a name may be the path of a file with TASK = Task(...)",
    )
    parser.add_argument(
        "--tasks",
        metavar="NAME,...",
        help="instead of text, tasks, groups or tags of lm-eval (pip install 'frugalmoe[lm-eval]'), without a network "
        "unless HF_HUB_OFFLINE=0 HF_DATASETS_OFFLINE=0. Texts have at most data.sequence_length tokens, and begin as "
        "data.document_start says: of a published model that knows none in front, --config.data.document_start=none",
    )
    parser.add_argument(
        "--task-path",
        metavar="DIR",
        help="where the tasks of --tasks are, a directory with YAML files (default: in lm-eval)",
    )
    parser.add_argument("--shots", type=int, metavar="N", help="examples in front, where a task of --tasks fixes none")
    parser.add_argument(
        "--items", type=int, metavar="N", help="of a task, at most (default: 400 of --suite, all of --tasks)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(config=None)  # overrides are of the run's config, and --config is no flag


def run(args: argparse.Namespace) -> int:
    """Prints the loss of each domain, or the accuracy of each task."""
    _check(args)
    kind = _suite if args.suite is not None else _text if args.tasks is None else _tasks
    found, show = kind(args)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        from frugalmoe.console import Console

        Console().print(show)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises `UserError` for flags that do not go together."""
    kind = "text" if args.suite is args.tasks is None else "--suite" if args.tasks is None else "--tasks"
    if args.suite is not None and args.tasks is not None:
        raise UserError("--suite: cannot be given with --tasks; give one after the other")
    used = {
        "--data": (args.data, ("text",)),
        "--tokens": (args.tokens, ("text",)),
        "--config.*": (args.overrides or None, ("text", "--tasks")),
        "--items": (args.items, ("--suite", "--tasks")),
        "--task-path": (args.task_path, ("--tasks",)),
        "--shots": (args.shots, ("--tasks",)),
    }
    for flag, (value, kinds) in used.items():
        if value is not None and kind not in kinds:
            raise UserError(f"{flag}: is of an evaluation on {' or '.join(kinds)}; this one is on {kind}")


def _text(args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    from frugalmoe.evaluate import evaluate
    from frugalmoe.train.weights import run_and_step

    directory, step = run_and_step(args.run)
    found = evaluate(directory, step, data=args.data, overrides=args.overrides, tokens=args.tokens, progress=True)
    return found._asdict(), _table_of_text(found)


def _table_of_text(found):
    from rich.text import Text

    table = _table(found, "", "domain", "tokens", "bytes", "loss (nats per token)", "bits per byte")
    for domain, loss in found.loss.items():
        if domain == "mean" and len(found.targets) == 1:
            continue
        counts = (f"{n[domain]:,}" if domain in n else "" for n in (found.targets, found.bytes))
        table.add_row(Text(domain), *counts, f"{loss:.4f}", f"{found.bits_per_byte[domain]:.4f}")
    return table


def _names(flag: str, given: str) -> tuple[str, ...]:
    """Of tasks, separated by commas; none for the flag alone."""
    if given and not all(names := tuple(name.strip() for name in given.split(","))):
        raise UserError(f"{flag}={given}: must be names separated by commas, none of them empty")
    return names if given else ()


def _suite(args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    from frugalmoe.evaluate.grading import ITEMS, grade_run
    from frugalmoe.train.weights import run_and_step

    directory, step = run_and_step(args.run)
    items = ITEMS if args.items is None else args.items
    found = grade_run(directory, step, names=_names("--suite", args.suite), items=items, progress=True)
    as_json = found._asdict() | {"tasks": {name: grade._asdict() for name, grade in found.tasks.items()}}
    return as_json, _table_of_suite(found)


def _table_of_suite(found):
    from rich.text import Text

    table = _table(found, "our suite", "task", "items", "chance", "accuracy", "95% interval", "margin (nats)")
    for name, grade in found.tasks.items():
        interval = f"{grade.low:.3f} to {grade.high:.3f}"
        numbers = (f"{grade.items:,}", f"{grade.chance:.3f}", f"{grade.accuracy:.3f}", interval, f"{grade.margin:+.3f}")
        table.add_row(Text(name), *numbers)
    if len(found.tasks) > 1:
        table.add_row("mean", "", "", f"{found.mean:.3f}", "", "")
    return table


def _tasks(args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    from frugalmoe.evaluate.tasks import run_tasks
    from frugalmoe.train.weights import run_and_step

    directory, step = run_and_step(args.run)
    found = run_tasks(
        directory,
        step,
        names=_names("--tasks", args.tasks),
        path=args.task_path,
        shots=args.shots,
        items=args.items,
        overrides=args.overrides,
        progress=True,
    )
    return found._asdict() | {"results": [result._asdict() for result in found.results]}, _table_of_tasks(found)


def _table_of_tasks(found):
    from rich.text import Text

    table = _table(found, "lm-eval", "task", "version", "shots", "items", "metric", "value", "error")
    for result in found.results:
        error = "" if result.error is None else f"{result.error:.4f}"
        numbers = (result.version, f"{result.shots}", f"{result.items:,}", result.metric, f"{result.value:.4f}", error)
        table.add_row(Text(result.task), *numbers)
    return table


def _table(found, what: str, first: str, *others: str):
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=None,
        pad_edge=False,
        title=Text(f"{found.run}, step {found.step:,}" + f", {what}" * bool(what)),
        title_justify="left",
    )
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
