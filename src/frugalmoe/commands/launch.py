"""`frugalmoe launch SCHEDULER`."""

import argparse
import sys
from pathlib import Path

from frugalmoe.commands import add_config_flag, load_config
from frugalmoe.errors import UserError, did_you_mean

SUMMARY = "Train on several machines: check the run, fill in a template of launch/, hand it to the scheduler."
EXAMPLES = """\
  frugalmoe launch slurm --config=configs/small.py --nodes=4 --devices-per-node=8 --dry-run
  frugalmoe launch slurm --config=configs/small.py --nodes=4 --devices-per-node=8 --template=our.sbatch
  frugalmoe launch jobset --config=configs/small.py --nodes=4 --devices-per-node=8 --workdir=runs/long
  frugalmoe launch jobset --config=configs/small.py --nodes=4 --devices-per-node=4 \\
    --template=launch/jobset-tpu.yaml
  frugalmoe launch skypilot --config=configs/small.py --nodes=2 --devices-per-node=8
  frugalmoe launch ssh --config=configs/small.py --hosts=node1,node2 --devices-per-node=8

A run that was stopped goes on with the same command."""

MOST = 100_000  # nodes, or devices of one


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `frugalmoe launch`."""
    parser.add_argument("scheduler", metavar="SCHEDULER", help="slurm, jobset, skypilot, ssh")
    add_config_flag(parser)
    parser.add_argument("--nodes", type=int, help="machines, or hosts of a TPU slice (default: 1; for ssh all hosts)")
    parser.add_argument("--devices-per-node", type=int, required=True, help="GPUs or TPU chips of each")
    parser.add_argument("--hosts", metavar="A,B|FILE", help="for ssh: hosts, or a file with one per line")
    parser.add_argument("--workdir", type=Path, help="run directory, seen by all nodes (default: runs/<config name>)")
    parser.add_argument("--template", metavar="FILE", help="instead of the scheduler's in launch/")
    parser.add_argument("--dry-run", action="store_true", help="check all, print the file, start nothing")


def run(args: argparse.Namespace) -> int:
    """Fills in the template, checks it and the run, and becomes the scheduler's program; with --dry-run prints it."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # no device is needed here, and those that are there may be in use
    from frugalmoe.launch.checks import check_visible
    from frugalmoe.launch.job import fill, unedited
    from frugalmoe.launch.schedulers import SCHEDULERS, submit
    from frugalmoe.shipped import TEMPLATES
    from frugalmoe.train import preflight

    if args.scheduler not in SCHEDULERS:
        raise UserError(f"launch {args.scheduler}: unknown scheduler; {did_you_mean(args.scheduler, SCHEDULERS)}")
    scheduler = SCHEDULERS[args.scheduler]
    template = TEMPLATES.find(args.template or f"launch/{scheduler.template}", f"--template={args.template}")
    config = load_config(args)
    job = _make_job(args, args.workdir or Path("runs") / config.name, scheduler.copies)
    text = fill(template, job)
    try:
        scheduler.check(text, job)
    except UserError as e:
        raise UserError(f"{template}: {e}") from e
    # Where nodes have a copy of this directory, neither the run directory nor their mounts can be seen from here.
    unseen = check_visible(config, template.read_text()) if scheduler.copies else []
    notes = preflight.check(
        config,
        None if scheduler.copies else job.workdir,
        num_devices=job.nodes * job.devices_per_node,
        unseen=unseen,
    ).notes
    waiting = unedited(text)
    if waiting and template.is_absolute() and not args.template:
        waiting += ", of a copy that --template=FILE names"
    if args.dry_run:
        print(text, end="")
        notes += (f"{template}: before it can start, {waiting}",) if waiting else ()
        print("".join(f"note: {note}\n" for note in notes), end="", file=sys.stderr)
        return 0
    if waiting:
        raise UserError(f"{template}: {waiting}")
    submit(scheduler.submit, text, job.workdir.with_name(f"{job.workdir.name}.{template.name}"))
    return 0


def _make_job(args: argparse.Namespace, workdir: Path, copies: bool):
    from frugalmoe.launch.job import Job, read_hosts

    if (args.scheduler == "ssh") != (args.hosts is not None):
        raise UserError(f"--hosts={args.hosts}: is for ssh, which needs it; {args.scheduler} chooses nodes by itself")
    hosts = read_hosts(args.hosts) if args.hosts is not None else ()
    nodes = args.nodes if args.nodes is not None else len(hosts) or 1
    for flag, value in (("nodes", nodes), ("devices-per-node", args.devices_per_node)):
        if not 1 <= value <= MOST:
            raise UserError(f"--{flag}={value}: must be from 1 to {MOST}")
    if hosts and nodes != len(hosts):
        raise UserError(f"--nodes={nodes}: --hosts names {len(hosts)}")
    if any(c.isspace() for c in str(workdir)):
        raise UserError(f"--workdir={workdir}: must not contain spaces")
    if copies:
        if workdir.parts[:1] != ("runs",) or ".." in workdir.parts:
            raise UserError(f"--workdir={workdir}: must lie in runs/, which is all that the nodes share")
        if Path(args.config).is_absolute() or ".." in Path(args.config).parts:
            raise UserError(f"--config={args.config}: must lie in the checkout, of which the nodes have a copy")
    overrides = (f"--config.{o}" for o in args.overrides)
    train = ("frugalmoe", "train", f"--config={args.config}", *overrides, f"--workdir={workdir}")
    return Job(nodes, args.devices_per_node, train, workdir, Path.cwd(), hosts)
