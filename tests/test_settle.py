"""What a config leaves open is settled once: on record, when a run goes on, and when it is repeated from its record."""

import json
import os
import shutil

import pytest
from runs import config_file, rows, run, write_text

from frugalmoe.cli import main
from frugalmoe.train.rundir import read_rows

TWO = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"}
SETTLED = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1, "context": 1}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A finished run of two steps on one device, under `run`, and its config file."""
    root = tmp_path_factory.mktemp("settled")
    config = config_file(root, write_text(root / "text"), root / "cache", {"train.steps": 6})
    assert main(["train", f"--config={config}", f"--workdir={root / 'run'}"]) == 0
    return root, config


def record(workdir) -> dict:
    return json.loads((workdir / "config.json").read_text())


def as_if_interrupted(place, name: str, older: bool):
    """A copy of the run that has not been evaluated; an older one left its vocabulary and its mesh open on record."""
    workdir = place[0] / name
    shutil.copytree(place[0] / "run", workdir)
    (workdir / "summary.json").unlink()
    if older:
        config = record(workdir)
        del config["left_open"]
        config["model"]["vocab_size"], config["mesh"]["data"] = 0, -1
        (workdir / "config.json").write_text(json.dumps(config))
    return workdir


def test_the_record_says_what_ran_and_what_was_open(place):
    config = record(place[0] / "run")
    assert config["model"]["vocab_size"] == 320  # 257 tokens, rounded up
    assert config["mesh"] == SETTLED and config["left_open"] == ["model.vocab_size", "mesh.data"]


@pytest.mark.parametrize("older", [False, True])
def test_the_same_command_goes_on_and_on_two_devices_too(place, older):
    workdir = as_if_interrupted(place, f"goes_on_{older}", older)
    done = run("train", f"--config={place[1]}", f"--workdir={workdir}", **TWO)
    assert done.returncode == 0, done.stderr
    assert len([row for row in rows(workdir) if "loss/ce" in row]) == 6
    config = record(workdir)
    assert config["model"]["vocab_size"] == 320 and config["mesh"] == SETTLED | {"data": 2}
    assert config["left_open"] == ["model.vocab_size", "mesh.data"]
    starts = read_rows(workdir / "history.jsonl")
    assert len(starts) == 2 and starts[-1]["changes"] == ({} if older else {"mesh.data": [1, 2]})


@pytest.mark.parametrize("older", [False, True])
def test_another_vocabulary_does_not_go_on(place, older, capsys):
    workdir = as_if_interrupted(place, f"refused_{older}", older)
    for size, code in ((384, 2), (320, 0)):
        capsys.readouterr()
        flags = [f"--config={place[1]}", f"--workdir={workdir}", f"--config.model.vocab_size={size}", "--dry-run"]
        assert main(["train", *flags]) == code
    assert main(["train", *flags[:2], "--config.model.vocab_size=384"]) == 2
    assert "model.vocab_size: 320 there, 384 here" in capsys.readouterr().err
    assert record(workdir)["model"]["vocab_size"] == (0 if older else 320)


def test_a_run_is_repeated_from_its_record_on_other_devices_and_with_another_tokenizer(place):
    flags = [f"--config={place[0] / 'run'}", f"--workdir={place[0] / 'repeated'}", "--config.train.steps=5"]
    done = run("train", *flags, "--config.data.tokenizer=bpe:340", **TWO)
    assert done.returncode == 0, done.stderr
    config = record(place[0] / "repeated")
    assert config["mesh"] == SETTLED | {"data": 2} and config["left_open"] == ["model.vocab_size", "mesh.data"]
    assert config["model"]["vocab_size"] == 384  # 340 tokens, rounded up
    assert config["data"]["tokenizer"] == "bpe:340"


def test_a_dry_run_of_a_complete_run_counts_its_parameters(place, capsys):
    capsys.readouterr()
    assert main(["train", f"--config={place[1]}", f"--workdir={place[0] / 'run'}", "--dry-run"]) == 0
    total = json.loads((place[0] / "run/summary.json").read_text())["parameters"]["total"]
    assert f"parameters     {total:,} total" in capsys.readouterr().out
