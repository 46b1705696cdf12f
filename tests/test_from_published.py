"""A run that begins with a published model, without a run in between."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from published import randomized, save
from runs import write_text
from safetensors.torch import load_file, save_file

from frugalmoe.cli import main
from frugalmoe.commands import read_config
from frugalmoe.config import resolve
from frugalmoe.convert import from_hf
from frugalmoe.convert.origin import RECIPE
from frugalmoe.data.tokenizer import train_bpe
from frugalmoe.files import read_json
from frugalmoe.train import checkpoint, rundir
from frugalmoe.train.weights import load_checkpoint

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.whole]  # transformers' own
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """`text`, and `model`: Mixtral in bfloat16 with a tokenizer and a chat template."""
    root = tmp_path_factory.mktemp("published")
    write_text(root / "text")
    save(randomized("mixtral"), root / "model")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(root / "model" / WEIGHTS).items()}
    save_file(tensors, root / "model" / WEIGHTS)
    train_bpe(["The moon calls the river. x1 = f(3, y=4)"] * 9, 300).save_into(root / "model")
    (root / "model/tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (root / "model/chat_template.jinja").write_text("{{ messages }}")
    return root


def look(place: Path) -> from_hf.Found:
    return from_hf.look(place / "model", place / "none")


@pytest.fixture
def train(place, tmp_path, capsys):
    """`frugalmoe train --from=model --config=model` in this process; returns (exit code, stderr, stdout)."""

    def train(*flags: object, origin: str = "model"):
        fields = {"data.path": place / "text", "data.cache_dir": place / "cache", "data.sequence_length": 32}
        fields |= {"train.steps": 1, "train.batch_size": 4, "train.eval_rows": 4, "optim.warmup_steps": 0}
        given = [f"--config.{name}={value}" for name, value in fields.items()]
        where = [f"--from={place / origin}", f"--config={place / 'model'}", f"--workdir={tmp_path / 'run'}"]
        code = main(["train", *where, *given, *map(str, flags)])
        shown = capsys.readouterr()
        return code, shown.err, shown.out

    return train


def test_a_directory_is_a_config_with_its_model_and_tokenizer(place):
    config = resolve(read_config(str(place / "model")))
    found = look(place)
    assert config.model == found.config.model and config.data.tokenizer == str(place / "model")
    assert config.optim.learning_rate == RECIPE["optim.learning_rate"] and config.train.steps == RECIPE["train.steps"]


def test_a_run_begins_with_the_numbers_of_the_files_and_says_which(place, train, tmp_path):
    """With a rate of almost zero the run ends with them: every tensor comes back bit by bit, with what was beside."""
    code, err, _ = train("--config.optim.learning_rate=1e-30")
    assert code == 0, err
    record = rundir.origin_of(tmp_path / "run")
    assert record["run"] == str(place / "model") and record["family"] == "mixtral" and record["new"] == []
    found, expected = load_checkpoint(tmp_path / "run").weights, from_hf.read_arrays(look(place))
    assert jax.tree.structure(tuple(found)) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(np.array_equal, tuple(found), expected))
    assert main(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    theirs, ours = load_file(place / "model" / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert read_json(tmp_path / "back/config.json") == read_json(place / "model/config.json")
    for name in ("chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (place / "model" / name).read_bytes()
    manifest = read_json(tmp_path / "run/source.json")
    assert manifest["family"] == "mixtral" and len(manifest["files"]["config.json"]["sha256"]) == 64


@pytest.mark.slow
def test_by_way_of_a_run_it_is_the_same(place, train, tmp_path):
    """Converted before, it begins with the same numbers, and what came with the model goes along too."""
    assert main(["convert", "from-hf", str(place / "model"), str(tmp_path / "between")]) == 0
    assert train(f"--from={tmp_path / 'between'}", "--config.optim.learning_rate=1e-30")[0] == 0
    assert "family" not in rundir.origin_of(tmp_path / "run")
    for name in ("source.json", "source/chat_template.jinja", "source/config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "between" / name).read_bytes()
    assert main(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    theirs, ours = load_file(place / "model" / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_what_was_begun_goes_on_with_the_same_files_only(place, train, tmp_path):
    """A run that was killed before it saved reads them again; another number in them is seen."""
    shutil.copytree(place / "model", place / "copy")
    assert train(origin="copy")[0] == 0
    shutil.rmtree(tmp_path / "run/checkpoints")
    (tmp_path / "run/summary.json").unlink()
    config = ["train", f"--config={tmp_path / 'run'}", f"--workdir={tmp_path / 'run'}"]
    assert main(config) == 2  # without --from
    assert train(origin="copy")[0] == 0 and checkpoint.saved_steps(tmp_path / "run") == [1]
    shutil.rmtree(tmp_path / "run/checkpoints")
    (tmp_path / "run/summary.json").unlink()
    tensors = load_file(place / "copy" / WEIGHTS)
    tensors["model.norm.weight"] += 1
    save_file(tensors, place / "copy" / WEIGHTS)
    code, err, _ = train(origin="copy")
    assert code == 2 and "has changed since the run began with it" in err
    code, err, _ = train("--from.drop=head*", origin="copy")
    assert code == 2 and "did not begin with" in err


@pytest.mark.slow
def test_a_router_s_bias_comes_along_and_a_head_may_be_new(place, train, tmp_path):
    """DeepSeek's bias of the router is state; what is dropped is new. Both are told before anything is read."""
    save(randomized("deepseek_v3"), place / "deepseek")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(place / "model" / name, place / "deepseek")
    code, err, out = train(f"--config={place / 'deepseek'}", "--from.drop=head*", "--dry-run", origin="deepseek")
    assert code == 0 and "parameters of deepseek_v3, with routers' state; new: head_DV" in out, err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--config.model.dim=64"], "arrays do not fit: "),
        (["--config.model.moe.num_experts=4"], "gate_up_ED2F 3x8x32x2x16 there, 3x4x32x2x16 here"),
        (["--from=MODEL@3"], "MODEL@3: a published model has no steps; leave @3 out"),
        (["--from=PICKLE"], "holds pytorch_model.bin but no model.safetensors: such a file is a Python pickle"),
        (["--from=CUT"], "CUT/model.safetensors: "),
        (["--from=STRANGE"], "model_type='gpt2': no such family of models"),
        (["--config=STRANGE"], "model_type='gpt2': no such family of models"),
        (["--from=NAN"], "tensor 'model.norm.weight': holds numbers that are not finite"),
        (["--config.data.tokenizer=bytes"], "another tokenizer than that of --from=MODEL; give --config.data.tokeniz"),
        (["--config=MODEL:laptop"], "MODEL:laptop"),
    ],
)
def test_a_model_that_cannot_be_begun_with_is_one_line(place, train, tmp_path, flags, said):
    names = {name: str(place / name.lower()) for name in ("MODEL", "PICKLE", "CUT", "STRANGE", "NAN")}
    for name in ("pickle", "cut", "strange", "nan"):
        if not (place / name).is_dir():
            shutil.copytree(place / "model", place / name)
    if "PICKLE" in flags[0]:
        (place / "pickle" / WEIGHTS).rename(place / "pickle/pytorch_model.bin")
    if "CUT" in flags[0]:
        (place / "cut" / WEIGHTS).write_bytes((place / "model" / WEIGHTS).read_bytes()[:-100])
    if "STRANGE" in flags[0]:
        (place / "strange/config.json").write_text(json.dumps({"model_type": "gpt2"}))
    if "NAN" in flags[0]:
        tensors = load_file(place / "model" / WEIGHTS)
        tensors["model.norm.weight"][3] = float("nan")
        save_file(tensors, place / "nan" / WEIGHTS)
    put = lambda text: re.sub("[A-Z]{3,}", lambda found: names.get(found[0], found[0]), text)
    code, err, _ = train(*map(put, flags))
    assert code == 2 and err.count("\n") == 1 and put(said) in err
    assert not (tmp_path / "run" / "config.json").exists()
