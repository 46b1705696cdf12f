"""Every file of experiments/ is a whole study, and every published page says what its data says."""

from pathlib import Path

import pytest

from frugalmoe.ablate import load_comparison, load_study, shrunk
from frugalmoe.ablate.plan import check_budgets
from frugalmoe.ablate.publish import index, page
from frugalmoe.ablate.study import arms_of
from frugalmoe.cost import forward_flops

ROOT = Path(__file__).parents[1]
FILES = sorted(ROOT.glob("experiments/*.py"))
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
