"""Pairs and paths of experts against cases computed by hand."""

import numpy as np
import pytest

from frugalmoe.analysis import coactivation

LN2 = np.log(2)


def selection(rows):
    """['01', '12', ...] -> bool [N, 4]: the experts of each token."""
    return np.array([[str(e) in row for e in range(4)] for row in rows])


def test_co_activation_by_hand():
    # expert 0 is chosen 3 times: with 1 twice, with 2 once; slots: 3 2 2 1 of 8
    observed_EE, expected_EE = coactivation.co_activation(selection(["01", "01", "02", "23"]))
    np.testing.assert_allclose(observed_EE[0], [np.nan, 2 / 3, 1 / 3, 0])
    np.testing.assert_allclose(observed_EE[3], [0, 0, 1, np.nan])
    # K = 2: expected_01 = (2 - 1) (2 / 8) / (1 - 3 / 8) = 2 / 5
    np.testing.assert_allclose(expected_EE[0], [np.nan, 2 / 5, 2 / 5, 1 / 5])


def test_independent_choices_have_no_preferred_pairs():
    rng = np.random.default_rng(0)
    observed_EE, expected_EE = coactivation.co_activation(np.argsort(rng.random((40_000, 6)), axis=1) < 2)
    np.testing.assert_allclose(expected_EE[~np.eye(6, dtype=bool)], 1 / 5, rtol=0.05)  # (K - 1) / (E - 1)
    off = ~np.eye(6, dtype=bool)
    np.testing.assert_allclose(observed_EE[off], expected_EE[off], rtol=0.06)


def test_every_pair_of_ranks_counts():
    """Uniform K = 3 of 4: (K - 1) / (E - 1) = 2/3. Neighbouring ranks only would give 2 * 2 / (3 * 3) = 4/9."""
    selected_NE = selection(["012", "013", "023", "123"])
    observed_EE, expected_EE = coactivation.co_activation(selected_NE)
    off = ~np.eye(4, dtype=bool)
    np.testing.assert_allclose(observed_EE[off], 2 / 3)
    np.testing.assert_allclose(expected_EE[off], 2 / 3)


def test_co_activation_interval():
    found = coactivation.co_activation_interval(selection(["01", "01", "02", "23"]), np.array([0, 0, 1, 1]), 0)
    np.testing.assert_allclose(found.value, [np.nan, 2 / 3, 1 / 3, 0])
    # unit 0 alone: always with 1; unit 1 alone: always with 2
    np.testing.assert_allclose(found.low, [np.nan, 0, 0, 0])
    np.testing.assert_allclose(found.high, [np.nan, 1, 1, 0])


def test_npmi_by_hand():
    found_EE = coactivation.npmi(selection(["01", "01", "2", "3"]))
    assert found_EE[0, 1] == pytest.approx(1)  # p01 = p0 = p1 = 1/2: ln(2) / ln(2)
    assert found_EE[2, 3] == -1 and np.isnan(found_EE[0, 0])
    # p0 = 1/2, p1 = 1/2, p01 = 1/4: independent
    assert coactivation.npmi(selection(["01", "0", "1", "2"]))[0, 1] == pytest.approx(0)


def test_path_information():
    rng = np.random.default_rng(0)
    first_NE = np.eye(4, dtype=bool)[rng.integers(0, 4, 4000)]
    other_NE = np.eye(4, dtype=bool)[rng.integers(0, 4, 4000)]
    same, none = coactivation.path_information(np.stack([first_NE, first_NE[:, ::-1], other_NE]))
    assert same == pytest.approx(2 * LN2, abs=0.01)  # H(e) = ln 4 where the next layer follows the first
    assert none == pytest.approx(0, abs=0.002)


def test_paths_by_hand():
    layer_NE = selection(["0"] * 8 + ["1", "2"])
    # with a second layer that says nothing: three paths of 8, 1 and 1 tokens; 8 + 1 cover 90% of 10
    distinct, needed, effective = coactivation.paths(np.stack([layer_NE, np.ones_like(layer_NE)]))
    assert (distinct, needed) == (3, 2)
    # H = -0.8 ln 0.8 - 2 * 0.1 ln 0.1
    assert effective == pytest.approx(np.exp(-0.8 * np.log(0.8) - 0.2 * np.log(0.1)))
