"""The schedulers that `frugalmoe launch` knows."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from frugalmoe.errors import UserError
from frugalmoe.files import write_atomically
from frugalmoe.launch import checks
from frugalmoe.launch.job import Job


class Scheduler(NamedTuple):
    """A template, its check, and the command that takes the filled file."""

    template: str
    check: Callable[[str, Job], None]
    submit: tuple[str, ...]
    copies: bool = False  # its processes see a copy of this directory, and share runs/ alone


SCHEDULERS = {
    "slurm": Scheduler("slurm.sbatch", checks.check_slurm, ("sbatch",)),
    # create, not apply, which leaves one that has ended as it is and says nothing
    "jobset": Scheduler("jobset.yaml", checks.check_jobset, ("kubectl", "create", "-f"), copies=True),
    "skypilot": Scheduler("skypilot.yaml", checks.check_skypilot, ("sky", "jobs", "launch"), copies=True),
    "ssh": Scheduler("ssh.sh", checks.check_ssh, ("bash",)),
}


def submit(command: tuple[str, ...], text: str, path: Path) -> None:
    """Writes the file beside the run directory and becomes the scheduler's program, whose exit code is ours."""
    program = shutil.which(command[0])
    if not program:
        raise UserError(f"{command[0]}: not found on this machine; --dry-run prints the file, to be started elsewhere")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())
    print(f"{' '.join(command)} {path}", flush=True)
    os.execv(program, [*command, str(path)])
