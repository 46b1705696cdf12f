"""One run in several real processes over loopback: stopped, killed, continued by other numbers of them, refused."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import command, config_file, rows, without_times, write_text

from frugalmoe import generate

pytestmark = pytest.mark.slow
STEPS, SAVE_EVERY = 12, 4
# Eight devices: parameters and sequences are spread over processes, tokens of a sequence over the devices of one.
FIELDS = {
    "train.steps": STEPS,
    "train.batch_size": 16,
    "train.accumulate_steps": 2,
    "checkpoint.every_steps": SAVE_EVERY,
    "model.num_layers": 2,
    "model.moe.router": "sigmoid_bias",
    "mesh.fsdp": 2,
    "mesh.expert": 2,
    "mesh.context": 2,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    return root, config_file(root, write_text(root / "text"), root / "cache", FIELDS)


def start(place, workdir: str, processes: int, devices: int, flags_of=lambda i: ()) -> list[subprocess.Popen]:
    """One run in so many processes of so many devices each; `flags_of(i)` are process i's own."""
    xla = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    with socket.create_server(("", 0)) as free:
        coordinator = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    together = lambda i: (coordinator, f"--num_processes={processes}", f"--process_id={i}") if processes > 1 else ()
    flags = lambda i: (f"--config={place[1]}", f"--workdir={place[0] / workdir}", *together(i), *flags_of(i))
    started = []
    for i in range(processes):
        with (place[0] / f"{workdir}.{i}.out").open("w") as out, (place[0] / f"{workdir}.{i}.err").open("w") as error:
            environment = os.environ | {"XLA_FLAGS": xla}
            started.append(subprocess.Popen(command("train", *flags(i)), stdout=out, stderr=error, env=environment))
    return started


def end(started: list[subprocess.Popen], timeout: float = 240) -> list[int]:
    """Exit codes."""
    deadline = time.monotonic() + timeout
    try:
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()


def said(place, workdir: str, process: int, stream: str = "out") -> str:
    return (place[0] / f"{workdir}.{process}.{stream}").read_text()


def wait_for(place, workdir: str, condition, timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(said(place, workdir, 0, "err")[-3000:])
        time.sleep(0.005)


def wait_for_step(place, workdir: str, step: int) -> None:
    log = place[0] / workdir / "metrics.jsonl"
    wait_for(place, workdir, lambda: log.is_file() and f'{{"step": {step}, ' in log.read_text())


def logged(workdir: Path) -> list[int]:
    return [row["step"] for row in rows(workdir) if "loss/ce" in row]


def saved(workdir: Path) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def undisturbed(place):
    """One process of eight devices, from beginning to end."""
    assert end(start(place, "undisturbed", 1, 8)) == [0], said(place, "undisturbed", 0, "err")
    return place[0] / "undisturbed"


@pytest.fixture(scope="module")
def stopped(place):
    """Two processes, of which the second gets SIGTERM while they compile: (exit codes, the step that they saved)."""
    started = start(place, "run", 2, 4)
    wait_for(place, "run", lambda: (place[0] / "run" / "config.json").is_file())
    started[1].send_signal(signal.SIGTERM)
    return end(started), max(saved(place[0] / "run"))


@pytest.fixture(scope="module")
def killed(place, stopped):
    """Two processes go on with the stopped run, and the second is killed after step 7: (both, when)."""
    started = start(place, "run", 2, 4)
    wait_for_step(place, "run", 7)
    started[1].kill()
    yield started, time.monotonic()
    end(started, timeout=0.1)


def test_a_signal_to_one_process_stops_both_after_the_same_step(place, stopped):
    codes, step = stopped
    assert codes == [75, 75], said(place, "run", 1, "err")
    assert f"stopped at step {step} of {STEPS} after saving" in said(place, "run", 0)
    assert 0 < step < STEPS and logged(place[0] / "run") == list(range(1, step + 1))


@pytest.mark.parametrize("processes, devices", [(1, 8), (4, 2)])
def test_killed_it_goes_on_in_any_number_of_processes(place, undisturbed, killed, processes, devices):
    """From the last whole checkpoint, with the same batches, to the same losses: nothing is lost or done twice."""
    name = f"continued{processes}"
    shutil.copytree(place[0] / "run", place[0] / name)
    step = max(saved(place[0] / name))
    codes = end(start(place, name, processes, devices))
    assert codes == [0] * processes, said(place, name, processes - 1, "err")
    assert f"resuming at step {step} of {STEPS}" in said(place, name, 0) and SAVE_EVERY <= step < STEPS
    assert "nats per token" in said(place, name, 0)
    assert all("nats per token" not in said(place, name, i) for i in range(1, processes))
    assert_same_run(place[0] / name, undisturbed)


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Which expert gets how many tokens is equal to the last one; losses and weights to what sums in float32 round."""
    assert logged(ours) == logged(theirs) == list(range(1, STEPS + 1))
    assert rows(ours, "expert_load.jsonl") == rows(theirs, "expert_load.jsonl")
    assert json.loads((ours / "data.json").read_text()) == json.loads((theirs / "data.json").read_text())
    for our, their in zip(*(without_times(rows(workdir)) for workdir in (ours, theirs)), strict=True):
        assert our.keys() == their.keys()
        np.testing.assert_allclose(list(our.values()), list(their.values()), rtol=1e-5, atol=1e-6, err_msg=str(their))
    # Restored on the one device of this process.
    weights = [jax.tree.leaves(generate.load(workdir)[1]) for workdir in (ours, theirs)]
    for our, their in zip(*weights, strict=True):
        np.testing.assert_allclose(our, their, rtol=1e-4, atol=1e-6)


def test_the_first_process_does_not_wait_for_a_dead_one(killed):
    """At once where a broken connection shows it, else when its heartbeat has been missed for a minute."""
    (first, _), since = killed
    code = first.wait(max(since + 90 - time.monotonic(), 0.1))
    assert code not in (0, 2, 75)


def test_one_process_writes(place, undisturbed, killed):
    """No file is there that one process alone does not write."""
    # Orbax's own files are one per process; their number is its business.
    files = lambda workdir: {p.relative_to(workdir).parts[0] for p in workdir.rglob("*")}
    assert files(place[0] / "continued4") == files(undisturbed)


def refused(place, workdir: str, processes: int, flags_of, *texts: str) -> None:
    """Exit code 2 in all processes, one line each, and nothing is written."""
    codes = end(start(place, workdir, processes, 1, flags_of))
    for i, code in enumerate(codes):
        error = said(place, workdir, i, "err")
        assert code == 2, error[-3000:]
        assert error.startswith("frugalmoe: ") and error.count("\n") == 1, error
        for text in texts:
            assert text in error, error
    assert not (place[0] / workdir).exists()


def test_processes_with_different_configs_are_refused(place):
    flags = lambda i: ("--config.mesh.fsdp=1", f"--config.optim.learning_rate={0.25 * (i + 1)}")
    refused(place, "unlike", 2, flags, "optim.learning_rate: 0.25 process 0, 0.5 process 1")


def test_processes_that_do_not_meet_give_up(place):
    """Of two processes only the second is there: nobody answers at the coordinator's address."""
    flags = ("--coordinator=127.0.0.1:9", "--num_processes=2", "--process_id=1", "--connect_timeout=2")
    message = "--coordinator=127.0.0.1:9: the processes did not all meet within 2 s"
    refused(place, "lonely", 1, lambda i: flags, message, "is process 0 running")
