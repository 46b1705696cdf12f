"""The suite that is ours: by the choices alone nobody is above chance, and a model chooses by its likelihoods."""

import dataclasses
import json
import operator
import re
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from runs import config_file, tiny, write_text

from frugalmoe import metrics
from frugalmoe.ablate import load_comparison, load_study, results, run_study
from frugalmoe.ablate import suite as of_studies
from frugalmoe.cli import main
from frugalmoe.errors import UserError
from frugalmoe.evaluate import evaluate, suite
from frugalmoe.evaluate.contract import Square, Task
from frugalmoe.evaluate.grading import Grade, fingerprint, grade, grade_run, graded, made
from frugalmoe.evaluate.scoring import Asked, score, whole_text
from frugalmoe.routing import strategies
from frugalmoe.train.loop import train
from frugalmoe.train.weights import load_checkpoint

pytestmark = pytest.mark.whole

ITEMS = 40
FIELDS = {"train.steps": 1, "optim.warmup_steps": 0, "model.num_layers": 2, "train.batch_size": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("suite")
    train(tiny(write_text(root / "text"), root / "cache", FIELDS), root / "run")
    return root / "run"


@pytest.fixture(scope="module")
def loaded(run):
    return load_checkpoint(run)


def of_task(name: str) -> list[Square]:
    return made(suite.get(name), ITEMS)


@pytest.mark.parametrize("name", suite.names())
@pytest.mark.parametrize("likes", [len, lambda choice: -len(choice), lambda choice: zlib.crc32(choice.encode()) % 3])
def test_whoever_looks_at_the_choices_alone_is_exactly_at_chance(name, likes):
    squares, task = of_task(name), suite.get(name)
    found = graded([np.array([[float(likes(c)) for c in s.choices] for _ in s.contexts]) for s in squares])
    assert found.accuracy == pytest.approx(1 / task.choices, abs=1e-12) and found.chance == 1 / task.choices
    assert found.low < found.chance < found.high and found.margin <= 0 and found.items >= ITEMS


@pytest.mark.parametrize("name", suite.names())
def test_the_texts_of_a_task_are_short_plain_and_each_its_own(name):
    squares, task = of_task(name), suite.get(name)
    assert task.about and len(set(squares)) == len(squares)
    for square in squares:
        assert len(set(square.contexts)) == len(set(square.choices)) == task.choices
        for context in square.contexts:
            assert context == context.strip() and " " in context, "whose first word no choice can change"
            assert all(re.fullmatch(r"[A-Za-z0-9 .;+=-]{3,128}", context + choice) for choice in square.choices)
        assert all(choice.startswith(" ") and choice == f" {choice.strip()}" for choice in square.choices)


def test_the_right_choice_is_right():
    """By the text alone, in ways that do not make it."""
    for contexts, choices in of_task("recall"):
        said = dict(re.findall(r"(\w+) has a (\w+)\.", contexts[0]))
        assert [said[c.split()[-3]] for c in contexts] == [c.strip(" .") for c in choices]
    for contexts, choices in of_task("induction"):
        for words, choice in zip(map(str.split, contexts), choices):
            assert words.count(words[-1]) == 2 and words[words.index(words[-1]) + 1] == choice.strip()
    for contexts, choices in of_task("copy"):
        assert [f" {context}" for context in contexts] == list(choices)
    signs = {"+": operator.add, "-": operator.sub}
    for contexts, choices in of_task("arithmetic"):
        for context, choice in zip(contexts, choices):
            sums = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)\.", context + choice)
            assert len(sums) == 3 and all(signs[sign](int(a), int(b)) == int(c) for a, sign, b, c in sums)
    for name, subject in (("agreement", -1), ("agreement_distant", 1)):
        for contexts, choices in of_task(name):
            assert [c.split()[subject].endswith("s") for c in contexts] == [False, True]
            assert [c.split()[0] in ("is", "was", "has", "does") for c in choices] == [True, False]


def test_the_suite_is_the_same_everywhere():
    """On every machine and Python. A change of the suite changes this line, and no result from before compares."""
    assert fingerprint({name: made(suite.get(name), 400) for name in suite.names()}) == "ec1e124212a2b3eb"


def test_equal_choices_share_an_item_and_no_number_is_no_answer():
    found = graded([np.array([[2.0, 2.0], [0.0, 0.0]]), np.array([[3.0, 1.0], [9.0, 8.0]])])
    assert found.accuracy == (0.5 + 0.5 + 1 + 0) / 4 and found.margin == (0 + 0 + 2 - 1) / 4
    nothing = graded([np.full((2, 2), np.nan)])
    assert nothing.accuracy == 0 and np.isnan(nothing.margin)
    assert graded([np.eye(2)])[:3] == (1.0, pytest.approx(graded([np.eye(2)]).low), 1.0)


