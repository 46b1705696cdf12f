"""The table of the runs in a directory: order, state, and in what their configs differ."""

import fcntl
import json

import pytest

from frugalmoe.analysis.stored.listing import list_runs
from frugalmoe.cli import main
from frugalmoe.config import default, override, recorded, resolve
from frugalmoe.errors import UserError
from frugalmoe.files import write_json


def write_run(path, rows=(), complete: bool = False, **changes):
    """A run directory as training leaves it, but for its checkpoints."""
    path.mkdir(parents=True)
    config = resolve(override(default(), {"name": path.name} | {k.replace("__", "."): v for k, v in changes.items()}))
    write_json(path / "config.json", recorded(config, config))
    history = {"time": "2026-01-02T03:04:05+00:00", "step": 0, "changes": {}}
    (path / "history.jsonl").write_text(json.dumps(history) + "\n")
    if rows:
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if complete:
        write_json(path / "summary.json", {"status": "complete", "eval": {"loss": {"mean": 1.0}}})


def logged(loss, step: int = 10, speed: float = 100.0):
    train = {"step": step, "loss/ce": loss, "speed/tokens_per_second": speed}
    return [train, {"step": step, "eval/loss/mean": loss, "eval/bits_per_byte/mean": loss and loss / 2}]


@pytest.fixture
def place(tmp_path):
    write_run(tmp_path / "a", logged(2.0, speed=300.0), complete=True)
    write_run(tmp_path / "study/fast/0", logged(1.5, 7), optim__learning_rate=0.5, train__seed=1)
    write_run(tmp_path / "study/slow/0", logged(3.0, speed=200.0), complete=True, model__moe__router="hash")
    write_run(tmp_path / "broken", logged(None))
    write_run(tmp_path / "young")
    return tmp_path


def test_runs_are_sorted_by_what_is_better(place):
    names = lambda by: [run.path for run in list_runs(place, by).runs]
    assert names("eval/loss/mean") == ["study/fast/0", "a", "study/slow/0", "broken", "young"]
    assert names("speed/tokens_per_second") == ["a", "study/slow/0", "broken", "study/fast/0", "young"]
    with pytest.raises(UserError, match=r"--by=loss/ec: no metric of these runs; did you mean 'loss/ce'\?"):
        list_runs(place, "loss/ec")


def test_each_run_says_how_far_it_is_and_in_what_it_differs(place):
    with (place / "young/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = {run.path: run for run in list_runs(place).runs}
    status = {path: run.status for path, run in found.items()}
    assert status == {
        "a": "complete",
        "study/fast/0": "stopped",
        "study/slow/0": "complete",
        "broken": "not finite",
        "young": "training",
    }
    assert {run.path: run.status for run in list_runs(place).runs}["young"] == "not begun"
    fast, slow = found["study/fast/0"], found["study/slow/0"]
    assert (fast.step, fast.steps, fast.started) == (7, 1000, "2026-01-02T03:04:05+00:00")
    assert fast.differences == {"optim.learning_rate": 0.5, "train.seed": 1}
    assert slow.differences["model.moe.router"] == "hash" and found["a"].differences == {}


def test_the_command_prints_a_table_and_json(place, capsys):
    assert main(["runs", str(place), "--by=speed/tokens_per_second"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["a", "study/slow/0", "broken", "study/fast/0", "young"]
    assert "training speed (tokens per second)" in lines[0] and "optim.learning_rate=0.5, train.seed=1" in lines[4]
    assert "10 of 1,000" in lines[1] and "2.000" in lines[1] and "2026-01-02 03:04" in lines[1]
    assert main(["runs", str(place / "a"), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["path"] == "a" and found["values"]["eval/loss/mean"] == 2.0


def test_a_name_that_a_terminal_would_obey_is_written_out(tmp_path, capsys):
    write_run(tmp_path / "plain")
    (tmp_path / "plain").rename(tmp_path / "red\x1b[31m\nrun")
    assert main(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "red\\x1b[31m run" in shown and "\x1b" not in shown


def test_what_is_damaged_is_told_and_the_others_are_listed(place, capsys):
    (place / "a/metrics.jsonl").write_text("{\n")
    (place / "young/config.json").write_text("{}")
    steps = json.loads((place / "broken/config.json").read_text())
    steps["train"]["steps"] = "many"
    (place / "broken/config.json").write_text(json.dumps(steps))
    (place / "study/slow/0/history.jsonl").write_text('{"time": 3}\n[]\n{')
    assert main(["runs", str(place)]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 3 and "metrics.jsonl line 1" in shown.err and "train.steps='many'" in shown.err
    assert [line.split()[0] for line in shown.out.splitlines()[1:]] == ["study/fast/0", "study/slow/0"]
    for path in (place / "nowhere", place / "young"):
        assert main(["runs", str(path)]) == 2
        assert "holds no run" in capsys.readouterr().err
