"""Published laws against what is printed of them: the rows of arithmetic that the Ling papers allow."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from frugalmoe.config import load
from frugalmoe.config.load import run_file
from frugalmoe.convert.from_run import COEFFICIENTS
from frugalmoe.cost import islands
from frugalmoe.cost.laws import published
from frugalmoe.model.transformer import count_parameters

LING_COST = run_file(Path(__file__).parents[1] / "experiments/ling_cost.py", "ling_cost")


@pytest.mark.parametrize("name", [*LING_COST.LING, *LING_COST.LEVERAGE_PAIR])
def test_published_counts_of_parameters(name):
    """Ling-Plus is printed as 290B and 28.8B, of which the head but not the embedding is part."""
    config, changes, total, active = (LING_COST.LING | LING_COST.LEVERAGE_PAIR)[name]
    found = count_parameters(LING_COST.overridden(config, changes))
    left_out = found["embedding"] + found["head"] if name in LING_COST.LEVERAGE_PAIR else 0
    assert (found["total"] - left_out) / 1e9 == pytest.approx(total, rel=3e-3)
    assert (found["active"] - left_out) / 1e9 == pytest.approx(active, rel=0.015)


# Device -> RMB per peak PFLOP-hour, utilization for 6.35M and for 5.08M in percent, device-hours, tokens/s at 5.08M.
SOLVED = {
    "A": (18.92, 14.3, 17.9, 725_714, 383),
    "B": (37.50, 28.3, 35.4, 1_128_889, 246),
    "C": (32.05, 24.2, 30.3, 508_000, 547),
    "D": (27.81, 21.0, 26.3, 184_727, 1_504),
    "E": (38.37, 29.0, 36.3, 900_709, 308),
}


@pytest.mark.parametrize("name", SOLVED)
def test_the_utilizations_that_the_totals_need(name):
    device, flops = LING_COST.BY_NAME[name], LING_COST.six_n()
    price, dear, cheap, hours, speed = SOLVED[name]
    assert 1e15 * device.rate / device.peak == pytest.approx(price, abs=0.005)
    for total, percent in ((6.35e6, dear), (5.08e6, cheap)):
        found = published.utilization_for(flops, device.peak, device.rate, total)
        assert 100 * found == pytest.approx(percent, abs=0.05)
        assert published.device_hours(flops, device.peak, found) * device.rate == pytest.approx(total)
    found = published.device_hours(
        flops, device.peak, published.utilization_for(flops, device.peak, device.rate, 5.08e6)
    )
    assert found == pytest.approx(hours, abs=1) and 1e12 / found / 3600 == pytest.approx(speed, abs=1)


def test_the_saving_and_the_mixes_that_give_it():
    assert LING_COST.saving() == pytest.approx(0.2, abs=1e-12)
    below = [device.name for device in LING_COST.DEVICES if LING_COST.relative(device) <= 0.8]
    assert below == ["A"]
    for other in "BCDE":  # half-way checks: the share that is returned costs what was wanted
        dear = LING_COST.relative(LING_COST.BY_NAME[other])
        share = published.share_needed(LING_COST.relative(LING_COST.BY_NAME["A"]), dear, 0.8)
        assert share * LING_COST.relative(LING_COST.BY_NAME["A"]) + (1 - share) * dear == pytest.approx(0.8)
    assert published.share_needed(1.0, 1.4, 0.8) is None and published.share_needed(0.5, 0.7, 0.8) == 0
    counted = list(LING_COST.conventions().values())
    assert counted == pytest.approx([1.728e23, 1.816e23, 1.932e23], rel=5e-4)


# What Ling 2.0 used (arXiv 2510.22115 table 1): C at 20T tokens, learning rate, batch in sequences of 4,096.
USED = {
    "mini": (1.350e23, 3.36e-4, 4400),
    "flash": (7.126e23, 2.61e-4, 8352),
    "1t": (6.462e24, 1.86e-4, 18_144),
}


@pytest.mark.parametrize("size", USED)
def test_the_laws_of_learning_rate_and_batch_give_what_ling_2_used(size):
    compute, rate, batch = USED[size]
    config = load(f"ling_2:{size}")
    found = published.training_compute(config.model, 4096, 20e12)
    assert found == pytest.approx(compute, rel=5e-4)
    assert published.LEVERAGE_PAPER.rate.at(found) == pytest.approx(rate, rel=2e-3)
    assert published.LEVERAGE_PAPER.batch.at(found) / 4096 == pytest.approx(batch, rel=0.034)
    with_module = dataclasses.replace(
        config.model, multi_token_prediction=dataclasses.replace(config.model.multi_token_prediction, depth=1)
    )
    assert published.training_compute(with_module, 4096, 20e12) == found  # nor the head: neither is counted


def test_ling_plus_stands_where_its_figure_has_it():
    compute = published.training_compute(load("ling_1:plus").model, 4096, 9e12)
    assert compute == pytest.approx(1.70e24, rel=2e-3)
    assert published.LING_1.rate.at(compute) == pytest.approx(2.32e-4, rel=1e-3)
    assert published.LING_1.batch.at(compute) == pytest.approx(45.2e6, rel=1e-3)


# A -> leverage at 1e18, 1e20, 1e22, 1e24 with G = 2, 8, 12, as the notes have them from the printed constants.
LEVERAGE = {
    0.008: (2.44, 3.55, 3.60, 4.30, 6.24, 6.34, 7.57, 10.99, 11.16, 13.3, 19.4, 19.7),
    0.031: (2.08, 2.83, 2.86, 3.31, 4.50, 4.55, 5.27, 7.15, 7.24, 8.38, 11.4, 11.5),
    0.10: (1.68, 2.08, 2.10, 2.33, 2.89, 2.91, 3.23, 4.01, 4.04, 4.48, 5.56, 5.61),
    0.50: (1.17, 1.25, 1.26, 1.30, 1.39, 1.39, 1.43, 1.53, 1.54, 1.58, 1.69, 1.70),
}


def test_leverage_with_the_logarithms_that_give_what_is_printed():
    assert published.leverage(0.031, 12, 1e22) > 7  # "more than 7"
    assert 8 <= published.best_granularity() <= 12
    assert published.best_granularity() == pytest.approx(11.3, abs=0.05)
    assert published.leverage(1.0, 8, 1e22) == pytest.approx(1, abs=0.02)
    assert published.leverage(13 / 385, 2 * 2048 / 384, 1e22) == pytest.approx(6.98, abs=0.005)
    for ratio, printed in LEVERAGE.items():
        found = [published.leverage(ratio, g, 10.0**e) for e in (18, 20, 22, 24) for g in (2, 8, 12)]
        assert found == pytest.approx(printed, rel=5e-3)


def test_natural_logarithms_are_the_trap():
    """With ln in both places the same constants give a leverage beyond all reason, or a best G of 33."""
    c = published.LEVERAGE
    assert math.exp(-c.slope / (2 * c.curvature)) == pytest.approx(33, abs=0.5)
    wrong = published.leverage(0.031, 12, 10 ** math.log(1e22))  # log10 of this is ln(1e22)
    assert wrong > 1000


def test_shapes_are_read_off_a_config():
    model = load("ling_2:mini").model
    assert published.activation_ratio(model) == 9 / 257 and published.granularity(model) == 8
    assert published.activation_ratio(load("ling_1:lite").model) == 8 / 66


@pytest.mark.parametrize(("law", "product"), [(published.MOE, 1.000), (published.DENSE, 0.999)])
def test_size_and_tokens_multiply_to_the_compute(law, product):
    assert law.size.coefficient * law.tokens.coefficient == pytest.approx(product, abs=5e-4)
    assert law.size.exponent + law.tokens.exponent == pytest.approx(1)
    assert law.size.at(1e22) * law.tokens.at(1e22) / 1e22 == pytest.approx(product, abs=5e-4)


def test_intervals_between_checkpoints():
    """Ling 2.0's s = sqrt(2880 C / F) minutes is Young's: 1440 / F minutes are between two of F failures a day."""
    assert islands.best_interval(1440 / 0.625, 0.5) == pytest.approx(48)
    for saves, fails in ((0.5, 0.625), (2, 3), (0.1, 20)):
        assert islands.best_interval(1440 / fails, saves) == pytest.approx(math.sqrt(2880 * saves / fails))
    between, saving, recovery = 3.0e4, 60.0, 600.0
    best = published.best_interval_with_recovery(between, saving, recovery)
    assert best == pytest.approx(60 + math.sqrt(2 * 30_600 * 60 + 3600))
    assert published.best_interval_with_recovery(1e9, 1.0, 0.0) == pytest.approx(
        islands.best_interval(1e9, 1.0), rel=1e-4
    )


def test_the_interval_with_recovery_is_the_most_available():
    """To first order a period of `interval` counts interval - saving, and loses half of itself and the recovery."""
    between, saving, recovery = 3.0e4, 60.0, 600.0
    best = published.best_interval_with_recovery(between, saving, recovery)
    counted = lambda period: (period - saving) / (period + period / between * (period / 2 + recovery))
    around = [counted(best * factor) for factor in (0.8, 0.99, 1, 1.01, 1.25)]
    assert max(around) == around[2]


def test_merging_checkpoints_is_a_decay_of_the_rate():
    """WSM: with plain gradient steps the mean of n checkpoints is one end of a run whose gradients count less and less:
    w_i = sum of the shares of all checkpoints from i on (arXiv 2510.22115 equation 2).
    """
    rng = np.random.default_rng(0)
    start, steps = rng.normal(size=5), rng.normal(size=(6, 5))  # rate * gradient of each step
    checkpoints = start - np.cumsum(steps, axis=0)  # after steps 1 to n
    for name, shares in COEFFICIENTS.items():
        share = np.array(shares(6), float) / sum(shares(6))
        weights = np.cumsum(share[::-1])[::-1]  # of each gradient
        assert share @ checkpoints == pytest.approx(start - weights @ steps), name
        assert weights[:-1] - weights[1:] == pytest.approx(share[:-1]) and weights[-1] == pytest.approx(share[-1])


def test_stragglers_of_the_report():
    """66.1% is more throughput; time falls by 39.8%."""
    slowest = islands.step_seconds(1, 1.661, 0.004, 10**6)
    assert slowest - 1 == pytest.approx(0.661) and (slowest - 1) / slowest == pytest.approx(0.398, abs=5e-4)


def test_failures_of_a_thousand_devices():
    assert published.any_fails(0.0027, 1000) == pytest.approx(0.933, abs=5e-4)
    assert published.any_fails(0.0, 1000) == 0 and published.any_fails(1e-12, 10) == pytest.approx(1e-11)


def test_deepseek_v3s_hours_money_and_utilization():
    hours = sum(LING_COST.H800_HOURS.values())
    assert hours == 2_788e3 and hours * LING_COST.H800_RATE == pytest.approx(5.576e6)
    assert LING_COST.H800_HOURS["pre-training"] / 14.8 == pytest.approx(180e3)
    speed = LING_COST.V3_FLOPS * 1e12 / (180e3 * 3600)
    assert speed == pytest.approx(385.8e12, rel=1e-3) and speed / LING_COST.H800_PEAK == pytest.approx(0.390, abs=5e-4)


@pytest.mark.parametrize("name", LING_COST.FLOOD)
def test_speedups_of_flood(name):
    old, new, printed = LING_COST.FLOOD[name]
    assert new / old == pytest.approx(printed, abs=0.006)


def test_throughput_of_ling_mini_over_a_dense_model():
    for speeds, gains in LING_COST.MINI.values():
        assert [100 * (new / old - 1) for new, old in zip(speeds, LING_COST.LLAMA)] == pytest.approx(gains, abs=0.07)


def test_averages_of_safety():
    """That of Qwen2.5-72B does not follow from its four scores: 90.54, where 91.18 is printed."""
    follows = {name: abs(np.mean(scores) - printed) < 0.006 for name, (scores, printed) in LING_COST.SAFETY.items()}
    assert [name for name, holds in follows.items() if not holds] == ["Qwen2.5-72B"]


def test_babel():
    before, after, factor = LING_COST.BABEL
    assert before / after == factor
