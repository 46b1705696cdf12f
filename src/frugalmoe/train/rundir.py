"""The run directory: who owns it, what config it holds, and its append-only logs."""

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import jax

from frugalmoe.config import RECORD, Config, completed, outside, record, recorded, settle
from frugalmoe.config.settle import left_open, open_again
from frugalmoe.data import Dataset
from frugalmoe.data.tokenizer import load_from
from frugalmoe.errors import UserError, of_disk, printable
from frugalmoe.fields import to_dict
from frugalmoe.files import is_temporary, read_json, remove_leftovers, to_json, write_atomically, write_json
from frugalmoe.shapes import misshapen
from frugalmoe.train.saved import DAMAGED, FOLDER, UNFINISHED, is_step
from frugalmoe.train.supervise import AGAIN

# What a run may write before config.json, which marks a directory as a run; then all that it writes.
_BEGINNING = ("checkpoints", "metrics.jsonl", "expert_load.jsonl", "tensorboard", "tokenizer", "environment.json",
              "data.json", "history.jsonl", "trackers.json", "wandb", "outside", "outside.json", "events.jsonl",
              "rounds.jsonl", "rollbacks.jsonl", "island.json", "island", "goodput.jsonl",
              "quarantine.jsonl", "supervisors")  # fmt: skip
_OWN = ("config.json", "environment.json", "data.json", "history.jsonl", "metrics.jsonl", "expert_load.jsonl",
        "summary.json", "probe.npz", "cross.json", "suite.json", ".*.json.*.tmp", ".*.jsonl.*.tmp",
        "tensorboard/events.out.tfevents.*", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
        "tokenizer/chat_template.jinja", "tokenizer/generation_config.json",
        "report/index.html", "report/*.png", "trace/step_*.npz", "trackers.json", "wandb", "profile",
        "outside.json", "outside/*/*.py", "source.json", "source/*", "events.jsonl", "rounds.jsonl", "rollbacks.jsonl",
        "island.json", "island/residual_*", "goodput.jsonl", "stuck-*.txt", "quarantine.jsonl")  # fmt: skip
_FOLDERS = ("checkpoints", "tensorboard", "tokenizer", "report", "trace", "outside/*", "outside", "source", "island")


def is_complete(workdir: Path) -> bool:
    """Whether a run is done, with a result: held-out losses that are numbers."""
    path = workdir / "summary.json"
    summary = read_json(path) if path.is_file() else {}
    try:
        return summary.get("status") == "complete" and all(map(math.isfinite, summary["eval"]["loss"].values()))
    except (AttributeError, LookupError, TypeError):  # a loss that is null, or no summary of ours
        return False


def check_no_links(workdir: Path) -> None:
    """Refuses a run directory in which what a run writes is a symbolic link: what is written, or deleted to start over,
    would lie elsewhere. The directory itself may be one.
    """
    names = {".lock", *(pattern.partition("/")[0] for pattern in (*_OWN, *_FOLDERS) if not pattern.startswith("."))}
    inside = workdir.glob("outside/*")
    if link := next(
        (path for path in (*(workdir / name for name in sorted(names)), *inside) if path.is_symlink()), None
    ):
        rule = "a run would write or delete what it leads to; put a folder or a file of its own in its place"
        raise UserError(f"--workdir={workdir}: {link.relative_to(workdir)} is a symbolic link: {rule}")


def check_fresh(workdir: Path) -> None:
    """Refuses to start over in a directory that holds something, but no run of ours."""
    check_no_links(workdir)
    if (workdir / RECORD).is_file():
        record(workdir / RECORD)
    elif _holds_something(workdir):
        raise UserError(f"--workdir={workdir}: --fresh deletes runs only, and this directory holds no {RECORD}")


def start_over(workdir: Path) -> None:
    """Deletes what a run wrote, and nothing else. To be called when the new run has the lock and all was checked."""
    check_fresh(workdir)
    for path in _own(workdir):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for folder in (folder for pattern in _FOLDERS for folder in workdir.glob(pattern)):
        with contextlib.suppress(OSError):  # it holds files of somebody else's
            folder.rmdir()


def size_of_run(workdir: Path) -> int:
    """Returns the bytes that `start_over` sets free."""
    files = [file for path in _own(workdir) for file in (path, *path.rglob("*"))]
    return sum(file.lstat().st_size for file in files if file.is_file())


def _own(workdir: Path) -> list[Path]:
    """Returns the files and folders that a run wrote into its directory, which may hold others too."""
    there = (workdir / FOLDER).glob("[0-9]*")  # whole ones, those that a kill interrupted, and damaged ones
    kinds = (UNFINISHED, DAMAGED)
    checkpoints = [path for path in there if is_step(path.name) or any(kind in path.name for kind in kinds)]
    return [*checkpoints, *(path for pattern in _OWN for path in sorted(workdir.glob(pattern)))]


