"""Silent errors of the hardware: a bit that flips in one replica, a gradient that one replica scales. They are found
within the stated steps and named, nothing wrong is saved, and the run that goes on is the run without them.
"""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from runs import config_file, figures, rows, without_times, write_text
from test_processes import by_flags, free_port

from frugalmoe import cli, sharding
from frugalmoe.errors import EXIT_HARDWARE, HardwareError
from frugalmoe.train import replicas, saved, step, supervise
from frugalmoe.train.program import Program
from frugalmoe.train.replicas import Group

EVERY, WHEN = 3, 5  # the fault is in step 5; step 6 is looked at
EIGHT = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
PATIENCE = 900  # seconds, on a busy machine
FIELDS = {
    "train.steps": 16,
    "train.trackers": "",
    "train.eval_rows": 8,
    "checkpoint.every_steps": 4,
    "checkpoint.keep_last": 9,
    "model.dim": 16,
    "model.num_layers": 2,
    "model.moe.router": "sigmoid_bias",
    "model.vocab_size": 320,
    "guard.replicas_every": EVERY,
}

# ---------------------------------------------------------------- sums


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.int8])
def test_every_bit_that_flips_changes_the_sum(dtype):
    """And so do two that flip alike, as all signs of an array, and numbers that change places."""
    array = jnp.asarray(np.random.default_rng(0).normal(0, 50, 300), dtype)
    bits = np.asarray(array).view(f"uint{8 * array.dtype.itemsize}")
    digest = jax.jit(lambda bits: replicas.digest(jax.lax.bitcast_convert_type(bits, dtype)))
    whole, width = int(digest(bits)), 8 * array.dtype.itemsize
    flipped = [bits ^ (np.arange(300) == i).astype(bits.dtype) << bit for i in (0, 1, 299) for bit in range(width)]
    top = np.asarray(1 << (width - 1), bits.dtype)
    flipped += [np.where(np.arange(300) < count, bits ^ top, bits) for count in (2, 4, 300)]
    flipped += [np.roll(bits, 1), bits[::-1].copy()]
    assert whole not in [int(digest(other)) for other in flipped]
    assert whole == int(digest(bits.copy()))


def layout(data: int, fsdp: int) -> SimpleNamespace:
    """What is looked at of a mesh, of devices that are not there."""
    devices = np.arange(data * fsdp).reshape(data, fsdp)
    return SimpleNamespace(devices=devices, axis_names=("data", "fsdp"), shape={"data": data, "fsdp": fsdp})


def test_who_differs_is_named():
    """The minority; all where there is none. Devices that hold other parts are not compared."""
    mesh = SimpleNamespace(
        devices=np.arange(8).reshape(4, 2), axis_names=("data", "fsdp"), shape={"data": 4, "fsdp": 2}
    )
    everywhere, spread = Group("params", ()), Group("opt_state", ("fsdp",))
    whole, parts = np.full(8, 5, np.uint32), np.tile(np.array([7, 9], np.uint32), 4)
    odd = lambda *columns: replicas.odd_ones(np.stack(columns, 1), mesh, [everywhere, spread])
    assert odd(whole, parts) == {}
    assert odd(np.where(np.arange(8) == 3, 6, whole), parts) == {"params": ((3,), True)}
    assert odd(whole, np.where(np.arange(8) == 5, 7, parts)) == {"opt_state": ((5,), True)}
    assert odd(np.where(np.arange(8) < 4, 6, whole), parts) == {"params": (tuple(range(8)), False)}
    assert odd(whole, np.arange(8)) == {"opt_state": (tuple(range(8)), False)}
    both = odd(whole, np.where(np.isin(np.arange(8), (2, 7)), 8, parts))
    assert both == {"opt_state": ((2, 7), True)}, "one of each four"
    assert replicas.odd_ones(np.array([[1], [2]]), layout(1, 2), [spread]) == {}


