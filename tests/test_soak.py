"""`frugalmoe soak`: the plan is that of its seed, faults are real, and a run whose end differs is found."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from runs import config_file, figures, run, write_text

from frugalmoe.cli import main
from frugalmoe.errors import UserError
from frugalmoe.train import goodput, soak
from frugalmoe.train.soak import KINDS, Fault, Soak

# Tells steps as a run does, from a file that says how far it came; saves at every tenth.
FAKE = """
import json, os, signal, sys, time
from pathlib import Path
workdir = Path(sys.argv[1]); workdir.mkdir(exist_ok=True)
log = workdir / "goodput.jsonl"
rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}}")] if log.is_file() else []
start = max([row["start"] for row in rows], default=-1) + 1
step = max([row["step"] for row in rows], default=0) // 10 * 10
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
began = time.time()
def tell(**more):
    now = time.time()
    row = dict(step=step, start=start, time=now, elapsed=now - began, seconds=dict(step=now - began), **more)
    with log.open("a") as file: file.write(json.dumps(row) + "\\n")
tell(back_to=step)
while step < {steps}:
    time.sleep(0.02); step += 1
    first = time.time() - began if "first" not in globals() else first
    tell(first_step=first)
{end}
"""


def fake(tmp_path: Path, end: str = "", steps: int = 60, **options) -> Soak:
    program = [sys.executable, "-c", FAKE.format(steps=steps, end=end), str(tmp_path / "run")]
    return Soak(program, tmp_path / "run", lambda text: None, steps, **options)


def test_a_plan_is_that_of_its_seed_and_has_each_kind_as_often():
    one = soak.plan(7, 23, 1000, tuple(KINDS))
    assert one == soak.plan(7, 23, 1000, tuple(KINDS)) != soak.plan(8, 23, 1000, tuple(KINDS))
    assert set(Counter(fault.kind for fault in one).values()) == {4, 5}
    assert [fault.step for fault in one] == sorted(fault.step for fault in one) and one[-1].step < 1000
    assert soak.plan(0, 0, 5, ("kill",)) == []
    with pytest.raises(UserError, match=r"--kinds=kill,melt: no fault is called 'melt'; valid: kill, term, "):
        soak.plan(0, 3, 5, ("kill", "melt"))


def test_each_kind_is_injected_and_the_program_started_until_it_ends(tmp_path):
    faults = [Fault(5 * n, 0.01, kind, n) for n, kind in enumerate(["kill", "term", "freeze", "damage", "tear"], 1)]
    ended = fake(tmp_path).run(faults)
    assert [fault.kind for fault in ended.faults] == [fault.kind for fault in faults]
    assert ended.starts == 5, "a freeze ends nothing"
    assert all(fault.recovered is not None and 0 < fault.recovered < 60 for fault in ended.faults)
    assert ended.faults[2].what.startswith("freeze for ") and "not yet two checkpoints" in ended.faults[3].what
    rows = goodput.read(tmp_path / "run/goodput.jsonl")
    assert rows[-1].step == 60 and {row.start for row in rows} == set(range(5))
    assert goodput.account(rows).seconds["restart"] > 0


def test_a_run_that_cannot_go_on_is_given_up(tmp_path):
    with pytest.raises(UserError, match=r"run: the run ended with 1: oh no; see .*run\.log"):
        fake(tmp_path, "print('oh no'); sys.exit(1)", steps=2).run()
    with pytest.raises(UserError, match="ended with 2"):
        fake(tmp_path, "sys.exit(2)", steps=2).run()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_too_and_what_it_started(tmp_path, number, code):
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)']).pid"
    run = f"import subprocess, sys, time; from pathlib import Path; p = {child}"
    run += "; Path(sys.argv[1]).write_text(str(p)); time.sleep(100)"
    pid = tmp_path / "pid"
    program = (
        "import sys; from pathlib import Path; from frugalmoe.train.soak import Soak\n"
        f"Soak([sys.executable, '-c', {run!r}, {str(pid)!r}], Path({str(tmp_path / 'run')!r}), print, 9, True).run()"
    )
    soaking = subprocess.Popen([sys.executable, "-c", program])
    while not (pid.is_file() and pid.read_text()):
        time.sleep(0.05)
    soaking.send_signal(number)
    assert soaking.wait(timeout=30) == code
    end = time.monotonic() + 10
    while (alive := Path(f"/proc/{pid.read_text()}/stat")).exists() and alive.read_text().split()[2] != "Z":
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--faults=-1", "--faults=-1: must be from 0"),
        ("--seconds=nan", "--seconds=nan: must be from 0"),
        ("--kinds=kill,", "no fault is called ''"),
        ("--workdir=HERE", "must be new or empty"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(tmp_path, capsys, flag, told):
    config = config_file(tmp_path, tmp_path / "text", tmp_path / "cache")
    flags = [f"--config={config}", f"--workdir={tmp_path / 'soak'}", flag.replace("HERE", str(tmp_path))]
    assert main(["soak", *flags]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "soak").exists()


@pytest.mark.slow
def test_a_run_under_faults_ends_as_the_calm_one(tmp_path):
    fields = {"train.steps": 60, "checkpoint.every_steps": 5, "train.trackers": "", "train.eval_rows": 8,
              "model.num_layers": 2, "model.dim": 16}  # fmt: skip
    config = config_file(tmp_path, write_text(tmp_path / "text"), tmp_path / "cache", fields)
    flags = ["--faults=3", "--kinds=kill,damage,term", "--seed=27", "--format=json"]
    done = run("soak", f"--config={config}", f"--workdir={tmp_path / 'soak'}", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["equal"] and sum(found["faults"].values()) == 3 and "fault 3 of 3" in done.stderr
    (of_run,) = found["runs"]
    # A fault may come while a start has not opened its run yet, which then has no row.
    assert of_run["starts"] == 4 and 2 <= of_run["goodput"]["starts"] <= 4
    assert of_run["goodput"]["seconds"].keys() >= {"restart", "step"} and 0 < found["useful"] < 1
    assert found["median_seconds_to_recover"] > 0 and "restart" not in found["calm"]["goodput"]["seconds"]
    figures("F26 soak: kill, damage, term", 3, 3, seconds=[found["median_seconds_to_recover"]])


@pytest.mark.slow
def test_an_end_that_differs_is_found(tmp_path):
    """The config reads its learning rate from the place it is run in: the run under faults has another."""
    fields = {"train.steps": 2, "train.trackers": "", "train.eval_rows": 8, "optim.warmup_steps": 1,
              "model.num_layers": 2, "model.dim": 16}  # fmt: skip
    config = config_file(tmp_path, write_text(tmp_path / "text"), tmp_path / "cache", fields)
    text = config.read_text().replace("return override", "c = override") + (
        "    import sys\n    c.optim.learning_rate = 1e-3 if any('calm' in a for a in sys.argv) else 1.0001e-3\n"
        "    return c\n"
    )
    config.write_text(text)
    done = run("soak", f"--config={config}", f"--workdir={tmp_path / 'soak'}", "--faults=0")
    assert done.returncode == 1, done.stderr
    assert "the end state DIFFERS from the calm run's" in done.stdout
