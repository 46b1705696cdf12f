"""Fitted laws: constants that are known come back, outliers do not move them, and what is not finite is refused."""

import json
import math

import numpy as np
import pytest

from frugalmoe.cost.laws import fitted, read_fit, write_fit
from frugalmoe.errors import UserError

SIZES = (1e5, 2e5, 4e5, 8e5, 1.6e6)
TOKENS = (2e5, 4e5, 8e5, 1.6e6)
FLOOR, A, ALPHA, B, BETA = 1.69, 406.4, 0.34, 410.7, 0.28  # Hoffmann et al. (2203.15556, equation 10)


def law(size: float, tokens: float) -> float:
    return FLOOR + A / size**ALPHA + B / tokens**BETA


def points(noise: float = 0.0, sizes=SIZES, seeds=(0, 1, 2), key: int = 0) -> list[fitted.Point]:
    """A grid of the law; what a seed adds is the same for all sizes, as in paired runs."""
    rng = np.random.default_rng(key)
    of_seed = {seed: rng.normal(0, noise) for seed in seeds}
    return [
        fitted.Point(
            f"size_{size:.0f}", seed, size, tokens, law(size, tokens) + of_seed[seed] + rng.normal(0, noise / 2)
        )
        for size in sizes
        for seed in seeds
        for tokens in TOKENS
    ]


@pytest.fixture(scope="module")
def exact():
    return fitted.fit_loss(points(), source="exact")


@pytest.fixture(scope="module")
def noisy():
    return fitted.fit_loss(points(0.03), source="noisy")


def test_known_constants_come_back(exact):
    assert exact.floor == pytest.approx(FLOOR, rel=0.02)
    (a, alpha), (b, beta) = exact.terms()["size"], exact.terms()["tokens"]
    assert (alpha, beta) == pytest.approx((ALPHA, BETA), rel=0.01)
    assert (a, b) == pytest.approx([A / exact.centers[0] ** ALPHA, B / exact.centers[1] ** BETA], rel=0.02)
    assert exact.spread < 1e-4


def test_it_foretells_what_it_has_not_seen(exact, noisy):
    for size, tokens in ((1.6e7, 1.6e7), (1e6, 1e8)):
        assert fitted.loss_at(exact, size, tokens).loss == pytest.approx(law(size, tokens), rel=2e-3)
        found = fitted.loss_at(noisy, size, tokens)
        assert found.low <= law(size, tokens) <= found.high and found.low < found.loss < found.high


def test_the_band_grows_with_the_distance(noisy):
    width = lambda size: (e := fitted.loss_at(noisy, size, 1.6e6 * size / 1.6e6)).high - e.low
    assert width(1.6e8) > 1.5 * width(1.6e6)


def test_an_outlier_does_not_move_the_law(exact):
    broken = [p._replace(loss=p.loss + 2) if (p.seed, p.size, p.tokens) == (1, 4e5, 8e5) else p for p in points()]
    found = fitted.fit_loss(broken)
    assert fitted.loss_at(found, 1.6e6, 1.6e6).loss == pytest.approx(law(1.6e6, 1.6e6), rel=1e-3)
    squares = np.polyfit(np.log([p.tokens for p in broken]), np.log([p.loss for p in broken]), 1)
    plain = np.polyfit(np.log([p.tokens for p in points()]), np.log([p.loss for p in points()]), 1)
    assert abs(squares[1] - plain[1]) > 1e-3  # which least squares would not resist


def test_order_and_units_of_the_points_do_not_matter(noisy):
    shuffled = points(0.03)
    np.random.default_rng(5).shuffle(shuffled)
    assert fitted.fit_loss([fitted.Point(*p) for p in shuffled], source="noisy") == noisy
    scaled = fitted.fit_loss([p._replace(size=1e6 * p.size) for p in points(0.03)])
    assert fitted.loss_at(scaled, 1e6 * 3e6, 3e6).loss == pytest.approx(fitted.loss_at(noisy, 3e6, 3e6).loss, rel=1e-4)


