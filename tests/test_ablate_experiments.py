"""Every file of experiments/ is a whole study or a calculation, and every published page says what its data says."""

from pathlib import Path

import pytest

from frugalmoe.ablate import load_comparison, load_study, shrunk
from frugalmoe.ablate.plan import check_budgets
from frugalmoe.ablate.publish import index, page
from frugalmoe.ablate.study import arms_of
from frugalmoe.config.load import run_file
from frugalmoe.cost import forward_flops
from frugalmoe.errors import UserError
from frugalmoe.shipped import STUDIES

ROOT = Path(__file__).parents[1]
FILES = [ROOT / f"experiments/{name}.py" for name in STUDIES.names()]
CALCULATIONS = sorted({*ROOT.glob("experiments/*.py")} - {*FILES})
PUBLISHED = sorted(path.parent for path in ROOT.glob("experiments/*/study.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_is_a_whole_study(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load_study(path)
    arms = arms_of(study, {"model.vocab_size": 1088})  # bpe:1024 and its end of text, rounded up to 64
    assert len(arms) > 1 and len(study.seeds) >= 3
    assert f"frugalmoe ablate experiments/{path.name}" in path.read_text()
    for whole_or_small in (study, shrunk(study, laptop=True, steps=20)):
        arms = arms_of(whole_or_small, {"model.vocab_size": 1088})
        flops = {a.name: forward_flops(a.config.model, a.config.data.sequence_length) for a in arms}
        check_budgets(whole_or_small, flops)


@pytest.mark.parametrize("path", CALCULATIONS, ids=lambda path: path.stem)
def test_what_is_no_study_is_a_calculation_with_its_page(path):
    """It trains nothing: `text()` is the generated part of its RESULTS.md, and running the file writes it."""
    module = run_file(path, path.name)
    assert f"python experiments/{path.name}" in module.__doc__
    assert module.PAGE.parent == path.with_suffix("") and module.PAGE.name == "RESULTS.md"
    assert module.text().strip() in module.PAGE.read_text(encoding="utf-8"), f"`python experiments/{path.name}`"
    assert len(module.PAGE.read_text().partition("<!-- generated: end -->")[2].split()) > 50, "what does it mean?"


def test_a_calculation_is_no_study():
    assert "ling_cost" in {path.stem for path in CALCULATIONS}
    with pytest.raises(UserError, match="defines no STUDY"):
        load_study(ROOT / "experiments/ling_cost.py")
    with pytest.raises(UserError, match="no such study"):
        load_study("ling_cost")


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda path: path.name)
def test_a_published_page_is_made_from_the_published_results(folder, monkeypatch):
    """The whole study, none missing, with a comment by hand; a strategy younger than the league is no arm of it yet."""
    monkeypatch.chdir(ROOT)
    comparison, text = load_comparison(folder.relative_to(ROOT)), (folder / "RESULTS.md").read_text()
    pictures = [name for name in ("differences", "curves", "balance") if (folder / f"{name}.png").is_file()]
    assert page(comparison, pictures).strip() in text
    study = load_study(f"experiments/{folder.name}.py")
    published = comparison.study["arms"]
    assert [a for a in study.arms if a in published] == list(published) and study.question == comparison.study[
        "question"
    ]
    assert list(study.arms) == list(published) or folder.name == "league"
    assert " missing" not in page(comparison, pictures)
    assert len(text.partition("<!-- generated: end -->")[2].split()) > 50, "what does it mean, beside the literature?"


def test_the_index_lists_what_is_published(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert index("experiments").strip() in (ROOT / "experiments" / "RESULTS.md").read_text()
