"""Scores of a trained run: those of its own summary, and those of any text, however they are computed."""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import tiny, write_text

from frugalmoe.cli import main
from frugalmoe.errors import UserError
from frugalmoe.evaluate import evaluate
from frugalmoe.evaluate.grading import grade_run
from frugalmoe.experts import executors
from frugalmoe.files import read_json
from frugalmoe.train import checkpoint
from frugalmoe.train.loop import train
from frugalmoe.train.step import init
from frugalmoe.train.weights import load_checkpoint, run_and_step

pytestmark = pytest.mark.whole

FIELDS = {"train.steps": 2, "checkpoint.every_steps": 1, "optim.warmup_steps": 1, "model.num_layers": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two domains of text, of which one has fewer rows than are evaluated."""
    root = tmp_path_factory.mktemp("evaluate")
    write_text(root / "text")
    lines = [
        {"text": f"{d} {i} " * (4 if d == "few" else 200), "domain": d} for i in range(30) for d in ("few", "many")
    ]
    (root / "two.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def made(place, name: str, **changes):
    """The directory of a complete run on two domains."""
    fields = FIELDS | {"data.path": str(place / "two.jsonl")} | changes
    if not (place / name).is_dir():
        train(tiny(place / "text", place / "cache", fields), place / name)
    return place / name


@pytest.fixture(scope="module")
def run(place):
    return made(place, "run")


def same(found, run, rel: float = 1e-6) -> None:
    summary = read_json(run / "summary.json")["eval"]
    assert found.loss == pytest.approx(summary["loss"], rel=rel)
    assert found.bits_per_byte == pytest.approx(summary["bits_per_byte"], rel=rel)


def test_a_run_scores_as_its_summary_says(run):
    found = evaluate(run)
    same(found, run)
    assert found.step == 2 and set(found.loss) == {"few", "many", "mean"}
    assert 0 < found.targets["few"] < 16 * 32 == found.targets["many"]
    earlier = evaluate(run, 1)
    assert earlier.step == 1 and earlier.loss != found.loss and earlier.targets == found.targets


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_size_of_batches_does_not_matter(place, accumulate):
    """7 rows in batches of 4 and 1; the last one is padded."""
    changes = {"train.batch_size": 4, "train.accumulate_steps": accumulate, "train.eval_rows": 7}
    same(evaluate(other := made(place, f"by {accumulate}", **changes)), other)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in executors.names() if not executors.get(name).platforms])
def test_each_executor_scores_as_its_summary_says(place, name):
    changes = {"model.moe.executor": name, "train.steps": 1, "optim.warmup_steps": 0}
    same(evaluate(other := made(place, name, **changes)), other)


def test_all_documents_of_a_given_text_are_scored(run, place, tmp_path):
    """Of one document of n bytes all n bytes and its end are targets; two of two domains score as each alone."""
    texts = ["The moon calls the river.\n" * 5, "x0 = f(7, y=12)\n" * 9]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    alone = [evaluate(run, data=str(tmp_path / f"{i}.txt")) for i in range(2)]
    for found, text in zip(alone, texts):
        assert list(found.targets.values()) == [len(text) + 1] and list(found.bytes.values()) == [len(text)]
        (domain,) = found.targets
        nats = found.loss[domain] * found.targets[domain]
        assert found.bits_per_byte[domain] == pytest.approx(nats / np.log(2) / len(text))
    lines = [{"text": text, "domain": f"d{i}"} for i, text in enumerate(texts)]
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    both = evaluate(run, data=str(tmp_path / "both.jsonl"))
    assert [both.loss[f"d{i}"] for i in range(2)] == pytest.approx([found.loss["mean"] for found in alone], rel=1e-6)
    few = evaluate(run, data=str(tmp_path / "both.jsonl"), tokens=64)
    assert few.targets == {"d0": 32, "d1": 32}


@pytest.mark.slow
def test_a_config_s_data_are_scored_on_its_held_out_documents(run, place):
    own = evaluate(run)
    again = evaluate(run, overrides=[f"data.path={place / 'two.jsonl'}"], tokens=2 * 16 * 32)
    assert again.loss == pytest.approx(own.loss) and again.targets == own.targets
    longer = evaluate(run, overrides={"data.sequence_length": 64})
    assert longer.targets["few"] == own.targets["few"] and longer.targets["many"] > own.targets["many"]


@pytest.mark.slow
def test_of_a_prepared_directory_the_held_out_documents_are_scored(run, place):
    text, flags = place / "text", ["--config=quickstart:laptop", f"--config.data.cache_dir={place / 'cache'}"]
    flags += ["--config.data.tokenizer=bytes", f"--config.data.path={text}", "--config.data.validation_fraction=0.25"]
    assert main(["data", "prepare", *flags, f"--output={place / 'quarter'}"]) == 0
    found = evaluate(run, data=str(place / "quarter"))
    held_out = evaluate(run, overrides={"data.path": str(text), "data.validation_fraction": 0.25})
    assert found.targets == held_out.targets and found.loss == pytest.approx(held_out.loss)
    assert sum(found.targets.values()) < sum(evaluate(run, data=str(text)).targets.values()) / 2


def test_the_command_prints_a_table_and_json(run, capsys):
    assert main(["evaluate", str(run)]) == 0
    shown = capsys.readouterr().out
    summary = read_json(run / "summary.json")["eval"]
    for name in ("few", "many", "mean"):
        (line,) = (line for line in shown.splitlines() if line.startswith(name))
        assert f"{summary['loss'][name]:.4f}" in line and f"{summary['bits_per_byte'][name]:.4f}" in line
    assert main(["evaluate", f"{run}@1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 1 and found["loss"]["mean"] == pytest.approx(evaluate(run, 1).loss["mean"])


BOTH = "import sys; from frugalmoe.cli import main; sys.exit(main(sys.argv[1:]) or main([*sys.argv[1:3], *SUITE]))"


@pytest.mark.slow
def test_eight_devices_score_as_one(run):
    """Rows that eight devices do not divide: 5 of one domain, and the few of the other; and 32 short texts."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    text, suite = str(run.parent / "two.jsonl"), ["--suite=recall,copy", "--items=4", "--json"]
    code = BOTH.replace("SUITE", repr(suite))
    arguments = [sys.executable, "-c", code, "evaluate", str(run), f"--data={text}", "--tokens=320", "--json"]
    done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": flags})
    assert done.returncode == 0, done.stderr
    (found, end), one = json.JSONDecoder().raw_decode(done.stdout), evaluate(run, data=text, tokens=320)
    assert found["targets"] == one.targets and found["bytes"] == one.bytes and one.targets["many"] == 5 * 32
    for name in ("loss", "bits_per_byte"):
        assert found[name] == pytest.approx(getattr(one, name), rel=1e-6)
    for name, grade in grade_run(run, names=("recall", "copy"), items=4).tasks.items():
        assert json.loads(done.stdout[end:])["tasks"][name] == pytest.approx(grade._asdict(), abs=1e-4)


def test_a_model_that_no_memory_holds_is_refused_before_it_is_read(run, tmp_path, capsys):
    """By all that load a run: what its record says of its size comes first."""
    large = shutil.copytree(run, tmp_path / "large")
    record = read_json(large / "config.json")
    record["model"]["moe"]["num_experts"] = 10**8
    (large / "config.json").write_text(json.dumps(record))
    for command in (
        ["evaluate", large],
        ["evaluate", large, "--suite=copy"],
        ["convert", "to-hf", large, large / "hf"],
    ):
        assert main([*map(str, command)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and f"{large}: the model needs " in err and "GB of memory, and this machine" in err
    assert not (large / "hf").exists()


def test_a_terminal_shows_a_bar(run, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert main(["evaluate", str(run), "--tokens=64"]) == 0
    assert "evaluating" in capsys.readouterr().err
    monkeypatch.delenv("FORCE_COLOR")
    assert main(["evaluate", str(run), "--tokens=64"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["RUN@7"], "no checkpoint of step 7; valid: [1, 2]"),
        (["RUN@last"], "no such directory, and STEP of RUN@STEP must be a whole number"),
        (["RUN@"], "STEP of RUN@STEP"),
        (["PLACE/text"], "not a run directory"),
        (["RUN", "--data=PLACE/blank.txt"], "holds no text"),
        (["RUN", "--data=PLACE/nowhere"], "PLACE/nowhere"),
        (["RUN", "--data="], "data.path"),
        (["RUN", "--data=PLACE/prepared"], "both must agree"),
        (["RUN", "--tokens=0"], "--tokens=0"),
        (["RUN", f"--tokens={2**40}"], "--tokens"),
        (["RUN", "--config.data.tokenizer=bpe:300"], "data.tokenizer: an evaluation is of a model with its tokenizer"),
        (["RUN", "--config.model.dim=64"], "model.dim: an evaluation is of a model"),
        (["RUN", "--data=PLACE/text", "--config.data.path=PLACE/text"], "cannot be given with --config.data.path"),
        (["RUN", "--config.data.nothing=1"], "data.nothing: unknown config field"),
    ],
)
def test_what_cannot_be_scored_is_one_line(run, place, capsys, arguments, said):
    (place / "blank.txt").write_text(" \n")
    if "prepared" in str(arguments) and not (place / "prepared").is_dir():
        text, cache = f"--config.data.path={place / 'text'}", f"--config.data.cache_dir={place / 'cache'}"
        flags = ["--config=quickstart", text, cache, "--config.data.tokenizer=bpe:300"]
        assert main(["data", "prepare", *flags, f"--output={place / 'prepared'}"]) == 0
    capsys.readouterr()
    filled = [a.replace("RUN", str(run)).replace("PLACE", str(place)) for a in arguments]
    assert main(["evaluate", *filled]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and said.replace("PLACE", str(place)) in shown.err and not shown.out


def test_a_checkpoint_that_is_not_finite_has_no_score(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    config, weights, _, mesh, _ = load_checkpoint(run)
    with jax.set_mesh(mesh), checkpoint.open_manager(tmp_path / "run", config.checkpoint) as manager:
        broken = jax.tree.map(lambda a: a * jnp.nan, weights.params)
        checkpoint.save(manager, 9, init(config)._replace(params=broken))
    assert evaluate(tmp_path / "run").step == 2, "the newest that is a model"
    with pytest.raises(UserError, match=r"checkpoints/9: a damaged checkpoint \(not finite\)"):
        evaluate(tmp_path / "run", 9)


def test_a_directory_with_an_at_is_a_run(tmp_path):
    (tmp_path / "a@3").mkdir()
    assert run_and_step(str(tmp_path / "a@3")) == (tmp_path / "a@3", None)
    assert run_and_step(str(tmp_path / "a@3@12")) == (tmp_path / "a@3", 12)
