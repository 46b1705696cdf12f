"""Where a run's metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio, as `train.trackers` says.

A tracker is an optional onlooker. What it lacks is said before anything runs; what fails later is said once, and the
run goes on without it. Without a network, WANDB_MODE=offline keeps a run's files in its directory; Trackio's are on
this machine.
"""

import contextlib
import contextvars
import importlib.util
import io
import math
import os
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from frugalmoe.config import Config
from frugalmoe.config.checks import tracker_names
from frugalmoe.errors import UserError, needs_package
from frugalmoe.fields import to_dict
from frugalmoe.files import read_json, write_json

PROJECT = "frugalmoe"  # WANDB_PROJECT names another
RECORD = "trackers.json"  # in a run's directory: the id under which trackers know it


class Tracker(Protocol):
    """Receives a run's metrics. No other run has its `name`; `start` is the step from which it goes on."""

    def __init__(self, config: Config, workdir: Path, name: str, start: int) -> None: ...

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, config: Config, workdir: Path, name: str, start: int) -> None:
        from tensorboardX import SummaryWriter

        # A continued run writes the steps after its checkpoint again: those there are hidden.
        self.writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
        self._events = self.writer.file_writer.event_writer
        self._file = self._events._ev_writer._py_recordio_writer = _File(self._events._ev_writer._py_recordio_writer)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._check()
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()
        self._check()

    def _check(self) -> None:
        if self._file.error:
            self._events._event_queue.cancel_join_thread()  # the process does not wait for what is left in it
            raise self._file.error


class _File:
    """The file of TensorBoard's events, which a thread of its own writes: an error there would end that thread, and
    then the queue that it reads would be full and the run would wait for ever.
    """

    def __init__(self, file: Any) -> None:
        self._file, self.error = file, None

    def _safely(self, act: Any) -> None:
        try:
            if self.error is None:
                act()
        except OSError as error:
            self.error = error

    def write(self, data: bytes) -> None:
        self._safely(lambda: self._file.write(data))

    def flush(self) -> None:
        self._safely(self._file.flush)

    def close(self) -> None:
        self._safely(self._file.close)


class WandB:
    def __init__(self, config: Config, workdir: Path, name: str, start: int) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=config.name,
            id=name.rpartition("-")[2],
            config=to_dict(config),
            dir=workdir,
            resume="allow",
            reinit="create_new",  # a study trains several runs in a process
            settings=wandb.Settings(silent=True, console="off"),  # what the process prints is the user's
        )
        # W&B's own step can only grow, and a continued run writes the steps after its checkpoint again.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        offline = f"offline; `wandb sync {Path(self.run.dir).parent}` uploads it"
        where = offline if self.run.offline else self.run.url
        print(f"wandb: {where}", file=sys.stderr)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()

    @staticmethod
    def check() -> None:
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False, verify=False):
            raise UserError("train.trackers: wandb knows no account: run `wandb login`, or set WANDB_MODE=offline")


class Trackio:
    def __init__(self, config: Config, workdir: Path, name: str, start: int) -> None:
        import trackio

        # Trackio ends the run that it finds in the context; each of ours has its own.
        self.context = contextvars.Context()
        options = dict(project=PROJECT, name=name, config=to_dict(config), resume="allow", embed=False)
        with contextlib.redirect_stdout(io.StringIO()):
            self.run = self.context.run(trackio.init, **options)
        print(f"trackio: `trackio show --project={PROJECT}` shows {name}", file=sys.stderr)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.context.run(self.run.log, dict(values), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.context.run(self.run.finish)


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb>=0.31", "trackio": "trackio>=0.43"}


def check(config: Config) -> None:
    """Raises `UserError` where a tracker's package or account is missing."""
    for name in tracker_names(config):
        package = _PACKAGES[name].partition(">")[0]
        if importlib.util.find_spec(package) is None:
            raise needs_package(f"train.trackers={config.train.trackers!r}", _PACKAGES[name])
        getattr(TRACKERS[name], "check", lambda: None)()


class Trackers:
    """The trackers of a run, as one; none if `quiet`. A run that goes on is the same there; a fresh one is not."""

    def __init__(self, config: Config, workdir: Path, start: int, quiet: bool = False) -> None:
        names = () if quiet else tracker_names(config)
        record = workdir / RECORD
        known = read_json(record) if start and record.is_file() else {"id": uuid.uuid4().hex[:12]}
        if set(names) - {"tensorboard"}:
            write_json(record, known)
        name = f"{config.name.replace('/', '-')}-{known['id']}"
        self._open: dict[str, Tracker] = {}
        for tracker in names:
            self._safely(tracker, lambda t=tracker: self._open.update({t: TRACKERS[t](config, workdir, name, start)}))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs scalars under flat names. Those that are not finite are left out: not every tracker can hold them."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        for name, tracker in list(self._open.items()):
            self._safely(name, lambda t=tracker: t.log(step, finite))

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            self._safely(name, tracker.close)
        self._open.clear()

    def _safely(self, name: str, act: Any) -> None:
        try:
            act()
        except Exception as e:  # of many kinds: networks, disks, accounts
            self._open.pop(name, None)
            line = " ".join(str(e).split()) or "no reason given"
            print(f"{name}: {type(e).__name__}: {line}; the run goes on without it", file=sys.stderr)
