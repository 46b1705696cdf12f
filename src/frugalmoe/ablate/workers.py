"""Several processes, or SLURM array tasks, that train one study. Each claims runs by their locks until none is left.

A process on this machine gets its share of the CPU cores: a core that trains a run by itself never waits for another
(figures in `together.py`). The claims need a file system whose locks reach across machines: NFS 4, or Lustre mounted
with `flock`.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from frugalmoe.ablate.progress import StudyProgress
from frugalmoe.errors import UserError, needs_package
from frugalmoe.train.distributed import stop_signals

_POLL_SECONDS = 0.2


def run_processes(argv: Sequence[str], jobs: int, workdir: Path, shown: StudyProgress) -> bool:
    """Runs `frugalmoe ARGV --worker=process` in `jobs` processes until all have ended; returns whether a signal stopped
    them.
    """
    logs = [workdir / f"worker_{i}.log" for i in range(jobs)]
    workers = [_start(argv, cores, log) for cores, log in zip(share_cores(jobs), logs)]
    with stop_signals() as stop:
        while any(worker.poll() is None for worker in workers):
            if stop():
                for worker in workers:
                    worker.stdin.close()  # each saves and ends, as it does when this process dies
                for worker in workers:
                    worker.wait()
            shown.refresh()
            time.sleep(_POLL_SECONDS)
    for worker, log in zip(workers, logs):
        worker.stdin.close()
        if worker.returncode not in (0, 75) and not stop():
            last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
            raise UserError(f"{log}: a worker ended with exit code {worker.returncode}: {last}")
    return stop()


def _start(argv: Sequence[str], cores: set[int], log: Path) -> subprocess.Popen:
    own = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cores)  # inherited: XLA sizes its thread pool by it
        with log.open("wb") as file:
            command = [sys.executable, "-m", "frugalmoe.cli", *argv, "--worker=process"]
            # In a process group of its own, so that Ctrl-C in a terminal reaches only this process, which then ends the
            # workers.
            pipes = dict(stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT)
            return subprocess.Popen(command, **pipes, process_group=0)
    finally:
        os.sched_setaffinity(0, own)


def share_cores(jobs: int) -> list[set[int]]:
    """Returns this process's cores in `jobs` shares. If there are more jobs than cores, some shares hold all cores."""
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[i::jobs] or cores) for i in range(jobs)]


def end_with_parent() -> None:
    """Makes this worker save and end when the process that started it ends, however that ends."""

    def watch() -> None:
        while os.read(0, 1):  # not through sys.stdin, whose lock the interpreter wants when it ends
            pass
        os.kill(os.getpid(), 15)

    threading.Thread(target=watch, daemon=True).start()


def run_slurm(
    argv: Sequence[str], jobs: int, workdir: Path, shown: StudyProgress, parameters: Mapping[str, str]
) -> None:
    """Submits an array of `jobs` tasks through submitit and waits for them. `parameters` are submitit's, as
    slurm_partition.
    """
    try:
        import submitit
    except ImportError as e:
        raise needs_package("--slurm", "submitit>=1.5.4") from e
    parameters = {k: int(v) if v.isdigit() else v for k, v in parameters.items()}
    try:
        executor = submitit.AutoExecutor(folder=workdir / "slurm", cluster=parameters.pop("cluster", "slurm"))
        executor.update_parameters(**parameters)
    except (NameError, TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"--slurm: {' '.join(str(e).split())}") from e
    command = submitit.helpers.CommandFunction([sys.executable, "-m", "frugalmoe.cli", *argv, "--worker=task"])
    with executor.batch():
        tasks = [executor.submit(command) for _ in range(jobs)]
    while not all(task.done() for task in tasks):
        shown.refresh()
        time.sleep(_POLL_SECONDS)
    for task in tasks:
        if error := task.exception():
            raise UserError(f"{task.paths.stderr}: task {task.job_id} failed: {' '.join(str(error).split())[-200:]}")


def parse_parameters(text: str) -> dict[str, str]:
    """Returns NAME=VALUE pairs as a mapping: `a=1,b=2` becomes {"a": "1", "b": "2"}."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    for name, equals, _ in pairs:
        if not equals:
            raise UserError(f"--slurm={text}: {name!r} must be NAME=VALUE, as in slurm_partition=gpu,timeout_min=60")
    return {name: value for name, _, value in pairs}
