"""Information and intervals against cases computed by hand and against truths that are known."""

import numpy as np
import pytest

from frugalmoe.analysis import information, uncertainty

LN2 = np.log(2)


def test_mutual_information():
    # independent rows: 0
    assert information.mutual_information(np.array([[2, 4], [3, 6]])) == pytest.approx(0)
    # each domain has its own expert: H(domain) = ln 2
    assert information.mutual_information(np.array([[7, 0], [0, 7]])) == pytest.approx(LN2)
    # joint 1/2 0 / 1/4 1/4: H(X) = LN2; H(E) of (3/4, 1/4) = 2 LN2 - 3/4 ln 3; H(X, E) = 1.5 LN2
    expected = LN2 + (2 * LN2 - 0.75 * np.log(3)) - 1.5 * LN2
    assert information.mutual_information(np.array([[2, 0], [1, 1]])) == pytest.approx(expected)


def test_miller_madow():
    # 2 rows, 2 columns, 3 occupied cells, n = 4: (2 + 2 - 3 - 1) / 8 = 0
    assert information.miller_madow(np.array([[2, 0], [1, 1]])) == 0
    # all 4 cells, n = 8: (2 + 2 - 4 - 1) / 16
    assert information.miller_madow(np.full((2, 2), 2)) == pytest.approx(-1 / 16)
    rng = np.random.default_rng(0)
    tables = [rng.multinomial(500, np.full(60, 1 / 60)).reshape(6, 10) for _ in range(200)]
    raw = np.mean([information.mutual_information(t) for t in tables])
    corrected = np.mean([information.mutual_information(t) + information.miller_madow(t) for t in tables])
    assert raw > 0.03 and abs(corrected) < 0.1 * raw  # truth: 0; bias of the raw value: 5 * 9 / 1000 = 0.045


def test_label_information():
    # label 0 always expert 0, label 1 always expert 1, 50 each in two units: I = ln 2; occupied cells 2 + 2 - 2 - 1 = 1
    label_N = np.repeat([7, 9], 50)
    selected_NE = np.stack([label_N == 7, label_N == 9, np.zeros(100, bool)], axis=1)
    found = information.label_information(selected_NE, label_N, np.arange(100) % 2)
    assert found.raw == pytest.approx(LN2) and found.label_entropy == pytest.approx(LN2)
    assert found.corrected.value == pytest.approx(LN2 + 1 / 200)
    np.testing.assert_allclose([found.corrected.low, found.corrected.high], found.corrected.value)  # equal units
    assert 0 < found.shuffled < 0.05


def test_label_information_of_noise_is_its_floor():
    rng = np.random.default_rng(0)
    selected_NE = np.argsort(rng.random((4000, 8)), axis=1) < 2
    found = information.label_information(selected_NE, rng.integers(0, 5, 4000), np.arange(4000) // 100)
    # K = 2 slots per token are not independent: 4 * 7 / (2 * 8000) is only about the floor
    assert found.shuffled == pytest.approx(4 * 7 / 16000, rel=0.3)
    assert found.raw < 2 * found.shuffled
    assert found.corrected.low < 0.001 and found.corrected.low < found.corrected.value < found.corrected.high


def test_mean_by_hand():
    # unit 0: 1 and 3; unit 1: 5 and one unknown: (1 + 3 + 5) / 3
    value_XN = np.array([[1, 5, 3, np.nan], [2, 2, 2, 2]])
    found = uncertainty.mean(value_XN, np.array([0, 1, 0, 1]))
    np.testing.assert_allclose(found.value, [3, 2])
    # a resample holds both units (3), only unit 0 (2) or only unit 1 (5); the last two in a quarter of cases each
    np.testing.assert_allclose(found.low, [2, 2])
    np.testing.assert_allclose(found.high, [5, 2])


def test_one_unit_has_no_interval():
    found = uncertainty.mean(np.arange(4.0), np.zeros(4, int))
    assert found.value == 1.5 and np.isnan(found.low) and np.isnan(found.high)


def test_the_bootstrap_interval_of_a_mean_is_that_of_theory():
    """Of 400 units with standard deviation 2 the mean has 2 / sqrt(400) = 0.1: 95% lie within 1.96 of them."""
    x_U = 2 * np.random.default_rng(0).standard_normal(400)
    x_U = 2 * (x_U - x_U.mean()) / x_U.std()
    found = uncertainty.bootstrap(lambda total: total / 400, x_U, samples=4000)
    assert found.value == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose([found.low, found.high], [-0.196, 0.196], atol=0.015)


def test_a_centred_interval_holds_the_value_of_a_statistic_that_resampling_biases():
    """The variance of a resample of n is (n - 1) / n of the sample's on average: centring gives it back."""
    x_U = np.arange(6.0)
    variance = lambda x, x2: x2 / 6 - (x / 6) ** 2
    plain, centred = (uncertainty.bootstrap(variance, x_U, x_U**2, samples=4000, centred=c) for c in (False, True))
    assert plain.value == centred.value == pytest.approx(35 / 12)
    assert centred.low - plain.low == pytest.approx(35 / 12 / 6, rel=0.1)
    assert centred.high - plain.high == pytest.approx(35 / 12 / 6, rel=0.1)


def test_p_value():
    # 2 of 4 shuffles reach 3, and the data itself: (1 + 2) / (1 + 4)
    assert uncertainty.p_value(np.array([1.0, 3.0, 4.0, 2.0]), 3.0) == pytest.approx(0.6)


def test_position_buckets():
    assert information.position_buckets(np.arange(16)).tolist() == [0, 1, 1, *[2] * 4, *[3] * 8, 4]
    # one expert for first tokens: H of 1/4 and 3/4 is all that the bucket can say about it
    position_N = np.tile(np.arange(4), 50)
    selected_NE = np.stack([position_N == 0, position_N > 0], axis=1)
    found = information.label_information(selected_NE, information.position_buckets(position_N), np.arange(200) // 4)
    assert found.raw == pytest.approx(2 * LN2 - 0.75 * np.log(3))
