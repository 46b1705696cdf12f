"""`frugalmoe soak`."""

import argparse
import sys
import time
from pathlib import Path

from frugalmoe.commands import add_config_flag, load_config
from frugalmoe.errors import UserError

SUMMARY = "Train a config under faults at random, and compare what comes of it with an undisturbed run."
EXAMPLES = """\
  frugalmoe soak                                    (the quickstart, 8 faults; exit code 1 where the end differs)
  frugalmoe soak --config=quickstart:laptop --seconds=3600 --seed=7
  frugalmoe soak --supervise --kinds=kill,term --faults=20
  frugalmoe soak --config=configs/small.py --config.train.steps=500 --format=json"""

EXIT_DIFFERS = 1


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `frugalmoe soak`."""
    add_config_flag(parser, default="quickstart")
    parser.add_argument("--workdir", type=Path, help="directory for the runs, new or empty (default: runs/soak-NAME)")
    parser.add_argument("--faults", type=int, default=8, metavar="N", help="in a run, at random steps (default: 8)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.0,
        help="to begin further runs in; one is made in any case (default: 0)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the faults; each further run has the next one")
    parser.add_argument(
        "--kinds", default="kill,term,freeze,damage,tear", metavar="NAMES", help="of faults (default: %(default)s)"
    )
    parser.add_argument("--supervise", action="store_true", help="under `train --supervise`, which restarts what died")
    parser.add_argument("--format", choices=("table", "json"), default="table")


def run(args: argparse.Namespace) -> int:
    """Trains a calm run and those under faults; prints what they cost; 1 where an end state or a loss differs."""
    from frugalmoe.train import soak

    config = load_config(args)
    if not 0 <= args.faults < 10**6:
        raise UserError(f"--faults={args.faults}: must be from 0 to 999999")
    if not 0 <= args.seconds < 10**9:
        raise UserError(f"--seconds={args.seconds:g}: must be from 0 to 999999999")
    kinds = tuple(args.kinds.split(","))
    soak.plan(args.seed, args.faults, config.train.steps, kinds)
    workdir = args.workdir or Path("runs") / f"soak-{config.name}"
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(f"--workdir={workdir}: must be new or empty")
    workdir.mkdir(parents=True, exist_ok=True)

    began = time.monotonic()
    told = _Told(config.train.steps)
    calm = _train(args, workdir / "calm", told, ())
    found = []
    while not found or time.monotonic() - began < args.seconds:
        seed = args.seed + len(found)
        faults = soak.plan(seed, args.faults, config.train.steps, kinds)
        found.append((seed, _train(args, workdir / f"seed_{seed}", told, faults)))
    result = _result(workdir, calm, found)
    if args.format == "json":
        from frugalmoe.files import to_json

        print(to_json(result, indent=1))
    else:
        _print(result)
    return 0 if result["equal"] else EXIT_DIFFERS


class _Told:
    """Says on stderr what happens, and how long it will take."""

    def __init__(self, steps: int) -> None:
        self.steps, self.began = steps, time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.0f} s  {text}", file=sys.stderr, flush=True)


def _train(args: argparse.Namespace, workdir: Path, told: _Told, faults):
    """Trains a run in processes of its own, under faults."""
    from frugalmoe.train import soak

    overrides = [f"--config.{override}" for override in args.overrides]
    command = [sys.executable, "-m", "frugalmoe.cli", "train", f"--config={args.config}", *overrides]
    command += [f"--workdir={workdir}"]
    if args.supervise and faults:
        command += ["--supervise", f"--supervise.restarts={len(faults) + soak.MOST_STARTS}"]
    told(f"{workdir.name}: {told.steps} steps, {len(faults)} faults")
    return soak.Soak(command, workdir, told, told.steps, args.supervise and bool(faults)).run(faults)


def _result(workdir: Path, calm, found) -> dict:
    """What is printed."""
    import statistics

    from frugalmoe.files import read_json
    from frugalmoe.train import soak

    ends = {name: _end(workdir / name) for name in ("calm", *(f"seed_{seed}" for seed, _ in found))}
    rows = []
    for seed, ended in found:
        name = f"seed_{seed}"
        recovered = [fault.recovered for fault in ended.faults if fault.recovered is not None]
        rows.append(
            {
                "seed": seed,
                "equal": ends[name] == ends["calm"],
                "seconds": ended.seconds,
                "starts": ended.starts,
                "faults": dict(soak.ways(ended.faults)),
                "recovered": recovered,
                "goodput": read_json(workdir / name / "summary.json")["goodput"],
                "injected": [fault._asdict() for fault in ended.faults],
            }
        )
    recovered = [seconds for row in rows for seconds in row["recovered"]]
    return {
        "equal": all(row["equal"] for row in rows),
        "faults": {kind: sum(row["faults"].get(kind, 0) for row in rows) for kind in soak.KINDS},
        "recovered": len(recovered),
        "median_seconds_to_recover": statistics.median(recovered) if recovered else None,
        "mean_seconds_to_recover": statistics.fmean(recovered) if recovered else None,
        "useful": statistics.fmean(row["goodput"]["useful"] for row in rows),
        "calm": {"seconds": calm.seconds, "goodput": read_json(workdir / "calm/summary.json")["goodput"]},
        "runs": rows,
    }


def _end(workdir: Path) -> tuple:
    """What must be equal at the end: all bits of the last checkpoint, and the losses on held-out documents."""
    from frugalmoe.files import read_json
    from frugalmoe.train import checkpoint

    summary = read_json(workdir / "summary.json")
    return checkpoint.values_digest(workdir, summary["step"]), summary["eval"]


def _print(result: dict) -> None:
    from rich.table import Table

    from frugalmoe.console import Console
    from frugalmoe.train import goodput

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    names = ["calm", *(f"seed {row['seed']}" for row in result["runs"])]
    of_runs = [result["calm"], *result["runs"]]
    for name in names:
        table.add_column(name, justify="right")
    seconds = [row["goodput"]["seconds"] for row in of_runs]
    table.add_row("seconds", *(f"{row['seconds']:,.0f}" for row in of_runs))
    table.add_row("goodput: useful steps", *(f"{row['goodput']['useful']:.1%}" for row in of_runs))
    for kind in goodput.KINDS:
        if any(kind in values for values in seconds):
            table.add_row(f"seconds of {kind}", *(f"{values.get(kind, 0.0):,.1f}" for values in seconds))
    table.add_row("faults", "", *(str(sum(row["faults"].values())) for row in result["runs"]))
    table.add_row("end equals the calm run's", "", *("yes" if row["equal"] else "NO" for row in result["runs"]))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    print(f"faults: {', '.join(f'{kind} {number}' for kind, number in result['faults'].items() if number) or 'none'}")
    if result["recovered"]:
        median, mean = result["median_seconds_to_recover"], result["mean_seconds_to_recover"]
        print(f"from a fault to the first step after it: {median:.1f} s in the median, {mean:.1f} s in the mean")
    verdict = "equals the calm run's bit for bit" if result["equal"] else "DIFFERS from the calm run's"
    print(f"the end state {verdict}; goodput {result['useful']:.1%}, calm {result['calm']['goodput']['useful']:.1%}")