def test_a_law_of_compute_alone():
    along = [
        fitted.Point(f"c{i}", seed, m, 20 * m, 1.5 + 90 / (3 * 20 * m * m) ** 0.15)
        for i, m in enumerate(SIZES)
        for seed in (0, 1)
    ]
    found = fitted.fit_loss(along, "compute")
    assert found.floor == pytest.approx(1.5, rel=0.02) and found.terms()["compute"][1] == pytest.approx(0.15, rel=0.03)
    assert fitted.loss_at(found, 1e7, 2e8).loss == pytest.approx(1.5 + 90 / (3 * 2e15) ** 0.15, rel=1e-3)
    with pytest.raises(UserError, match=r"knows no best size"):
        fitted.best_size(found, 1e12)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss": math.nan}, "size_100000 seed 0: loss=nan: must be finite"),
        ({"loss": math.inf}, "loss=inf"),
        ({"loss": -1.0}, "loss=-1.0"),
        ({"tokens": 0.0}, "tokens=0.0"),
        ({"size": -math.inf}, "size=-inf"),
    ],
)
def test_what_is_not_finite_never_becomes_a_result(change, said):
    first, *others = points()
    with pytest.raises(UserError, match=said):
        fitted.fit_loss([first._replace(**change), *others])


def test_too_few_points_are_refused_and_what_is_missing_is_named():
    with pytest.raises(UserError, match=r"size: .*at least 3 values, there are 2; runs of size_100000, size_200000"):
        fitted.fit_loss(points(sizes=SIZES[:2]))
    with pytest.raises(UserError, match=r"tokens: .*at least 3 values, there are 1"):
        fitted.fit_loss([p for p in points() if p.tokens == TOKENS[0]])
    with pytest.raises(UserError, match=r"there are 0; runs of no arm"):
        fitted.fit_loss([])
    few = [p for p in points(sizes=SIZES[:3], seeds=(0,)) if p.tokens != TOKENS[0]]
    cross = [p for p in few if p.size == SIZES[0] or p.tokens == TOKENS[1]]
    with pytest.raises(UserError, match=r"5 points: .* has 5 constants"):
        fitted.fit_loss(cross)
    with pytest.raises(UserError, match=r"must be one of size and tokens, compute"):
        fitted.fit_loss(points(), "nothing")


def test_losses_that_do_not_fall_give_a_flat_law_and_no_best_size():
    flat = fitted.fit_loss([p._replace(loss=3.0) for p in points()])
    assert fitted.loss_at(flat, 1e9, 1e9).loss == pytest.approx(3.0, rel=1e-2)
    rising = fitted.fit_loss([p._replace(loss=8 - law(p.size, p.tokens) / 10) for p in points()])
    with pytest.raises(UserError, match=r"does not fall"):
        fitted.best_size(rising, 1e12)


def test_tokens_for_a_target(exact):
    wanted = fitted.loss_at(exact, 8e5, 5e6).loss
    assert fitted.tokens_for(exact, 8e5, wanted) == pytest.approx(5e6, rel=1e-6)
    with pytest.raises(UserError, match=r"--target-loss=1.0: must be above"):
        fitted.tokens_for(exact, 8e5, 1.0)
    with pytest.raises(UserError, match=r"must be above"):
        fitted.tokens_for(exact, 8e5, math.nan)
    with pytest.raises(UserError, match=r"is reached before"):
        fitted.tokens_for(exact, 8e5, 1e9)


def test_how_far_it_extrapolates_is_said(exact):
    assert fitted.beyond(exact, 4e5, 4e5) == {"size": 1, "tokens": 1, "compute": 1}
    assert fitted.how_far(exact, 4e5, 4e5) == "within the 5 sizes and 3 seeds of exact"
    assert fitted.beyond(exact, 1.6e8, 1.6e6) == pytest.approx({"size": 100, "tokens": 1, "compute": 100})
    assert fitted.how_far(exact, 1.6e8, 1.6e6).startswith("extrapolates 100 times the size, 100 times the compute")
    assert fitted.beyond(exact, 1e4, 4e5)["size"] == pytest.approx(10)


def test_the_best_size_is_that_of_a_search(exact):
    for compute in (1e12, 1e15):
        found = fitted.best_size(exact, compute)
        sizes = found * np.geomspace(0.5, 2, 101)
        losses = [fitted.loss_at(exact, m, compute / 3 / m).loss for m in sizes]
        assert sizes[int(np.argmin(losses))] == pytest.approx(found, rel=0.02)


