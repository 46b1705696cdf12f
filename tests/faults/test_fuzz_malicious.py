"""Files that were made to do harm: nothing outside a run's directory is written, deleted, copied or run by them."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import parsers
import pyarrow
import pyarrow.parquet
import pytest
import tensorstore
import zstandard
from fuzz import prepared
from runs import config_file, figures

from frugalmoe.analysis.pages.report import write_report
from frugalmoe.analysis.stored.runs import load_run
from frugalmoe.cli import main
from frugalmoe.config import runnable
from frugalmoe.convert import safetensors
from frugalmoe.data import readers
from frugalmoe.errors import UserError
from frugalmoe.train import checkpoint, checksums, rundir, saved
from frugalmoe.train.weights import load_model


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("malicious")
    prepared(root)
    return parsers.MADE["root"]


@pytest.fixture
def run(made, tmp_path) -> Path:
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


NAMES = [".lock", "checkpoints", "report", "tensorboard", "tokenizer", "outside", "outside/model.moe.router", "trace",
         "metrics.jsonl",
         "summary.json", "config.json", "events.jsonl", "source", "island", "profile", "wandb"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_a_run_s_directory_leads_nowhere(run, tmp_path, name, there):
    """Neither a start nor --fresh nor a report writes or deletes what a link leads to."""
    victim = tmp_path / "victim"
    if there:
        (victim / "7").mkdir(parents=True)
        for inside in ("index.html", "a.png", "7/x", "step_1.npz", "tokenizer.json", "a.py", "residual_1"):
            (victim / inside).write_text("mine")
    path = run / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(victim)
    before, told = contents(tmp_path / "victim"), "is a symbolic link"
    for start in (rundir.check_fresh, rundir.start_over, lambda run: rundir.check_config(run, None, force=True)):
        with pytest.raises(UserError, match=told):
            start(run)
    if name in ("report", "outside", "trace", "wandb"):
        with pytest.raises(UserError, match=told):
            write_report(run)
    assert contents(victim) == before and os.path.lexists(victim) == there


def test_the_command_refuses_it_before_anything_is_done(run, made, tmp_path, capsys):
    shutil.rmtree(run / "checkpoints")
    (tmp_path / "victim/2").mkdir(parents=True)
    (run / "checkpoints").symlink_to(tmp_path / "victim")
    config = config_file(tmp_path, made / "text", made / "cache")
    for flags in ([], ["--fresh"], ["--resume=force"]):
        assert main(["train", f"--config={config}", f"--workdir={run}", *flags]) == 2
        assert capsys.readouterr().err.count("checkpoints is a symbolic link") == 1
    assert (tmp_path / "victim/2").is_dir()


@pytest.mark.parametrize(
    "file", ["../evil.py", "/{root}/evil.py", "outside/../../evil.py", "outside/model.moe.router/a.py"]
)
def test_no_python_file_outside_a_run_s_directory_is_run_for_it(run, tmp_path, file):
    """The last one is a link."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (run / "outside/model.moe.router").mkdir(parents=True)
    (run / "outside/model.moe.router/a.py").symlink_to(tmp_path / "evil.py")
    config = json.loads((run / "config.json").read_text())
    config["model"]["moe"]["router"] = "gone.py"
    (run / "config.json").write_text(json.dumps(config))
    row = {"spec": "gone.py", "sha256": "0" * 64, "file": file.replace("/{root}", str(tmp_path))}
    (run / "outside.json").write_text(json.dumps({"model.moe.router": row}))
    with pytest.raises(UserError, match=r"damaged|leads out of the run's directory"):
        runnable(run / "config.json")
    assert not (tmp_path / "ran").exists()