def _holds_something(workdir: Path) -> bool:
    """Whether a directory without config.json holds more than what a run that was killed as it began leaves there."""
    if not workdir.is_dir():
        return False
    others = {path.name for path in workdir.iterdir()} - {".lock", *_BEGINNING}
    others = {name for name in others if not is_temporary(name)}
    return bool(others or any((workdir / "checkpoints").glob("[0-9]*")))


def check_config(workdir: Path, config: Config, force: bool) -> None:
    """Refuses to continue a run of another config, and names what differs. Mesh, trackers and what is done about
    faults may differ, for no result depends on them while there are none.

    A vocabulary that is not settled yet is not compared: when the run begins it is settled and this is called again. A
    file outside the package that the config names is the same file as long as its text is.
    """
    check_no_links(workdir)
    if not (workdir / RECORD).is_file():
        if _holds_something(workdir):
            raise UserError(f"--workdir={workdir}: holds files but no {RECORD}; give an empty or new directory")
        return
    here, ours = completed(to_dict(config)), config.model.vocab_size
    saved = record(workdir / RECORD) | {"mesh": here["mesh"]}
    changed = outside.compared(workdir, saved, config)
    if changed and not force:
        rule = "give another --workdir, or --resume=force to go on with it as it is now"
        raise UserError(f"--workdir={workdir}: {changed[0]}; {rule}")
    saved["model"]["vocab_size"] = ours and (vocabulary(workdir) or ours)
    saved["train"]["trackers"] = config.train.trackers
    saved["data"]["quarantine"] = config.data.quarantine
    saved["train"]["stuck_seconds"] = config.train.stuck_seconds
    saved["checkpoint"]["on_error"] = config.checkpoint.on_error
    if "eval_batches" in read_json(workdir / RECORD)["train"]:  # an older run goes on with the rows of today
        saved["train"]["eval_rows"] = config.train.eval_rows
    differing = differences(saved, here, "there", "here")
    if differing and not force:
        shown = ", ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise UserError(
            f"--workdir={workdir}: holds a run with another config ({shown}); "
            "give another --workdir, or --resume=force to continue it with this one"
        )


def vocabulary(workdir: Path) -> int:
    """Returns the `model.vocab_size` of the run in a directory, 0 where it is not known.

    Records that are older than `settle` leave it to the tokenizer, which lies beside them.
    """
    if size := record(workdir / RECORD)["model"]["vocab_size"]:
        return size
    with contextlib.suppress(UserError):
        return settle(Config(), load_from(workdir / "tokenizer").size, None).model.vocab_size
    return 0


def as_begun(config: Config, workdir: Path) -> Config:
    """Returns the config with the values that the directory's run began with, in fields that are younger than the run.

    No flag could ask for these values when the run began: the same command meant them.
    """
    path = workdir / RECORD
    saved = read_json(path) if path.is_file() else None
    data = saved.get("data") if isinstance(saved, Mapping) else None
    if not isinstance(data, Mapping) or "document_start" in data:
        return config
    data = dataclasses.replace(config.data, document_start=record(path)["data"]["document_start"])
    return dataclasses.replace(config, data=data)


def differences(ours: Any, theirs: Any, where: str, elsewhere: str) -> list[str]:
    """Returns the fields in which two nested mappings differ, with both values and where each is."""
    found = changes(ours, theirs)
    return [f"{path}: {a!r} {where}, {b!r} {elsewhere}" for path, (a, b) in found.items()]


