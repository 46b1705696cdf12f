"""A job, and the template that it fills in."""

import dataclasses
import re
import shlex
import sys
from pathlib import Path

from frugalmoe.errors import UserError, did_you_mean

EDIT = "EDIT-ME"
LONGEST_NAME = 40  # Kubernetes adds to it, and ends at 63


@dataclasses.dataclass(frozen=True)
class Job:
    """What changes from run to run; what changes from cluster to cluster is edited in the template."""

    nodes: int
    devices_per_node: int
    train: tuple[str, ...]  # the command that each process runs
    workdir: Path
    directory: Path  # where it runs
    hosts: tuple[str, ...] = ()
    bin: Path = Path(sys.executable).parent  # where `frugalmoe` is, here and on the nodes

    @property
    def name(self) -> str:
        """Returns the run directory's name as a DNS label (RFC 1035), which all schedulers accept."""
        label = re.sub("[^a-z0-9]+", "-", self.workdir.name.lower()).strip("-")
        label = label if label[:1].isalpha() else f"run-{label}".rstrip("-")
        if len(label) > LONGEST_NAME:
            raise UserError(f"--workdir={self.workdir}: job name {label} must be at most {LONGEST_NAME} long")
        return label


def fill(path: Path, job: Job) -> str:
    """The template at `path` with the job's values for its `$lower_case` words; `$UPPER_CASE`, `$1`, `$(...)` and the
    like are the shell's.
    """
    try:
        text = path.read_text()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from e
    values = {
        "name": job.name,
        "nodes": str(job.nodes),
        "devices_per_node": str(job.devices_per_node),
        "train": shlex.join(job.train),
        "workdir": str(job.workdir),
        "directory": shlex.quote(str(job.directory)),
        "bin": shlex.quote(str(job.bin)),
        "hosts": shlex.join(job.hosts),
    }

    def value(match: re.Match) -> str:
        if match[1] not in values:
            raise UserError(f"{path}: {match[0]}: unknown; {did_you_mean(match[1], values)}")
        return values[match[1]]

    return re.sub(r"\$([a-z_]+)", value, text)


def unedited(text: str) -> str:
    """Returns what the user has still to edit in a filled template; comments do not count."""
    lines = [str(i) for i, line in enumerate(text.splitlines(), start=1) if EDIT in line.partition("#")[0]]
    return f"put your own values in place of {EDIT}, in lines {', '.join(lines)}" if lines else ""


def read_hosts(text: str) -> tuple[str, ...]:
    """Returns the hosts of `a,b`, or of a file with one host per line and `#` comments; the first one coordinates."""
    if (path := Path(text)).is_file():
        names = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    else:
        names = text.split(",")
    hosts = tuple(name for name in names if name)
    if not hosts:
        raise UserError(f"--hosts={text}: names no host")
    for host in hosts:
        if not re.fullmatch(r"[A-Za-z0-9_][\w.@-]*", host):
            raise UserError(f"--hosts={text}: {host!r} is no host; give a file of hosts, or HOST,USER@HOST")
        if hosts.count(host) > 1:
            raise UserError(f"--hosts={text}: {host!r} twice; a host runs one process with all its devices")
    return hosts
