"""The ledger of a run's wall time: nothing counts twice, all is counted, and it tells what a history really was."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import command, config_file, figures, rows, tiny, write_text

from frugalmoe import sharding
from frugalmoe.ablate import worktime
from frugalmoe.ablate.worktime import WorkTime
from frugalmoe.analysis import load_run, write_report
from frugalmoe.config.checks import check_devices
from frugalmoe.files import read_json
from frugalmoe.train import goodput, ledger
from frugalmoe.train.goodput import KINDS, Row
from frugalmoe.train.ledger import Ledger
from frugalmoe.train.loop import opened, train, train_runs

FIELDS = {
    "train.steps": 4,
    "checkpoint.every_steps": 2,
    "model.num_layers": 2,
    "model.dim": 16,
    "train.eval_rows": 8,
    "train.trackers": "",
    "optim.warmup_steps": 1,
}


class Clock:
    """Clocks that a test turns: the monotonic one, and the wall's, which may be set."""

    def __init__(self, monkeypatch):
        self.now, self.wall = 100.0, 1e9
        monkeypatch.setattr(ledger.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(ledger.time, "time", lambda: self.wall)

    def go(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def kept(seconds: dict) -> dict:
    return {kind: round(value, 3) for kind, value in seconds.items()}


# ---------------------------------------------------------------- the stopwatch


def test_what_jax_reports_is_taken_from_the_open_phase_and_once(clock, tmp_path):
    with Ledger() as times:
        times.attach(tmp_path, 0)
        with times.phase("step"):
            clock.go(10)
            clock.go(1)  # the trace of an inner function, which the outer one's 3 seconds hold
            jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_trace_duration", 1.0)
            clock.go(1)
            jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_trace_duration", 3.0)
            clock.go(5)
            jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 5.0)
            jax.monitoring.record_event_duration_secs("/jax/something/else", 4.0)
            with times.phase("data"):
                clock.go(2)
            with times.phase("data"):
                clock.go(3)
                times.rather("step")
        clock.go(0.5)
        times.write(1)
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 5.0)  # nobody listens
    times.write(1)
    found = times.account()
    assert kept(found.seconds) == {"step": 12, "setup": 0.5, "tracing": 3, "compiling": 5, "data": 2}
    assert found.wall == pytest.approx(22.5)


@pytest.mark.parametrize("reported", [-3600.0, 3600.0])
def test_a_clock_that_is_set_while_a_program_compiles_makes_no_second_and_takes_none(clock, tmp_path, reported):
    with Ledger() as times:
        times.attach(tmp_path, 0)
        with times.phase("step"):
            clock.go(4)
            jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", reported)
        times.write(1)
    found = times.account().seconds
    assert sum(found.values()) == pytest.approx(4) and min(found.values()) >= 0


def test_the_imports_of_the_program_are_the_first_seconds(clock, tmp_path):
    times = Ledger(clock.now - 2.5)
    clock.go(1)
    times.attach(tmp_path, 0)
    assert kept(times.account().seconds) == {"imports": 2.5, "setup": 1}


def test_processes_of_a_study_account_for_all_of_their_time(clock, tmp_path):
    """Two workers of 10 and 7 seconds, whose parent took 2 seconds before, waited 11, and reports for 1: 28 seconds of
    two processes. A process that trained nothing says nothing.
    """
    lead = WorkTime(tmp_path, Ledger(began=clock.now - 2.0))
    workers = [WorkTime(tmp_path, Ledger()) for _ in range(3)]
    for number, worker in enumerate(workers):
        worker._name = f"worker {number}"
    clock.go(10.0)
    workers[0].times.take({"step": 9.0, "compiling": 0.5})
    workers[0].write()
    workers[1].times._since += 3.0  # it began later
    workers[1].times.take({"step": 6.0, "evaluation": 1.0})
    workers[1].write()
    workers[2].write()
    found = worktime.processes(tmp_path)
    assert kept(found["worker 0"]) == {"setup": 0.5, "step": 9.0, "compiling": 0.5}
    assert kept(found["worker 1"]) == {"setup": 0.0, "step": 6.0, "evaluation": 1.0} and len(found) == 2
    lead.times._seconds, lead.times._since, lead.times._kind = {"imports": 2.0, "idle": 11.0}, clock.now, "report"
    clock.go(1.0)
    lead.write_lead(jobs=2)
    (own,) = (of for name, of in worktime.processes(tmp_path).items() if name not in found)
    assert kept(own) == {"imports": 4.0, "report": 2.0, "idle": 5.0}
    assert worktime.line(tmp_path) == (
        "53.6% of 0.467 minutes of wall time, added up over processes, was training steps; "
        "idle 17.9%, imports 14.3%, report 7.1%, evaluation 3.6%"
    )
    (tmp_path / worktime.FILE).write_text('{"a": {"step": -1}, "b": 7, "c": {"step": 60, "setup": 0}, "d": {"x": 1}}')
    assert worktime.line(tmp_path) == "100.0% of 1.00 minutes of wall time, added up over processes, was training steps"
    (tmp_path / worktime.FILE).write_text('{"a": {"st')
    assert worktime.line(tmp_path) == ""