def test_the_device_whose_second_try_differs_is_named():
    devices = np.array([SimpleNamespace(process_index=i // 4, id=i) for i in range(8)])
    mesh, loss = SimpleNamespace(devices=devices, size=8), np.float32(2.5)
    first, same = np.zeros((8, 2), np.uint32), {"loss": (loss, loss)}
    other = {"loss": (loss, np.nextafter(loss, np.float32(3)))}
    replicas.compare_tries(3, same, first, first.copy(), mesh)
    again = first.copy()
    again[6, 1] = 1
    with pytest.raises(HardwareError, match=r"^step 3, made twice, .*the states after it\): process 1 device 6;"):
        replicas.compare_tries(3, same, first, again, mesh)
    for sums in (first, first + 1):
        with pytest.raises(HardwareError, match=r"loss 2.5 and 2.5000002\d*\): on all devices"):
            replicas.compare_tries(3, other, first, sums, mesh)


# ---------------------------------------------------------------- runs with a fault


def spoiled(state, place: int):
    """The state, of which one device of the mesh, or each (-1), holds a parameter with another bit."""
    leaves, tree = jax.tree.flatten(state.params)
    number = next(i for i, leaf in enumerate(leaves) if leaf.sharding.is_fully_replicated)
    leaf, parts = leaves[number], []
    for shard in leaf.addressable_shards:
        host = np.array(shard.data)
        if place < 0 or shard.device == leaf.sharding.mesh.devices.flat[place]:
            host.view(np.uint32).reshape(-1)[0] ^= 1 << 20
        parts.append(jax.device_put(host, shard.device))
    leaves[number] = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)
    return state._replace(params=jax.tree.unflatten(tree, leaves))


@contextmanager
def fault(kind: str, place: int, when: int = WHEN):
    """In step `when`: a bit flips in the state `before` or `after` it, or one device scales its `gradient`."""
    made, made_gradient = Program.step, step.make_gradient

    def stepped(self, batch, again=False):
        now = self.runs[0].queue.tried.position + 1 == when
        with jax.transfer_guard("allow"):
            self.state = spoiled(self.state, place) if now and kind == "before" else self.state
        report = made(self, batch, again)
        with jax.transfer_guard("allow"):
            self.state = spoiled(self.state, place) if now and kind == "after" else self.state
        return report

    def make_gradient(*of_step):
        gradient = made_gradient(*of_step)

        def scaled(params, router_state, batch, number, knobs):
            grads, *rest = gradient(params, router_state, batch, number, knobs)
            specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, grads)
            mesh = jax.sharding.get_abstract_mesh()
            sizes = [mesh.shape[axis] for axis in sharding.AXES]

            def on_device(grads, number):
                own = jnp.ravel_multi_index([jax.lax.axis_index(a) for a in sharding.AXES], sizes, mode="wrap")
                factor = jnp.where((own == place) & (number == when - 1), 1.125, 1.0)
                return jax.tree.map(lambda a: a * factor, grads)

            on_device = jax.shard_map(on_device, in_specs=(specs, P()), out_specs=specs, check_vma=False)
            return on_device(grads, number), *rest

        return scaled

    Program.step = stepped
    step.make_gradient = make_gradient if kind == "gradient" else made_gradient
    try:
        yield
    finally:
        Program.step, step.make_gradient = made, made_gradient


def faulty(kind: str, place: str, *argv: str) -> None:
    """The command line with a fault, in a process of its own."""
    with fault(kind, int(place)):
        sys.exit(cli.main(argv))


def by(kind: str, place: int) -> list[str]:
    return [sys.executable, "-c", "import sys, test_replicas; test_replicas.faulty(*sys.argv[1:])", kind, str(place)]


CLEAN = [sys.executable, "-m", "frugalmoe.cli"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("replicas")
    (root / "eight").mkdir()
    write_text(root / "text")
    config_file(root, root / "text", root / "cache", FIELDS | {"mesh.data": 2, "mesh.fsdp": 2})
    config_file(root / "eight", root / "text", root / "cache", FIELDS | {"mesh.data": 4, "mesh.fsdp": 2})
    return root


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} {EIGHT}")


def train_in(root: Path, name: str, *more: str) -> list[str]:
    return ["train", f"--config={root / 'eight' / 'tiny.py'}", f"--workdir={root / name}", *more]


def done(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def clean(root):
    """A run of eight devices without a fault, in which steps are looked at and made twice."""
    flags = f"{os.environ['XLA_FLAGS']} {EIGHT}"
    command = [*CLEAN, *train_in(root, "clean", "--config.guard.replay_every=5")]
    environment = os.environ | {"XLA_FLAGS": flags}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert not (root / "clean" / "events.jsonl").exists()
    return root / "clean"


@pytest.mark.slow
def test_a_bit_that_flips_in_one_replica_is_found_and_the_supervisor_starts_again(root, clean):
    limits = supervise.Limits(restarts=2, hang=PATIENCE)
    workdir, argv = root / "flipped", train_in(root, "flipped")
    assert supervise.supervise([*by("before", 5), *argv], [*CLEAN, *argv], workdir, limits) == 0
    found, again = rows(workdir, "events.jsonl")
    assert (found["kind"], found["step"], again["kind"]) == ("hardware", 6, "restart")
    assert found["what"].startswith("replicas of params differ after step 6: process 0 device 5 (unlike most)")
    assert f"ended with {EXIT_HARDWARE}" in again["what"]
    assert without_times(rows(workdir)) == without_times(rows(clean)), "from step 4 on it was made anew"
    figures("F14 a bit that flips in one of eight replicas, supervised", 1, 1, found["step"] - 4)


@pytest.mark.slow
def test_a_gradient_that_one_replica_scales_is_found(root):
    ended = done([*by("gradient", 2), *train_in(root, "scaled")])
    assert ended.returncode == EXIT_HARDWARE and "Traceback" not in ended.stderr
    (found,) = rows(root / "scaled", "events.jsonl")
    assert "replicas of params differ after step 6: process 0 device 2 (unlike most)" in found["what"]
    assert saved.saved_steps(root / "scaled") == [4]
    figures("F14 a gradient that one of eight replicas scales", 1, 1, found["step"] - 4)


@pytest.mark.slow
def test_a_step_that_does_not_repeat_is_found_where_all_replicas_are_alike(root):
    """As after an error before gradients were added up: the first try began with another number on all devices."""
    more = ["--config.guard.replay_every=5", "--config.guard.replicas_every=0"]
    ended = done([*by("before", -1), *train_in(root, "replayed", *more)])
    assert ended.returncode == EXIT_HARDWARE, ended.stderr
    assert saved.saved_steps(root / "replayed") == [4]
    said = ended.stderr.splitlines()[-1]
    assert "step 5, made twice, gave other results (loss/total" in said and "on all devices" in said
    figures("F14 a step that does not repeat, alike on eight devices", 1, 1, WHEN - 4)


@pytest.mark.slow
def test_of_two_processes_the_one_is_named_and_both_end(root):
    """Before it is saved, where nothing is looked at in between."""
    argv = ["train", f"--config={root / 'tiny.py'}", f"--workdir={root / 'two'}", "--config.guard.replicas_every=0"]
    flags = os.environ["XLA_FLAGS"].replace("count=8", "count=2")
    port = free_port()
    start = lambda i: subprocess.Popen(
        [*by("before", 3), *argv, *by_flags(i, 2, port)[0]],
        env=os.environ | {"XLA_FLAGS": flags}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    processes = [start(i) for i in range(2)]
    said = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    assert [process.returncode for process in processes] == [EXIT_HARDWARE] * 2, "\n".join(said)
    (found,) = rows(root / "two", "events.jsonl")
    assert found["kind"] == "hardware" and "params differ after step 8: process 1 device" in found["what"]
    assert found["what"].count("device") == 1 and saved.saved_steps(root / "two") == [4]
    figures("F14 a bit that flips in one of two processes", 1, 1, found["step"] - 4)
