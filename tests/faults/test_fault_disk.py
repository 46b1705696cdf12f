"""A disk that is full while a run saves, logs or prepares data: it goes on or stops with a line, and loses nothing."""

import json
import time

import pytest
from faulted import EVERY, FIELDS, STEPS, Disk, Heard, assert_same, bits, events, saved, small_disk
from runs import config_file, figures, rows, run, tiny, write_text

from frugalmoe.cli import main
from frugalmoe.data import prepare
from frugalmoe.errors import UserError
from frugalmoe.train import checkpoint, saving
from frugalmoe.train.loop import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("disk")
    write_text(root / "text")
    return root


@pytest.fixture(scope="module")
def make(place):
    return lambda **fields: tiny(
        place / "text", place / "cache", FIELDS | {name.replace("__", "."): value for name, value in fields.items()}
    )


@pytest.fixture(scope="module")
def calm(place, make):
    train(make(), place / "calm", progress=Heard())
    return bits(place / "calm")


@pytest.fixture
def disk():
    with small_disk(16) as disk:
        yield disk


def when_saved(disk: Disk, step: int) -> None:
    """Waits for a step that is being written meanwhile."""
    while step not in saved(disk.path / "run"):
        time.sleep(0.01)


# Orbax closes the loop of writes that have not all failed yet.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("seen_before", [True, False])
def test_a_run_goes_on_when_the_disk_is_full_and_saves_when_it_is_not(make, calm, disk: Disk, monkeypatch, seen_before):
    """Full from step 5 to step 9: the saves of 6 and 8 fail, as they begin or while they are written."""
    if not seen_before:
        monkeypatch.setattr(checkpoint, "check_space", lambda *ignored: None)
    there: list[list[int]] = []
    look = lambda: there.append(saved(disk.path / "run"))
    left = 0 if seen_before else 100_000  # the manager makes folders, and logs go on
    fill = lambda: (when_saved(disk, 4), disk.fill(left), look())
    heard = Heard({5: fill, 7: look, 9: lambda: (look(), disk.free())})
    train(make(), disk.path / "run", progress=heard)
    assert_same(bits(disk.path / "run"), calm)
    told = events(disk.path / "run", "checkpoint")
    assert [row["step"] for row in told] == [6, 8], told
    for row in told:
        assert f"{disk.path}/run/checkpoints: No space left on device" in row["what"], row
        assert f"step {row['step']} is not saved, the last checkpoint is 4" in row["what"], row
        assert row["what"] in heard.said
    assert all(4 in steps for steps in there), there
    assert not list((disk.path / "run").rglob("*tmp*"))
    figures("F5 disk full at a save", 2, 2, 0)


def test_a_run_whose_last_step_cannot_be_saved_ends_and_goes_on_later(make, calm, disk: Disk, monkeypatch):
    monkeypatch.setattr(saving, "WAIT", 1.0)
    workdir = disk.path / "run"
    with pytest.raises(saving.NotSaved) as error:
        train(make(), workdir, progress=Heard({STEPS - 1: lambda: (when_saved(disk, STEPS - EVERY), disk.fill())}))
    message = str(error.value)
    assert message.startswith(str(workdir)) and "No space left on device" in message and "\n" not in message
    assert any(unit in message for unit in (" MB", " bytes")), message
    assert f"step {STEPS} is not saved, the last checkpoint is {STEPS - EVERY}" in message
    assert not (workdir / "summary.json").exists() and max(saved(workdir)) == STEPS - EVERY
    with pytest.raises(UserError, match="No space left on device"):
        train(make(), workdir, progress=Heard())
    disk.free()
    assert train(make(), workdir, progress=Heard())["status"] == "complete"
    assert_same(bits(workdir), calm)
    figures("F5 disk full at the end of a run", 1, 1, EVERY)


