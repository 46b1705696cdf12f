"""A validation set of one's own: scored beside the held-out documents, never trained on."""

import json
import shutil

import numpy as np
import pytest
from runs import config_file, rows, tiny, write_text

from frugalmoe.analysis import load_run, summary_table
from frugalmoe.cli import main
from frugalmoe.console import Console
from frugalmoe.data import open_data
from frugalmoe.errors import UserError
from frugalmoe.evaluate import evaluate
from frugalmoe.files import read_json
from frugalmoe.train.loop import train

pytestmark = pytest.mark.whole

FIELDS = {"train.steps": 2, "train.eval_every": 1, "optim.warmup_steps": 1, "model.num_layers": 2}
TEXTS = {"prose": "The sea finds the crown. " * 9, "code": "y = g(1)\n" * 5}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`text` to train on; `own.jsonl`, of two domains, whose text stands in `content`; `prepared`, the same on disk."""
    root = tmp_path_factory.mktemp("validation")
    write_text(root / "text")
    lines = [{"content": text, "domain": domain} for domain, text in TEXTS.items()]
    (root / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def config(place, **changes):
    own = {"data.validation.path": str(place / "own.jsonl"), "data.validation.text_field": "content"}
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return tiny(place / "text", place / "cache", FIELDS | own | changes)


def table(run) -> list[str]:
    console = Console(width=120, record=True, quiet=False)
    console.print(summary_table(load_run(run)))
    return console.export_text().splitlines()


def opened(config):
    return open_data(config.data, batch_size=2, seed=0, progress=False)


def test_it_is_scored_during_and_after_training(place, tmp_path):
    """Its scores are those of an evaluation on that text, and the held-out documents' those of a run's own data."""
    run = tmp_path / "run"
    train(config(place), run)
    summary = read_json(run / "summary.json")
    found = evaluate(run, data=str(place / "own.jsonl"), overrides={"data.text_field": "content"})
    assert summary["validation"]["loss"] == pytest.approx(found.loss, rel=1e-6)
    assert summary["validation"]["bits_per_byte"] == pytest.approx(found.bits_per_byte, rel=1e-6)
    assert evaluate(run).loss == pytest.approx(summary["eval"]["loss"], rel=1e-6)
    logged = [row for row in rows(run) if "validation/loss/mean" in row]
    assert [row["step"] for row in logged] == [1, 2]
    assert logged[1]["validation/bits_per_byte/code"] == summary["validation"]["bits_per_byte"]["code"]
    assert len([row for row in rows(run) if "eval/loss/mean" in row]) == 2
    (shown,) = (line for line in table(run) if "validation set: code" in line)
    assert f"{summary['validation']['loss']['code']:.4g} nats per token" in shown


def test_all_of_it_is_validation_and_none_is_trained_on(place):
    """Of n bytes all n and their end are targets. The training rows are those without it, bit by bit."""
    data, plain = opened(config(place)), opened(config(place, data__validation__path=""))
    assert data.validation.validation_tokens == {d: len(text.encode()) + 1 for d, text in TEXTS.items()}
    assert data.validation.train_tokens == 0 and data.fingerprint == plain.fingerprint and plain.validation is None
    assert all(np.array_equal(a, b) for n in range(4) for a, b in zip(data.batch(n), plain.batch(n)))


def test_it_is_tokenized_as_the_training_data_are(place):
    """A tokenizer that is trained is trained without it."""
    data = opened(config(place, data__tokenizer="bpe:300"))
    plain = opened(config(place, data__tokenizer="bpe:300", data__validation__path=""))
    assert data.tokenizer.fingerprint == data.validation.tokenizer.fingerprint == plain.tokenizer.fingerprint


def test_of_a_prepared_directory_the_held_out_documents_are_taken(place, tmp_path):
    flags = [f"--config.data.path={place / 'text'}", f"--config.data.cache_dir={place / 'cache'}"]
    assert main(["data", "prepare", "--config=quickstart:laptop", *flags, f"--output={tmp_path / 'made'}"]) == 0
    (tmp_path / "train").mkdir()
    (tmp_path / "train/a.txt").write_text("Another text. " * 200)
    fields = {"data__validation__path": str(tmp_path / "made"), "data__validation__text_field": "text"}
    data = opened(config(place, data__path=str(tmp_path / "train"), **fields))
    held_out = opened(config(place, data__path=str(tmp_path / "made"), data__validation__path=""))
    assert data.validation.validation_tokens == held_out.validation_tokens


def test_it_is_prepared_with_the_data(place, tmp_path, capsys):
    file = config_file(tmp_path, place / "text", tmp_path / "cache", FIELDS)
    own = [f"--config.data.validation.path={place / 'own.jsonl'}", "--config.data.validation.text_field=content"]
    assert main(["data", "prepare", f"--config={file}", *own]) == 0
    shown = capsys.readouterr().out
    assert shown.count("prepared in ") == 2 and f"{len(TEXTS['prose']) + 1}" in shown
    made = sorted((tmp_path / "cache/prepared").iterdir())
    opened(config(place, data__cache_dir=str(tmp_path / "cache")))
    assert sorted((tmp_path / "cache/prepared").iterdir()) == made
    assert main(["data", "prepare", f"--config={file}", f"--config.data.validation.path={place / 'text'}"]) == 2
    assert "is training data too" in capsys.readouterr().err


def test_texts_that_are_trained_on_are_told(place, tmp_path):
    shutil.copy(place / "own.jsonl", tmp_path / "own.jsonl")
    with (tmp_path / "own.jsonl").open("a") as file:
        for name in ("doc00.txt", "doc01.txt", "doc02.txt"):
            file.write(json.dumps({"content": (place / "text" / name).read_text(), "domain": "again"}) + "\n")
    data = opened(config(place, data__validation__path=str(tmp_path / "own.jsonl")))
    trained = sum((place / "text" / f"doc0{n}.txt").is_file() for n in range(3))
    (note,) = data.notes
    assert "of its 5 documents repeat the text of a training document" in note and 0 < int(note.split()[1]) <= trained


def test_a_copy_of_what_is_trained_on_is_told(place, tmp_path):
    """Of a copy no file is the same; its texts are."""
    copy = shutil.copytree(place / "text", tmp_path / "copy")
    data = opened(config(place, data__validation__path=str(copy), data__validation__text_field="text"))
    (note,) = data.notes
    trained, all_of_it = int(note.split()[1]), int(note.split()[4])
    assert "repeat the text of a training document" in note and 0.5 * all_of_it < trained <= all_of_it


def test_another_set_is_not_taken_for_the_run_s(place, tmp_path):
    shutil.copy(place / "own.jsonl", tmp_path / "own.jsonl")
    made = config(place, data__validation__path=str(tmp_path / "own.jsonl"), train__steps=1, optim__warmup_steps=0)
    train(made, tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    with (tmp_path / "own.jsonl").open("a") as file:
        file.write('{"content": "more", "domain": "code"}\n')
    with pytest.raises(UserError, match="the run's validation set changed"):
        train(made, tmp_path / "run")


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"path": "PLACE/text/doc03.txt"}, "PLACE/text/doc03.txt is training data too (data.path='PLACE/text')"),
        ({"path": "PLACE/link"}, "PLACE/text/doc04.txt is training data too"),
        ({"path": "PLACE/hard.txt"}, "PLACE/hard.txt is training data too (data.path='PLACE/text')"),
        ({"path": "PLACE/text"}, "is training data too"),
        ({"path": "PLACE/nowhere"}, "data.validation.path='PLACE/nowhere': no such file or directory"),
        ({"path": "PLACE/blank.txt"}, "data.validation.path='PLACE/blank.txt': holds no text"),
        ({"text_field": "txet"}, "field 'txet' (text_field) is null or absent"),
        ({"path": "PLACE/latin.txt"}, "latin.txt: not UTF-8 at byte 0"),
        ({"weight": 1.0}, "data.validation.weight=1.0: must be 0"),
        ({"null_text": "go"}, "data.validation.null_text='go': unknown"),
        ({"encoding": "klingon"}, "data.validation.encoding='klingon': must be a text encoding"),
        ({"nothing": 1}, "data.validation.nothing: unknown config field"),
    ],
)
def test_a_set_that_cannot_be_used_is_one_line_before_anything_is_done(place, capsys, tmp_path, fields, said):
    (place / "blank.txt").write_text(" \n")
    (place / "latin.txt").write_bytes("é".encode("latin-1") * 3)
    if not (place / "link").is_dir():
        (place / "hard.txt").hardlink_to(place / "text/doc05.txt")
        (place / "link").mkdir()
        (place / "link/other.txt").symlink_to(place / "text/doc04.txt")
    put = lambda text: text.replace("PLACE", str(place)) if isinstance(text, str) else text
    own = {"path": "PLACE/own.jsonl", "text_field": "content"} | fields
    flags = [f"--config.data.validation.{name}={put(value)}" for name, value in own.items()]
    file = config_file(place, place / "text", place / "cache", FIELDS)
    assert main(["train", f"--config={file}", f"--workdir={tmp_path / 'run'}", "--dry-run", *flags]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and put(said) in shown and not (tmp_path / "run").exists()