def test_rows_are_few_and_each_has_all_that_was(clock, tmp_path):
    times = Ledger()
    times.attach(tmp_path, 0)
    for step in range(1, 100_001):  # more than a day
        with times.phase("step"):
            clock.go(1.0)
        times.stepped(step)
    there = goodput.read(tmp_path / goodput.FILE)
    assert len(there) < 4000
    assert there[-1].step > 100_000 * 0.997 and there[-1].seconds["step"] == pytest.approx(there[-1].step, abs=1)


def test_what_cannot_be_written_is_not_lost(clock, tmp_path):
    times = Ledger()
    times.attach(tmp_path / "no", 0)
    clock.go(1)
    times.write(1)
    assert kept(times.account().seconds) == {"setup": 1}
    (tmp_path / "no").mkdir()
    clock.go(1)
    times.write(2)
    assert [row.elapsed for row in goodput.read(tmp_path / "no" / goodput.FILE)] == [2]


JUNK = ["5", "[]", '{"step": 1}', '{"st', "\x00\xff", '{"step": 1, "start": 0, "time": 1, "elapsed": 1, "seconds": 5}',
        '{"step": "1", "start": 0, "time": 1, "elapsed": 1, "seconds": {}}', "[" * 100_000,
        '{"step": 1, "start": 0, "time": NaN, "elapsed": 1, "seconds": {}}',
        '{"step": 1, "start": 0, "time": 1, "elapsed": 1, "seconds": {"sleep": 3}}',
        '{"step": 1, "start": 0, "time": 1, "elapsed": 1, "seconds": {"step": null}}',
        '{"step": 1, "start": 0, "time": 1, "elapsed": 1, "seconds": {}, "ended": 3}',
        '{"step": 1, "start": 0, "time": 1, "elapsed": 1, "seconds": {}, "first_step": []}',
        '{"step": 1, "start": 0, "time": 1, "elapsed": 1, "seconds": {}, "first_step": false}',
        '{"step": 1, "start": 0, "time": 1, "elapsed": 1, "seconds": {}, "back_to": ""}']  # fmt: skip


def test_lines_that_are_no_rows_are_left_out(clock, tmp_path):
    times = Ledger()
    times.attach(tmp_path, 0)
    path = tmp_path / goodput.FILE
    path.write_bytes(path.read_bytes() + "\n".join(JUNK).encode("latin-1"))
    assert len(goodput.read(path)) == 1
    times.write(1)  # the last piece of junk, a line without an end, makes room
    assert len(goodput.read(path)) == 2


# ---------------------------------------------------------------- the account of many starts


class History:
    """A run that is killed and stopped at random: its `rows`, and what really became of its seconds, `truth` by kind.

    The seconds of each step are kept in `done`, from which a start that goes back takes those after its checkpoint.
    """

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.rows, self.truth, self.recoveries, self.done = [], dict.fromkeys(KINDS, 0.0), [], {}
        self.now, self.saved, self.away = 1e9, 0, None  # away: seconds since a death, before a step
        for number in range(self.rng.integers(1, 6)):
            if number:
                gap = self.rng.uniform(0, 50)
                self.now += gap
                self.count("stopped", gap)
            self.start(number)
            ended = self.make_steps(self.rng.integers(1, 20)) if self.rng.random() < 0.8 else False
            if not ended and self.away is None:
                self.away = 0.0  # of what is not in a row the next start makes a part of its gap

    def count(self, kind: str, seconds: float) -> None:
        if self.away is not None:
            self.away, kind = self.away + seconds, "restart"
        self.truth[kind] += seconds

    def spend(self, kind: str, seconds: float) -> float:
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds
        self.now, self.elapsed = self.now + seconds, self.elapsed + seconds
        return seconds

    def row(self, **more) -> None:
        values = self.number, self.now, self.elapsed, dict(self.seconds), self.first
        self.rows.append(Row(self.step, *values, **more))

    def start(self, number: int) -> None:
        for step in [step for step in self.done if step > self.saved]:
            self.truth["lost"] += self.done.pop(step)
        self.number, self.step, self.elapsed, self.seconds, self.first = number, self.saved, 0.0, {}, None
        self.count("imports", self.spend("imports", self.rng.uniform(0, 5)))
        self.row(back_to=self.saved)

    def make_steps(self, steps: int) -> bool:
        """Whether the start ended in order."""
        self.count("compiling", self.spend("compiling", self.rng.uniform(0, 9)))
        for _ in range(steps):
            worked = self.spend("step", self.rng.uniform(0, 2))
            self.step, self.first = self.step + 1, self.first or self.elapsed
            if self.away is None:
                self.done[self.step] = worked
            else:
                self.count("step", worked)
                self.recoveries.append(self.away)
                self.away = None
            self.row()
            if self.rng.random() < 0.3:
                self.saved = self.step
        if self.rng.random() < 0.4:
            self.saved = self.step
            self.row(ended="stopped")
            return True
        return False


