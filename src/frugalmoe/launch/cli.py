"""`frugalmoe launch SCHEDULER`: flags only."""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from frugalmoe.commands import add_command, add_config_flag, load_config
from frugalmoe.config import check_devices
from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.files import write_atomically
from frugalmoe.launch import checks
from frugalmoe.launch.job import Job, fill, read_hosts, unedited


class Scheduler(NamedTuple):
    """A template, its check, and the command that takes the filled file."""

    template: str
    check: Callable[[str, Job], None]
    submit: tuple[str, ...]
    copies: bool = False  # its processes see a copy of the checkout, and share runs/ alone


SCHEDULERS = {
    "slurm": Scheduler("slurm.sbatch", checks.check_slurm, ("sbatch",)),
    # create, not apply, which leaves one that has ended as it is and says nothing
    "jobset": Scheduler("jobset.yaml", checks.check_jobset, ("kubectl", "create", "-f"), copies=True),
    "skypilot": Scheduler("skypilot.yaml", checks.check_skypilot, ("sky", "jobs", "launch"), copies=True),
    "ssh": Scheduler("ssh.sh", checks.check_ssh, ("bash",)),
}


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """`frugalmoe launch SCHEDULER`."""
    parser = add_command(
        commands,
        "launch",
        _launch,
        "Train on several machines: fill in a template of launch/, check it, hand it to the scheduler.",
        "  frugalmoe launch slurm --config=configs/small.py --nodes=4 --devices-per-node=8 --dry-run\n"
        "  frugalmoe launch slurm --config=configs/small.py --nodes=4 --devices-per-node=8 --template=our.sbatch\n"
        "  frugalmoe launch jobset --config=configs/small.py --nodes=4 --devices-per-node=8 --workdir=runs/long\n"
        "  frugalmoe launch jobset --config=configs/small.py --nodes=4 --devices-per-node=4 \\\n"
        "    --template=launch/jobset-tpu.yaml\n"
        "  frugalmoe launch skypilot --config=configs/small.py --nodes=2 --devices-per-node=8\n"
        "  frugalmoe launch ssh --config=configs/small.py --hosts=node1,node2 --devices-per-node=8\n"
        "\nA run that was stopped goes on with the same command.",
    )
    parser.add_argument("scheduler", metavar="SCHEDULER", help=", ".join(SCHEDULERS))
    add_config_flag(parser)
    parser.add_argument("--nodes", type=int, help="machines, or hosts of a TPU slice (default: 1; for ssh all hosts)")
    parser.add_argument("--devices-per-node", type=int, required=True, help="GPUs or TPU chips of each")
    parser.add_argument("--hosts", metavar="A,B|FILE", help="for ssh: hosts, or a file with one per line")
    parser.add_argument("--workdir", type=Path, help="run directory, seen by all nodes (default: runs/<config name>)")
    parser.add_argument("--template", type=Path, metavar="FILE", help="instead of the scheduler's in launch/")
    parser.add_argument("--dry-run", action="store_true", help="check all, print the file, start nothing")


def _launch(args: argparse.Namespace) -> int:
    if args.scheduler not in SCHEDULERS:
        raise UserError(f"launch {args.scheduler}: unknown scheduler; {did_you_mean(args.scheduler, SCHEDULERS)}")
    scheduler = SCHEDULERS[args.scheduler]
    template = args.template or Path("launch") / scheduler.template
    config = load_config(args)
    job = _make_job(args, args.workdir or Path("runs") / config.name)
    check_devices(config, job.nodes * job.devices_per_node)
    text = fill(template, job)
    try:
        scheduler.check(text, job)
    except UserError as e:
        raise UserError(f"{template}: {e}") from e
    waiting = unedited(text)
    if args.dry_run:
        print(text, end="")
        if waiting:
            print(f"{template}: before it can start, {waiting}", file=sys.stderr)
        return 0
    if waiting:
        raise UserError(f"{template}: {waiting}")
    _submit(scheduler.submit, text, job.workdir.with_name(f"{job.workdir.name}.{template.name}"))
    return 0


def _make_job(args: argparse.Namespace, workdir: Path) -> Job:
    if (args.scheduler == "ssh") != (args.hosts is not None):
        raise UserError(f"--hosts={args.hosts}: is for ssh, which needs it; {args.scheduler} chooses nodes by itself")
    hosts = read_hosts(args.hosts) if args.hosts is not None else ()
    nodes = args.nodes if args.nodes is not None else len(hosts) or 1
    for flag, value in (("nodes", nodes), ("devices-per-node", args.devices_per_node)):
        if value < 1:
            raise UserError(f"--{flag}={value}: must be at least 1")
    if hosts and nodes != len(hosts):
        raise UserError(f"--nodes={nodes}: --hosts names {len(hosts)}")
    if any(c.isspace() for c in str(workdir)):
        raise UserError(f"--workdir={workdir}: must not contain spaces")
    if SCHEDULERS[args.scheduler].copies:
        if workdir.parts[:1] != ("runs",) or ".." in workdir.parts:
            raise UserError(f"--workdir={workdir}: must lie in runs/, which is all that the nodes share")
        if Path(args.config).is_absolute() or ".." in Path(args.config).parts:
            raise UserError(f"--config={args.config}: must lie in the checkout, of which the nodes have a copy")
    overrides = (f"--config.{o}" for o in args.overrides)
    train = ("frugalmoe", "train", f"--config={args.config}", *overrides, f"--workdir={workdir}")
    return Job(nodes, args.devices_per_node, train, workdir, Path.cwd(), hosts)


def _submit(command: tuple[str, ...], text: str, path: Path) -> None:
    """Writes the file beside the run directory and becomes the scheduler's program, whose exit code is ours."""
    program = shutil.which(command[0])
    if not program:
        raise UserError(f"{command[0]}: not found on this machine; --dry-run prints the file, to be started elsewhere")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())
    print(f"{' '.join(command)} {path}", flush=True)
    os.execv(program, [*command, str(path)])
