"""One run in several real processes over loopback: stopped, killed, continued by other numbers of them, refused."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import command, config_file, figures, rows, without_times, write_text

from frugalmoe.errors import UserError
from frugalmoe.train import checksums, distributed
from frugalmoe.train.weights import load_model, run_and_step

pytestmark = pytest.mark.slow
STEPS, SAVE_EVERY = 12, 4
# Eight devices: parameters and sequences are spread over processes, tokens of a sequence over the devices of one.
FIELDS = {
    "train.steps": STEPS,
    "train.eval_rows": 8,
    "checkpoint.every_steps": SAVE_EVERY,
    "train.eval_every": SAVE_EVERY,
    "checkpoint.keep_best": "eval/loss/mean",
    "model.num_layers": 2,
    "model.num_dense_layers": 0,
    "model.moe.num_shared_experts": 0,
    "model.moe.router": "sigmoid_bias",
    "mesh.fsdp": 2,
    "mesh.expert": 2,
    "mesh.context": 2,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    return root, config_file(root, write_text(root / "text"), root / "cache", FIELDS)


LOWEST_PORT = 65536 - 4096  # of those that JAX derives from the number of a job


def free_port() -> int:
    """One that nobody listens at, and that JAX can derive."""
    for port in np.random.default_rng().permutation(np.arange(LOWEST_PORT, 65536)).tolist():
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port
    raise OSError("no port is free")


def by_flags(i: int, processes: int, port: int) -> tuple[list[str], dict[str, str]]:
    return [f"--coordinator=127.0.0.1:{port}", f"--num-processes={processes}", f"--process-id={i}"], {}


def by_slurm(i: int, processes: int, port: int) -> tuple[list[str], dict[str, str]]:
    """What srun sets, from which JAX takes the number of the job for the port."""
    own = {"PROCID": i, "LOCALID": i, "NTASKS": processes, "STEP_NUM_TASKS": processes}
    of_step = {"JOB_ID": port - LOWEST_PORT, "STEP_NODELIST": "127.0.0.1"}
    return [], {f"SLURM_{name}": str(value) for name, value in (own | of_step).items()}


def by_open_mpi(i: int, processes: int, port: int) -> tuple[list[str], dict[str, str]]:
    """What mpirun sets; a number of a job of Open MPI is a multiple of 4096."""
    world = {"SIZE": processes, "RANK": i, "LOCAL_RANK": i}
    address = f"{(port - LOWEST_PORT) * 4096}.0;tcp://127.0.0.1:9"
    return [], {f"OMPI_COMM_WORLD_{k}": str(v) for k, v in world.items()} | {"OMPI_MCA_orte_hnp_uri": address}


def start(place, workdir: str, processes: int, devices: int, by=by_flags, own=lambda i: ()) -> list[subprocess.Popen]:
    """One run in so many processes of so many devices each, which learn of each other `by`; `own(i)` are more flags."""
    xla = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    port, started = free_port(), []
    for i in range(processes):
        flags, environment = by(i, processes, port) if processes > 1 else ([], {})
        line = command("train", f"--config={place[1]}", f"--workdir={place[0] / workdir}", *flags, *own(i))
        environment |= os.environ | {"XLA_FLAGS": xla}
        with (place[0] / f"{workdir}.{i}.out").open("w") as out, (place[0] / f"{workdir}.{i}.err").open("w") as error:
            started.append(subprocess.Popen(line, stdout=out, stderr=error, env=environment))
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
    """Two processes, as of mpirun, go on with the stopped run; the second is killed after step 7: (both, when)."""
    started = start(place, "run", 2, 4, by_open_mpi)
    wait_for_step(place, "run", 7)
    started[1].kill()
    yield started, time.monotonic()
    end(started, timeout=0.1)


def test_a_signal_to_one_process_stops_both_after_the_same_step(place, stopped):
    codes, step = stopped
    assert codes == [75, 75], said(place, "run", 1, "err")
    assert f"stopped at step {step} of {STEPS} after saving" in said(place, "run", 0)
    assert 0 < step < STEPS and logged(place[0] / "run") == list(range(1, step + 1))
    path = place[0] / "run" / "checkpoints" / str(step)
    of_second = {f"{item}/ocdbt.process_1/manifest.ocdbt" for item in ("params", "opt_state")}
    assert json.loads((path / checksums.NAME).read_text())["files"].keys() >= of_second, (
        "the first writes them, at last"
    )
    assert not checksums.faults(path)
    figures("F3 SIGTERM to one of two processes", 1, 1, 0)


@pytest.mark.parametrize("layouts", [[(1, 8)], [(4, 2), (2, 4)], [(4, 2), (1, 8)]], ids=str)
def test_killed_it_goes_on_in_any_number_of_processes(place, undisturbed, killed, layouts):
    """From the last whole checkpoint, with the same batches, to the same losses: nothing is lost or done twice. All but
    the last of these layouts, (processes, devices of each), are killed in all processes at once.
    """
    name, lost = "continued" + "".join(f"_{processes}" for processes, _ in layouts), []
    shutil.copytree(place[0] / "run", place[0] / name)
    (place[0] / name / "checkpoints" / "99").mkdir()
    step = max(saved(place[0] / "run"))
    for processes, devices in layouts[:-1]:
        lost.append(max(logged(place[0] / name)) - step)
        started = start(place, name, processes, devices)
        wait_for_step(place, name, STEPS - 2)
        for process in started:
            process.kill()
        assert end(started) == [-signal.SIGKILL] * processes
        assert (place[0] / name / "checkpoints" / "99.damaged").is_dir()
        step = max(
            step for step in saved(place[0] / name) if not checksums.faults(place[0] / name / f"checkpoints/{step}")
        )
    lost.append(max(logged(place[0] / name)) - step)
    (processes, devices), first = layouts[-1], len(layouts) == 1
    codes = end(start(place, name, processes, devices))
    assert codes == [0] * processes, said(place, name, processes - 1, "err")
    assert ("checkpoints/99: a damaged checkpoint (params, step: missing)" in said(place, name, 0)) == first
    assert (place[0] / name / "checkpoints" / "99.damaged").is_dir()
    assert f"resuming at step {step} of {STEPS}" in said(place, name, 0) and SAVE_EVERY <= step < STEPS
    assert "nats per token" in said(place, name, 0)
    assert all("nats per token" not in said(place, name, i) for i in range(1, processes))
    assert_same_run(place[0] / name, undisturbed)
    spoken = ", then ".join(f"{processes} with {devices}" for processes, devices in layouts)
    figures(f"F19 two processes with 4 devices, then {spoken}", len(layouts), len(layouts), max(lost))
    starts = 2 + len(layouts)
    assert len(list((place[0] / name / "tensorboard").iterdir())) == starts, "one process writes, at each start"


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Which expert gets how many tokens is equal to the last one; losses and weights to what sums in float32 round."""
    assert logged(ours) == logged(theirs) == list(range(1, STEPS + 1))
    assert rows(ours, "expert_load.jsonl") == rows(theirs, "expert_load.jsonl")
    assert json.loads((ours / "data.json").read_text()) == json.loads((theirs / "data.json").read_text())
    for our, their in zip(*(without_times(rows(workdir)) for workdir in (ours, theirs)), strict=True):
        assert our.keys() == their.keys()
        np.testing.assert_allclose(list(our.values()), list(their.values()), rtol=1e-5, atol=1e-6, err_msg=str(their))
    best = [run_and_step(f"{workdir}@best")[1] for workdir in (ours, theirs)]
    assert best[0] == best[1] and best[0] in saved(ours)
    # Restored on the one device of this process.
    weights = [jax.tree.leaves(load_model(workdir)[1]) for workdir in (ours, theirs)]
    for our, their in zip(*weights, strict=True):
        np.testing.assert_allclose(our, their, rtol=1e-4, atol=1e-6)