@pytest.mark.parametrize("seed", range(40))
def test_the_account_is_what_really_happened(seed):
    history = History(seed)
    truth = history.truth | {"step": sum(history.done.values())}
    found, wall = goodput.account(history.rows), history.now - 1e9
    assert found.wall == pytest.approx(wall, rel=1e-6)
    assert found.seconds == pytest.approx({kind: value for kind, value in truth.items() if value}, rel=1e-5, abs=1e-4)
    assert found.recoveries == pytest.approx(history.recoveries, abs=1e-4)
    assert sum(map(sum, (start.values() for start in found.by_start))) == pytest.approx(wall, rel=1e-6)
    figures("F26 deaths in a made-up history, accounted for", len(history.recoveries), len(found.recoveries))


def test_a_run_that_goes_back_has_lost_what_it_did_since(clock, tmp_path):
    times = Ledger()
    times.attach(tmp_path, 0)
    for step in range(1, 8):
        with times.phase("step"):
            clock.go(10.0)
        if step < 7:
            times.stepped(step)  # the seventh has no row when the run goes back
    with times.phase("checkpoint"):
        clock.go(0.5)  # reads the checkpoint of step 4
    times.write(4, back_to=4)
    with times.phase("step"):
        clock.go(10.0)
    times.stepped(5)
    assert kept(times.account().seconds) == {"step": 50, "lost": 30.5}


def test_a_wall_clock_that_was_set_back_between_starts_takes_nothing_away():
    begun = {"step": 9, "start": 0, "time": 5000.0, "elapsed": 9.0, "seconds": {"step": 9.0}}
    again = begun | {"start": 1, "time": 1409.0}
    found = goodput.account([Row(**begun), Row(**again, back_to=9)])
    assert found.seconds == {"step": 9.0, "restart": 9.0} and found.wall == 18


# ---------------------------------------------------------------- runs


class Quiet:
    def __init__(self, *ignored): ...

    def __enter__(self):
        return self

    def __exit__(self, *error): ...

    def say(self, text): ...

    def update(self, *numbers): ...


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("goodput")
    write_text(root / "text")
    return root


def timed(act) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


@pytest.mark.slow
def test_a_run_in_a_program_that_is_old_accounts_for_itself_alone(place):
    config = tiny(place / "text", place / "cache", FIELDS)
    workdir = place / "run"
    seconds = timed(lambda: train(config, workdir, progress=Quiet))
    of_run = read_json(workdir / "summary.json")["goodput"]
    assert of_run["starts"] == 1 and of_run["recoveries"] == {"count": 0}
    assert sum(of_run["seconds"].values()) == pytest.approx(of_run["wall_seconds"])
    assert of_run["wall_seconds"] <= seconds and seconds - of_run["wall_seconds"] < 0.01 * seconds + 0.5
    assert of_run["seconds"].keys() >= {"setup", "tracing", "compiling", "data", "step", "evaluation", "checkpoint"}
    assert "imports" not in of_run["seconds"]
    train(tiny(place / "text", place / "cache", FIELDS | {"train.steps": 5}), workdir, resume="force", progress=Quiet)
    found = load_run(workdir).goodput
    assert len(found.by_start) == 2 and found.seconds["stopped"] >= 0 and "restart" not in found.seconds
    assert {row.back_to for row in goodput.read(workdir / goodput.FILE)} == {None, 0, 4}
    page = write_report(workdir).read_text()
    assert "Wall time" in page and "of wall time in 2 starts were training steps" in page
    assert (workdir / "report/goodput.png").is_file()


@pytest.mark.slow
def test_runs_of_one_program_have_its_whole_time_each(place):
    configs = [tiny(place / "text", place / "cache", FIELDS | {"train.seed": seed}) for seed in (0, 1)]
    began = time.perf_counter()
    with jax.set_mesh(sharding.make_mesh(check_devices(configs[0], 1))), ExitStack() as held:
        runs = [held.enter_context(opened(c, place / f"pair{i}")) for i, c in enumerate(configs)]
        train_runs(runs, Quiet)
    seconds = time.perf_counter() - began
    first, second = (read_json(place / f"pair{i}/summary.json")["goodput"] for i in (0, 1))
    assert first["wall_seconds"] <= seconds and second["wall_seconds"] <= seconds
    for kind in ("step", "checkpoint"):
        assert first["seconds"][kind] == pytest.approx(second["seconds"][kind], rel=0.3, abs=0.3)


