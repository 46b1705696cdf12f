"""The law of compute, activation and granularity: known constants come back; what runs do not vary is not fitted."""

import json
import math

import numpy as np
import pytest

from frugalmoe.cost import laws
from frugalmoe.cost.laws import published, shaped
from frugalmoe.cost.laws.shaped import Shaped
from frugalmoe.errors import UserError

FLOOR, A, ALPHA, CENTER = 1.8, 1.1, 0.12, 1e19
TRUE = {"base": -0.25, "per_decade": -0.08, "curvature": 0.0167, "slope": -0.117, "start": 0.0163}


def leverage(activation: float, granularity: float, compute: float) -> float:
    """The module's formula, written down again."""
    c, cut = TRUE, math.log2(granularity)
    exponent = c["base"] + c["per_decade"] * math.log10(compute / CENTER) + c["curvature"] * cut**2 + c["slope"] * cut
    return ((activation + c["start"]) / (1 + c["start"])) ** exponent


def points(noise: float = 0.0, seeds=(0, 1), activations=(1.0, 0.5, 0.125, 0.03), cuts=(1, 4, 16), key=0):
    rng = np.random.default_rng(key)
    of_seed = {seed: rng.normal(0, noise) for seed in seeds}
    found = []
    for activation in activations:
        for cut in cuts if activation < 1 else (1,):
            for compute in np.geomspace(1e18, 1e20, 4):
                for seed in seeds:
                    loss = FLOOR + A * (leverage(activation, cut, compute) * compute / CENTER) ** -ALPHA
                    loss *= math.exp(of_seed[seed] + rng.normal(0, noise / 2))
                    found.append(Shaped(f"{activation}_{cut}", seed, compute, activation, float(cut), loss))
    return found


@pytest.fixture(scope="module")
def exact():
    return laws.fit_shaped(points(), source="exact")


@pytest.fixture(scope="module")
def noisy():
    return laws.fit_shaped(points(0.004), source="noisy")


def test_known_constants_come_back(exact):
    assert exact.free == shaped.CONSTANTS and exact.center == pytest.approx(CENTER)
    found = dict(zip(shaped.CONSTANTS, exact.constants))
    assert math.exp(found["log_floor"]) == pytest.approx(FLOOR, rel=0.02)
    assert found["alpha"] == pytest.approx(ALPHA, rel=0.05) and exact.spread < 1e-4
    for name in ("base", "per_decade", "curvature", "slope"):
        assert found[name] == pytest.approx(TRUE[name], rel=0.1), name
    assert math.exp(found["log_start"]) == pytest.approx(TRUE["start"], rel=0.1)


def test_leverage_and_loss_are_foretold_beyond_the_runs(exact, noisy):
    for shape in ((0.03, 8, 1e20), (0.0625, 12, 1e21), (0.5, 2, 1e18)):
        assert laws.leverage_of(exact, *shape).value == pytest.approx(leverage(*shape), rel=0.02)
        band = laws.leverage_of(noisy, *shape)
        assert band.low < band.value < band.high
        assert abs(band.value - leverage(*shape)) < band.high - band.low  # within twice of what half a band is
    true = FLOOR + A * (leverage(0.0625, 12, 1e21) * 1e21 / CENTER) ** -ALPHA
    assert laws.loss_of(exact, 1e21, 0.0625, 12).loss == pytest.approx(true, rel=2e-3)
    found = laws.loss_of(noisy, 1e21, 0.0625, 12)
    assert found.low <= true <= found.high


def test_it_is_the_published_law_but_for_dense_models(exact):
    """With its constants told from C0 the fit says what `published.leverage` says, to the 1.6% of A = 1."""
    c = dict(zip(shaped.CONSTANTS, exact.constants))
    base = c["base"] - c["per_decade"] * math.log10(exact.center)
    theirs = published.Leverage(base, c["per_decade"], c["curvature"], c["slope"], math.exp(c["log_start"]))
    for shape in ((0.03, 8, 1e19), (0.125, 2, 1e20)):
        assert laws.leverage_of(exact, *shape).value == pytest.approx(published.leverage(*shape, theirs), rel=0.017)
    assert laws.leverage_of(exact, 1.0, 5, 1e22).value == 1


def test_bands_hold_the_constants_and_an_outlier_does_not_move_them(noisy):
    for name in ("base", "alpha"):
        band = noisy.constant(name)
        assert band.low < band.high and band.low <= {**TRUE, "alpha": ALPHA}[name] <= band.high, name
    broken = points()
    broken[7] = broken[7]._replace(loss=broken[7].loss + 1)
    found = laws.fit_shaped(broken)
    assert laws.leverage_of(found, 0.125, 8, 1e19).value == pytest.approx(leverage(0.125, 8, 1e19), rel=0.02)


def test_what_the_runs_do_not_vary_is_not_fitted():
    few = laws.fit_shaped(points(activations=(1.0, 0.125), cuts=(2,)))
    assert few.free == ("log_floor", "log_a", "alpha", "base", "per_decade")
    assert few.constant("slope") == (0.0, 0.0, 0.0)
    said = laws.how_far_of(few, 1e22, 0.125, 8)
    assert said == (
        "extrapolates 100 times the compute, 4 times the granularity of the 2 arms; "
        "not fitted: curvature, slope, log_start"
    )
    assert laws.how_far_of(few, 1e19, 0.125, 2).startswith("within the 2 arms")
    assert "granularity" not in laws.how_far_of(few, 1e19, 1.0, 1.0).split(";")[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss": math.nan}, "loss=nan: must be finite"),
        ({"compute": 0.0}, "compute=0.0"),
        ({"activation": 1.5}, "activation=1.5: must be at most 1"),
        ({"granularity": -1.0}, "granularity=-1.0"),
    ],
)
def test_what_is_no_point_is_refused(change, said):
    first, *others = points()
    with pytest.raises(UserError, match=said):
        laws.fit_shaped([first._replace(**change), *others])


def test_too_few_runs_are_refused_by_name():
    with pytest.raises(UserError, match=r"activation: .*at least 2 values, there are 1"):
        laws.fit_shaped(points(activations=(0.125,)))
    with pytest.raises(UserError, match=r"compute: .*at least 3 values"):
        laws.fit_shaped([p for p in points() if p.compute == 1e18])
    with pytest.raises(UserError, match="compute"):
        laws.fit_shaped([])
    three = [p for p in points(activations=(1.0, 0.5), cuts=(2,), seeds=(0,))][:5]
    with pytest.raises(UserError, match=r"activation|points"):
        laws.fit_shaped(three)


def test_a_file_holds_a_fit_and_damage_is_named(tmp_path, noisy):
    path = tmp_path / "leverage.json"
    laws.write_shaped(path, noisy, made="today")
    assert laws.read_shaped(path) == noisy
    whole = json.loads(path.read_text())
    for name, value in (("constants", [1.0]), ("draws", []), ("center", -1), ("ranges", {}), ("free", ["other"])):
        path.write_text(json.dumps(whole | {name: value}))
        with pytest.raises(UserError, match=f"leverage.json: {name}: missing or damaged"):
            laws.read_shaped(path)
