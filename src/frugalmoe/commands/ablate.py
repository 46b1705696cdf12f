"""`frugalmoe ablate STUDY`."""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

from frugalmoe.commands import set_up_training
from frugalmoe.errors import EXIT_PREEMPTED, UserError

RESUMABLE = True
SUMMARY = "Train the arms of a study over several seeds; the same command continues it."
EXAMPLES = """\
  frugalmoe ablate balance --dry-run
  frugalmoe ablate experiments/balance.py --laptop --steps=40
  frugalmoe ablate experiments/balance.py --jobs=2
  frugalmoe ablate experiments/balance.py --arms=none,bias --seeds=0,1,2,3,4
  frugalmoe ablate experiments/balance.py --config.train.steps=600 --workdir=runs/balance_long
  frugalmoe ablate experiments/balance.py --jobs=4 --slurm=slurm_partition=gpu,gpus_per_node=1,timeout_min=60"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `frugalmoe ablate`."""
    parser.add_argument(
        "study", metavar="STUDY", help="a Python file that ends with STUDY = Study(...), or the name of one of ours"
    )
    parser.add_argument("--workdir", type=Path, help="directory of the study (default: runs/<study name>)")
    parser.add_argument("--arms", type=_names, help="some of the arms, a,b")
    parser.add_argument("--seeds", type=_seeds, help="in place of the study's own, 0,1,2")
    parser.add_argument("--steps", type=int, metavar="N", help="of each run, in place of the study's own")
    parser.add_argument("--laptop", action="store_true", help="the study in small: the base's laptop mode, two seeds")
    parser.add_argument("--keep-checkpoints", action="store_true", help="of complete runs, to generate from and trace")
    parser.add_argument("--jobs", type=int, default=1, help="processes, or SLURM array tasks (default: 1)")
    parser.add_argument("--slurm", metavar="NAME=VALUE,...", help="run as SLURM jobs, with submitit's parameters")
    parser.add_argument(
        "--at-once", type=int, help="runs that one process trains as one program (default: by platform and memory)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check all that the runs need, show arms and budgets")
    parser.add_argument("--fresh", action="store_true", help="delete the chosen runs and start them over")
    parser.add_argument(
        "--worker", choices=("process", "task"), help=argparse.SUPPRESS
    )  # set for the workers of --jobs, local or SLURM
    parser.set_defaults(config=None)  # takes --config.x=... overrides of the base


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: integers separated by commas") from None


def run(args: argparse.Namespace) -> int:
    """Trains what is missing of the study; prints its table and writes its report."""
    from frugalmoe.ablate.plan import make_plan
    from frugalmoe.ablate.study import load_study, shrunk
    from frugalmoe.train.ledger import Ledger

    times = Ledger(args.began)
    for flag in ("jobs", "at_once"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')}={value}: must be at least 1")
    study = shrunk(load_study(args.study), steps=args.steps, laptop=args.laptop)
    study = dataclasses.replace(study, keep_checkpoints=study.keep_checkpoints or args.keep_checkpoints)
    workdir = args.workdir or Path("runs") / study.name
    chosen = (study, args.overrides, args.arms, args.seeds)
    plan = make_plan(*chosen, dry=True)  # refuses what it can before data are prepared
    set_up_training(plan.arms[plan.study.baseline].config)
    if not args.worker:
        from frugalmoe.ablate import runner

        notes = dict.fromkeys((*plan.notes, *runner.check(plan, workdir, args.fresh)))
        if args.dry_run:
            from frugalmoe.ablate.table import budget_table

            _print(budget_table(plan, workdir))
            print("".join(f"note: {note}\n" for note in notes), end="")
            return 0
    plan = make_plan(*chosen)
    return _work(args, plan, workdir, times) if args.worker else _lead(args, plan, workdir, times)


def _work(args: argparse.Namespace, plan, workdir: Path, times) -> int:
    from frugalmoe.ablate import workers
    from frugalmoe.ablate.progress import StudyProgress
    from frugalmoe.ablate.runner import train_plan
    from frugalmoe.ablate.worktime import WorkTime

    if args.worker == "process":
        workers.end_with_parent()
    with StudyProgress(plan, workdir) as shown:
        found = train_plan(plan, workdir, shown, args.at_once, WorkTime(workdir, times))
    return EXIT_PREEMPTED if found.stopped else 0


def _lead(args: argparse.Namespace, plan, workdir: Path, times) -> int:
    from frugalmoe.ablate import results, runner, workers, worktime
    from frugalmoe.ablate.plan import read_study
    from frugalmoe.ablate.progress import StudyProgress
    from frugalmoe.ablate.report import write_study_report
    from frugalmoe.ablate.table import result_table

    parameters = workers.parse_parameters(args.slurm or "")
    jobs = min(args.jobs, len(plan.pairs))
    runner.prepare(plan, workdir, sys.argv, args.fresh)
    work = worktime.WorkTime(workdir, times)
    write = work.write if jobs == 1 else functools.partial(work.write_lead, jobs)
    with StudyProgress(plan, workdir) as shown:
        if args.slurm:
            workers.run_slurm(_worker_argv(args, workdir), jobs, workdir, shown, parameters)
            found = runner.outcome(plan, workdir)
        elif jobs > 1:
            with times.phase("idle"):
                stopped = workers.run_processes(_worker_argv(args, workdir), jobs, workdir, shown)
            write()
            found = runner.outcome(plan, workdir, stopped)
        else:
            found = runner.train_plan(plan, workdir, shown, args.at_once, work)
    if found.stopped:
        print(f"stopped with {len(found.missing)} of {len(plan.pairs)} runs to go; the same command continues")
        return EXIT_PREEMPTED
    described = read_study(workdir)
    if results.gather(workdir, described).num_rows:
        with times.phase("report"):
            _print(result_table(workdir))
            print(f"report: {write_study_report(workdir)}")
    if not args.slurm:  # the time of an array in its queue is nobody's work
        write()
        print(worktime.line(workdir))
    if found.missing:
        print(f"{len(found.missing)} of {len(plan.pairs)} runs are with other processes or were interrupted")
    if found.diverged:
        names = ", ".join(f"{p.arm} seed {p.seed}" for p in found.diverged)
        print(f"without a result, because the loss became infinite or NaN: {names}")
    return 0


def _worker_argv(args: argparse.Namespace, workdir: Path) -> list[str]:
    """Returns the command line of a worker: the same study, without what only the first process does."""
    argv = ["ablate", args.study, f"--workdir={workdir}", *(f"--config.{o}" for o in args.overrides)]
    argv += [f"--steps={args.steps}"] if args.steps else []
    argv += [f"--{flag.replace('_', '-')}" for flag in ("laptop", "keep_checkpoints") if getattr(args, flag)]
    argv += [f"--arms={','.join(args.arms)}"] if args.arms else []
    argv += [f"--seeds={','.join(map(str, args.seeds))}"] if args.seeds else []
    return argv + ([f"--at-once={args.at_once}"] if args.at_once else [])


def _print(table) -> None:
    from frugalmoe.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(table)