def changes(ours: Any, theirs: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Returns {dotted field: (our value, their value)} of the fields in which two nested mappings differ."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        keys, prefix = sorted(ours.keys() | theirs.keys()), f"{path}." if path else ""
        found = [changes(ours.get(k), theirs.get(k), f"{prefix}{k}") for k in keys]
        return {field: values for part in found for field, values in part.items()}
    return {} if ours == theirs else {path: (ours, theirs)}


_OF_A_START = ("command", "versions", "git_commit", "platform", "devices", "processes", "xla_flags", "jax_options")
# What may change the bits of the same steps: of a start, with the layout of its devices.
_OF_THE_BITS = ("python", "machine", "versions", "platform", "devices", "processes", "xla_flags", "jax_options", "mesh")
_JAX_OPTIONS = (
    "jax_default_matmul_precision", "jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion", "jax_disable_jit", "jax_debug_nans",
)  # fmt: skip


def other_environment(workdir: Path, settled: Config) -> list[str]:
    """Returns a line on what has changed since the last start of a run that may change the bits of its steps; to be
    called before `describe`, which writes over it. What that start did not record is not compared.
    """
    if not (workdir / "environment.json").is_file():
        return []
    before, now = read_json(workdir / "environment.json"), environment() | {"mesh": to_dict(settled.mesh)}
    if not isinstance(before, Mapping):
        return []
    known = {**before, "mesh": record(workdir / RECORD)["mesh"]} if (workdir / RECORD).is_file() else before
    compared = [name for name in _OF_THE_BITS if name in known]
    found = differences({n: known[n] for n in compared}, {n: now[n] for n in compared}, "before", "now")
    shown = "; ".join(line[:120] for line in found[:6]) + (f"; and {len(found) - 6} more" if len(found) > 6 else "")
    rule = "steps from here on may differ in their last bits from those of a run that was not interrupted"
    return [printable(f"{workdir}: goes on in another environment ({shown}); {rule}")] if found else []


def describe(
    workdir: Path, config: Config, settled: Config, step: int, origin: Mapping[str, Any] | None = None
) -> None:
    """Writes what the run is from this start on, at `step`: config.json, environment.json, copies of the files outside
    the package that the config names, and a row in history.jsonl, which keeps what they said before.

    `config` is what was asked for, `settled` what runs.

    A row holds the time (UTC), the step, what `_OF_A_START` names of the environment, and `changes` of the config
    since the start before: field -> [then, now]; and the `origin` of a run that began with another's weights, which is
    given at the start that read them. A run that is older than its history has a first row without time.
    """
    known, here = workdir / RECORD, completed(to_dict(settled))
    before = record(known) if known.is_file() else here
    unknown = left_open(before)  # fields that a run older than `settle` did not record
    path, now = workdir / "history.jsonl", environment()
    rows = read_rows(path) if path.is_file() else []
    if not rows and known.is_file() and (workdir / "environment.json").is_file():
        first = read_json(workdir / "environment.json")
        rows = [{"time": None, "step": 0, **{k: first.get(k) for k in _OF_A_START}, "changes": {}}]
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    found = changes(open_again(before, unknown), open_again(here, unknown)) | _changed_files(workdir, config)
    began = origin or origin_of(workdir)
    rows += [{"time": time, "step": step, **{k: now[k] for k in _OF_A_START}, "changes": found}]
    rows[-1] |= {"origin": began} if began else {}
    write_rows(path, rows)
    write_json(workdir / "environment.json", now)
    outside.keep(workdir, config)
    write_json(known, recorded(config, settled))


def origin_of(workdir: Path) -> dict[str, Any] | None:
    """Returns the record of the run whose weights a run began with (`train.origin`), None for one that began anew."""
    path = workdir / "history.jsonl"
    rows = read_rows(path) if path.is_file() and (workdir / RECORD).is_file() else []
    found = rows[-1].get("origin") if rows else None
    kinds = {"run": str, "step": int, "state": str, "drop": list, "sha256": str}
    if found is not None and not (
        isinstance(found, dict) and all(isinstance(found.get(k), kind) for k, kind in kinds.items())
    ):
        raise UserError(f"{path}: a damaged record of the run that this one began with; --fresh starts over")
    return found


def copy_source(there: Path, workdir: Path) -> None:
    """Copies what a run that was made of a published model keeps of it, `source.json` and the files in `source/`."""
    for path in (there / "source.json", *sorted((there / "source").glob("*"))):
        if path.is_file():
            to = workdir / path.relative_to(there)
            to.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, to)


def describe_data(workdir: Path, data: Dataset) -> None:
    """Writes data.json: which data a run is about, and how much there is of it."""
    write_json(workdir / "data.json", _described(data))


def _described(data: Dataset) -> dict[str, Any]:
    described = {
        "fingerprint": data.fingerprint,
        "domains": list(data.domains),
        "train_tokens": data.train_tokens,
        "validation_tokens": data.validation_tokens,
        "remainder": data.remainder,
        "notes": [*data.manifest["notes"], *data.notes],
    }
    if data.validation:
        described["validation"] = {
            "fingerprint": data.validation.fingerprint,
            "domains": list(data.validation.domains),
            "tokens": data.validation.validation_tokens,
        }
    return described


