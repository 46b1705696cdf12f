"""Runs that no longer move, or whose clock is set: who is stuck says so and ends, who is slow goes on."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time

import pytest
from faulted import (
    EVERY,
    FIELDS,
    LONG,
    STEPS,
    assert_same,
    bits,
    errors_of,
    events,
    logged,
    saved,
    start,
    trainer,
    wait_until,
)
from runs import config_file, figures, write_text

from frugalmoe.errors import EXIT_PREEMPTED, EXIT_STUCK
from frugalmoe.train import watch
from frugalmoe.train.watch import _Voices

pytestmark = pytest.mark.slow

# What a config file does to the process that reads it, where the environment says so.
FAULTS = '''

import os, sys, time
import frugalmoe.train.loop
from frugalmoe.data.batches import Dataset

checkpoint, evaluate = (sys.modules[f"frugalmoe.train.{name}"] for name in ("checkpoint", "evaluate"))
whole, now = Dataset.batch, time.time


def batch(self, position, rows=None, ramp=None):
    """A loader that falls asleep for ever, once."""
    flag = os.environ.get("ASLEEP", "")
    if flag and position == 7 and not os.path.exists(flag):
        open(flag, "w").close()
        time.sleep(10**6)
    return whole(self, position, rows, ramp)


def slow(act, seconds):
    return lambda *args, **flags: (time.sleep(seconds), act(*args, **flags))[1]


Dataset.batch = batch
if "SLOW" in os.environ:
    checkpoint.save = slow(checkpoint.save, float(os.environ["SLOW"]))
    evaluate.put_batch = slow(evaluate.put_batch, float(os.environ["SLOW"]))
if "CLOCK" in os.environ:
    time.time = lambda: now() + (3600 if int(time.monotonic()) % 4 < 2 else -3600)
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("stuck")
    write_text(root / "text")
    config = config_file(root, root / "text", root / "cache", FIELDS)
    config.write_text(config.read_text() + FAULTS)
    return root


@pytest.fixture(scope="module")
def config(place):
    return place / "tiny.py"


@pytest.fixture(scope="module")
def calm(place, config):
    process = start(config, place / "calm")
    assert process.wait(300) == 0, errors_of(place / "calm")
    return bits(place / "calm")


def found_after(flag, stacks) -> float:
    """Seconds from when a loader fell asleep to when that was found."""
    return stacks.stat().st_mtime - flag.stat().st_mtime


def ended(process: subprocess.Popen, timeout: float = 240) -> int:
    try:
        return process.wait(timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_loader_that_sleeps_is_found_and_the_supervisor_starts_again(place, config, calm):
    workdir = place / "asleep"
    flags = ("--supervise", "--config.train.stuck_seconds=4")
    process = start(config, workdir, *flags, ASLEEP=str(place / "asleep.flag"))
    assert ended(process) == 0, errors_of(workdir)
    assert_same(bits(workdir), calm)
    stuck, again = events(workdir, "stuck")[0], events(workdir, "restart")[0]
    assert re.fullmatch(r"stuck: waited [45] s for the batch of step 8", stuck["what"]), stuck
    assert stuck["step"] == 7 and again["what"].startswith("the run was stuck after step "), again
    lines = errors_of(workdir).splitlines()
    assert lines[0].startswith(f"frugalmoe: {stuck['what']}; where its threads stood is in {workdir}/stuck-0.txt; ")
    assert len(lines) == 2, lines
    stacks = (workdir / "stuck-0.txt").read_text()
    assert "in batch" in stacks and "in next_batch" in stacks and stacks.startswith("waited ")
    seconds = found_after(place / "asleep.flag", workdir / "stuck-0.txt")
    figures("F17 a loader that sleeps, one process", 1, 1, 7 - int(again["step"]), [seconds])


def test_a_signal_ends_a_run_whose_loader_sleeps_and_nothing_is_lost(place, config, calm):
    workdir = place / "asked"
    process = start(config, workdir, "--config.train.stuck_seconds=600", ASLEEP=str(place / "asked.flag"))
    wait_until(lambda: logged(workdir) >= 6, process)
    time.sleep(1)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert ended(process, 60) == EXIT_PREEMPTED, errors_of(workdir)
    took = time.monotonic() - began
    assert took < 30 and logged(workdir) == 7 and not errors_of(workdir), errors_of(workdir)
    assert (workdir / "checkpoints" / "7").is_dir()
    assert ended(start(config, workdir)) == 0
    ours = bits(workdir)
    assert_same(ours, calm)
    figures("F17 SIGTERM to a run whose loader sleeps", 1, 1, 0, [took])


def test_slow_saves_and_evaluations_are_no_alarm(place, config):
    """Each of them is slower than a batch or a step may be."""
    workdir = place / "slow"
    flags = ("--config.train.stuck_seconds=2", "--config.train.steps=4", "--config.train.eval_every=2")
    process = start(config, workdir, *flags, SLOW="5")
    assert ended(process) == 0, errors_of(workdir)
    assert not list(workdir.glob("stuck*"))
    figures("F17 slow saves, compilation and evaluations: no alarm", 3, 3, 0)


SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

static int (*real)(clockid_t, struct timespec *);

static long jump(void) {
    struct timespec at;
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    real(CLOCK_MONOTONIC, &at);
    return at.tv_sec % 4 < 2 ? 3600 : -3600;
}
int clock_gettime(clockid_t clock, struct timespec *at) {
    long by = jump();
    int code = real(clock, at);
    if (clock == CLOCK_REALTIME) at->tv_sec += by;
    return code;
}
int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""


def test_a_clock_that_jumps_by_an_hour_changes_nothing(place, config, calm):
    """Forth and back every two seconds, for all of the process where there is a compiler, else for its Python."""
    workdir, environment = place / "clock", {"CLOCK": "1"}
    if compiler := shutil.which("gcc") or shutil.which("cc"):
        (place / "shim.c").write_text(SHIM)
        line = [compiler, "-shared", "-fPIC", "-o", place / "shim.so", place / "shim.c", "-ldl"]
        subprocess.run(line, check=True)
        environment = {"LD_PRELOAD": str(place / "shim.so")}
    process = start(config, workdir, "--config.train.stuck_seconds=30", SLOW="0.7", **environment)
    assert ended(process) == 0, errors_of(workdir)
    assert_same(bits(workdir), calm)
    assert not list(workdir.glob("stuck*"))
    figures("F18 the clock jumps by an hour", STEPS // EVERY, STEPS // EVERY, 0)


def test_what_two_looks_at_the_others_tell():
    key = "frugalmoe/watch/"
    before = {f"{key}0": "4 step 8 to end", f"{key}1": "7 the batch of step 8", f"{key}2": "9 step 8 to end"}
    moved = {f"{key}0": "6 step 8 to end", f"{key}1": "9 the batch of step 8", f"{key}2": "11 step 8 to end"}
    told = lambda after, own: _Voices.compared(before, after, own, 3)
    assert told(moved, 0) == ("; process 1 waits for the batch of step 8", False) and told(moved, 1) == ("", False)
    what, silent = told(moved | {f"{key}1": before[f"{key}1"]}, 0)
    assert "process 1 does not answer" in what and silent
    assert "process 1, 2 does not answer" in told({f"{key}0": "6 x"}, 0)[0]


def test_time_in_which_the_process_itself_was_stopped_does_not_count(tmp_path, monkeypatch):
    ends, clock = [], [0.0]
    monkeypatch.setattr(watch._Watch, "_end", lambda self, now, waited: (ends.append(waited), self.close()))
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    seconds = iter([0.5, 3600.0, 0.5, 0.5])
    with watch.watching(3.0, tmp_path):
        current = watch._current
        current._over.set()
        current._thread.join()
        watch.doing(watch.BATCH, 1)
        steps = iter([False, False, False, False, True])

        def wait(self, timeout):
            clock[0] += next(seconds, 0.0)
            return next(steps)

        current._over = type("Over", (), {"wait": wait, "set": lambda self: None})()
        current._look()
    assert not ends


# ---------------------------------------------------------------- several processes


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def start_two(config, workdir, *flags, asleep: str = "") -> list[subprocess.Popen]:
    port, started = free_port(), []
    for i in range(2):
        of = (f"--coordinator=127.0.0.1:{port}", "--num-processes=2", f"--process-id={i}")
        environment = {"ASLEEP": asleep} if i == 1 else {}
        output = workdir.with_name(f"{workdir.name}-{i}")
        started.append(start(config, workdir, *of, *flags, output=output, **environment))
    return started


@pytest.fixture(scope="module")
def calm_two(place, config):
    started = start_two(config, place / "two")
    assert [ended(process) for process in started] == [0, 0], errors_of(place / "two-0")
    return bits(place / "two")


def own_lines(place, name: str) -> list[str]:
    """What a process said itself, without what JAX and gloo log."""
    return [line for line in errors_of(place / name).splitlines() if line.startswith("frugalmoe: ")]


def test_a_loader_that_sleeps_in_one_of_two_is_named(place, config):
    workdir = place / "nap"
    started = start_two(config, workdir, "--config.train.stuck_seconds=5", asleep=str(place / "nap.flag"))
    assert [ended(process) for process in started][1] == EXIT_STUCK
    assert all(process.returncode not in (0, 2, 75) for process in started)
    (line,) = own_lines(place, "nap-1")
    assert "process 1: stuck: waited " in line and " s for the batch of step 8" in line
    (other,) = own_lines(place, "nap-0")
    assert "another process has ended" in other or "process 0: stuck" in other, other
    assert (workdir / "stuck-1.txt").is_file()
    seconds = found_after(place / "nap.flag", workdir / "stuck-1.txt")
    figures("F17 a loader that sleeps in one of two processes", 1, 1, seconds=[seconds])


def test_where_the_first_process_is_killed_the_other_says_so(place, config):
    """JAX's coordination service dies with it; of JAX's page about that nothing is seen."""
    workdir = place / "first"
    started = start_two(config, workdir, "--config.train.steps=100000")
    wait_until(lambda: logged(workdir) >= 4, started[0])
    os.kill(started[0].pid, signal.SIGKILL)
    began = time.monotonic()
    code = started[1].wait(60)
    took = time.monotonic() - began
    started[0].wait()
    (line,) = errors_of(place / "first-1").splitlines()
    assert code == 1 and line.startswith("frugalmoe: ") and "another process has ended" in line
    figures("F15 process 0 of two killed: the other ends with a line", 1, 1, seconds=[took])


@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_process_is_named_and_the_other_ends_with_a_line(place, config, victim):
    workdir = place / f"frozen{victim}"
    started = start_two(config, workdir, "--config.train.stuck_seconds=3", "--config.train.steps=100000")
    wait_until(lambda: logged(workdir) >= 4, started[0])
    os.kill(started[victim].pid, signal.SIGSTOP)
    began = time.monotonic()
    code = started[1 - victim].wait(120)
    took = time.monotonic() - began
    os.killpg(started[victim].pid, signal.SIGKILL)
    started[victim].wait()
    assert code == EXIT_STUCK and took < 60, errors_of(place / f"{workdir.name}-{1 - victim}")
    (line,) = errors_of(place / f"{workdir.name}-{1 - victim}").splitlines()
    assert f"process {1 - victim}: stuck: waited " in line
    assert f"process {victim} does not answer: it is frozen, or its host cannot be reached" in line
    figures("F17 one of two processes frozen", 1, 1, seconds=[took])


def test_supervised_processes_come_back_when_one_is_killed_and_one_is_frozen(place, config, calm_two):
    workdir = place / "back"
    flags = ("--supervise", "--supervise.hang=90", "--config.train.stuck_seconds=8")
    started = start_two(config, workdir, *flags)
    times, lost = [], []
    moments = [(1, signal.SIGKILL, 4), (0, signal.SIGKILL, 7), (1, signal.SIGSTOP, 10)]
    for victim, number, step in moments if LONG else moments[1:]:
        wait_until(lambda step=step: logged(workdir) >= step, started[0])
        process = trainer(started[victim].pid)
        if number == signal.SIGSTOP:  # its supervisor would wait a minute
            os.kill(process, signal.SIGSTOP)
            wait_until(lambda: "does not answer" in errors_of(place / "back-0"), started[0])
            os.kill(process, signal.SIGKILL)
        else:
            os.kill(process, number)
        began, at = time.monotonic(), logged(workdir)
        lost.append(at - max(saved(workdir), default=0))
        wait_until(lambda at=at: logged(workdir) > at, started[0])
        times.append(time.monotonic() - began)
    assert [ended(process, 300) for process in started] == [0, 0], errors_of(place / "back-0")
    assert_same(bits(workdir), calm_two)
    for i in range(2):
        assert "Traceback" not in errors_of(place / f"back-{i}")
    figures("F15 one of two supervised processes killed or frozen", len(times), len(times), max(lost), times)