@pytest.fixture(scope="module")
def calm(place):
    """A run as a program of its own, and its seconds as the one who started it measured them."""
    fields = FIELDS | {"train.steps": 800, "checkpoint.every_steps": 50, "train.log_every": 10}
    config = config_file(place, place / "text", place / "cache", fields)
    started = Started(config, place / "calm", "--timings")
    return started, started.ended()


class Started:
    def __init__(self, config: Path, workdir: Path, *flags: str):
        self.workdir, self.config = workdir, config
        self.began = time.time()
        self.process = subprocess.Popen(
            command("train", f"--config={config}", f"--workdir={workdir}", *flags),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )

    def ended(self) -> float:
        """Waits for the end; returns when the path of the report was printed, after which the process just ends."""
        at, self.printed = 0.0, []
        with self.process:
            for line in self.process.stdout:
                self.printed.append(line)
                at = time.time() if line.startswith(("report:", "stopped at")) else at
            assert self.process.wait(60) in (0, 75), self.process.stderr.read()
        return at

    def when_at(self, step: int) -> int:
        """The process that trains, when it has logged a step."""
        while not any(row.step >= step for row in goodput.read(self.workdir / goodput.FILE)):
            time.sleep(0.02)
        return int((self.workdir / ".lock").read_text())


def of(workdir: Path) -> dict:
    return read_json(workdir / "summary.json")["goodput"]


@pytest.mark.slow
def test_a_calm_run_accounts_for_its_process(calm):
    started, end = calm
    found = of(started.workdir)
    assert found["wall_seconds"] == pytest.approx(end - started.began, rel=0.01)
    assert sum(found["seconds"].values()) == pytest.approx(found["wall_seconds"], rel=1e-6)
    printed = "".join(started.printed)
    assert "wall time of this start" in printed and "wall time of all starts" not in printed
    for kind in ("imports", "tracing", "compiling", "data", "step", "evaluation", "checkpoint", "report"):
        assert found["seconds"][kind] > 0 and f"{kind} " in printed


@pytest.mark.slow
def test_a_run_that_is_killed_and_stopped_accounts_for_all_of_it(calm):
    """Killed once under the supervisor, then stopped once, then run to the end: by the clock of who started it."""
    config, workdir = calm[0].config, calm[0].workdir.with_name("killed")
    first = Started(config, workdir, "--supervise")
    os.kill(first.when_at(75), signal.SIGKILL)
    killed = time.time()
    first.when_at(400)
    again = next(row for row in goodput.read(workdir / goodput.FILE) if row.start == 1 and row.first_step)
    recovered = again.time - again.elapsed + again.first_step - killed
    first.process.send_signal(signal.SIGTERM)
    stopped = first.ended()
    assert first.process.returncode == 75
    time.sleep(3)
    second = Started(config, workdir)
    gap = second.began - stopped
    end = second.ended()
    found, made = of(workdir), goodput.read(workdir / goodput.FILE)
    assert found["wall_seconds"] == pytest.approx(end - first.began, rel=0.01)
    assert found["starts"] == 3 and found["recoveries"]["count"] == 1
    assert found["recoveries"]["median"] == pytest.approx(recovered, abs=ledger.SHORTEST + 1.5)
    assert found["seconds"]["restart"] == pytest.approx(found["recoveries"]["median"], abs=0.01)
    assert found["seconds"]["stopped"] == pytest.approx(gap, abs=1.5)
    back = next(row.back_to for row in made if row.start == 1)
    of_first = [row for row in made if row.start == 0]
    before = [row for row in of_first if row.step <= back][-1]
    assert back % 50 == 0 and before is not of_first[-1]
    work = lambda row: sum(row.seconds.get(kind, 0.0) for kind in goodput.AGAIN)
    assert found["seconds"]["lost"] == pytest.approx(work(of_first[-1]) - work(before), abs=0.01)
    assert without(workdir) == without(calm[0].workdir)
    figures("F26 a kill and a stop, by the clock of who started the run", 2, 2, seconds=[recovered])


def without(workdir: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("speed/")} for row in rows(workdir)]


def test_the_account_needs_no_jax():
    """A supervisor or a soak that reads it holds no device."""
    program = "import sys, frugalmoe.train.goodput; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    assert json.loads(json.dumps(goodput.account([]).summary()))["useful"] == 0
