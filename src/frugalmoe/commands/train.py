"""`frugalmoe train`."""

import argparse
import functools
import sys
from pathlib import Path

from frugalmoe.commands import add_config_flag, load_config, set_up_training
from frugalmoe.errors import EXIT_PREEMPTED, UserError

RESUMABLE = True
SUMMARY = "Train a config, or continue the run in its directory."
EXAMPLES = """\
  frugalmoe train --config=configs/quickstart.py
  frugalmoe train --config=configs/quickstart.py:laptop --workdir=/tmp/run
  frugalmoe train --config=configs/quickstart.py --config.model.moe.router=hash --workdir=runs/hash
  frugalmoe train --config=configs/small.py --dry-run
  frugalmoe train --from=runs/quickstart@200 --config=configs/quickstart.py --workdir=runs/more
  frugalmoe train --from=models/OLMoE-1B-7B --config=models/OLMoE-1B-7B --config.data.path=texts/
  frugalmoe train --from=models/Ling-mini --config=models/Ling-mini --config.data.path=talks/ --config.data.kind=chat
  frugalmoe train --config=configs/small.py --profile=5 --config.train.trackers=tensorboard,wandb
  frugalmoe train --config=configs/small.py --workdir=runs/a --islands=/shared/islands --config.islands.bits=8
  frugalmoe train --config=configs/small.py --coordinator=node1:8476 --num-processes=4 --process-id=0
  frugalmoe train --config=configs/small.py --coordinator=node1:8476 --num-processes=4 --process-id=0 \\
      --supervise --supervise.min-processes=2"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `frugalmoe train`."""
    add_config_flag(parser)
    parser.add_argument("--workdir", type=Path, help="run directory (default: runs/<config name>)")
    parser.add_argument(
        "--resume",
        choices=("auto", "force", "never"),
        default="auto",
        help="auto: continue a run of the same config; force: whatever its config; never: refuse an existing run",
    )
    parser.add_argument("--fresh", action="store_true", help="delete the run in the directory and start over")
    parser.add_argument(
        "--dry-run", action="store_true", help="check all that a run needs and compile its step; make no run"
    )
    parser.add_argument(
        "--profile", type=int, metavar="STEPS", help="trace so many steps into the run directory's profile/, for XProf"
    )
    parser.add_argument(
        "--timings", action="store_true", help="print at the end where the time of this start went, and of the run"
    )
    for add in (_add_supervision, _add_origin, _add_islands, _add_processes):
        add(parser)


def _add_supervision(parser: argparse.ArgumentParser) -> None:
    watched = parser.add_argument_group(
        "supervision", "A process beside the run starts it again when it dies or makes no step any more."
    )
    watched.add_argument("--supervise", action="store_true", help="start the run under a supervisor")
    watched.add_argument(
        "--supervise.restarts",
        dest="restarts",
        type=int,
        metavar="N",
        help="in a row that come no further than those before (default: 5)",
    )
    watched.add_argument(
        "--supervise.hang",
        dest="hang",
        type=float,
        metavar="SECONDS",
        help="without a step, after which it counts as stuck; compiling and evaluating take their share (default: 600)",
    )
    watched.add_argument(
        "--supervise.grace",
        dest="grace",
        type=float,
        metavar="SECONDS",
        help="to save in when it is asked to stop (default: 300)",
    )
    watched.add_argument(
        "--supervise.min-processes",
        dest="min_processes",
        type=int,
        metavar="N",
        help="go on without those of --num-processes that are gone, in at least so many (default: wait for all)",
    )
    watched.add_argument(
        "--supervise.wait",
        dest="wait",
        type=float,
        metavar="SECONDS",
        help="for the others, before fewer go on (default: 60)",
    )


def _add_origin(parser: argparse.ArgumentParser) -> None:
    origin = parser.add_argument_group(
        "weights of another run, or of a published model",
        "The run begins with them; data, schedule and optimizer's state are its own. What does not fit is named.",
    )
    origin.add_argument(
        "--from",
        dest="origin",
        metavar="RUN[@STEP]|HFDIR",
        help="a run directory, by default its newest step, RUN@best its best; or a directory in the layout of Hugging "
        "Face, which --config=HFDIR makes a config of",
    )
    origin.add_argument(
        "--from.state",
        dest="origin_state",
        choices=("auto", "yes", "no"),
        help="take the state of routers, as a balance bias; auto: where the router is the same (default)",
    )
    origin.add_argument(
        "--from.drop",
        dest="origin_drop",
        action="append",
        metavar="GLOB",
        help="make new the parameters whose path, names joined by /, it matches, as 'head*'; may be repeated",
    )


def _add_islands(parser: argparse.ArgumentParser) -> None:
    islands = parser.add_argument_group(
        "islands",
        "Runs that train one model apart from each other, on whatever devices, and meet in a directory; "
        "--config.islands says how, and `frugalmoe islands DIR` shows them.",
    )
    islands.add_argument(
        "--islands", metavar="DIR", help="where they meet: a path, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"
    )
    islands.add_argument("--island", metavar="NAME", help="of this one (default: the name of its run directory)")


