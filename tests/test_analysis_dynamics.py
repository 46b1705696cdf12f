"""Saturation and churn against cases computed by hand."""

import numpy as np
import pytest

from frugalmoe.analysis import dynamics


def selection(rows):
    """['01', '12', ...] -> bool [N, 4]: the experts of each token."""
    return np.array([[str(e) in row for e in range(4)] for row in rows])


EARLY, LAST = selection(["01", "02", "13"]), selection(["01", "23", "02"])


def test_saturation_by_hand():
    np.testing.assert_allclose(dynamics.overlap(EARLY, LAST), [1, 0.5, 0])  # of K = 2
    found = dynamics.saturation(np.stack([EARLY, LAST])[:, None], np.array([0, 0, 1]))
    np.testing.assert_allclose(found.value, [[0.5], [1]])  # (1 + 0.5 + 0) / 3
    np.testing.assert_allclose([found.low[0, 0], found.high[0, 0]], [0, 0.75])  # unit 1 alone, unit 0 alone
    assert np.isnan(dynamics.overlap(EARLY, selection(["", "01", "01"]))[0])


def test_saturation_chance():
    # loads 2 2 1 1 and 2 1 2 1 of 3 tokens: (4 + 2 + 2 + 1) / 9 / 2
    assert dynamics.saturation_chance(EARLY, LAST) == pytest.approx(0.5)
    rng = np.random.default_rng(0)
    a, b = (np.argsort(rng.random((5000, 8)) + np.linspace(0, 0.5, 8), axis=1) < 2 for _ in range(2))
    chance = dynamics.saturation_chance(a, b)
    assert chance > 2 / 8 + 0.02  # equal loads alone are more than K / E
    assert dynamics.overlap(a, b).mean() == pytest.approx(chance, abs=0.01)
    assert dynamics.beyond_chance(0.75, 0.5) == 0.5 and dynamics.beyond_chance(1.0, 0.5) == 1


def test_churn_by_hand():
    # the same; one of three; nothing in common
    np.testing.assert_allclose(dynamics.churn(EARLY, LAST), [0, 1 - 1 / 3, 1])
    assert np.isnan(dynamics.churn(selection([""]), selection([""]))).all()
    rng = np.random.default_rng(0)
    a, b = (np.argsort(rng.random((20_000, 16)), axis=1) < 4 for _ in range(2))
    assert dynamics.churn(a, b).mean() == pytest.approx(1 - 0.25 / 1.75, abs=0.02)  # K / E = 1/4


def test_weighted_churn_by_hand():
    gate_NE, later_NE = np.array([[0.75, 0.25], [1, 0]]), np.array([[0.5, 0.5], [1, 0]])
    # least: 0.5 + 0.25 + 1; most: 0.75 + 0.5 + 1
    assert dynamics.weighted_churn(gate_NE, later_NE) == pytest.approx(1 - 1.75 / 2.25)
    assert dynamics.weighted_churn(gate_NE, gate_NE) == 0
