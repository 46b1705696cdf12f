"""Whole runs through the command line, in processes of their own that are really killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from runs import command, config_file, rows, run, without_times, write_text

pytestmark = pytest.mark.slow
NORMAL = {"XLA_FLAGS": ""}  # as a user runs it, optimized


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Text, a data cache that is filled once, and a config file whose steps each checkpoint."""
    root = tmp_path_factory.mktemp("runs")
    text = write_text(root / "text")
    fields = {"checkpoint.every_steps": 4, "train.steps": 16, "train.eval_every": 8, "model.moe.router": "sigmoid_bias"}
    return root, config_file(root, text, root / "cache", fields)


def train(place, workdir: str, *flags: str, **environment: str):
    return run("train", f"--config={place[1]}", f"--workdir={place[0] / workdir}", *flags, **NORMAL | environment)


@pytest.fixture(scope="module")
def undisturbed(place):
    out = train(place, "undisturbed")
    assert out.returncode == 0, out.stderr
    return place[0] / "undisturbed", out


def leaves(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint."""
    step = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    found = {}
    for item in ("params", "router_state", "opt_state", "step"):
        tree = ocp.StandardCheckpointer().restore((workdir / "checkpoints" / str(step) / item).absolute())
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[f"{item}{path}"] = np.asarray(leaf)
    return found


def same_bits(a: Path, b: Path) -> None:
    """Same state, same metrics at every step, whatever happened on the way."""
    ours, theirs = leaves(a), leaves(b)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert without_times(rows(a)) == without_times(rows(b))
    assert rows(a, "expert_load.jsonl") == rows(b, "expert_load.jsonl")


def start(place, workdir: str) -> subprocess.Popen:
    flags = [f"--config={place[1]}", f"--workdir={place[0] / workdir}"]
    return subprocess.Popen(
        command("train", *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | NORMAL
    )


def wait_for_step(workdir: Path, step: int, timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    log = workdir / "metrics.jsonl"
    while time.monotonic() < deadline:
        if log.is_file() and log.read_text().count('"loss/ce"') >= step:
            return
        time.sleep(0.005)
    raise TimeoutError(f"{log} did not reach step {step}")


def test_a_run_ends_with_a_table_a_sample_and_a_report(undisturbed):
    workdir, out = undisturbed
    for text in ("nats per token", "tokens/s", "active per token", "max violation", "sample: The ", "report: "):
        assert text in out.stdout, out.stdout
    for name in ("config.json", "environment.json", "data.json", "metrics.jsonl", "expert_load.jsonl", "summary.json",
                 "probe.npz", "report/index.html"):  # fmt: skip
        assert (workdir / name).stat().st_size > 0
    assert list((workdir / "tensorboard").glob("events*"))
    steps = [row["step"] for row in rows(workdir) if "loss/ce" in row]
    assert steps == list(range(1, 17))
    row = rows(workdir)[5]
    for name in ("loss/ce", "router/max_violation/layer_01", "speed/tokens_per_second", "optim/learning_rate"):
        assert np.isfinite(row[name])
    assert [r["step"] for r in rows(workdir) if "eval/loss/mean" in r] == [8, 16]


def test_again_it_says_complete_and_trains_nothing(undisturbed, place):
    before = {p: p.stat().st_mtime_ns for p in undisturbed[0].rglob("*") if p.is_file() and "report" not in p.parts}
    out = train(place, "undisturbed")
    assert out.returncode == 0 and "this run is complete (16 steps)" in out.stdout and "nats per token" in out.stdout
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_fresh_starts_over(undisturbed, place):
    train(place, "fresh")
    out = train(place, "fresh", "--fresh")
    assert out.returncode == 0, out.stderr
    same_bits(place[0] / "fresh", undisturbed[0])


@pytest.mark.parametrize("step", [2, 6, 10])
def test_killed_and_restarted_it_ends_in_the_same_bits(undisturbed, place, step):
    """SIGKILL before the first checkpoint, between two, and around one; twice on the way."""
    name = f"killed{step}"
    for target in (step, step + 3):
        process = start(place, name)
        wait_for_step(place[0] / name, target)
        process.kill()
        process.communicate()
    out = train(place, name)
    assert out.returncode == 0, out.stderr
    same_bits(place[0] / name, undisturbed[0])


def test_a_run_from_before_documents_had_a_start_ends_as_it_would_have(place):
    """The same command continues it bit for bit, though its default batches are others now."""
    whole, cut = place[0] / "whole_old", place[0] / "cut_old"
    quick = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    assert train(place, whole.name, "--config.data.document_start=none", **quick).returncode == 0
    shutil.copytree(whole, cut)
    for path in (cut / "checkpoints" / "16", cut / "report"):
        shutil.rmtree(path)
    (cut / "summary.json").unlink()
    config = json.loads((cut / "config.json").read_text())
    del config["data"]["document_start"]
    (cut / "config.json").write_text(json.dumps(config))
    out = train(place, cut.name, **quick)
    assert out.returncode == 0, out.stderr
    same_bits(cut, whole)
    assert json.loads((cut / "config.json").read_text()) == json.loads((whole / "config.json").read_text())


def test_sigterm_saves_and_exits_with_75(undisturbed, place):
    process = start(place, "term")
    wait_for_step(place[0] / "term", 5)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    assert "after saving" in stdout
    stopped = max(int(p.name) for p in (place[0] / "term" / "checkpoints").iterdir())
    assert stopped >= 5, "the step it was in was saved, not the last multiple of checkpoint.every_steps"
    out = train(place, "term")
    assert out.returncode == 0 and f"resuming at step {stopped} of 16" in out.stdout
    same_bits(place[0] / "term", undisturbed[0])


def test_retention_keeps_the_last_two(undisturbed):
    steps = sorted(int(p.name) for p in (undisturbed[0] / "checkpoints").iterdir() if p.name.isdigit())
    assert steps == [12, 16]


def refused(out: subprocess.CompletedProcess, *texts: str) -> None:
    """Exit code 2 and one line that says what is wrong."""
    assert out.returncode == 2, (out.returncode, out.stderr[-2000:])
    assert len(out.stderr.strip().splitlines()) == 1 and out.stderr.startswith("frugalmoe: "), out.stderr
    for text in texts:
        assert text in out.stderr, out.stderr


def test_another_config_is_refused_and_named(undisturbed, place):
    before = (undisturbed[0] / "config.json").read_text()
    out = train(place, "undisturbed", "--config.optim.learning_rate=0.1", "--config.model.moe.num_experts=4")
    refused(
        out, "optim.learning_rate: 0.003 there, 0.1 here", "model.moe.num_experts: 8 there, 4 here", "--resume=force"
    )
    assert (undisturbed[0] / "config.json").read_text() == before


def test_force_continues_with_another_config(place, undisturbed):
    subprocess.run(["cp", "-r", undisturbed[0], place[0] / "forced"], check=True)
    out = train(place, "forced", "--resume=force", "--config.train.steps=20")
    assert out.returncode == 0, out.stderr
    assert [r["step"] for r in rows(place[0] / "forced") if "loss/ce" in r] == list(range(1, 21))


def test_a_checkpoint_of_another_model_is_refused(place, undisturbed):
    subprocess.run(["cp", "-r", undisturbed[0], place[0] / "other"], check=True)
    out = train(place, "other", "--resume=force", "--config.model.dim=64")
    refused(out, "checkpoint of another model", "params", "(1, 32,", "(1, 64,")


BAD = [
    (["--config.model.moe.num_expert=4"], "did you mean 'num_experts'"),
    (["--config.train.batch_size=many"], "train.batch_size='many': expected int"),
    (["--config.model.moe.num_experts_per_token=9"], "at most model.moe.num_experts=8"),
    (["--config.model.moe.router=topk"], "no such routing strategy"),
    (["--config.data.path=/nowhere"], "/nowhere"),
    (["--config.model.vocab_size=100"], "smaller than the 257 tokens"),
    (["--config.mesh.data=2"], "number of devices, 1"),
    (["--config.mesh.expert=2"], "mesh.expert=2"),
]


@pytest.mark.parametrize("flags, message", BAD, ids=lambda v: v[0] if isinstance(v, list) else "")
def test_bad_input_is_one_line_and_writes_nothing(place, flags, message):
    refused(train(place, "bad", *flags), message)
    assert not (place[0] / "bad").exists()


def test_a_directory_that_is_no_run_is_left_alone(place):
    (place[0] / "mine").mkdir(exist_ok=True)
    (place[0] / "mine" / "thesis.txt").write_text("do not delete")
    refused(train(place, "mine"), "holds files but no config.json")
    refused(train(place, "mine", "--fresh"), "--fresh deletes runs only")
    assert (place[0] / "mine" / "thesis.txt").exists()


def test_a_workdir_that_cannot_be_made(place):
    refused(train(place, "text/doc00.txt/run"), "doc00.txt is a file")


def test_two_processes_do_not_share_a_run_directory(place):
    process = start(place, "shared")
    wait_for_step(place[0] / "shared", 1)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        refused(train(place, "shared"), f"process {process.pid} is training here")
    finally:
        os.kill(process.pid, signal.SIGCONT)
        process.kill()
        process.communicate()


MOUNT = "mount -t tmpfs -o {options} tmpfs {target} && cd {root} && {command}; code=$?; {then}; exit $code"


def in_a_mount(place, options: str, *flags: str, then: str = "true") -> subprocess.CompletedProcess:
    """Trains into a file system of its own, in a mount namespace of its own."""
    target = place[0] / "mount"
    target.mkdir(exist_ok=True)
    inner = " ".join(command("train", f"--config={place[1]}", f"--workdir={target}/run", *flags))
    script = MOUNT.format(options=options, target=target, command=inner, root=place[0], then=then)
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, env=os.environ | NORMAL, timeout=300
    )


def test_a_read_only_disk_is_named(place, undisturbed):
    refused(in_a_mount(place, "ro"), "mount/run", "Read-only file system")


def test_a_full_disk_is_named(place, undisturbed):
    refused(in_a_mount(place, "size=160k"), "No space left on device", "a checkpoint takes")


def test_a_disk_that_fills_up_is_named_and_the_last_checkpoint_kept(place, undisturbed):
    size = sum(p.stat().st_size for p in (undisturbed[0] / "checkpoints" / "16").rglob("*") if p.is_file())
    flags = ["--config.checkpoint.on_error=stop"]  # what else it does is in faults/test_fault_disk.py
    out = in_a_mount(place, f"size={int(2.5 * size)}", *flags, then="ls mount/run/checkpoints >&2")
    assert out.returncode == 2, out.stderr
    message, *steps = out.stderr.strip().splitlines()
    assert "No space left on device" in message and steps, out.stderr
    assert all(step.isdigit() for step in steps), ("no half-written checkpoint stays", out.stderr)


def test_generate_samples_reproducibly_and_stops(undisturbed):
    flags = ["generate", undisturbed[0], "--prompt=The ", "--max-tokens=80"]
    first, again, other = (run(*flags, f"--seed={seed}") for seed in (1, 1, 2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout != other.stdout
    assert first.stdout.startswith("The ")
    text = first.stdout.removeprefix("The ")
    stop = next(c for c in text if c.isalnum() and c.isascii())
    stopped = run(*flags, "--seed=1", f"--stop={stop}")
    assert stopped.stdout.rstrip("\n") == "The " + text[: text.index(stop)]


def test_generate_refuses_what_it_cannot_do(undisturbed, place):
    refused(run("generate", place[0]), "not a run directory")
    refused(run("generate", undisturbed[0], "--temperature=-1"), "--temperature=-1.0: must not be negative")
    refused(run("generate", undisturbed[0], "--top-p=0"), "--top-p=0.0: must be in (0, 1]")
    refused(run("generate", undisturbed[0], "--max-tokens=999999999"), "--max-tokens=999999999: this device, with")
    refused(run("generate", undisturbed[0], "--prompt=a\udcff"), "--prompt: must be UTF-8")


@pytest.mark.parametrize("name", ["", "train", "ablate", "generate", "report", "data", "routers"])
def test_help_has_examples(name):
    out = run(*([name] if name else []), "--help")
    assert out.returncode == 0
    assert "examples:" in out.stdout if name else "COMMAND" in out.stdout


def test_the_installed_command_is_the_module():
    out = subprocess.run(
        [Path(sys.executable).parent / "frugalmoe", "routers", "--format=json"], capture_output=True, text=True
    )
    assert out.returncode == 0 and '"topk_softmax"' in out.stdout
