"""A supervisor starts runs again that are killed, frozen or crash, and lets those be that cannot go on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from runs import command, config_file, rows, run, without_times, write_text

from frugalmoe.cli import main
from frugalmoe.commands.train import _without
from frugalmoe.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, UserError
from frugalmoe.train import gathering, supervise
from frugalmoe.train.gathering import Flags, Gathering
from frugalmoe.train.supervise import Limits

OF_TWO = ("--coordinator=h:1", "--num-processes=2", "--process-id=0")
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


BAD = [
    (("--supervise.wait=9",), "--supervise.wait=9: needs --supervise"),
    (
        ("--supervise", "--supervise.min-processes=1"),
        "--supervise.min-processes=1: needs --coordinator, --num-processes",
    ),
    (
        ("--supervise", "--supervise.min-processes=0"),
        "--supervise.min-processes=0: needs --coordinator, --num-processes",
    ),
    (("--supervise", "--supervise.min-processes=0", *OF_TWO), "--supervise.min-processes=0: must be from 1 to 2"),
    (("--supervise", "--supervise.min-processes=3", *OF_TWO), "--supervise.min-processes=3: must be from 1 to 2"),
    (("--supervise", "--supervise.wait=0", *OF_TWO), "--supervise.wait=0: must be positive, in seconds"),
    (("--supervise", *OF_TWO[:2]), "--coordinator=h:1 --num-processes=2: needs --process-id too"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=str)
def test_bad_flags_are_named_before_anything_is_written(tmp_path, capsys, flags, message) -> None:
    argv = ["train", "--config=quickstart:laptop", f"--workdir={tmp_path / 'run'}", *flags]
    assert main(argv) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith(f"frugalmoe: {message}") and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()


def test_where_fewer_may_go_on_a_process_that_is_asked_to_stop_leaves_the_others(tmp_path, monkeypatch, capfd) -> None:
    """The run tells with how many processes it can go on; its flags and its environment say in how many it does."""
    monkeypatch.setattr(gathering, "_SECONDS", 0.05)
    other = Gathering(tmp_path / "run", Flags("127.0.0.1:4000", 2, 1), 1.0, 1)

    def leave() -> None:
        with other:
            assert other.meet([], print).flags.processes == 2
            other.ends(EXIT_PREEMPTED)

    body = """
open(f"{workdir}/flags{starts}", "w").write(" ".join(sys.argv[2:] + [str("FRUGALMOE_STARTED_AGAIN" in os.environ)]))
most = int(os.environ["FRUGALMOE_PROCESSES"])
os.write(pipe, b"fits 1 2 junk 99\\n" if most == 2 else b""); tell(3)
sys.exit(0 if starts else 75)
"""
    (tmp_path / "starts").mkdir()
    program = [sys.executable, "-c", FAKE + body.replace("{starts}", "{min(starts, 1)}"), str(tmp_path / "starts")]
    with ThreadPoolExecutor() as pool:
        left = pool.submit(leave)
        others = Gathering(tmp_path / "run", Flags("127.0.0.1:4000", 2, 0), 1.0, 1)
        assert supervise.supervise(program, program, tmp_path / "run", Limits(), None, others) == 0
        left.result()
    first, second = ((tmp_path / "starts" / f"flags{i}").read_text().split() for i in range(2))
    assert first[1:] == ["--num-processes=2", "--process-id=0", "False"]
    assert second[1:] == ["--num-processes=1", "--process-id=0", "True"]
    said = capfd.readouterr().err
    assert "the run was asked to stop in another process after step 3, and saved; starting again in 0.05 s" in said
    assert "frugalmoe: the run goes on in process 0 of 2, without process 1\n" in said
    told = [row["what"] for row in rows(tmp_path / "run", "events.jsonl")]
    assert told[1] == "the run goes on in process 0 of 2, without process 1"


def test_the_lock_of_a_machine_that_is_gone_is_waited_for_by_a_run_that_goes_on(tmp_path, monkeypatch) -> None:
    from frugalmoe.train import rundir

    with contextlib.ExitStack() as holds:
        holds.enter_context(rundir.locked(tmp_path))
        with pytest.raises(rundir.Busy):
            rundir.check_idle(tmp_path)
        monkeypatch.setenv(supervise.AGAIN, "1")
        threading.Timer(0.5, holds.pop_all().close).start()
        began = time.monotonic()
        rundir.check_idle(tmp_path)
        assert time.monotonic() - began > 0.4


def test_the_supervisor_imports_no_jax() -> None:
    program = "import sys, frugalmoe.config, frugalmoe.train.supervise; sys.exit('jax' in sys.modules)"
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