def test_the_first_process_does_not_wait_for_a_dead_one(killed):
    """At once where a broken connection shows it, else, as amid a save, in twice `train.stuck_seconds`."""
    (first, _), since = killed
    code = first.wait(max(since + 2 * 60 + 20 - time.monotonic(), 0.1))
    assert code not in (0, 2, 75)


WAITS = """
import sys, time
from frugalmoe.train import distributed

coordinator = sys.argv[1].partition("=")[2] if len(sys.argv) > 1 else None
count, number = (int(flag.partition("=")[2]) for flag in sys.argv[2:4]) if coordinator else (None, None)
distributed.start(coordinator, count, number, 60)
print("met", flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("by", [by_flags, by_slurm, by_open_mpi])
def test_where_the_first_is_killed_before_there_is_a_run_the_other_says_so(by):
    """Whoever tells of the processes: of JAX's page nothing is seen, from when they have met."""
    port, started = free_port(), []
    for i in range(2):
        flags, environment = by(i, 2, port)
        line, pipes = [sys.executable, "-c", WAITS, *flags], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(line, env=os.environ | environment, text=True, **pipes))
    try:
        assert [process.stdout.readline() for process in started] == ["met\n"] * 2
        started[0].kill()
        began = time.monotonic()
        error = started[1].communicate(timeout=60)[1]
        took = time.monotonic() - began
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert started[1].returncode == 1 and error.count("\n") == 1, error
    assert error.startswith("frugalmoe: another process has ended: process 0, and with it the run; "), error
    figures("F15 process 0 of two killed before there is a run: the other ends with a line", 1, 1, seconds=[took])


