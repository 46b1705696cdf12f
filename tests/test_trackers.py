"""Trackers beside metrics.jsonl, and traces of steps; W&B and Trackio themselves are in no environment of the tests."""

import struct
from pathlib import Path
from typing import ClassVar

import pytest
from runs import rows, tiny, write_text

import frugalmoe
from frugalmoe.cli import main
from frugalmoe.errors import UserError
from frugalmoe.files import read_json
from frugalmoe.train import loop, trackers
from frugalmoe.train.profile import profiled


class Notebook:
    """A tracker that writes down what it is told, and can break."""

    opened: ClassVar[list["Notebook"]] = []
    breaks = ""

    def __init__(self, config, workdir, name, start):
        self.name, self.start, self.logged, self.closed = name, start, [], 0
        self.opened.append(self)
        self._break("init")

    def log(self, step, values):
        self._break("log")
        self.logged.append((step, values))

    def close(self):
        self.closed += 1
        self._break("close")

    def _break(self, where):
        if self.breaks == where:
            raise ConnectionError("no\nnetwork")


@pytest.fixture
def notebook(monkeypatch):
    """Takes the place of Trackio in the table of trackers, and its package is there."""
    monkeypatch.setattr(Notebook, "opened", [])
    monkeypatch.setattr(Notebook, "breaks", "")
    monkeypatch.setitem(trackers.TRACKERS, "trackio", Notebook)
    monkeypatch.setitem(trackers._PACKAGES, "trackio", "json>=1")
    return Notebook


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    root = tmp_path_factory.mktemp("trackers")
    return write_text(root / "text"), root / "cache"


class Stopping(loop.Progress):
    """Ends a run after its fifth step, as Ctrl-C would."""

    def update(self, step, *rest):
        super().update(step, *rest)
        if step == 5:
            raise KeyboardInterrupt


# One config for all runs here, so that its step is compiled once.
FIELDS = {"train.trackers": "tensorboard,trackio", "checkpoint.every_steps": 4, "train.eval_every": 4}


@pytest.mark.slow
def test_a_tracker_sees_the_rows_of_the_log_and_a_continued_run_is_the_same(text, tmp_path, notebook):
    config = tiny(*text, FIELDS)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "run", progress=Stopping)
    frugalmoe.train(config, str(tmp_path / "run"))
    first, second = notebook.opened
    assert first.name == second.name and (first.start, second.start) == (0, 4)
    assert first.closed == second.closed == 1
    seen = [{"step": step, **values} for step, values in [*first.logged[: len(first.logged) - 1], *second.logged]]
    logged = {(row["step"], *row): row for row in rows(tmp_path / "run")}
    assert seen[-1] == rows(tmp_path / "run")[-1] and "eval/loss/mean" in seen[-1]
    assert all(row in seen for row in logged.values() if row["step"] > 4)
    alone = frugalmoe.train(tiny(*text, FIELDS | {"train.trackers": ""}), tmp_path / "run")
    assert alone["status"] == "complete" and len(notebook.opened) == 2  # the same run, whoever looks on
    frugalmoe.train(config, tmp_path / "run", fresh=True)
    assert notebook.opened[2].name != first.name and notebook.opened[2].start == 0


@pytest.mark.parametrize("where", ["init", "log", "close"])
def test_a_tracker_that_breaks_is_said_once_and_the_run_goes_on(tmp_path, notebook, capsys, where, text):
    notebook.breaks = where
    opened = trackers.Trackers(tiny(*text, {"train.trackers": "trackio,tensorboard"}), tmp_path, start=0)
    for step in (1, 2):
        opened.log(step, {"loss/ce": 2.0})
    opened.close()
    err = capsys.readouterr().err
    assert err == "trackio: ConnectionError: no network; the run goes on without it\n"
    assert scalars(tmp_path) == [("loss/ce", 1, 2.0), ("loss/ce", 2, 2.0)]


def test_what_is_not_finite_reaches_no_tracker(tmp_path, notebook, text, recwarn):
    opened = trackers.Trackers(tiny(*text, {"train.trackers": "trackio,tensorboard"}), tmp_path, start=0)
    opened.log(1, {"a": float("nan"), "b": float("inf"), "c": 3.0})
    opened.close()
    assert notebook.opened[0].logged == [(1, {"c": 3.0})]
    assert scalars(tmp_path) == [("c", 1, 3.0)] and not list(recwarn)


def scalars(workdir: Path) -> list[tuple[str, int, float]]:
    """(name, step, value) of the scalars in TensorBoard's event files: records of length, crc, content, crc."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((workdir / "tensorboard").glob("events*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack_from("<Q", data)
            event = Event.FromString(data[12 : 12 + size])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            data = data[16 + size :]
    return found


def test_a_package_that_is_missing_is_said_before_anything_runs(text, tmp_path, monkeypatch, capsys):
    config = tiny(*text, {"train.trackers": "wandb"})
    monkeypatch.setitem(trackers._PACKAGES, "wandb", "nothing_of_that_name>=2")
    with pytest.raises(UserError, match=r"train\.trackers='wandb': needs .* pip install 'nothing_of_that_name>=2'"):
        frugalmoe.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_profile_holds_the_steps_that_were_asked_for(text, tmp_path, capsys, notebook):
    config = tiny(*text, FIELDS)
    loop.train(config, tmp_path / "run", progress=profiled(3, tmp_path / "run/profile"))
    (trace,) = (tmp_path / "run/profile").glob("plugins/profile/*/*.xplane.pb")
    content = trace.read_bytes()
    assert b"step_num" in content and b"train" in content  # by which XProf tells steps
    assert f"xprof --logdir={tmp_path / 'run/profile'}" in capsys.readouterr().out.replace("\n", "")


def test_a_profile_of_no_steps_is_refused(text, capsys):
    assert main(["train", "--config=quickstart:laptop", "--profile=0"]) == 2
    assert capsys.readouterr().err == "frugalmoe: --profile=0: must be at least 1\n"


def test_the_id_of_a_run_is_kept_only_where_a_tracker_needs_it(tmp_path, text, notebook):
    trackers.Trackers(tiny(*text), tmp_path, start=0).close()
    assert not (tmp_path / trackers.RECORD).exists()
    trackers.Trackers(tiny(*text, {"train.trackers": "trackio"}), tmp_path, start=0).close()
    assert read_json(tmp_path / trackers.RECORD)["id"] in notebook.opened[0].name
