"""A supervisor starts runs again that are killed, frozen or crash, and lets those be that cannot go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import command, config_file, rows, run, without_times, write_text

from frugalmoe.commands.train import _without
from frugalmoe.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, UserError
from frugalmoe.train import supervise
from frugalmoe.train.supervise import Limits

FAKE = """
import os, sys, time, signal
workdir, pipe = sys.argv[1], int(os.environ["FRUGALMOE_SUPERVISED"])
starts = len(os.listdir(workdir)); open(f"{workdir}/{starts}", "w").close()
def tell(step): os.write(pipe, f"{step}\\n".encode())
"""


def fake(tmp_path: Path, body: str, **limits: float) -> tuple[int, int]:
    """(exit code, starts) of a program that tells steps; `starts` in it counts those before."""
    tmp_path.mkdir(exist_ok=True)
    program = [sys.executable, "-c", FAKE + body, str(tmp_path)]
    return supervise.supervise(program, program, tmp_path / "none", Limits(**limits)), len(list(tmp_path.iterdir()))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(supervise, "LONGEST_PAUSE", 0.05)


@pytest.mark.parametrize("code", [0, EXIT_USER_ERROR, EXIT_PREEMPTED])
def test_what_ends_for_good_is_not_started_again(tmp_path, code) -> None:
    assert fake(tmp_path, f"sys.exit({code})") == (code, 1)


def test_a_run_that_comes_further_each_time_is_started_without_end(tmp_path) -> None:
    body = "tell(starts); os.kill(os.getpid(), signal.SIGKILL) if starts < 9 else sys.exit(0)"
    assert fake(tmp_path, body, restarts=1) == (0, 10)


def test_a_run_that_comes_no_further_is_given_up(tmp_path, capfd) -> None:
    assert fake(tmp_path, "tell(3); sys.exit(1)", restarts=3) == (1, 4)
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "frugalmoe: the run ended with 1 after step 3; starting again in 0.05 s (1 of 3)"
    assert "3 starts have come no further" in said[-1]
    assert fake(tmp_path / "no", "sys.exit(7)", restarts=0) == (1, 1)


def test_a_run_that_makes_no_step_is_killed_and_started_again(tmp_path, capfd) -> None:
    body = "tell(5); time.sleep(60) if starts == 0 else sys.exit(0)"
    began = time.monotonic()
    assert fake(tmp_path, body, hang=1.0) == (0, 2)
    assert time.monotonic() - began < 20 and "made no step for 1 s after step 5" in capfd.readouterr().err


def test_junk_in_the_pipe_is_no_step(tmp_path) -> None:
    assert fake(tmp_path, 'os.write(pipe, b"\\xff\\n-3\\n\\n9e9\\n" + b"7" * 5); sys.exit(0)') == (0, 1)


@pytest.mark.parametrize(("obeys", "code"), [(True, EXIT_PREEMPTED), (False, EXIT_PREEMPTED)])
def test_a_request_to_stop_is_handed_on_once(tmp_path, obeys, code) -> None:
    """A run that does not obey is killed when its time to save is over."""
    handler = f"lambda *a: sys.exit({code})" if obeys else "lambda *a: None"
    body = f"signal.signal(signal.SIGTERM, {handler}); tell(1); [time.sleep(0.1) for _ in range(600)]"
    driver = (
        "import sys; from pathlib import Path; from frugalmoe.train.supervise import *\n"
        "sys.exit(supervise(sys.argv[1:], [], Path('none'), Limits(grace=1.5)))"
    )
    inner = [sys.executable, "-c", FAKE + body, str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-c", driver, *inner])
    while not list(tmp_path.iterdir()):
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == code and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("limits", [Limits(restarts=-1), Limits(hang=0.0), Limits(grace=float("nan"))])
def test_limits_that_are_none_are_refused(limits) -> None:
    with pytest.raises(UserError, match="--supervise"):
        supervise.check(limits)


def test_flags_of_supervision_are_taken_off_the_command() -> None:
    argv = ["train", "--supervise", "--supervise.hang", "9", "--supervise.grace=1", "--fresh", "--config=x", "--resume"]
    assert _without(argv, "--supervise") == ["train", "--fresh", "--config=x", "--resume"]
    assert _without([*argv, "never"], "--fresh", "--resume")[-1] == "--config=x"


def test_the_supervisor_imports_no_jax() -> None:
    program = "import sys, frugalmoe.train.supervise; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.slow
def test_a_run_that_is_killed_and_frozen_ends_as_if_nothing_had_been(tmp_path) -> None:
    fields = {"checkpoint.every_steps": 4, "train.steps": 60, "train.trackers": "", "train.eval_rows": 8}
    config = config_file(tmp_path, write_text(tmp_path / "text"), tmp_path / "cache", fields)
    calm, workdir = tmp_path / "calm", tmp_path / "run"
    done = run("train", f"--config={config}", f"--workdir={calm}")
    assert done.returncode == 0, done.stderr
    flags = ["--supervise", "--supervise.hang=45", "--fresh"]
    process = subprocess.Popen(
        command("train", f"--config={config}", f"--workdir={workdir}", *flags), stderr=subprocess.PIPE, text=True
    )
    for number, step in ((signal.SIGKILL, 10), (signal.SIGSTOP, 30)):
        os.kill(_when_at(workdir, step), number)
    said = process.communicate(timeout=500)[1]
    assert process.returncode == 0, said
    assert said.count("starting again") == 2 and "SIGKILL" in said and "made no step for 45 s" in said
    assert without_times(rows(workdir)) == without_times(rows(calm))
    assert [row["kind"] for row in rows(workdir, "events.jsonl")] == ["restart", "restart"]


def _when_at(workdir: Path, step: int) -> int:
    """The process that trains, when it has logged a step."""
    while True:
        log, lock = workdir / "metrics.jsonl", workdir / ".lock"
        if log.is_file() and lock.is_file() and any(row["step"] >= step for row in rows_of(log)):
            return int(lock.read_text())
        time.sleep(0.02)


def rows_of(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