def test_a_profile_at_equal_compute_has_the_best_size_of_the_law():
    """Far from the ends of the grid, from points alone."""
    grid = [
        fitted.Point(f"{m:.3g}", s, m, d, law(m, d))
        for m in np.geomspace(1e5, 1e7, 9)
        for d in np.geomspace(1e4, 1e9, 40)
        for s in (0, 1)
    ]
    exact = fitted.fit_loss(grid)
    trials = [t for c in np.geomspace(1e12, 1e13, 4) for t in fitted.profile(grid, c)]
    found = fitted.fit_power(trials)
    assert found.exponent == pytest.approx(BETA / (ALPHA + BETA), abs=0.03)
    for o in found.optima:
        assert o.value == pytest.approx(fitted.best_size(exact, o.compute), rel=0.1)
    assert fitted.profile(grid, 1e30) == []


def test_the_law_of_a_learning_rate_comes_back():
    """A parabola around 1.2 C^-0.15 in log rate; what a seed adds is the same at all rates."""
    rates = np.geomspace(1e-4, 1e-1, 9)
    rng = np.random.default_rng(0)
    of_seed = rng.normal(0, 0.05, 3)
    trials = [
        fitted.Trial(c, r, s, 3 + 0.2 * math.log(r / (1.2 * c**-0.15)) ** 2 + of_seed[s] + rng.normal(0, 1e-3))
        for c in (1e13, 1e14, 1e15) for r in rates for s in range(3)
    ]  # fmt: skip
    found = fitted.fit_power(trials)
    assert found.exponent == pytest.approx(-0.15, abs=0.01) and found.low <= found.exponent <= found.high
    assert found.coefficient * 1e14**found.exponent == pytest.approx(1.2 * 1e14**-0.15, rel=0.02)
    assert not found.left_out


def test_an_optimum_at_the_end_of_what_was_tried_is_none():
    falling = [fitted.Trial(1e12, v, 0, 4 - v) for v in (0.1, 0.2, 0.3)]
    with pytest.raises(UserError, match=r"the best is the end 0.3: try beyond it"):
        fitted.optimum(falling)
    with pytest.raises(UserError, match=r"needs three values, has 0.1, 0.2"):
        fitted.optimum(falling[:2])
    with pytest.raises(UserError, match=r"must be finite"):
        fitted.optimum([*falling, fitted.Trial(1e12, 0.4, 0, math.nan)])
    with pytest.raises(UserError, match=r"optima at two computes; .*try beyond it"):
        fitted.fit_power(falling)
    with pytest.raises(UserError, match=r"no runs"):
        fitted.fit_power([])


def test_a_file_holds_the_whole_fit(noisy, tmp_path):
    write_fit(tmp_path / "fit.json", noisy, foretold={})
    assert read_fit(tmp_path / "fit.json") == noisy


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"form": ["compute"]}, "not a fit"),
        ({"constants": [1.0]}, "constants=.*must be 5 finite numbers"),
        ({"constants": [1.0, 1.0, float("nan"), 1.0, 1.0]}, "constants="),
        ({"draws": []}, "draws="),
        ({"ranges": {"size": [1, 2]}}, "ranges="),
        ({"ranges": {"size": [2, 1], "tokens": [1, 2]}}, "ranges="),
        ({"spread": -1}, "spread="),
        ({"seeds": ["a"]}, "seeds="),
        ({"points": True}, "points="),
        ({"centers": None}, "centers="),
    ],
)
def test_a_file_that_is_no_fit_is_refused(noisy, tmp_path, change, said):
    write_fit(tmp_path / "fit.json", noisy)
    (tmp_path / "fit.json").write_text(json.dumps(json.loads((tmp_path / "fit.json").read_text()) | change))
    with pytest.raises(UserError, match=said):
        read_fit(tmp_path / "fit.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"form": "size and tokens"', '{"form": "size and tokens"}'])
def test_a_cut_or_foreign_file_is_refused(tmp_path, text):
    (tmp_path / "fit.json").write_text(text)
    with pytest.raises(UserError, match=r"fit\.json"):
        read_fit(tmp_path / "fit.json")
    with pytest.raises(UserError, match=r"none\.json"):
        read_fit(tmp_path / "none.json")
