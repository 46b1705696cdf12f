"""`frugalmoe checkpoints RUN [list|verify|prune|export|merge]`."""

import argparse
import sys
from pathlib import Path

from frugalmoe.errors import UserError

SUMMARY = "List, verify, prune, export or merge the checkpoints of a run."
EXAMPLES = """\
  frugalmoe checkpoints runs/quickstart
  frugalmoe checkpoints runs/quickstart verify     (exit code 1 where one is not known as whole and finite)
  frugalmoe checkpoints runs/quickstart prune --keep-last=1 --dry-run
  frugalmoe checkpoints runs/quickstart export best runs/exported
  frugalmoe checkpoints runs/quickstart merge --last=4 --weights=1-sqrt --to=runs/merged
  frugalmoe evaluate runs/merged"""

EXIT_FAULT = 1
_FLAGS = {  # of each action
    "list": ("format",),
    "verify": (),
    "prune": ("keep_last", "keep", "dry_run"),
    "export": (),
    "merge": ("last", "steps", "weights", "to"),
}
_DEFAULTS = {"format": "table", "weights": "mean", "dry_run": False}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `frugalmoe checkpoints`."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    parser.add_argument("action", nargs="?", choices=tuple(_FLAGS), default="list", help="(default: list)")
    parser.add_argument("of_export", nargs="*", metavar="STEP DIR", help="export: a step or best, and a new directory")
    parser.add_argument("--format", choices=("table", "json"), help="list: (default: table)")
    parser.add_argument("--keep-last", type=int, metavar="N", help="prune: the newest whole ones that stay")
    parser.add_argument("--keep", metavar="STEP,STEP", help="prune: steps that stay")
    parser.add_argument("--dry-run", action="store_true", default=None, help="prune: say what would go, delete nothing")
    parser.add_argument("--last", type=int, metavar="N", help="merge: the newest whole ones")
    parser.add_argument("--steps", metavar="STEP,STEP", help="merge: these, in place of the newest")
    parser.add_argument(
        "--weights",
        metavar="NAME",
        help="merge: what each counts for: mean, as a linear decay of the rate; linear, the newer the more; 1-sqrt, as "
        "a decay that begins fast (default: mean)",
    )
    parser.add_argument("--to", type=Path, metavar="RUN2", help="merge: a new run directory")


def run(args: argparse.Namespace) -> int:
    """Does what is asked for; `verify` returns 1 where a checkpoint is not known as whole and finite."""
    from frugalmoe.train import saved
    from frugalmoe.train.weights import check_run

    for name, value in vars(args).items():
        if any(name in flags for flags in _FLAGS.values()) and name not in _FLAGS[args.action] and value is not None:
            actions = " and ".join(action for action, flags in _FLAGS.items() if name in flags)
            raise UserError(f"--{name.replace('_', '-')}={value}: is a flag of {actions}, not of {args.action}")
    for name in _FLAGS[args.action]:
        if getattr(args, name) is None:
            setattr(args, name, _DEFAULTS.get(name))
    if args.of_export and args.action != "export":
        raise UserError(f"{args.of_export[0]}: {args.action} takes a run and flags only")
    check_run(args.run)
    if not saved.entries(args.run):
        raise UserError(f"{args.run}: holds no checkpoint yet")
    return {"list": _list, "verify": _verify, "prune": _prune, "export": _export, "merge": _merge}[args.action](args)


def _list(args: argparse.Namespace) -> int:
    from frugalmoe.files import to_json
    from frugalmoe.train import kept

    found = kept.listed(args.run)
    if args.format == "json":
        print(to_json([each._asdict() for each in found], indent=1))
    else:
        _print(found, kept.metric(args.run))
    return 0


def _print(found, metric: str) -> None:
    import datetime

    from rich.table import Table
    from rich.text import Text

    from frugalmoe.console import Console
    from frugalmoe.errors import printable

    now = datetime.datetime.now(datetime.UTC)
    table = Table(box=None, pad_edge=False)
    for name in ("step", "MB", "age", *([f"best {metric}"] if metric else [])):
        table.add_column(Text(name), justify="right")
    table.add_column("state")
    for each in found:
        age = _age((now - datetime.datetime.fromisoformat(each.saved)).total_seconds())
        best = ["" if each.metric is None else f"{each.metric:.4f}"] if metric else []
        state = each.state + (f": {each.fault}" if each.fault else "")
        cells = (str(each.step), f"{each.bytes / 1e6:,.1f}", age, *best, state)
        table.add_row(*(Text(printable(text)) for text in cells))
    Console(width=None if sys.stdout.isatty() else 2000).print(table)


def _age(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _verify(args: argparse.Namespace) -> int:
    """Prints a line for each checkpoint that is not known as whole and finite."""
    from frugalmoe.errors import printable
    from frugalmoe.train import kept, saved

    faults = list(kept.faults(args.run))
    for step, why in faults:
        print(printable(f"{saved.place(args.run, step)}: {why}"))
    count = len(saved.entries(args.run))
    print(f"{args.run}: {count - len(faults)} of {count} checkpoints are whole and finite")
    return EXIT_FAULT if faults else 0


def _prune(args: argparse.Namespace) -> int:
    from frugalmoe.train import kept, saved

    keep = () if args.keep is None else _steps("--keep", args.keep)
    gone = kept.prune(args.run, keep_last=args.keep_last, keep=keep, dry_run=args.dry_run)
    said = "would be deleted" if args.dry_run else "deleted"
    stay = [step for step in saved.entries(args.run) if step not in gone]
    print(f"{args.run}: {said}: {_listed(gone)}; kept: {_listed(stay)}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from frugalmoe.convert import from_run, output
    from frugalmoe.train import best

    if len(args.of_export) != 2:
        raise UserError(
            f"export {' '.join(args.of_export)}: needs STEP and DIR: a step, or {best.NAME}; a new directory"
        )
    text, to = args.of_export[0], Path(args.of_export[1])
    step = best.step_of(args.run) if text == best.NAME else _steps("STEP", text)[0]
    output.check_new(to, "DIR")
    from_run.export(args.run, step, to)
    print(f"{to}: a run with the checkpoint of step {step}")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from frugalmoe.convert import from_run, output

    if args.to is None:
        raise UserError("merge: needs --to=RUN2, a new run directory")
    if (args.last is None) == (args.steps is None):
        raise UserError("merge: needs --last=N or --steps=STEP,STEP, and not both")
    output.check_new(args.to, "--to")
    steps = None if args.steps is None else _steps("--steps", args.steps)
    merged = from_run.merge(args.run, args.weights, last=args.last, steps=steps)
    from_run.write_merged(args.run, merged, args.weights, args.to)
    parts = ", ".join(f"{step} ({share:.3f})" for step, share in zip(merged.steps, merged.coefficients))
    print(f"{args.to}: a run with the mean of the checkpoints {parts}; without an optimizer's state")
    return 0


def _steps(flag: str, text: str) -> list[int]:
    """Returns the steps of a list as 2,4."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise UserError(f"{flag}={text}: must be whole numbers with commas between them")
    return [int(part) for part in parts]


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
