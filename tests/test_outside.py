"""A router, an executor, attention and a source of text from outside the package, through a whole run and after it."""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from runs import TINY, run

from frugalmoe import found
from frugalmoe.cli import main
from frugalmoe.config import default, outside, override, resolve, runnable, settle
from frugalmoe.data.sources import documents, open_inputs
from frugalmoe.data.tokenizer import load_from
from frugalmoe.errors import UserError
from frugalmoe.fields import to_dict
from frugalmoe.schema import Data, FrozenDict, Source
from frugalmoe.train import rundir
from frugalmoe.train.loop import train

pytestmark = pytest.mark.whole

ROUTER = '''"""topk_softmax by another name."""
import dataclasses
from frugalmoe.routing.strategies import topk_softmax
ROUTER = dataclasses.replace(topk_softmax.ROUTER)
'''
EXECUTOR = "from frugalmoe.experts.executors.blocks import EXECUTOR\n"
ATTENTION = "from frugalmoe.model.attention.kinds.window import ATTENTION\n"
CORPUS = """
from frugalmoe.data.corpus import Corpus

def documents():
    for i in range(40):
        yield {"text": f"The moon {i} calls the river {i * i}.", "domain": "prose" if i % 2 else "verse"}

CORPUS = Corpus(documents=documents, fingerprint=lambda: "1")
"""
FIELDS = TINY | {
    "train.steps": 4,
    "optim.warmup_steps": 1,
    "train.eval_rows": 8,
    "model.num_layers": 2,
    "model.moe.router": "mine.py",
    "model.moe.executor": "lab_outside.runner",
    "model.attention": "grouped, lab_outside/near.py",
    "model.attention_options": {"near": {"window": 5}},
    "data.path": "texts.py",
}
FILES = {"mine.py": ROUTER, "lab_outside/runner.py": EXECUTOR, "lab_outside/near.py": ATTENTION, "texts.py": CORPUS}


