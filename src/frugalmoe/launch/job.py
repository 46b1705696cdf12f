"""A job, and the template that it fills in."""

import dataclasses
import re
import shlex
import string
from pathlib import Path

from frugalmoe.errors import UserError, did_you_mean

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

    @property
    def name(self) -> str:
        """The run directory's, as a DNS label (RFC 1035), which all schedulers accept."""
        label = re.sub("[^a-z0-9]+", "-", self.workdir.name.lower()).strip("-")
        label = label if label[:1].isalpha() else f"run-{label}".rstrip("-")
        if len(label) > LONGEST_NAME:
            raise UserError(f"--workdir={self.workdir}: job name {label} must be at most {LONGEST_NAME} long")
        return label


class Template(string.Template):
    """`$lower_case` words are filled in; `$UPPER_CASE`, `$1`, `$(...)` and the like are the shell's."""

    idpattern = "[a-z_]+"
    flags = 0


def fill(path: Path, job: Job) -> str:
    """The template at `path` with the job's values in it."""
    try:
        template = Template(path.read_text())
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; run it in the checkout, or name a --template") from e
    values = {
        "name": job.name,
        "nodes": job.nodes,
        "devices_per_node": job.devices_per_node,
        "train": shlex.join(job.train),
        "workdir": job.workdir,
        "directory": shlex.quote(str(job.directory)),
        "hosts": shlex.join(job.hosts),
    }
    for word in template.get_identifiers():
        if word not in values:
            raise UserError(f"{path}: ${word}: unknown; {did_you_mean(word, values)}")
    return template.safe_substitute(values)


def read_hosts(text: str) -> tuple[str, ...]:
    """`a,b` or a file with one host per line, `#` comments -> hosts; the first one coordinates."""
    if (path := Path(text)).is_file():
        names = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    else:
        names = text.split(",")
    hosts = tuple(name for name in names if name)
    for host in hosts:
        if not re.fullmatch(r"[A-Za-z0-9_][\w.@:-]*", host):
            raise UserError(f"--hosts={text}: {host!r} is no host; give a file of hosts, or HOST,USER@HOST")
        if hosts.count(host) > 1:
            raise UserError(f"--hosts={text}: {host!r} twice; a host runs one process with all its devices")
    if not hosts:
        raise UserError(f"--hosts={text}: names no host")
    return hosts