def _add_processes(parser: argparse.ArgumentParser) -> None:
    several = parser.add_argument_group(
        "several processes",
        "One run over the devices of all of them, which share the run directory. SLURM, Open MPI, Kubernetes and TPU "
        "pods are found without flags.",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="the host of process 0, and a port free there")
    several.add_argument("--num-processes", type=int, metavar="N", help="1: this process alone, wherever it runs")
    several.add_argument("--process-id", type=int, metavar="I", help="of this process, from 0 to N - 1")
    several.add_argument(
        "--connect-timeout", type=int, default=300, metavar="SECONDS", help="to find all others in (default: 300)"
    )


def run(args: argparse.Namespace) -> int:
    """Trains, prints a table and a sample, and writes the report; 75 where a signal stopped the run after saving."""
    config = load_config(args)
    workdir = args.workdir or Path("runs") / config.name
    limits = _limits(args)
    if args.supervise and not args.dry_run:
        return _supervise(args, workdir, limits)
    set_up_training(config)
    import jax

    from frugalmoe.console import Console
    from frugalmoe.fields import to_dict
    from frugalmoe.train import distributed, preflight, rundir, supervise, watch
    from frugalmoe.train.ledger import Ledger
    from frugalmoe.train.loop import train
    from frugalmoe.train.profile import profiled
    from frugalmoe.train.progress import Progress

    times = Ledger(supervise.beginning(args.began))
    if args.profile is not None and args.profile < 1:
        raise UserError(f"--profile={args.profile}: must be at least 1")
    distributed.start(args.coordinator, args.num_processes, args.process_id, args.connect_timeout)
    distributed.check_same(to_dict(config))  # before anything else that may differ is looked at
    supervise.tell_what_fits(functools.partial(_fits, config, jax.local_device_count()))
    how = {"resume": args.resume, "fresh": args.fresh, "origin": _origin(args)}
    with distributed.together():
        ready = preflight.check(config, workdir, num_devices=jax.device_count(), **how)
    how |= _island(args, ready.config, workdir)
    if args.dry_run:
        return _dry_run(ready, workdir, distributed.is_main())
    was_complete = rundir.is_complete(workdir) and not args.fresh
    progress = supervise.telling(profiled(args.profile, workdir / "profile") if args.profile else Progress)
    with watch.watching(config.train.stuck_seconds, workdir):
        summary = train(config, workdir, **how, sample=_sample, progress=progress, times=times)
    if summary["status"] == "stopped":
        watch.leave_within(10, EXIT_PREEMPTED)
    if not distributed.is_main():
        return EXIT_PREEMPTED if summary["status"] == "stopped" else 0
    if summary["status"] == "stopped":
        _print_timings(args, times)
        print(f"stopped at step {summary['step']} of {summary['steps']} after saving; the same command continues it")
        return EXIT_PREEMPTED
    if was_complete and args.resume != "force":
        print(f"{workdir}: this run is complete ({summary['step']} steps); --fresh starts it over")
    console = Console()
    with times.phase("report"):
        from frugalmoe.analysis import load_run, summary_table, write_report

        console.print(summary_table(load_run(workdir)))
        page = write_report(workdir)
    if sample := summary.get("sample"):  # `train` of the library draws none
        empty = "no sample: the model ended the document at once"
        console.print(f"sample: {sample['prompt']}{sample['text']}" if sample["text"] else sample.get("why", empty))
    console.print(f"report: {page}", soft_wrap=True)
    if not was_complete or args.resume == "force":
        times.amend(workdir, summary["step"])
        _print_timings(args, times)
    return 0


def _fits(config, devices: int, processes: int) -> bool:
    """Whether a config can be trained by so many processes of so many devices each."""
    from frugalmoe.config import settle

    try:
        settle(config, None, devices * processes)
    except UserError:
        return False
    return True


def _sample(*given) -> dict[str, str]:
    """As `generate.sample_text`, which is needed when all is trained."""
    from frugalmoe.generate import sample_text

    return sample_text(*given)


def _print_timings(args: argparse.Namespace, times) -> None:
    """Prints the tables that --timings asks for."""
    if not args.timings:
        return
    from rich.table import Table

    from frugalmoe.console import Console
    from frugalmoe.train import goodput

    of_start, of_run = times.account_of_start(), times.account()
    tables = [("this start", of_start)] + [("all starts", of_run)] * (len(of_run.by_start) > 1)
    for title, found in tables:
        table = Table(title=f"wall time of {title}: {found.useful:.1%} in training steps", title_justify="left")
        for name, justify in (("kind", "left"), ("what it is", "left"), ("seconds", "right"), ("share", "right")):
            table.add_column(name, justify=justify)
        for row in goodput.table(found):
            table.add_row(*row)
        Console().print(table)


