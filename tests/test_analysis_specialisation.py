"""Domains of experts against cases computed by hand and planted ones."""

import numpy as np
import pytest

from frugalmoe.analysis import specialisation


def selection(rows):
    """['01', '12', ...] -> bool [N, 4]: the experts of each token."""
    return np.array([[str(e) in row for e in range(4)] for row in rows])


UNIT_N = np.array([0, 0, 2, 2, 1])  # out of order on purpose
DOMAIN_N = np.array([0, 0, 1, 1, 0])
SELECTED_NE = selection(["01", "02", "23", "23", "03"])


def test_units_and_domain_shares():
    units = specialisation.group_units(SELECTED_NE[None], DOMAIN_N, UNIT_N)
    assert units.tokens_U.tolist() == [2, 1, 2] and units.domain_U.tolist() == [0, 0, 1]
    assert units.routed_LUE[0].tolist() == [[2, 1, 1, 0], [1, 0, 0, 1], [0, 0, 2, 2]]
    # domain 0 has 3 tokens: expert 0 got all 3, experts 1, 2, 3 one each; domain 1 has 2: experts 2 and 3 got both
    np.testing.assert_allclose(specialisation.domain_shares(units, 2)[0], [[1, 1 / 3, 1 / 3, 1 / 3], [0, 0, 1, 1]])
    np.testing.assert_allclose(
        specialisation.excess(specialisation.domain_shares(units, 2))[0, 0], [0.5, 1 / 6, -1 / 3, -1 / 3]
    )
    with pytest.raises(ValueError, match="two domains"):
        specialisation.group_units(SELECTED_NE[None], DOMAIN_N, np.zeros(5, int))


def test_a_domain_without_tokens_has_no_share():
    units = specialisation.group_units(SELECTED_NE[None], DOMAIN_N, UNIT_N)
    share_GE = specialisation.domain_shares(units, 3)[0]
    assert np.isnan(share_GE[2]).all() and np.isfinite(share_GE[:2]).all()


def noise_units(rng, rows=30, experts=8, drift=0.0):
    """Rows of 100 tokens over 3 domains; with drift, each row prefers experts of its own that no domain shares."""
    logits_UE = drift * rng.standard_normal((rows, experts))
    p_UE = np.exp(logits_UE) / np.exp(logits_UE).sum(1, keepdims=True)
    routed_UE = np.stack([rng.multinomial(200, p_E) for p_E in p_UE])
    return specialisation.Units(routed_UE[None], np.full(rows, 100), np.arange(rows) % 3)


def test_rows_that_differ_from_each_other_do_not_pass_for_domains():
    """With topics per row and none per domain p must be uniform: at most 10 of 60 below 0.05 (99.99% of binomials)."""
    rng = np.random.default_rng(0)
    found = [specialisation.specialise(noise_units(rng, drift=0.5), 3, shuffles=99) for _ in range(60)]
    assert np.sum([f.p_L[0] <= 0.05 for f in found]) <= 10
    assert np.sum([f.p_top <= 0.05 for f in found]) <= 10


def test_a_planted_domain_expert_is_found():
    rng = np.random.default_rng(1)
    units = noise_units(rng, drift=0.5)
    units.routed_LUE[0, units.domain_U == 2, 5] += 60  # of 100 tokens
    found = specialisation.specialise(units, 3, shuffles=199)
    assert found.top == (0, 2, 5)
    assert found.p_top == found.p_L[0] == pytest.approx(1 / 200)
    assert found.low_LGE[found.top] < found.share_LGE[found.top] < found.high_LGE[found.top]
    assert found.information_L[0] > 2 * found.shuffled_L[0]
    assert found.units_G.tolist() == [10] * 3 and found.tokens_G.tolist() == [1000] * 3
    assert found.domain_entropy == pytest.approx(np.log(3))


def test_an_expert_that_is_busy_everywhere_is_not_specialised():
    rng = np.random.default_rng(2)
    units = noise_units(rng)
    units.routed_LUE[0, :, 4] += 70
    assert specialisation.specialise(units, 3, shuffles=199).p_top > 0.05


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """Bootstrap over 10 rows is a little narrow: of 100 intervals at 95%, between 82 and 100 hold the true 0.25."""
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(100):
        low, high = specialisation.share_interval(noise_units(rng), 3, samples=200)
        hits += low[0, 0, 0] <= 0.25 <= high[0, 0, 0]  # 200 slots, 8 experts, 100 tokens: 25 per row
    assert 82 <= hits <= 100


def test_one_row_has_no_interval():
    low, high = specialisation.share_interval(
        noise_units(np.random.default_rng(0), rows=5), 3
    )  # domains of 2, 2 and 1 rows
    assert np.isfinite(low[0, :2]).all() and np.isnan(low[0, 2]).all() and np.isnan(high[0, 2]).all()


def test_divergence_from_uniform():
    # slots 1/2 1/2 0 0 of 4 experts: ln 4 - ln 2; uniform: 0; one expert: ln 4
    share_GE = np.array([[1, 1, 0, 0], [0.5, 0.5, 0.5, 0.5], [0, 2, 0, 0]])
    np.testing.assert_allclose(specialisation.divergence(share_GE), [np.log(2), 0, np.log(4)], atol=1e-12)
    rng = np.random.default_rng(0)
    noise_RE = rng.multinomial(1000, np.full(16, 1 / 16), 400)
    assert specialisation.divergence(noise_RE).mean() == pytest.approx(15 / 2000, rel=0.1)  # (E - 1) / (2 n)
