"""What the tests of faults share: a tiny run, the bits that it ends with, disks that fill, and the matrix's figures."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from runs import command, rows, without_times

LONG = bool(os.environ.get("FRUGALMOE_FAULTS_LONG"))  # the long form: as many injections as the matrix promises
STEPS, EVERY = 12, 2
FIELDS = {
    "train.steps": STEPS,
    "train.trackers": "",
    "train.eval_rows": 8,
    "checkpoint.every_steps": EVERY,
    "optim.warmup_steps": 1,
    "model.num_layers": 2,
    "model.moe.router": "sigmoid_bias",
    "model.vocab_size": 320,
}


def bits(workdir: Path) -> dict:
    """All that a run has come to: each array of its newest checkpoint, byte for byte, and its rows without times."""
    step = max(saved(workdir))
    found: dict = {"step": step}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        for item in sorted(path.name for path in (workdir / "checkpoints" / str(step)).iterdir() if path.is_dir()):
            path = workdir.absolute() / "checkpoints" / str(step) / item
            tree = reader.metadata(path).item_metadata.tree
            target = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            arrays = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=target))
            for name, leaf in jax.tree_util.tree_leaves_with_path(arrays):
                found[f"{item}{jax.tree_util.keystr(name)}"] = np.asarray(leaf).tobytes()
    for log in ("metrics.jsonl", "expert_load.jsonl"):
        found[log] = without_times(rows(workdir, log))
    return found


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if ours[name] != theirs[name]]


def saved(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def events(workdir: Path, kind: str) -> list[dict]:
    return [row for row in rows(workdir, "events.jsonl") if row["kind"] == kind]


class Forks:
    """Commands of `frugalmoe`, each a process, one at a time; see forks.py."""

    def __init__(self) -> None:
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._server = subprocess.Popen([sys.executable, Path(__file__).with_name("forks.py")], **pipes)
        self.pid, self.code, self._reading = 0, None, threading.Thread()

    def start(self, *argv: object, said: Path) -> None:
        print(json.dumps([list(map(str, argv)), str(said)]), file=self._server.stdin, flush=True)
        self.pid, self.code = json.loads(self._server.stdout.readline()), None
        self._reading = threading.Thread(target=self._wait, args=(self.pid,), daemon=True)
        self._reading.start()

    def _wait(self, pid: int) -> None:
        if line := self._server.stdout.readline():
            assert json.loads(line)[0] == pid
            self.code = json.loads(line)[1]

    def poll(self) -> int | None:
        return self.code

    def wait(self, timeout: float = 240) -> int:
        end = time.monotonic() + timeout
        while self.code is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError
            time.sleep(0.005)
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(30)
        if self.pid:
            self._reading.join()
        self._server.stdout.close()


def recovered(forks: Forks, begin, name: str, workdir: Path, at: int) -> float:
    """Seconds from a new start to the first step beyond that at which the run was killed."""
    began = time.monotonic()
    begin(name)
    while logged(workdir) <= at and forks.poll() is None:
        time.sleep(0.005)
    return time.monotonic() - began


class Heard:
    """What a run says and where it stands; `at` maps steps to what happens once they are logged."""

    def __init__(self, at: dict[int, Callable[[], None]] | None = None):
        self.said, self.at = [], dict(at or {})

    def __call__(self, *ignored):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error): ...

    def say(self, text):
        self.said.append(text)

    def update(self, step, *numbers):
        self.at.pop(step, lambda: None)()


class Disk:
    """A small disk that can be filled and freed."""

    def __init__(self, path: Path):
        self.path, self._filler = path, path / "filler"

    def fill(self, left: int = 0) -> None:
        """Leaves at most so many bytes."""
        with self._filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            for size in (2**16, 2**12, 1):
                while shutil.disk_usage(self.path).free > left and file.write(b"\1" * size):
                    pass

    def free(self) -> None:
        self._filler.unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(megabytes: int) -> Iterator[Disk]:
    """A tmpfs of its own; where none can be mounted the one that is there, /dev/shm, which has 64 MB in a container,
    is left with so much.
    """
    with tempfile.TemporaryDirectory() as place:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", place]).returncode == 0
        if mounted:
            try:
                yield Disk(Path(place))
            finally:
                subprocess.run(["umount", "-l", place], check=True)
            return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        reserve = Path(place) / "reserve"
        with reserve.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(place).free - megabytes * 2**20))
        yield Disk(Path(place))


def start(
    config: Path, workdir: Path, *flags: object, output: Path | None = None, **environment: str
) -> subprocess.Popen:
    """`frugalmoe train` in a process of its own, what it says in OUTPUT.out and .err, by default beside the run."""
    output = output or workdir
    line = command("train", f"--config={config}", f"--workdir={workdir}", *flags)
    out, err = (output.with_name(f"{output.name}.{stream}").open("a") for stream in ("out", "err"))
    with out, err:
        return subprocess.Popen(line, stdout=out, stderr=err, env=os.environ | environment, start_new_session=True)


def errors_of(workdir: Path) -> str:
    return workdir.with_name(f"{workdir.name}.err").read_text()


def trainer(supervisor: int) -> int:
    """The process that a supervisor has started."""
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children")
    while not (found := children.read_text().split()):
        time.sleep(0.01)
    return int(found[0])


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, timeout: float = 240) -> None:
    end = time.monotonic() + timeout
    while not condition() and process.poll() is None:
        if time.monotonic() > end:
            os.killpg(process.pid, signal.SIGKILL)
            raise TimeoutError
        time.sleep(0.002)


def logged(workdir: Path) -> int:
    """The last step that a run has logged; 0: none."""
    log = workdir / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
