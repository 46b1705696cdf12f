"""Runs in several processes that lose a machine, supervisor and all: those that remain go on, and nothing is lost."""

import contextlib
import json
import os
import signal
import socket
import time

import numpy as np
import pytest
from faulted import FIELDS, STEPS, errors_of, events, logged, saved, start, wait_until
from runs import config_file, figures, rows, without_times, write_text

pytestmark = pytest.mark.slow
WAIT = 4  # seconds for those that are gone
BATCH = 12  # sequences, which one, two and three processes can share


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("remaining")


@pytest.fixture(scope="module")
def config(place):
    return config_file(place, write_text(place / "text"), place / "cache", FIELDS | {"train.batch_size": BATCH})


@pytest.fixture(scope="module")
def calm(place, config):
    """One process, from beginning to end."""
    process = start(config, place / "calm")
    assert process.wait(300) == 0, errors_of(place / "calm")
    return place / "calm"


class Machines:
    """Supervised processes of one run; what is started ends with the block."""

    def __init__(self, config, workdir, processes, *flags):
        self.workdir, self._config, self._flags = workdir, config, flags
        with socket.create_server(("", 0)) as server:
            self._of = (f"--coordinator=127.0.0.1:{server.getsockname()[1]}", f"--num-processes={processes}")
        self.all = {}
        for number in range(processes):
            self.begin(number)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for number in self.all:
            self.lose(number)

    def begin(self, number):
        flags = (*self._of, f"--process-id={number}", "--supervise", "--config.train.stuck_seconds=10", *self._flags)
        self.all[number] = start(self._config, self.workdir, *flags, output=self._output(number))

    def _output(self, number):
        return self.workdir.with_name(f"{self.workdir.name}-{number}")

    def lose(self, number):
        """The supervisor and its run at one moment, as where the power fails."""
        supervisor = self.all[number]
        if supervisor.poll() is None:
            supervisor.send_signal(signal.SIGSTOP)  # it shall not hear of its run
            with open(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children") as children:
                for child in children.read().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(child), signal.SIGKILL)
            supervisor.kill()
        supervisor.wait()

    def said(self, number):
        return errors_of(self._output(number))

    def reach(self, step, by):
        wait_until(lambda: logged(self.workdir) >= step, self.all[by])
        assert logged(self.workdir) >= step, self.said(by)

    def wait_for_line(self, number, line):
        wait_until(lambda: line in self.said(number), self.all[number])
        assert line in self.said(number)

    def end(self, number):
        assert self.all[number].wait(240) == 0, self.said(number)
        assert "Traceback" not in self.said(number)


def assert_as_calm(workdir, calm):
    """As F19: the same batches in the same order, to the same experts; losses to what sums in float32 round."""
    ours, theirs = (without_times(rows(each)) for each in (workdir, calm))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert rows(workdir, "expert_load.jsonl") == rows(calm, "expert_load.jsonl")
    assert json.loads((workdir / "data.json").read_text()) == json.loads((calm / "data.json").read_text())
    for our, their in zip(ours, theirs, strict=True):
        assert our.keys() == their.keys()
        np.testing.assert_allclose(list(our.values()), list(their.values()), rtol=1e-5, atol=1e-6, err_msg=str(their))
    assert max(saved(workdir)) == STEPS


def lost_and_found(machines, victim, by):
    """(Steps lost, seconds until the run makes one again), from when a machine is lost."""
    at, began = logged(machines.workdir), time.monotonic()
    machines.lose(victim)
    lost = at - max(saved(machines.workdir), default=0)
    wait_until(lambda: logged(machines.workdir) > at, machines.all[by])
    return lost, time.monotonic() - began


def test_of_three_the_first_is_lost_and_then_another_and_one_goes_on(place, config, calm):
    flags = ("--supervise.min-processes=1", f"--supervise.wait={WAIT}")
    with Machines(config, place / "three", 3, *flags) as machines:
        machines.reach(4, by=0)
        found = [lost_and_found(machines, 0, by=1)]
        machines.reach(8, by=1)
        found.append(lost_and_found(machines, 2, by=1))
        machines.end(1)
        told = [row["what"] for row in events(machines.workdir, "restart") if "goes on" in row["what"]]
        assert told == [
            "the run goes on in processes 1, 2 of 3, without process 0",
            "the run goes on in process 1 of 3, without processes 0, 2",
        ]
        assert f"frugalmoe: {told[0]}\n" in machines.said(1) and told[0] not in machines.said(2)
    assert_as_calm(place / "three", calm)
    lost, seconds = zip(*found)
    figures("F15 a machine lost with its supervisor: the others go on", 2, 2, max(lost), list(seconds))


def test_one_that_comes_back_is_waited_for_by_default_and_taken_in(place, config, calm):
    """Nobody said that fewer would do."""
    with Machines(config, place / "back", 2) as machines:
        machines.reach(4, by=1)
        machines.lose(0)
        machines.wait_for_line(1, "frugalmoe: waiting for process 0 of 2: no sign of life in ")
        assert "with --supervise.min-processes=N the run would go on with N that are there" in machines.said(1)
        at, began = logged(machines.workdir), time.monotonic()
        machines.begin(0)
        wait_until(lambda: logged(machines.workdir) > at, machines.all[1])
        took = time.monotonic() - began
        for number in range(2):
            machines.end(number)
    assert_as_calm(place / "back", calm)
    figures("F15 a machine lost with its supervisor comes back", 1, 1, seconds=[took])
