"""`frugalmoe plan` by a fit: tokens for a loss, the loss for tokens, how far that is from what was seen; budgets."""

import dataclasses
import json
import math

import pytest

from frugalmoe.aot.program import as_expected
from frugalmoe.cli import main
from frugalmoe.config import load
from frugalmoe.cost import budget, device_catalogue, forward_flops, planning
from frugalmoe.cost.laws import Fit, loss_at, size_of, write_fit
from frugalmoe.errors import UserError

# floor 2, 1 nat at M0 and 1 at D0
LAW = (math.log(2.0), math.log(1.0), 0.3, math.log(1.0), 0.25)
FIT = Fit(
    form="size and tokens", constants=LAW, centers=(1e6, 1e6),
    draws=tuple((LAW[0] + 0.01 * i, *LAW[1:]) for i in (-2, -1, 0, 1, 2)),
    ranges={"size": (1e5, 1e7), "tokens": (1e5, 1e7)}, spread=0.01, points=40, arms=("a", "b", "c"), seeds=(0, 1),
    source="grid",
)  # fmt: skip
PLAN = ("plan", "--config=study", "--devices=h100:1", "--format=json")


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    path = tmp_path_factory.mktemp("fit") / "fit.json"
    write_fit(path, FIT)
    return str(path)


@pytest.fixture(scope="module")
def config():
    return as_expected(load("study"), None)


def refused(capsys, *flags) -> str:
    assert main(list(flags)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    return err


def test_tokens_for_a_loss_and_the_loss_for_tokens_are_each_others(fit, capsys):
    assert main([*PLAN, f"--fit={fit}", "--tokens=2e8"]) == 0
    expected = json.loads(capsys.readouterr().out)["loss"]
    assert expected["low"] < expected["loss"] < expected["high"] and expected["distance"].startswith("extrapolates")
    assert (
        "20 times the tokens" in expected["distance"] and "of the 3 sizes and 2 seeds of grid" in expected["distance"]
    )
    assert main([*PLAN, f"--fit={fit}", f"--target-loss={expected['loss']!r}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == pytest.approx(2e8, rel=1e-6) and found["loss"]["loss"] == pytest.approx(expected["loss"])


def test_people_read_it_in_one_line(fit, capsys):
    assert main([*PLAN[:3], f"--fit={fit}", "--tokens=1e6"]) == 0
    assert "nats per token (" in (line := capsys.readouterr().out.splitlines()[-1]) and "within the 3 sizes" in line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--target-loss=3",), "needs --fit=FILE"),
        (("--target-loss=3", "--tokens=1e9", "--fit={fit}"), "--tokens=1e9 says how many already"),
        (("--target-loss=1.5", "--fit={fit}"), "must be above"),
        (("--target-loss=nan", "--fit={fit}"), "--target-loss=nan: must be a positive number"),
        (("--target-loss=-2", "--fit={fit}"), "must be a positive number"),
        (("--target-loss=90", "--fit={fit}"), "is reached before"),
        (("--target-loss=2.9", "--fit=none.json"), "none.json"),
        (("--tokens=1e9", "--fit=none.json"), "none.json"),
    ],
)
def test_bad_input(fit, capsys, flags, said):
    assert said in refused(capsys, *PLAN, *(flag.format(fit=fit) for flag in flags))


def test_a_loss_that_takes_more_tokens_than_a_plan_has(fit, config, capsys):
    size = size_of(forward_flops(config.model, config.data.sequence_length))
    near = loss_at(FIT, size, 1e30).loss + 1e-5
    assert "a plan goes up to 1e+16" in refused(capsys, *PLAN, f"--fit={fit}", f"--target-loss={near!r}")


# What money buys.


def test_a_budget_is_spent_to_the_last_cent(config):
    """Tokens by the plan of as many devices are those that the hours give."""
    catalogue = device_catalogue.read()
    for row in budget.bought([config], ["h100", "v5e"], 100.0, catalogue, FIT):
        entry = catalogue.get(row.device)
        price = entry.value("price_per_hour")
        assert row.hours * row.count * price == pytest.approx(100.0)
        ask = planning.Ask(config, row.tokens)
        plan = planning.plan(ask, [planning.part(ask, planning.Offer(entry, row.count, price), row.count)])
        assert plan.price == pytest.approx(100.0) and row.loss.low < row.loss.loss < row.loss.high
        assert "extrapolates" in row.distance


def test_twice_the_money_is_twice_the_tokens_and_less_time_takes_more_devices(config):
    catalogue = device_catalogue.read()
    (once,) = budget.bought([config], ["h100"], 100.0, catalogue)
    (twice,) = budget.bought([config], ["h100"], 200.0, catalogue)
    assert (once.count, twice.count) == (1, 1) and twice.tokens == pytest.approx(2 * once.tokens)
    (sooner,) = budget.bought([config], ["h100"], 200.0, catalogue, days=1)
    assert sooner.count == 4 and sooner.hours <= 24 and once.loss is None


def test_money_in_another_currency(config):
    catalogue = device_catalogue.read()
    (dollars,), (yuan,) = (
        budget.bought([config], ["h20"], m, catalogue, currency=c) for m, c in ((10, "USD"), (72.5, "CNY"))
    )
    assert dollars.tokens == pytest.approx(yuan.tokens)


def test_a_model_that_fits_nothing_is_left_out_and_bad_input_is_refused(config):
    catalogue = device_catalogue.read()
    huge = dataclasses.replace(config, model=dataclasses.replace(config.model, dim=65_536, num_layers=4000))
    assert budget.bought([huge], ["rtx4090"], 100.0, catalogue) == []
    for money in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match=r"money=.*must be positive"):
            budget.bought([config], ["h100"], money, catalogue)
    with pytest.raises(UserError, match="unknown device"):
        budget.bought([config], ["h1000"], 1.0, catalogue)
    with pytest.raises(UserError, match="no price is known"):
        budget.bought([config], ["ppu"], 1.0, catalogue)
