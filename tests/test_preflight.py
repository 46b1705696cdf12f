"""What would end a run before its first step is found before it waits for devices, and nothing is written for it."""

import json
import os
from pathlib import Path

import pytest
from runs import config_file, write_text

from frugalmoe.cli import main
from frugalmoe.config import load
from frugalmoe.data.prepare import prepare
from frugalmoe.fields import to_dict
from frugalmoe.train import preflight


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A text, a config and an empty directory to run in."""
    text = write_text(tmp_path / "text")
    config_file(tmp_path, text, tmp_path / "cache")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def tree(root: Path) -> dict[str, int]:
    """Files with their times; the cache's directory, which holds compiled programs and locks, is left out."""
    paths = [p for p in root.rglob("*") if "cache" not in p.relative_to(root).parts and p.is_file()]
    return {str(p): p.stat().st_mtime_ns for p in paths}


def broken_tokenizer(root: Path) -> str:
    (root / "tokenizer.json").write_text('{"model": ')
    return f"--config.data.tokenizer={root / 'tokenizer.json'}"


def without_field(root: Path) -> str:
    (root / "x.jsonl").write_text(json.dumps({"content": "no text here"}) + "\n")
    return f"--config.data.path={root / 'x.jsonl'}"


def run_of_another(root: Path) -> str:
    config = to_dict(load(str(root / "tiny.py"), {"model.dim": 64}))
    (root / "other").mkdir()
    (root / "other/config.json").write_text(json.dumps(config))
    return f"--workdir={root / 'other'}"


def somebodys_files(root: Path) -> str:
    return f"--workdir={root / 'text'}"


def prepared_with_another_tokenizer(root: Path) -> str:
    config = load(str(root / "tiny.py"))
    return f"--config.data.tokenizer=bpe:300 --config.data.path={prepare(config.data, root / 'prepared')}"


WRONG = [
    ("--config.data.path=/no/such/place", "data.path='/no/such/place': no such file or directory"),
    ("--config.data.path=quickstart:novell", "did you mean 'novel'?"),
    ("--config.data.path=mixed:code_g", "did you mean 'code_go'?"),
    ("--config.data.tokenizer=none.json", "data.tokenizer='none.json': no such kind or file"),
    ("--config.model.vocab_size=100", "model.vocab_size=100: smaller than the 257 tokens"),
    ("--config.model.moe.expert_dim=1000000000", "No space left on device: a checkpoint takes"),
    ("--config.mesh.expert=3", "mesh.expert=3: must divide"),
    ("--config.train.trackers=wandb,trackoi", "did you mean 'trackio'?"),
    ("--workdir=/proc/self/status/x", "/proc/self/status is a file"),
    (f"--workdir={'x' * 300}", "x: "),  # File name too long, or as a job's name
    (broken_tokenizer, "data.tokenizer"),
    (without_field, "'text'"),
    (run_of_another, "holds a run with another config (model.dim: 64 there, 32 here)"),
    (somebodys_files, "holds files but no config.json"),
    (prepared_with_another_tokenizer, "was prepared with 'bytes'"),
]


@pytest.mark.parametrize("command", ["train --dry-run", "train", "launch slurm --devices-per-node=1 --dry-run"])
@pytest.mark.parametrize(("wrong", "said"), WRONG, ids=[said[:25] for _, said in WRONG])
def test_what_is_wrong_is_one_line_and_nothing_is_written(place, capsys, command, wrong, said):
    flags = wrong(place) if callable(wrong) else wrong
    before = tree(place)
    capsys.readouterr()
    assert main([*command.split(), f"--config={place / 'tiny.py'}", *flags.split()]) == 2
    out = capsys.readouterr()
    assert said in out.err and out.err.count("\n") == 1 and out.out == ""
    assert tree(place) == before


def test_a_file_that_cannot_be_read(place, monkeypatch):
    """Where tests run as root, who may read everything, the rule itself is what is asked."""
    closed = str(place / "text/doc03.txt")
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != closed)
    with pytest.raises(preflight.UserError, match=r"doc03\.txt: Permission denied"):
        preflight.check(load(str(place / "tiny.py")), place / "run")


def test_a_run_that_is_training_is_named(place):
    from frugalmoe.train import rundir

    with rundir.locked(place / "run"), pytest.raises(rundir.Busy, match=f"process {os.getpid()} is training here"):
        preflight.check(load(str(place / "tiny.py")), place / "run")


