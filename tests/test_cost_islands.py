"""The closed forms of islands: numbers by hand, simulated failures, the published points, and the page made of them."""

import math
import random
from pathlib import Path

import islands_paper
import pytest

from frugalmoe.cost import islands


def test_bytes_of_a_round_by_hand():
    """A million values of 32 bits are 4 MB; in codes of 4 bits with steps 1e6 * 4.25 / 8 = 531,250 bytes."""
    assert islands.traffic(10**6, "float32", 3) == (4e6, 8e6, 12e6)
    assert islands.traffic(10**6, "int4", 2) == (531_250, 531_250, 1_062_500)
    assert islands.traffic(10**6, "bfloat16", 5, fragments=4) == (5e5, 2e6, 2.5e6)
    assert islands.traffic(10**6, "int8", 1).received == 0
    assert islands.all_reduce(10**6, "bfloat16", 4) == 3e6  # 2 * 3/4 * 2 MB
    assert islands.all_reduce(10**6, "float32", 1) == 0


def test_rounds_of_a_day_by_hand():
    """(4 + 8) MB at 1 MB/s are 12 s: beside 20 s of steps they are hidden, in front of them they are not."""
    seconds = islands.transfer_seconds(islands.traffic(10**6, "float32", 3), 1e6)
    assert seconds == 12
    assert islands.rounds_per_day(20, seconds, overlapped=True) == 4320
    assert islands.rounds_per_day(20, seconds, overlapped=False) == 2700
    assert islands.rounds_per_day(10, seconds, overlapped=True) == 7200
    assert islands.tokens_per_second(512, 370e12, 0.3, 1e11) == pytest.approx(568_320)


def test_equal_steps_keep_what_the_slowest_can():
    """Speeds 1, 2, 4, 8: in the time of the slowest's piece 4 are done, and 15 could be."""
    assert islands.kept_when_all_wait([1, 2, 4, 8]) == pytest.approx(4 / 15)
    assert islands.kept_when_all_wait([3, 3]) == 1


@pytest.mark.parametrize(("between", "down", "interval", "saving"), [(10, 2, 3, 0.1), (3, 1, 3, 0.5), (100, 5, 7, 0)])
def test_goodput_is_that_of_a_simulation(between, down, interval, saving):
    rng, useful, wall = random.Random(0), 0.0, 0.0
    for _ in range(40_000):
        worked = rng.expovariate(1 / between)
        useful += interval * (worked // (interval + saving))
        wall += worked + down
    assert islands.goodput(between, down, interval, saving) == pytest.approx(useful / wall, rel=0.02)


def test_goodput_has_its_limits():
    first_order = 1 - 1 / 100 - (100 / 2 + 30) / 1e6
    assert islands.goodput(1e6, 30, 100, 1) == pytest.approx(first_order, abs=1e-4)
    assert islands.goodput(1e12, 30, 100) == pytest.approx(1)
    assert islands.goodput(1, 30, 100) == pytest.approx(0, abs=1e-9)
    best = islands.best_interval(1e5, 60)
    assert best == pytest.approx(3464, abs=1)
    around = [islands.goodput(1e5, 600, best * factor, 60) for factor in (0.5, 0.9, 1, 1.1, 2)]
    assert max(around) == pytest.approx(around[2], abs=1e-4) and around[0] < around[1] and around[4] < around[3]


def test_islands_have_the_goodput_of_one_with_fewer_devices():
    for count in (2, 8, 16):
        many = islands.time_between_failures(3e7, 16_384, count)
        one = islands.time_between_failures(3e7, 16_384 // count, 1)
        assert islands.goodput(many, 900, 600, 9) == islands.goodput(one, 900, 600, 9)
    assert islands.time_between_failures(50_700, 16_384, 1) == pytest.approx(
        3.094, abs=1e-3
    )  # hours; 3.1 were published


def test_the_straggler_curve_is_the_published_one():
    for workers, printed in islands_paper.PRINTED.items():
        found = 1 / islands.step_seconds(1 / 0.0912, 1.661 / 0.0912, 0.004, workers)
        assert found == pytest.approx(printed, abs=0.0005), workers
    assert islands.step_seconds(1, 3, 0.5, 2) == 2.5  # 1 + 2 * (1 - 1/4)
    assert islands.step_seconds(1, 3, 0, 99) == 1 and islands.step_seconds(1, 3, 1, 1) == 3


def test_the_price_of_a_day_by_hand():
    """2 islands send 6 GiB, in 2 requests each, and read the other's: 12 GiB leave the store in each of 10 rounds."""
    moved = islands.Traffic(6 * 2**30, 6 * 2**30, 12 * 2**30)
    prices = islands.Prices(stored=1e-12, received=1e-9, written=1e-3, read=1e-4, source="")
    lying, moving = islands.storage_per_day(moved, 10, 1e9, prices)
    assert lying == pytest.approx(1e9 * 86_400 * 1e-12)
    assert moving == pytest.approx(10 * (12 * 2**30 * 1e-9 + 4 * 1e-3 + 4 * 1e-4))
    assert math.ceil(moved.sent / islands.LARGEST_OBJECT) == 2


def test_the_page_says_what_the_formulas_say():
    assert islands_paper.text().strip() in islands_paper.PAGE.read_text(encoding="utf-8"), "`make paper` writes it"


def test_losses_are_those_of_the_study():
    text = (Path(__file__).parents[1] / "experiments/islands/RESULTS.md").read_text(encoding="utf-8")
    for (count, steps), (nats, half) in islands.LOSSES.items():
        assert f"| m{count}_h{steps} | 3 |" in text
        assert f"m{count}_h{steps}: worse by {nats:.4f} ± {half:.4f} nats" in text
    assert islands.loss(2, 50) == ((2, 50), 0.1920, 0.0361)
    assert islands.loss(5, 500)[0] == (4, 200) and islands.loss(100, 1)[0] == (8, 10)