def _limits(args: argparse.Namespace):
    """The limits of supervision that the flags name. Raises `UserError` for some without --supervise, or for those of
    several processes where no flags name them.
    """
    from frugalmoe.train import supervise

    names = (*supervise.Limits._fields, "min_processes")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name, value in given.items():
        flag = f"--supervise.{name.replace('_', '-')}={value:g}"
        if not args.supervise:
            raise UserError(f"{flag}: needs --supervise")
        if name in ("wait", "min_processes") and args.process_id is None:
            raise UserError(f"{flag}: needs --coordinator, --num-processes and --process-id")
    least, most = given.pop("min_processes", 1), args.num_processes
    if most and not 1 <= least <= most:
        raise UserError(f"--supervise.min-processes={least}: must be from 1 to {most} (--num-processes)")
    limits = supervise.Limits(**given)
    supervise.check(limits)
    return limits


def _supervise(args: argparse.Namespace, workdir: Path, limits) -> int:
    """Starts the same command without the flags of supervision, and watches it. --fresh and --resume are of the first
    start only: later ones go on. The flags of several processes are new at each start.
    """
    from frugalmoe.train import gathering, supervise

    run, others = [sys.executable, "-m", "frugalmoe.cli", *_without(args.argv, "--supervise")], None
    flags = gathering.check_flags(args.coordinator, args.num_processes, args.process_id, args.connect_timeout)
    if flags and flags.processes > 1:
        least = args.min_processes or flags.processes
        others = gathering.Gathering(workdir, flags, limits.wait, least)
        run = _without(run, "--coordinator", "--num-processes", "--process-id")
    again = [*_without(run, "--fresh", "--resume"), "--resume=auto"]
    return supervise.supervise(run, again, workdir, limits, args.began, others)


def _without(argv: list[str], *flags: str) -> list[str]:
    """A command line without some flags, FLAG.NAME too, and without the values of those that have one."""
    kept, arguments = [], iter(argv)
    for argument in arguments:
        name, equals, _ = argument.replace("_", "-").partition("=")
        if not any(name == flag or name.startswith(f"{flag}.") for flag in flags):
            kept.append(argument)
        elif not equals and name not in ("--supervise", "--fresh"):
            next(arguments, None)
    return kept


def _island(args: argparse.Namespace, config, workdir: Path) -> dict:
    """What `train` is told of a run that is an island."""
    if args.islands is None:
        if args.island is not None:
            raise UserError(f"--island={args.island}: needs --islands=DIR, where it meets the others")
        if not config.islands.virtual:
            return {}
        from frugalmoe.islands import virtual

        virtual.check(config)
        return {"drive": virtual.drive}
    from frugalmoe.islands import training

    if config.islands.virtual:
        rule = "all islands are in one process then, and need no --islands"
        raise UserError(f"islands.virtual={config.islands.virtual}: {rule}")
    name = args.island or workdir.absolute().name
    store = training.check(config, args.islands, name)
    of_island = {"drive": functools.partial(training.drive, store=store, name=name)}
    return of_island | {"suits": functools.partial(training.suits, store)}


def _origin(args: argparse.Namespace):
    """The `Origin` that the flags name, or None."""
    from frugalmoe.convert.checkpoint import is_published
    from frugalmoe.train.origin import Origin
    from frugalmoe.train.weights import run_and_step

    if args.origin is None:
        for flag, given in (("state", args.origin_state), ("drop", args.origin_drop)):
            if given is not None:
                raise UserError(f"--from.{flag}: needs --from=RUN[@STEP] or HFDIR, whose weights it is about")
        return None
    origin = Origin(*run_and_step(args.origin), args.origin_state or "auto", tuple(args.origin_drop or ()))
    if not is_published(origin.run):
        return origin
    from frugalmoe.convert.origin import open_published

    return origin._replace(published=open_published(origin.run))


def _dry_run(ready, workdir: Path, talks: bool) -> int:
    import jax

    from frugalmoe.aot.program import compile_step
    from frugalmoe.aot.table import tables
    from frugalmoe.console import Console
    from frugalmoe.data import ramp
    from frugalmoe.fields import to_dict
    from frugalmoe.model.transformer import count_parameters
    from frugalmoe.train import origin
    from frugalmoe.train.optim import bytes_of

    config, notes = ready.config, ready.notes
    if ready.origin is not None:
        origin.check_numbers(ready.origin, config)
    if not talks:  # a program for several processes is compiled by all of them
        compile_step(config)
        return 0
    train, data = config.train, config.data
    counts, per_step = count_parameters(config.model), train.batch_size * data.sequence_length
    in_all = ramp.of(to_dict(train)).before(train.steps) * data.sequence_length
    print(f"run directory  {workdir}")
    print(f"devices        {jax.device_count()} x {jax.devices()[0].device_kind}")
    print(f"tokens         {per_step:,} per step, {in_all:,} in {train.steps:,} steps")
    trained = bytes_of(config).gradients // 4  # float32
    print(f"parameters     {counts['total']:,} total, {counts['active']:,} active, {trained:,} trained")
    print(*(f"note: {note}" for note in notes), sep="\n", end="\n" if notes else "")
    print("compiling the step, which makes the start of the run shorter", flush=True)
    Console(width=None if sys.stdout.isatty() else 120).print(*tables(compile_step(config)), sep="\n")
    return 0
