"""The formulas against published runs, and docs/planner.md, which is made of the comparison."""

import published_runs
import pytest

from frugalmoe.model.transformer import count_parameters

DATA = published_runs.DATA


@pytest.mark.parametrize("name", DATA["models"])
def test_the_configs_have_the_published_sizes(name):
    """As printed, with one or two digits; without modules of multi-token prediction, and without what sees images."""
    found, printed = count_parameters(published_runs.config_of(name).model), DATA["models"][name]
    module = 11.6 if name == "deepseek-v3" else 0.0  # billion
    assert found["total"] / 1e9 - module == pytest.approx(printed["total"], rel=0.012)
    without = found["active"] - found["embedding"] * (name == "gpt-oss-120b")
    assert without / 1e9 == pytest.approx(printed["active"], rel=0.035)


def test_every_row_has_a_source_with_a_date_and_a_model():
    for row in (row for kind in ("flops", "runs", "steps") for row in DATA.get(kind, ())):
        assert DATA["sources"][row["source"]]["date"] and row["model"] in DATA["models"], row


def test_flops_of_a_token_are_the_published_ones_to_half_a_percent():
    errors = published_runs.flops_errors()
    assert len(errors) >= 13
    assert not {row: error for row, error in errors.items() if abs(error) > published_runs.FLOPS_BAR}


def test_rows_outside_of_the_mean_are_few_and_say_why():
    outside = [row for row in DATA["flops"] if "outside" in row]
    assert 3 * len(outside) < len(DATA["flops"]) and all(row["outside"] for row in outside)
    assert all(abs(published_runs.counted(row) / row["published"] - 1) > published_runs.FLOPS_BAR for row in outside)


def test_the_page_says_what_the_formulas_say():
    assert published_runs.text().strip() in published_runs.PAGE.read_text(encoding="utf-8"), "`make paper` writes it"
