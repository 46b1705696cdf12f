"""Islands as a user runs them: commands of their own, and the virtual ones of studies beside them."""

import json
import subprocess

import numpy as np
import pytest
from runs import command, config_file, rows, run, write_text
from test_processes import free_port

from frugalmoe.ablate.results import final_metrics, known_metrics
from frugalmoe.islands.tensors import flatten
from frugalmoe.train.weights import load_model

pytestmark = pytest.mark.slow
FIELDS = {
    "train.batch_size": 4,
    "train.accumulate_steps": 2,
    "train.ramp_from": 2,  # batches grow amid the second round
    "train.ramp_batches": 4,
    "train.trackers": "",
    "train.eval_rows": 8,
    "model.moe.router": "sigmoid_bias",
    "islands.round_steps": 3,
    "islands.wait_for": 2,
    "islands.bits": 8,
    "islands.lapse_seconds": 600.0,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("islands")
    return root, config_file(root, write_text(root / "text"), root / "cache", FIELDS)


def train_all(*flags: list) -> None:
    """Runs commands at one time."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen(command("train", *each), **streams) for each in flags]
    said = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(flags), "\n".join(said)


@pytest.fixture(scope="module")
def two(place):
    root, config = place
    names = ("island-00", "island-01")
    train_all(*([f"--config={config}", f"--workdir={root / name}", f"--islands={root / 'meet'}"] for name in names))
    return [root / name for name in names]


def test_two_islands_have_the_same_outer_parameters_after_every_round(two) -> None:
    hashes = [[row["outer_sha256"] for row in rows(workdir, "rounds.jsonl")] for workdir in two]
    assert len(hashes[0]) == 4 and hashes[0] == hashes[1] and len(set(hashes[0])) == 4
    first, second = (flatten(load_model(workdir)[1].params) for workdir in two)
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    assert rows(two[0], "rounds.jsonl")[-1]["tokens_of_all"] == 2 * (4 * 2 + 8 * 4) * 32
    losses = [json.loads((workdir / "summary.json").read_text())["eval"]["loss"] for workdir in two]
    assert losses[0] == losses[1]


def test_records_have_the_expert_loads_of_all(two) -> None:
    """Those that each run counted itself at the steps of the round."""
    logs = {workdir.name: rows(workdir, "expert_load.jsonl") for workdir in two}
    of_rounds = [rows(workdir, "island_load.jsonl") for workdir in two]
    assert of_rounds[0] == of_rounds[1] and len(of_rounds[0]) == 4
    for row in of_rounds[0]:
        assert [name for name, _ in row["loads"]] == list(logs)
        for name, loads in row["loads"]:
            own = [log["counts"] for log in logs[name] if row["step"] - 3 < log["step"] <= row["step"]]
            assert loads == np.sum(own, axis=0).tolist()


def test_virtual_islands_are_those_of_real_processes(place, two) -> None:
    """The same rounds bit for bit: two virtual islands share batches that grow to 8, the real ones have halves."""
    root, config = place
    flags = ["--config.islands.virtual=2", "--config.train.batch_size=8", "--config.train.ramp_from=4"]
    done = run("train", f"--config={config}", f"--workdir={root / 'virtual'}", *flags)
    assert done.returncode == 0, done.stderr
    summary = json.loads((root / "virtual" / "summary.json").read_text())
    found, real = summary["islands"], rows(two[0], "rounds.jsonl")[-1]
    assert (found["outer_sha256"], found["tokens"]) == (real["outer_sha256"], real["tokens_of_all"])
    study = {"forward_flops": {"a": {"routed experts": 1.0}}, "experts_per_token": {"a": 2}, "tokens_per_step": 1}
    values = final_metrics(summary, rows(root / "virtual", "metrics.jsonl"), study, "a")
    assert values["islands/tokens"] == found["tokens"] and values.keys() <= set(known_metrics(summary["domains"]))
    assert values["islands/tokens_per_second"] == found["tokens"] / found["seconds"]


def test_an_island_of_two_processes_is_one_island(place, two) -> None:
    root, config = place
    port, meet = free_port(), f"--islands={root / 'meet-of-three'}"
    both = [f"--coordinator=127.0.0.1:{port}", "--num-processes=2"]
    of_two = [[f"--workdir={root / 'both'}", *both, f"--process-id={i}"] for i in range(2)]
    train_all(*([f"--config={config}", meet, *each] for each in (*of_two, [f"--workdir={root / 'alone'}"])))
    hashes = [[row["outer_sha256"] for row in rows(root / name, "rounds.jsonl")] for name in ("both", "alone")]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 4
    ((_, counts), *_) = rows(root / "alone", "island_load.jsonl")[0]["loads"]
    ((_, whole), *_) = rows(two[0], "island_load.jsonl")[0]["loads"]
    assert np.sum(counts, axis=1).tolist() == np.sum(whole, axis=1).tolist()  # those of both processes
    # As far as sums over devices allow, they are the two islands of one process each.
    first, second = (flatten(load_model(workdir)[1].params) for workdir in (root / "both", two[0]))
    assert max(np.abs(first[name] - second[name]).max() for name in first) < 1e-3


def test_data_of_its_own_are_refused_before_there_is_a_run(place, two) -> None:
    root, config = place
    text = write_text(root / "other")
    (text / "doc00.txt").write_text("Words that the others do not read.\n")
    workdir = root / "stranger"
    flags = [f"--workdir={workdir}", f"--islands={root / 'meet'}", f"--config.data.path={text}"]
    done = run("train", f"--config={config}", *flags)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and ": data is '" in done.stderr
    assert not workdir.exists() or {path.name for path in workdir.iterdir()} <= {".lock"}