def test_the_last_save_waits_for_space(make, calm, disk: Disk, monkeypatch):
    looks = []
    sleep = lambda seconds: (looks.append(seconds), time.sleep(0.01), len(looks) == 3 and disk.free())
    monkeypatch.setattr(saving, "_pause", sleep)
    heard = Heard({STEPS - 1: lambda: (when_saved(disk, STEPS - EVERY), disk.fill())})
    train(make(), disk.path / "run", progress=heard)
    assert_same(bits(disk.path / "run"), calm)
    assert len(looks) == 3 and sum("the run waits up to 300 s for space" in line for line in heard.said) == 1
    told = [row["what"] for row in events(disk.path / "run", "checkpoint")]  # they waited too, with nothing after them
    assert sum("the run waits up to 300 s for space" in line for line in told) == 1


def test_the_policy_stop_stops(make, calm, disk: Disk):
    with pytest.raises(saving.NotSaved, match="step 6 is not saved, the last checkpoint is 4; the same command"):
        train(
            make(checkpoint__on_error="stop"),
            disk.path / "run",
            progress=Heard({5: lambda: (when_saved(disk, 4), disk.fill())}),
        )
    disk.free()
    train(make(), disk.path / "run", progress=Heard())
    assert_same(bits(disk.path / "run"), calm)
    with pytest.raises(UserError, match=r"checkpoint.on_error='never': unknown; valid: continue, stop"):
        make(checkpoint__on_error="never")


def test_logs_wait_for_space_and_a_torn_row_is_mended(make, calm, disk: Disk, capfd):
    """TensorBoard, which writes in a thread of its own, ends with a line and does not hold the run up."""
    fields = {"checkpoint__every_steps": 0, "train__trackers": "tensorboard"}
    heard = Heard({3: lambda: disk.fill(500), 9: disk.free})
    train(make(**fields), disk.path / "run", progress=heard)
    ours = bits(disk.path / "run")
    assert_same(ours, calm)
    told = [row["what"] for row in events(disk.path / "run", "log")]
    assert "No space left on device" in told[0] and "rows wait in memory" in told[0] and "are written" in told[-1]
    assert "Traceback" not in (said := "".join(capfd.readouterr())), said
    figures("F5 disk full at a row of metrics", 1, 1, 0)


def test_a_disk_that_is_full_while_data_are_prepared_is_one_line(place, make, disk: Disk, tmp_path):
    """What is whole stays, is not taken for all, and is not made again."""
    lines = [json.dumps({"text": f"{n} " * 2000, "domain": "ab"[n % 2]}) for n in range(1500)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    fields = {"data.path": str(tmp_path / "data.jsonl"), "data.cache_dir": str(disk.path)}
    whole = prepare(make(data__path=fields["data.path"], data__cache_dir=str(tmp_path / "cache")).data, progress=False)
    for left in (300_000, 20_000, 0):
        disk.fill(left)
        code = main(["data", "prepare", f"--config={config_file(tmp_path, place, place, FIELDS | fields)}"])
        assert code == 2
        assert not list(disk.path.glob("prepared/*/manifest.json"))
    disk.free()
    again = prepare(make(**{k.replace(".", "__"): v for k, v in fields.items()}).data, progress=False)
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    for name in names:
        assert name.endswith(".array_record") or (whole / name).read_bytes() == (again / name).read_bytes(), name
    figures("F5 disk full while data are prepared", 3, 3)


def test_the_command_says_it_in_one_line(place, disk: Disk, tmp_path):
    """A report that cannot be written does not undo the run: the same command writes it when there is space."""
    config = config_file(tmp_path, place / "text", place / "cache", FIELDS | {"train.steps": 2})
    done = run("train", f"--config={config}", f"--workdir={disk.path / 'run'}")
    assert done.returncode == 0, done.stderr
    disk.fill()
    done = run(
        "train", f"--config={config}", f"--workdir={disk.path / 'run'}", "--config.train.steps=4", "--resume=force"
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"frugalmoe: {disk.path / 'run'}") and "No space left on device" in done.stderr
    assert rows(disk.path / "run")[-1]["step"] == 2 and max(saved(disk.path / "run")) == 2
