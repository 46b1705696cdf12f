"""Every file of experiments/ is a whole study: its arms resolve, differ in what is declared, and cost the same."""

from pathlib import Path

import pytest

from frugalmoe.ablate import load_study
from frugalmoe.ablate.plan import check_budgets
from frugalmoe.ablate.study import arms_of
from frugalmoe.cost import forward_flops

ROOT = Path(__file__).parents[1]
FILES = sorted(ROOT.glob("experiments/*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_is_a_whole_study(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load_study(path)
    arms = arms_of(study, {"model.vocab_size": 1088})  # bpe:1024 and its end of text, rounded up to 64
    assert len(arms) > 1 and len(study.seeds) >= 3
    assert f"frugalmoe ablate experiments/{path.name}" in path.read_text()
    check_budgets(study, {a.name: forward_flops(a.config.model, a.config.data.sequence_length) for a in arms})