def check_data(workdir: Path, data: Dataset, force: bool) -> list[str]:
    """Refuses to continue a run with other data, and names what differs; with `force` returns what to tell of it."""
    path = workdir / "data.json"
    there, here = (read_data(workdir), _described(data)) if path.is_file() else ({}, {})
    pairs = [("data", there, here)]
    if "validation" in there and "validation" in here:
        pairs.append(("validation set", there["validation"], here["validation"]))
    lines = []
    for what, old, new in pairs:
        if old.get("fingerprint") == new.get("fingerprint"):
            continue
        names = ("domains", "train_tokens", "validation_tokens", "tokens")
        counted = [{name: found[name] for name in names if name in found} for found in (old, new)]
        told = [printable(field[:200]) for field in differences(*counted, "there", "now")]
        told = told[:5] or ["as many tokens in the same domains, but other texts, tokenizer or weights"]
        prints = f"fingerprint {printable(old['fingerprint'][:80])} there, {new['fingerprint']} now"
        line = f"--workdir={workdir}: the run's {what} changed ({'; '.join(told)}; {prints})"
        if not force:
            raise UserError(f"{line}; put it back, or --resume=force to go on with it as it is now")
        lines.append(line)
    return lines


_DATA = {"fingerprint": str, "validation?": {"fingerprint": str}}


def read_data(workdir: Path) -> dict[str, Any]:
    """Returns the content of data.json. Raises `UserError` for what is none."""
    found = read_json(workdir / "data.json")
    if wrong := next(misshapen(found, _DATA), None) if isinstance(found, dict) else "all":
        raise UserError(f"{workdir / 'data.json'}: damaged: {wrong} is not as a run writes it")
    return found


def _changed_files(workdir: Path, config: Config) -> dict[str, tuple[str, str]]:
    """Returns `FIELD sha256` -> the hashes then and now, for files outside the package whose text has changed."""
    before = {field: row["sha256"] for field, row in outside.kept(workdir).items()}
    now = outside.hashes(config)
    changed = [field for field in before if now.get(field, before[field]) != before[field]]
    return {f"{field} sha256": (before[field], now[field]) for field in changed}


# Seconds that a run which goes on without a machine waits for the lock of that one: a file server cannot know at once
# that a machine has lost its power, and keeps its locks for a while (NFS: 90 s).
_LEASE = 150.0


class Busy(UserError):
    """Another process has the run directory."""


def check_idle(workdir: Path) -> None:
    """Raises `Busy` where a process is training. It keeps no lock, so another process may come before `locked`."""
    path = workdir / ".lock"
    if path.is_file():
        with contextlib.suppress(OSError), path.open() as lock:  # one that cannot be read is refused by `locked`
            _take(workdir, lock, fcntl.LOCK_SH)  # shared: the processes of a run may all look at one time


def _take(workdir: Path, lock: TextIO, kind: int = fcntl.LOCK_EX) -> None:
    until = time.monotonic() + (_LEASE if AGAIN in os.environ else 0.0)
    while True:
        with contextlib.suppress(OSError):
            return fcntl.flock(lock, kind | fcntl.LOCK_NB)
        if time.monotonic() >= until:
            lock.seek(0)
            raise Busy(f"--workdir={workdir}: process {lock.read().strip()} is training here")
        time.sleep(0.2)


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Locks a run directory for one process: two would leave a mixture of both runs' checkpoints."""
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
        remove_leftovers(workdir)
        yield


def environment() -> dict[str, Any]:
    """Returns versions, commit and devices, so that a result can be traced."""
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
        "jax_options": {name: str(getattr(jax.config, name)) for name in _JAX_OPTIONS if hasattr(jax.config, name)},
    }


@functools.cache  # of the code that this process has imported, whatever is committed since
def _git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


class Log:
    """A JSON-lines file. Opening it for a resumed run drops the rows after the checkpoint, and a torn last line; a row
    of the checkpoint's own step is not written twice, for a run that was killed after its last save ends once more.

    Rows that the disk has no space for wait in memory until it has, the rest of one that was torn too; `trouble` says
    what is wrong meanwhile.
    """

    def __init__(self, path: Path, step: int):
        rows = []
        if path.is_file():
            rows = [row for row in read_rows(path) if type(row.get("step")) is int and row["step"] <= step]
            write_rows(path, rows)
        self._path, self._file = path, path.open("ab", buffering=0)
        self._waiting, self.trouble = b"", ""
        self._there = [to_json(row) for row in rows if row["step"] == step]

    def write(self, row: Mapping[str, Any]) -> bool:
        """Returns whether the row was not there before."""
        if (line := to_json(row)) in self._there:
            return False
        self._waiting += line.encode() + b"\n"
        self.flush()
        return True

    def flush(self) -> str:
        """Writes what waits; returns the trouble with it, "" for none."""
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self.trouble = ""
        except OSError as error:
            if not of_disk(error):
                raise
            self.trouble = f"{self._path}: {error.strerror}: {len(self._waiting)} bytes are to be written"
        return self.trouble

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a JSON-lines file. Other lines are left out, as the last one after a kill."""
    rows = [_row(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return [row for row in rows if isinstance(row, dict)]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_atomically(path, "".join(to_json(row) + "\n" for row in rows).encode())


def _row(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
