"""The run directory: who owns it, what config it holds, and its append-only logs. Analysis needs nothing else."""

import dataclasses
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import jax

from frugalmoe.config import Config, to_dict
from frugalmoe.errors import UserError
from frugalmoe.files import read_json, write_atomically


def is_complete(workdir: Path) -> bool:
    summary = workdir / "summary.json"
    return summary.is_file() and read_json(summary).get("status") == "complete"


def check_fresh(workdir: Path) -> None:
    """Refuses to start over in a directory that holds something, but no run of ours."""
    if workdir.is_dir() and any(workdir.iterdir()) and not (workdir / "config.json").is_file():
        raise UserError(f"--workdir={workdir}: --fresh deletes runs only, and this directory holds no config.json")


def start_over(workdir: Path) -> None:
    """Deletes a run; refuses a directory that is not one."""
    check_fresh(workdir)
    if workdir.is_dir() and any(workdir.iterdir()):
        shutil.rmtree(workdir)


def check_config(workdir: Path, config: Mapping[str, Any], force: bool) -> None:
    """Refuses to continue a run of another config, and names what differs. Mesh and trackers change no answer."""
    path = workdir / "config.json"
    if not path.is_file():
        if workdir.is_dir() and any(p.name != ".lock" for p in workdir.iterdir()):
            raise UserError(f"--workdir={workdir}: holds files but no config.json; give an empty or new directory")
        return
    saved = _completed(read_json(path), Config())
    saved |= {"mesh": config["mesh"], "train": saved["train"] | {"trackers": config["train"]["trackers"]}}
    differing = differences(saved, config, "there", "here")
    if differing and not force:
        shown = ", ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise UserError(
            f"--workdir={workdir}: holds a run with another config ({shown}); "
            "give another --workdir, or --resume=force to continue it with this one"
        )


def _completed(saved: Any, section: Any) -> Any:
    """A run's config with the fields that are younger than it, at their defaults: those leave things as they were."""
    if not isinstance(saved, Mapping):
        return saved
    new = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    fill = lambda name, value: (
        _completed(saved.get(name, {}), value) if dataclasses.is_dataclass(value) else saved.get(name, to_dict(value))
    )
    return {**saved, **{name: fill(name, value) for name, value in new.items()}}


def differences(ours: Any, theirs: Any, where: str, elsewhere: str, path: str = "") -> list[str]:
    """The fields in which two nested mappings differ, with both values and where each is."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        keys, prefix = sorted(ours.keys() | theirs.keys()), f"{path}." if path else ""
        return [d for k in keys for d in differences(ours.get(k), theirs.get(k), where, elsewhere, f"{prefix}{k}")]
    return [] if ours == theirs else [f"{path}: {ours!r} {where}, {theirs!r} {elsewhere}"]


class Busy(UserError):
    """Another process has the run directory."""


def check_idle(workdir: Path) -> None:
    """Raises `Busy` where a process is training; takes and writes nothing, so another may come before `locked`."""
    path = workdir / ".lock"
    if path.is_file():
        with path.open() as lock:
            _take(workdir, lock)


def _take(workdir: Path, lock: TextIO) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        raise Busy(f"--workdir={workdir}: process {lock.read().strip()} is training here") from None


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """One process per run directory: two would leave a mixture of both runs' checkpoints."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("a+")
    except OSError as e:
        raise UserError(f"--workdir={workdir}: cannot be written ({e.strerror})") from e
    with lock:
        _take(workdir, lock)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def environment() -> dict[str, Any]:
    """Versions, commit and devices, so that a result can be traced."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    devices = jax.devices()
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cpu_count": os.cpu_count(),
        "versions": {"frugalmoe": version("frugalmoe"), **{p: version(p) for p in packages}},
        "git_commit": _git_commit(),
        "platform": devices[0].platform,
        "devices": [d.device_kind for d in devices],
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


class Log:
    """A JSON-lines file. Opening it for a resumed run drops what is past the checkpoint, torn last line included."""

    def __init__(self, path: Path, step: int):
        if path.is_file():
            rows = [row for line in path.read_text().splitlines() if (row := _row(line)) and row["step"] <= step]
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file: TextIO = path.open("a")

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _row(line: str) -> dict | None:
    try:
        return json.loads(line)
    except ValueError:  # the write that a kill interrupted
        return None
