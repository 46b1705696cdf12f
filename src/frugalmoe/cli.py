"""`frugalmoe COMMAND ...`: flags only. Each command calls one function that a notebook can call too."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from frugalmoe.commands import add_command, add_config_flag, load_config, set_up_training
from frugalmoe.errors import EXIT_USER_ERROR, UserError, one_line

EXIT_PREEMPTED = 75


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; 0 done, 2 user error, 75 stopped by a signal after saving."""
    flags, overrides = _take_overrides(list(sys.argv[1:] if argv is None else argv))
    args = _parser().parse_args(flags)
    args.overrides = overrides
    try:
        if overrides and not hasattr(args, "config"):
            raise UserError(f"--config.{overrides[0]}: frugalmoe {args.command} takes no config")
        return args.handler(args) or 0
    except Exception as e:
        if not (line := one_line(e)):
            raise
        print(f"frugalmoe: {line}", file=sys.stderr)
        return EXIT_USER_ERROR


def _take_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Splits off `--config.a.b=value` (or `--config.a.b value`) -> (other flags, ["a.b=value", ...])."""
    flags, overrides = [], []
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("--config."):
            flags.append(argument)
        elif "=" in argument:
            overrides.append(argument.removeprefix("--config."))
        else:
            value = next(arguments, None)
            overrides.append(argument.removeprefix("--config.") + ("" if value is None else f"={value}"))
    return flags, overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="frugalmoe",
        description="Train, ablate and cost mixture-of-experts language models on the hardware a team can afford.",
        epilog="frugalmoe COMMAND --help shows a command's flags with examples.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_generate(commands)
    _add_routers(commands)
    from frugalmoe.ablate import cli as ablate_cli
    from frugalmoe.analysis import report, tracing
    from frugalmoe.cost import cli as cost_cli
    from frugalmoe.data import cli as data_cli
    from frugalmoe.launch import cli as launch_cli

    ablate_cli.add_parsers(commands)
    cost_cli.add_parsers(commands)
    report.add_parsers(commands)
    tracing.add_parsers(commands)
    data_cli.add_parsers(commands)
    launch_cli.add_parsers(commands)
    return parser


def _add_train(commands) -> None:
    parser = add_command(
        commands,
        "train",
        _train,
        "Train a config, or continue the run in its directory.",
        "  frugalmoe train --config=configs/quickstart.py\n"
        "  frugalmoe train --config=configs/quickstart.py:laptop --workdir=/tmp/run\n"
        "  frugalmoe train --config=configs/quickstart.py --config.model.moe.router=hash --workdir=runs/hash\n"
        "  frugalmoe train --config=configs/small.py --dry-run\n"
        "  frugalmoe train --config=configs/small.py --coordinator=node1:8476 --num_processes=4 --process_id=0",
    )
    add_config_flag(parser)
    parser.add_argument("--workdir", type=Path, help="run directory (default: runs/<config name>)")
    parser.add_argument(
        "--resume",
        choices=("auto", "force", "never"),
        default="auto",
        help="auto: continue a run of the same config; force: whatever its config; never: refuse an existing run",
    )
    parser.add_argument("--fresh", action="store_true", help="delete the run in the directory and start over")
    parser.add_argument("--dry-run", action="store_true", help="compile the step and say what it needs; train nothing")
    several = parser.add_argument_group(
        "several processes",
        "One run over the devices of all of them, which share the run directory. SLURM, Open MPI, Kubernetes and TPU "
        "pods are found without flags.",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="the host of process 0, and a port free there")
    several.add_argument("--num_processes", type=int, metavar="N", help="1: this process alone, wherever it runs")
    several.add_argument("--process_id", type=int, metavar="I", help="of this process, from 0 to N - 1")
    several.add_argument(
        "--connect_timeout", type=int, default=300, metavar="SECONDS", help="to find all others in (default: 300)"
    )


def _train(args: argparse.Namespace) -> int:
    config = load_config(args)
    workdir = args.workdir or Path("runs") / config.name
    set_up_training(config)
    from rich.console import Console

    from frugalmoe.train import distributed, rundir
    from frugalmoe.train.loop import train

    distributed.start(args.coordinator, args.num_processes, args.process_id, args.connect_timeout)
    if args.dry_run:
        return _dry_run(config, workdir, distributed.is_main())
    was_complete = rundir.is_complete(workdir) and not args.fresh
    summary = train(config, workdir, resume=args.resume, fresh=args.fresh)
    if not distributed.is_main():
        return EXIT_PREEMPTED if summary["status"] == "stopped" else 0
    if summary["status"] == "stopped":
        print(f"stopped at step {summary['step']} of {summary['steps']} after saving; the same command continues it")
        return EXIT_PREEMPTED
    if was_complete and args.resume != "force":
        print(f"{workdir}: this run is complete ({summary['step']} steps); --fresh starts it over")
    from frugalmoe.analysis import load_run, summary_table, write_report

    console = Console(highlight=False)
    console.print(summary_table(load_run(workdir)))
    sample = summary["sample"]
    console.print(f"sample: {sample['prompt']}{sample['text']}" if sample["text"] else sample["why"], markup=False)
    console.print(f"report: {write_report(workdir)}", soft_wrap=True)
    return 0


def _dry_run(config, workdir: Path, talks: bool) -> int:
    import jax
    from rich.console import Console

    from frugalmoe.config import check_devices
    from frugalmoe.cost.aot import compile_step, settled
    from frugalmoe.cost.cli import tables
    from frugalmoe.model.transformer import count_parameters

    check_devices(config, jax.device_count())
    config = settled(config)
    if not talks:  # a program for several processes is compiled by all of them
        compile_step(config)
        return 0
    train, data = config.train, config.data
    counts, per_step = count_parameters(config.model), train.batch_size * data.sequence_length
    print(f"run directory  {workdir}")
    print(f"devices        {jax.device_count()} x {jax.devices()[0].device_kind}")
    print(f"tokens         {per_step:,} per step, {per_step * train.steps:,} in {train.steps:,} steps")
    print(f"parameters     {counts['total']:,} total, {counts['active']:,} active")
    print("compiling the step, which makes the start of the run shorter", flush=True)
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(*tables(compile_step(config)), sep="\n")
    return 0


def _add_generate(commands) -> None:
    parser = add_command(
        commands,
        "generate",
        _generate,
        "Sample text from a trained run.",
        '  frugalmoe generate runs/quickstart --prompt="To be, or not to be"\n'
        '  frugalmoe generate runs/quickstart --prompt="def main" --temperature=0 --max-tokens=64\n'
        '  frugalmoe generate runs/quickstart --prompt="My lord" --top-p=0.9 --seed=3 --stop="\\n\\n"',
    )
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most likely token (default: 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus probability (default: 0.95)")
    parser.add_argument("--max-tokens", type=int, default=200, help="(default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--stop", action="append", default=[], help="end before this text; may be repeated")


def _generate(args: argparse.Namespace) -> int:
    import jax

    from frugalmoe.generate import Sampling, load, stream

    stop = tuple(s.encode().decode("unicode_escape") for s in args.stop)
    sampling = Sampling(
        temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_tokens, seed=args.seed, stop=stop
    )
    sampling.check()
    config, weights, tokenizer, mesh = load(args.run)
    print(args.prompt, end="", flush=True)
    with jax.set_mesh(mesh):
        for piece in stream(config, weights, tokenizer, args.prompt, sampling):
            print(piece, end="", flush=True)
    print()
    return 0


def _add_routers(commands) -> None:
    parser = add_command(
        commands,
        "routers",
        _routers,
        "List the routing strategies and what each one claims.",
        "  frugalmoe routers\n  frugalmoe routers --format=json\n  frugalmoe routers --format=markdown",
    )
    parser.add_argument("--format", choices=("table", "json", "markdown"), default="table")


def _routers(args: argparse.Namespace) -> int:
    from rich.console import Console

    from frugalmoe.routing import strategies
    from frugalmoe.routing.catalogue import BLOCKS, blocks, catalogue, format_markdown, format_table

    rows = catalogue()
    for line in strategies.broken().values():
        print(f"frugalmoe: {line}", file=sys.stderr)
    if args.format == "json":
        print(json.dumps(rows, indent=1))
    elif args.format == "markdown":
        print(format_markdown(rows, blocks()))
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(format_table(rows), format_table(blocks(), BLOCKS))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    sys.exit(main())