def test_an_interval_holds_the_accuracy_as_often_as_it_says():
    """95% of the time, on average over accuracies: the sum over all outcomes of 40 items, none drawn."""
    n, p = 40, np.linspace(0.02, 0.98, 97)
    right = lambda item, hits: float(item < hits)
    square = lambda i, hits: np.array([[right(2 * i, hits), 0.5], [0.5, right(2 * i + 1, hits)]])
    grades = [graded([square(i, hits) for i in range(n // 2)]) for hits in range(n + 1)]
    assert [g.accuracy for g in grades] == [hits / n for hits in range(n + 1)]
    inside = [[g.low <= q <= g.high for g in grades] for q in p]
    covered = (scipy.stats.binom.pmf(np.arange(n + 1), n, p[:, None]) * inside).sum(axis=1)
    assert covered.mean() == pytest.approx(0.95, abs=0.01) and covered.min() > 0.88


def test_a_text_is_as_likely_as_evaluation_says(run, loaded, tmp_path):
    """All tokens of a document and its end; and a part of it is what the whole has beyond the rest."""
    config, weights, tokenizer, mesh, _ = loaded
    text = "The moon calls the river."
    (tmp_path / "one.txt").write_text(text)
    nats = evaluate(run, data=str(tmp_path / "one.txt"))
    ids = np.append(whole_text(config, tokenizer, text).ids, tokenizer.eos).astype(np.int32)
    asked = [Asked(ids, 1), Asked(ids, 9), Asked(ids[:9], 1), Asked(ids[:2], 2)]
    with jax.set_mesh(mesh):
        whole, end, begin, nothing = score(config, weights, mesh, asked)
        alone = [score(config, weights, mesh, [a])[0] for a in asked]
    (targets,) = nats.targets.values()
    assert whole.log_probability == pytest.approx(-nats.loss["mean"] * targets, rel=1e-6) and targets == len(text) + 1
    assert whole.log_probability == pytest.approx(begin.log_probability + end.log_probability, rel=1e-6)
    assert (nothing.log_probability, nothing.greedy) == (0.0, True)
    assert [a.log_probability for a in alone] == pytest.approx([whole[0], end[0], begin[0], 0.0], rel=1e-6)


def test_a_uniform_model_is_at_chance_and_counts_its_vocabulary(loaded):
    """All tokens are equally likely: n of them have the probability V to the -n, and choices of one length tie."""
    config, weights, tokenizer, mesh, _ = loaded
    silent = jax.tree.map(jnp.zeros_like, weights.params)
    tasks = {name: of_task(name) for name in ("arithmetic", "induction", "copy")}
    with jax.set_mesh(mesh):
        grades = grade(config, weights._replace(params=silent), tokenizer, mesh, tasks)
        (found,) = score(config, weights._replace(params=silent), mesh, [whole_text(config, tokenizer, "a" * 50)])
    assert found.log_probability == pytest.approx(-50 * np.log(config.model.vocab_size), rel=1e-6)
    for name, g in grades.items():
        assert (g.accuracy, g.margin, g.chance) == (0.25, 0.0, 0.25), name


def test_a_model_is_graded_by_its_own_likelihoods(run, loaded):
    """One square by hand, from the likelihood of each of its texts by itself."""
    config, weights, tokenizer, mesh, step = loaded
    found = grade_run(run, names=["reflexives", "recall"], items=4)
    assert (found.step, set(found.tasks)) == (step, {"reflexives", "recall"})
    (square,) = made(suite.get("recall"), 4)
    asked = lambda context, choice: whole_text(config, tokenizer, context + choice)
    with jax.set_mesh(mesh):
        by_hand = [[score(config, weights, mesh, [asked(a, b)])[0][0] for b in square.choices] for a in square.contexts]
    expected, g = graded([np.array(by_hand)]), found.tasks["recall"]
    assert g == Grade(*expected[:4], pytest.approx(expected.margin, abs=1e-4), 4)
    assert found.mean == pytest.approx((g.accuracy + found.tasks["reflexives"].accuracy) / 2)


def test_the_command_prints_a_table_and_json(run, capsys):
    assert main(["evaluate", str(run), "--suite=copy,recall", "--items=8"]) == 0
    shown = capsys.readouterr().out  # a long path of the run is wrapped
    assert "step 1, our suite" in " ".join(shown.split()) and "0.250" in shown and re.search(r"^mean +0\.", shown, re.M)
    assert main(["evaluate", f"{run}@1", "--suite=copy", "--items=8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tasks"]["copy"] == grade_run(run, names=["copy"], items=8).tasks["copy"]._asdict()


TASK = "from frugalmoe.evaluate.contract import Square, Task\n"
WRONG = {
    "empty": "TASK = Task(about='', choices=2, squares=lambda rng: iter(()))",
    "other": "TASK = 7",
    "broken": "TASK = Task(about='', choices=2, squares=lambda rng: iter([1 / 0]))",
    "numbers": "TASK = Task(about='', choices=2, squares=lambda rng: iter([Square(('a', 'b'), (1, 2))]))",
    "three": "TASK = Task(about='', choices=3, squares=lambda rng: iter([Square(('a', 'b'), (' c', ' d'))]))",
    "same": "TASK = Task(about='', choices=2, squares=lambda rng: iter([Square(('a', 'b'), (' c', ' c'))]))",
    "longer": "TASK = Task(about='', choices=2, squares=lambda rng: iter([Square(('a', 'b'), (' c', ' cd'))]))",
}


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--suite=recal"], "did you mean 'recall'"),
        (["--suite=nowhere.py"], "no such file"),
        (["--suite=PLACE/empty.py"], "makes no square"),
        (["--suite=PLACE/other.py"], "ends without TASK = Task(...)"),
        (["--suite=PLACE/broken.py"], "ZeroDivisionError"),
        (["--suite=PLACE/numbers.py"], "must be texts"),
        (["--suite=PLACE/three.py"], "must have 3 contexts and as many choices"),
        (["--suite=PLACE/same.py"], "all different"),
        (["--suite=PLACE/longer.py"], "beginning of another"),
        (["--suite=,"], "--suite=,: must be names separated by commas, none of them empty"),
        (["--suite", "--items=0"], "--items=0"),
        (["--suite", "--items=100001"], "at most 100000"),
        (["--items=5"], "--items: is of an evaluation on --suite or --tasks; this one is on text"),
        (["--suite", "--tokens=5"], "--tokens: is of an evaluation on text; this one is on --suite"),
        (["--suite", "--config.data.path=x"], "--config.*: is of an evaluation on text"),
    ],
)
def test_what_cannot_be_graded_is_one_line(run, tmp_path, capsys, flags, said):
    for name, text in WRONG.items():
        (tmp_path / f"{name}.py").write_text(TASK + text + "\n")
    assert main(["evaluate", str(run), *(flag.replace("PLACE", str(tmp_path)) for flag in flags)]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and said in shown.err and not shown.out


def test_lm_eval_that_is_not_there_is_named(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", str(run), "--tasks=arc_easy"]) == 2
    said = "frugalmoe: --tasks: needs a package that is not installed: pip install 'frugalmoe[lm-eval]'\n"
    assert capsys.readouterr().err == said


def test_a_model_whose_texts_depend_on_what_follows_is_not_graded(loaded):
    config, *_ = loaded
    options = dataclasses.replace(strategies.get("expert_choice").options(), evaluate="choice")
    moe = dataclasses.replace(config.model.moe, router="expert_choice", options=options)
    leaking = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    with pytest.raises(UserError, match=r"^model.moe.router='expert_choice': a text has no likelihood .*causal=leak"):
        score(leaking, loaded.weights, loaded.mesh, [])
    with pytest.raises(UserError, match=r"^metrics='copy': arm 'b': model.moe.router='expert_choice': "):
        of_studies.check({"a": config, "b": leaking}, ["eval/loss/mean", "suite/margin/copy"])
    of_studies.check({"b": leaking}, ["eval/loss/mean"])


def test_a_task_that_has_few_items_is_asked_for_those(tmp_path):
    squares = lambda rng: iter([Square((f"a {i % 3}", "b"), (" c", " d")) for i in range(999)])
    assert len(made(Task(about="", choices=2, squares=squares, name="few"), 50)) == 3


STUDY = """
from frugalmoe.ablate import Study

STUDY = Study(
    name="graded",
    question="Does it copy?",
    expectation="Not after one step.",
    base={base!r},
    arms={{"aux": {{}}, "none": {{"model.moe.losses.load_balance": 0.0}}}},
    baseline="aux",
    varies=("model.moe.losses",),
    seeds=(0, 1),
    metrics=("eval/loss/mean", "suite/accuracy/copy", "suite/margin/copy"),
)
"""


@pytest.mark.slow
def test_a_study_asks_for_a_task_beside_loss(tmp_path):
    text = write_text(tmp_path / "text")
    base = config_file(tmp_path, text, tmp_path / "cache", FIELDS)
    (tmp_path / "graded.py").write_text(STUDY.format(base=str(base)))
    study = load_study(tmp_path / "graded.py")
    assert run_study(study, tmp_path / "out").missing == []
    rows = results.read_table(tmp_path / "out", "graded").to_pylist()
    found = {(r["arm"], r["metric"]): r["value"] for r in rows if r["final"] and r["seed"] == 0}
    assert 0 < found["aux", "suite/accuracy/copy"] < 1 and found["aux", "suite/margin/copy"] < 0
    assert ("aux", "suite/accuracy/recall") not in found
    assert metrics.titled("suite/accuracy/copy") == "accuracy of copy" and metrics.titled("suite/margin/copy")
    assert main(["report", str(tmp_path / "out")]) == 0
    assert "accuracy of copy" in (tmp_path / "out/report/index.html").read_text()
    assert load_comparison(tmp_path / "out").final("suite/accuracy/copy", "none").keys() == {0, 1}