@pytest.fixture(autouse=True)
def nothing_read(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(found, "_READ", {})
    yield
    for name in [name for name in sys.modules if name.startswith("lab_outside")]:
        del sys.modules[name]


def write(folder: Path) -> Path:
    (folder / "lab_outside").mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def config_of(folder: Path, fields: Mapping = FrozenDict()):
    return resolve(override(default(), FIELDS | {"data.cache_dir": str(folder / "cache")} | dict(fields)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with the files and a run in `run`."""
    folder = write(tmp_path_factory.mktemp("outside"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(found, "_READ", {})
        train(config_of(folder), folder / "run")
    return folder


@pytest.fixture
def own(trained, tmp_path, monkeypatch) -> Path:
    """A copy of it, which is the directory of the command."""
    shutil.copytree(trained, tmp_path / "own")
    monkeypatch.chdir(tmp_path / "own")
    return tmp_path / "own"


def test_a_run_keeps_what_it_was_given_and_copies(trained):
    saved = json.loads((trained / "run/config.json").read_text())
    assert saved["model"]["moe"]["router"] == "mine.py" and saved["data"]["path"] == "texts.py"
    assert saved["model"]["moe"]["executor"] == "lab_outside.runner"
    kept = outside.kept(trained / "run")
    assert {field: row["spec"] for field, row in kept.items()} == {
        "model.moe.router": "mine.py",
        "model.moe.executor": "lab_outside.runner",
        "model.attention.near": "lab_outside/near.py",
        "data.path": "texts.py",
    }
    assert (trained / "run" / kept["model.moe.router"]["file"]).read_text() == ROUTER


def test_it_trains_bit_for_bit_as_the_shipped_ones_do(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    shipped = {"model.moe.router": "topk_softmax", "model.moe.executor": "blocks", "model.attention": "grouped,window"}
    shipped["model.attention_options"] = {"window": {"window": 5}}
    train(config_of(trained, shipped), tmp_path / "shipped")
    losses = [
        [json.loads(line)["loss/ce"] for line in (run / "metrics.jsonl").read_text().splitlines() if "loss/ce" in line]
        for run in (trained / "run", tmp_path / "shipped")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert not (tmp_path / "shipped/outside/model.moe.router").exists()


def test_the_same_text_elsewhere_is_the_same_run(own):
    (own / "mine.py").rename(own / "renamed.py")
    (own / "lab_outside/near.py").rename(own / "near.py")
    config = config_of(own, {"model.moe.router": "renamed.py", "model.attention": "grouped, ./near.py"})
    saved = rundir.record(own / "run/config.json")
    assert outside.compared(own / "run", saved, config) == []
    assert saved["model"]["moe"]["router"] == "renamed.py" and saved["model"]["attention"] == "grouped, ./near.py"


def test_a_changed_file_is_one_line_and_needs_force(own, trained):
    config = config_of(trained)
    rundir.check_config(own / "run", config, force=False)
    found._READ.clear()
    (own / "mine.py").write_text(ROUTER + "# another\n")
    with pytest.raises(
        UserError, match=r"model\.moe\.router='mine\.py': the file has changed since \(sha256 \w{12} the"
    ):
        rundir.check_config(own / "run", config, force=False)
    rundir.check_config(own / "run", config, force=True)
    settled = settle(config, load_from(own / "run/tokenizer").size, 1)
    rundir.describe(own / "run", config, settled, 4)
    assert (own / "run" / outside.kept(own / "run")["model.moe.router"]["file"]).read_text().endswith("# another\n")
    last = json.loads((own / "run/history.jsonl").read_text().splitlines()[-1])
    assert list(last["changes"]) == ["model.moe.router sha256"]


def test_a_run_is_read_sampled_and_reported_without_its_files(own, monkeypatch, capsys):
    for name in FILES:
        (own / name).unlink()
    monkeypatch.chdir(own.parent)
    config = resolve(runnable(own / "run/config.json"))
    assert config.model.moe.router == str(own / "run/outside/model.moe.router/mine.py")
    assert config.model.attention == f"grouped, {own / 'run/outside/model.attention.near/near.py'}"
    assert config.model.attention_options["near"].window == 5
    assert main(["generate", "own/run", "--prompt=The", "--max-tokens=4", "--temperature=0"]) == 0
    assert main(["trace", "own/run"]) == 0
    assert main(["report", "own/run"]) == 0
    assert main(["config", "--config=own/run", "--changed"]) == 0
    assert capsys.readouterr().err.count("frugalmoe:") == 0


def test_fresh_deletes_the_copies_too(own):
    (own / "run/outside/notes.txt").write_text("mine")
    rundir.start_over(own / "run")
    assert [p.name for p in (own / "run").rglob("*") if p.is_file() and p.name != ".lock"] == ["notes.txt"]


def test_a_damaged_record_is_one_line(own):
    (own / "run/outside.json").write_text('{"model.moe.router": 3}')
    with pytest.raises(UserError, match=r"outside\.json: damaged"):
        runnable(own / "run/config.json")


@pytest.mark.slow
def test_the_command_line_and_a_study_with_workers(own, trained):
    fields = FIELDS | {"data.cache_dir": str(trained / "cache")}
    (own / "config.py").write_text(
        "from frugalmoe.config import default, override\n"
        f"def get_config(arg=None):\n    return override(default(), {fields!r})\n"
    )
    (own / "mine.py").write_text(ROUTER + "#\n")
    again = run("train", "--config=config.py", "--workdir=run", "--config.train.steps=5", cwd=own)
    assert again.returncode == 2 and len(again.stderr.splitlines()) == 1 and "the file has changed" in again.stderr
    (own / "study.py").write_text(
        "from frugalmoe.ablate import Study\n"
        "STUDY = Study(question='?', expectation='', base='config.py', baseline='mine', seeds=(0,),\n"
        "    arms={'mine': {}, 'theirs': {'model.moe.router': 'topk_softmax'}}, varies=('model.moe.router',),\n"
        "    metrics=('eval/loss/mean',))\n"
    )
    study = run("ablate", "study.py", "--jobs=2", "--workdir=studied", cwd=own, timeout=600)
    assert study.returncode == 0, study.stderr
    assert len(list((own / "studied").rglob("outside/model.moe.router/mine.py"))) == 1


# A source of text


def read(path: str, **source: str) -> list:
    data = Data(path=path) if not source else Data(sources={"named": Source(path=path, **source)})
    return [document for opened in open_inputs(data, progress=False) for document in documents(opened)]


def corpus(folder: Path, body: str, rest: str = "") -> str:
    path = folder / "corpus_of_mine.py"
    lines = body.replace("\n", "\n    ")
    path.write_text(
        "import random\nfrom frugalmoe.data.corpus import Corpus\n"
        f"def documents():\n    {lines}\nCORPUS = Corpus(documents=documents{rest})\n"
    )
    return str(path)


def test_documents_are_texts_or_records(tmp_path):
    path = corpus(tmp_path, "yield 'one'\nyield {'text': 'two', 'domain': 'd'}\nyield '  '")
    assert [(d.text, d.domain) for d in read(path)] == [("one", "corpus_of_mine"), ("two", "d")]
    found._READ.clear()
    assert {d.domain for d in read(path, domain="given")} == {"given"}


@pytest.mark.parametrize(
    ("body", "rest", "message"),
    [
        ("yield 3", "", "document 1: must be an object with the field 'text', is int"),
        ("yield None", "", "document 1: must be an object with the field 'text', is NoneType"),
        ("yield {'txt': 'a'}", "", "field 'text'"),
        ("yield 'a'\nyield 'b' + 1", "", "line 5: TypeError"),
        ("return 3", "", "TypeError: 'int' object is not iterable"),
        ("return []", "", "holds no text"),
        ("yield 'a\\ud800'", "", "lone surrogate"),
        ("raise SystemExit", "", "SystemExit"),
        ("yield 'a'", ")\nCORPUS = dict(", "CORPUS must be a frugalmoe.data.corpus.Corpus"),
    ],
)
def test_what_a_corpus_gives_that_is_no_document_is_one_line(tmp_path, body, rest, message):
    with pytest.raises(UserError) as error:
        read(corpus(tmp_path, body, rest))
    assert message in str(error.value) and str(error.value).startswith("data.path=")


def test_documents_that_differ_from_reading_to_reading_are_refused(tmp_path):
    path = corpus(tmp_path, "for _ in range(3):\n    yield str(random.random())")
    (opened,) = open_inputs(Data(path=path), progress=False)
    list(documents(opened))
    with pytest.raises(UserError, match="gives others each time"):
        list(documents(opened))


def test_prepared_data_are_used_again_until_file_or_fingerprint_change(tmp_path):
    def identity(rest: str) -> list:
        found._READ.clear()
        (opened,) = open_inputs(Data(path=corpus(tmp_path, "yield 'one'", rest)), progress=False)
        return opened.identity()

    assert identity("") == identity("") != identity(", fingerprint=lambda: 'x'")
    with pytest.raises(UserError, match=r"fingerprint\(\) gives int"):
        identity(", fingerprint=lambda: 3")


def test_a_python_file_without_a_corpus_is_text_as_before(tmp_path):
    (tmp_path / "a.py").write_text("x = 3\n")
    assert [d.text for d in read(str(tmp_path / "a.py"))] == ["x = 3\n"]


def test_older_names_of_options_are_read(tmp_path):
    """`normalize` was the name of what is `renormalize` in all strategies now."""
    saved = json.loads(json.dumps(to_dict(resolve(override(default(), {"model.moe.router": "sigmoid_bias"})))))
    saved["model"]["moe"]["options"]["normalize"] = saved["model"]["moe"]["options"].pop("renormalize") and False
    (tmp_path / "config.json").write_text(json.dumps(saved))
    options = rundir.record(tmp_path / "config.json")["model"]["moe"]["options"]
    assert options["renormalize"] is False and "normalize" not in options