def test_an_export_takes_no_file_from_elsewhere_along(run, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key").write_text("secret")
    (run / "tokenizer/leak").symlink_to(tmp_path / "secret/key")
    (run / "checkpoints/2/leak").symlink_to(tmp_path / "secret")
    (run / "data.json").unlink()
    (run / "data.json").symlink_to(tmp_path / "secret/key")
    assert main(["checkpoints", str(run), "export", "2", str(tmp_path / "new")]) == 0
    assert not [name for name, content in contents(tmp_path / "new").items() if b"secret" in content]
    assert not saved.fault(tmp_path / "new", 2)


@pytest.mark.parametrize(
    "name", ["../x", "/abs", "a/../../x", "..", "a/", "a b", "\x00", ".hidden", "-flag", "a" * 300, "x/" * 200]
)
def test_a_run_s_name_is_no_way_out(made, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    config = config_file(tmp_path, made / "text", made / "cache")
    before = contents(tmp_path)
    assert main(["train", f"--config={config}", f"--config.name={name}"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert contents(tmp_path) == before and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_commands_follow_no_link_and_no_name_out_of_a_run(run, made, forks, tmp_path):
    """Each a process of its own, which ends with one line and has changed nothing anywhere."""
    config, links, names = config_file(tmp_path, made / "text", made / "cache"), 0, 0
    victim, said = tmp_path / "victim", tmp_path / "said"

    def refused(*argv: object, line: str) -> None:
        said.unlink(missing_ok=True)
        before = contents(victim), contents(run)
        forks.start(*argv, said=said)
        assert forks.wait() == 2 and said.read_text().count("\n") == 1 and line in said.read_text(), said.read_text()
        assert (contents(victim), contents(run)) == before

    (victim / "7").mkdir(parents=True)
    for inside in ("index.html", "7/x", "step_1.npz", "tokenizer.json", "a.py"):
        (victim / inside).write_text("mine")
    shutil.copytree(run, tmp_path / "whole")
    for name in NAMES:
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "whole", run)
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(victim)
        refused("train", f"--config={config}", f"--workdir={run}", "--fresh", line="is a symbolic link")
        refused("train", f"--config={config}", f"--workdir={run}", "--resume=force", line="is a symbolic link")
        links += 2
    for name in ("../x", "/abs", "a/../../x", "..", "a b", ".hidden", "-flag", "a" * 300):
        refused("train", f"--config={config}", f"--config.name={name}", line="name")
        names += 1
    figures("F22 links out of a run's directory, in place of each thing in it", links, links)
    figures("F22 names of runs that lead out", names, names)


@pytest.mark.slow
def test_commands_load_no_pickle_and_no_array_that_memory_cannot_hold(run, forks, tmp_path):
    said = tmp_path / "said"

    def told(*argv: object, code: int, line: str) -> None:
        said.unlink(missing_ok=True)
        forks.start(*argv, said=said)
        assert forks.wait() == code and line in said.read_text(), said.read_text()

    _huge(saved.place(run, 2))
    told("checkpoints", run, "verify", code=1, line="more than there is memory")
    told("generate", run, "--prompt=a", code=2, line="checkpoint of another model")
    (run / "opened").mkdir()
    columns = {"layers": np.array([Opened(run / "opened" / "by a pickle")], object)}
    np.savez(run / "probe.npz", **columns, allow_pickle=True)
    told("report", run, code=2, line="Python objects")
    assert not list((run / "opened").iterdir())
    figures("F22 a pickle, an array of 4 TB", 3, 3)


class Opened:
    """What makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def _huge(step: Path) -> None:
    """A checkpoint of a few bytes whose params are said to be an array of 4 TB; its checksums fit."""
    shutil.rmtree(step / "params")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(step / "params", args=ocp.args.PyTreeSave({"a": np.zeros(7, np.float32)}))
    for folder in ("params/", "params/ocdbt.process_0/"):
        tensorstore.open(
            {
                "driver": "zarr",
                "kvstore": {"driver": "ocdbt", "base": f"file://{step}/{folder}", "path": "a/"},
                "metadata": {"shape": [10**12], "chunks": [1024], "dtype": "<f4"},
            },
            create=True,
            delete_existing=True,
        ).result()
    checksums.write(step)


def test_a_checkpoint_that_says_more_than_memory_holds_is_refused(run):
    _huge(saved.place(run, 2))
    assert sum(path.stat().st_size for path in (run / "checkpoints/2/params").rglob("*") if path.is_file()) < 20_000
    assert not saved.fault(run, 2)
    assert checkpoint.not_finite(run, 2) == "params: says 4e+03 GB of arrays, more than there is memory"
    assert main(["checkpoints", str(run), "verify"]) == 1
    with pytest.raises(UserError, match="checkpoint of another model"):
        load_model(run, 2)


def test_a_damaged_parquet_does_not_end_the_process(tmp_path):
    """Numbers of a column in the footer, which the library reads with no way to say that they are wrong."""
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["The moon calls", None, "the river"] * 3, "domain": ["a", "b", None] * 3})
    packed = io.BytesIO()
    pyarrow.parquet.write_table(table, packed, compression="zstd")
    good = packed.getvalue()
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    for at in range(footer, len(good)):
        for bit in (0, 3):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
            try:
                list(readers.records(path, "a", "utf-8", ("text",)))
            except (UserError, *readers.ERRORS) as error:
                assert str(error)


def test_sizes_are_bounded_before_there_is_memory_for_them(tmp_path):
    bomb = tmp_path / "a.jsonl.zst"
    bomb.write_bytes(zstandard.ZstdCompressor().compress(bytes(readers.LARGEST + 1)))
    assert bomb.stat().st_size < 1 << 15
    with pytest.raises(UserError, match="unpack to"):
        list(readers.records(bomb, "a", "utf-8", ("text",)))
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
    for length, rule in ((len(header), "cut off or damaged"), (2**63, "not a whole safetensors file")):
        (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + header)
        with pytest.raises(UserError, match=rule):
            safetensors.read_header(tmp_path / "a.safetensors")


def test_a_pickle_in_a_run_is_not_loaded(run):
    evil = np.array([{"a": 1}], object)
    with np.load(run / "probe.npz") as probe:
        columns = dict(probe)
    np.savez(run / "probe.npz", **columns | {"layers": evil}, allow_pickle=True)
    with pytest.raises(UserError, match="Python objects"):
        load_run(run)


def test_text_cannot_command_the_terminal(made, tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / f"text/{number}.txt").write_text(f"\x1b]0;owned\x07 the {number} \x1b[2J moon\n" * 9)
    config = config_file(tmp_path, tmp_path / "text", tmp_path / "cache")
    assert main(["data", "show", f"--config={config}"]) == 0
    shown = capsys.readouterr().out
    assert "moon" in shown and "\x1b]" not in shown and "\x07" not in shown and "\x1b[2J" not in shown