def test_a_complete_run_needs_its_data_no_more(place):
    config = load(str(place / "tiny.py"), {"data.path": "/gone"})
    (place / "run").mkdir()
    (place / "run/config.json").write_text(json.dumps(to_dict(config)))
    (place / "run/summary.json").write_text(json.dumps({"status": "complete", "eval": {"loss": {"mean": 2.0}}}))
    assert "this run is complete" in preflight.check(config, place / "run").notes[0]
    with pytest.raises(preflight.UserError, match="no such file or directory"):
        preflight.check(config, place / "run", fresh=True)


def test_other_data_than_the_runs_is_refused(place):
    config = load(str(place / "tiny.py"))
    prepare(config.data)
    (place / "run").mkdir()
    (place / "run/config.json").write_text(json.dumps(to_dict(config)))
    (place / "run/data.json").write_text(json.dumps({"fingerprint": "another"}))
    with pytest.raises(preflight.UserError, match=r"the run's data changed .*--resume=force to go on with it"):
        preflight.check(config, place / "run")
    preflight.check(config, place / "run", resume="force")


def test_data_that_have_to_be_prepared_are_said_and_not_prepared(place):
    config = load(str(place / "tiny.py"), {"data.tokenizer": "bpe:300"})
    ready = preflight.check(config, place / "run")
    assert ready.config.model.vocab_size == 320  # 300, rounded up to a multiple of 64
    assert "40 files" in ready.notes[0] and "bpe:300" in ready.notes[1] and "frugalmoe data prepare" in ready.notes[2]
    assert not (place / "cache/prepared").exists() and not (place / "run").exists()
    prepare(config.data)
    assert preflight.check(config, place / "run").notes == ()


@pytest.mark.parametrize("path", ["quickstart", "mixed:code_go"])
def test_a_corpus_that_has_to_be_fetched_is_said_and_not_fetched(place, path):
    ready = preflight.check(load(str(place / "tiny.py"), {"data.path": path}), place / "run")
    assert "takes a network" in ready.notes[0]
    assert [p.name for p in (place / "cache").iterdir()] == []


def test_a_disk_that_holds_one_checkpoint_and_not_all_is_said(place, monkeypatch):
    """Tiny has 43,000 parameters: a checkpoint of 12 bytes each, half a MB; two are kept while a third is written."""
    config = load(str(place / "tiny.py"), {"checkpoint.every_steps": 2})
    usage = preflight.shutil.disk_usage(place)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=1_200_000))
    (note,) = [n for n in preflight.check(config, place / "run").notes if "checkpoints" in n]
    assert "3 checkpoints of" in note
    alone = load(str(place / "tiny.py"))  # saved at the end only
    assert not [n for n in preflight.check(alone, place / "run").notes if "checkpoints" in n]


@pytest.mark.parametrize(
    ("scheduler", "flags", "said"),
    [
        ("jobset", "--config.data.path=/elsewhere/texts", "must lie in this directory"),
        ("jobset", "--config.data.path=../text", "must lie in this directory"),
        ("skypilot", "--config.data.path=runs/text", "requirements.txt: not here"),
    ],
)
def test_nodes_with_a_copy_must_see_the_data(place, capsys, scheduler, flags, said):
    argv = ["launch", scheduler, "--config=quickstart", "--devices-per-node=1", *flags.split(), "--dry-run"]
    assert main(argv) == 2
    assert said in capsys.readouterr().err


def test_data_that_the_template_mounts_are_left_to_the_nodes(place, capsys):
    """The run's volume lies at /frugalmoe/runs of a pod, whatever is there on this machine."""
    flags = ["--config.data.path=/frugalmoe/runs/texts", "--workdir=runs/x"]
    assert main(["launch", "jobset", "--config=quickstart", "--devices-per-node=1", *flags, "--dry-run"]) == 0
    assert "data.path='/frugalmoe/runs/texts' cannot be seen from here" in capsys.readouterr().err


def test_a_study_is_checked_without_preparing_its_data(place, capsys):
    flags = [f"--config.data.path={place / 'text'}", f"--config.data.cache_dir={place / 'cache'}"]
    assert main(["ablate", "balance", "--dry-run", *flags]) == 0
    out = capsys.readouterr().out
    assert "loss_global (baseline)" in out and "note: data.tokenizer='bpe:1024' is trained" in out
    assert not (place / "cache/prepared").exists() and not list((place / "here").iterdir())
    for wrong, said in [
        ("--config.data.path=/no/such/place", "no such file or directory"),
        ("--config.model.moe.expert_dim=1000000000", "No space left on device"),
        (f"--workdir={place / 'text'}", "holds files but no study.json"),
        ("--config.train.trackers=none", "train.trackers='none': unknown"),
    ]:
        for dry in (["--dry-run"], []):
            assert main(["ablate", "balance", *dry, *flags, wrong]) == 2
            assert said in capsys.readouterr().err
            assert not (place / "cache/prepared").exists()