def test_where_slurm_tells_of_processes_and_the_first_is_killed_the_other_says_so(place):
    started = start(place, "slurm", 2, 4, by_slurm, lambda i: ("--config.train.steps=100000",))
    wait_for_step(place, "slurm", 3)
    started[0].kill()
    began = time.monotonic()
    code = started[1].wait(60)
    took = time.monotonic() - began
    end(started, timeout=0.1)
    (line,) = said(place, "slurm", 1, "err").splitlines()
    assert code == 1 and line.startswith("frugalmoe: ") and "another process has ended" in line
    figures("F15 process 0 of two killed, as of SLURM: the other ends with a line", 1, 1, seconds=[took])


PARTS = """
import sys
import time
import jax, numpy as np
from frugalmoe import sharding
from frugalmoe.config import default, override, resolve
from frugalmoe.data import Batch
from frugalmoe.errors import UserError
from frugalmoe.train import checksums, distributed
from frugalmoe.train.placing import own_rows, put_rows

distributed.start(sys.argv[1], 2, int(sys.argv[2]), 60)
config = resolve(override(default(), {"train.batch_size": 16, "train.accumulate_steps": 2, "data.sequence_length": 8}))
whole = [np.arange(16 * 8).reshape(16, 8) + 1000 * i for i in range(len(Batch._fields))]
for sizes in eval(sys.argv[3]):
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)))
    rows = own_rows(mesh, config)
    read = Batch(*(column[rows].reshape(2, -1, 8) for column in whole))
    for ours, column in zip(sharding.fetch(put_rows(mesh, read, "ABT", config)), whole):
        np.testing.assert_array_equal(ours, column.reshape(2, 8, 8))
    print("rows", len(rows))
began = time.monotonic()
try:
    with distributed.together():
        if jax.process_index() == 1:
            raise UserError("no such file")
except UserError as e:
    print("error", e)
print("seconds", time.monotonic() - began)
"""
ROWS = {(8, 1, 1, 1, 1): 8, (2, 2, 1, 1, 2): 8, (1, 1, 2, 2, 2): 8, (1, 1, 1, 8, 1): 16, (1, 1, 1, 1, 8): 16}


def test_each_process_reads_its_rows_and_errors_are_shared(place):
    """Half of 16 rows where processes have sequences of their own, all where they share them; whole on the devices."""
    xla = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    line = (sys.executable, "-c", PARTS, f"127.0.0.1:{free_port()}")
    started = [
        subprocess.Popen(
            [*line, str(i), str([*ROWS])], stdout=subprocess.PIPE, env=os.environ | {"XLA_FLAGS": xla}, text=True
        )
        for i in range(2)
    ]
    outs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    for out, error in zip(outs, ("process 1: no such file", "no such file"), strict=True):
        assert [int(n) for n in re.findall(r"rows (\d+)", out)] == [*ROWS.values()]
        assert f"error {error}\n" in out
    took = [float(re.search(r"seconds (.*)", out)[1]) for out in outs]
    assert max(took) < 15, "none waits for one that has failed"
    figures("F16 an error in one of two processes is one in both", 1, 1, seconds=[max(took)])


def refused(place, workdir: str, processes: int, by, own, *texts: str) -> None:
    """Exit code 2 in all processes, one line each, and nothing is written."""
    codes = end(start(place, workdir, processes, 1, by, own))
    for i, code in enumerate(codes):
        error = said(place, workdir, i, "err")
        assert code == 2, error[-3000:]
        assert error.startswith("frugalmoe: ") and error.count("\n") == 1, error
        for text in texts:
            assert text in error, error
    assert not (place[0] / workdir).exists()


def test_processes_with_different_configs_are_refused(place):
    """Started as by srun, before anything else that may differ is looked at: the mesh is wrong too."""
    own = lambda i: (f"--config.optim.learning_rate={0.25 * (i + 1)}",)
    refused(place, "unlike", 2, by_slurm, own, "optim.learning_rate: 0.25 in process 0, 0.5 in process 1")


def test_processes_that_do_not_meet_give_up(place):
    """Of two processes only the second is there: nobody answers at the coordinator's address."""
    flags = ("--coordinator=127.0.0.1:9", "--num-processes=2", "--process-id=1", "--connect-timeout=2")
    message = "--coordinator=127.0.0.1:9: the processes did not all meet within 2 s"
    refused(place, "lonely", 1, by_flags, lambda i: flags, message, "is process 0 running")


BAD = [
    (("h:1", None, None), "--coordinator=h:1: needs --num-processes, --process-id too"),
    ((None, 4, None), "--num-processes=4: needs --coordinator, --process-id too"),
    ((None, 1, 0), "needs --coordinator too"),
    (("h", 2, 0), "--coordinator=h: must be HOST:PORT"),
    (("h:70000", 2, 0), "--coordinator=h:70000: must be HOST:PORT"),
    (("h:1", 0, 0), "--num-processes=0: must be at least 1"),
    (("h:1", 2, 2), "--process-id=2: must be from 0 to 1"),
]


@pytest.mark.parametrize("flags, message", BAD, ids=str)
def test_bad_flags_are_named(flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        distributed.start(*flags, timeout=1)


ALONE = [
    {},
    by_slurm(0, 1, LOWEST_PORT)[1],
    {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # the script of a job, not a step of it
    by_open_mpi(0, 1, LOWEST_PORT)[1],
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # any pod
    {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ML_PLATFORM": "JAX"},  # one TPU host
]


@pytest.mark.parametrize("environment", ALONE, ids=lambda e: next(iter(e), "none"))
def test_one_process_meets_nobody(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    distributed.start(None, None, None, timeout=1)
    assert not jax.distributed.is_initialized()


def test_a_cluster_that_jax_does_not_know_is_named(monkeypatch):
    """Open MPI 5 tells nobody where the first process is: each would train the run by itself."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "8")
    with pytest.raises(UserError, match=r"OMPI_COMM_WORLD_SIZE=8: .*--coordinator=HOST:PORT.*--num-processes=1"):
        distributed.start(None, None, None, timeout=1)
    distributed.start(None, 1, None, timeout=1)
    assert not jax.distributed.is_initialized()
