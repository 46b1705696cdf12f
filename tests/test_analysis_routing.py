"""Measures of routing against cases computed by hand; the arithmetic is beside each number."""

import numpy as np
import pytest

from frugalmoe.analysis import routing

LN2 = np.log(2)


def selection(rows):
    """['01', '12', ...] -> bool [N, 4]: the experts of each token."""
    return np.array([[str(e) in row for e in range(4)] for row in rows])


# counts -> max violation, entropy, gini
BALANCE = [
    ([5, 5, 5, 5], 0, 2 * LN2, 0),  # uniform: H = ln 4
    ([20, 0, 0, 0], 3, 0, 0.75),  # collapse: max / mean - 1 = 20 / 5 - 1; gini = 6 pairs' 2 * 3 * 20 / (2 * 4 * 20)
    # p = 1/2 1/4 1/4 0: H = LN2 / 2 + 2 (2 LN2) / 4 = 1.5 LN2; |differences| over ordered pairs:
    # 2 (2 + 2 + 4 + 0 + 2 + 2) = 24; 24 / (2 * 4 * 8) = 0.375
    ([4, 2, 2, 0], 1, 1.5 * LN2, 0.375),
]


@pytest.mark.parametrize("counts, violation, entropy, gini", BALANCE)
def test_balance(counts, violation, entropy, gini):
    counts_E = np.array(counts)
    assert routing.max_violation(counts_E) == pytest.approx(violation)
    assert routing.entropy(counts_E) == pytest.approx(entropy)
    assert routing.effective_experts(counts_E) == pytest.approx(np.exp(entropy))
    assert routing.gini(counts_E) == pytest.approx(gini)
    stacked_LE = np.stack([counts_E, counts_E[::-1]])
    for measure in (routing.max_violation, routing.entropy, routing.effective_experts, routing.gini):
        np.testing.assert_allclose(measure(stacked_LE), measure(counts_E))  # leading axes stay, order does not matter


@pytest.mark.parametrize("experts, k, tokens", [(8, 2, 4096), (32, 4, 4096), (64, 8, 2048)])
def test_violation_floor_is_what_a_uniform_router_shows(experts, k, tokens):
    rng = np.random.default_rng(0)
    shown = []
    for _ in range(40):
        chosen_NK = np.argpartition(rng.random((tokens, experts)), k, axis=1)[:, :k]
        shown.append(routing.max_violation(np.bincount(chosen_NK.ravel(), minlength=experts)))
    floor = routing.violation_floor(experts, k * tokens)
    assert 0.75 * floor < np.mean(shown) < 1.25 * floor


UNIT_N = np.array([0, 0, 2, 2, 1])  # out of order on purpose
DOMAIN_N = np.array([0, 0, 1, 1, 0])
SELECTED_NE = selection(["01", "02", "23", "23", "03"])


def test_units_and_domain_shares():
    units = routing.group_units(SELECTED_NE[None], DOMAIN_N, UNIT_N)
    assert units.tokens_U.tolist() == [2, 1, 2] and units.domain_U.tolist() == [0, 0, 1]
    assert units.routed_LUE[0].tolist() == [[2, 1, 1, 0], [1, 0, 0, 1], [0, 0, 2, 2]]
    # domain 0 has 3 tokens: expert 0 got all 3, experts 1, 2, 3 one each; domain 1 has 2: experts 2 and 3 got both
    np.testing.assert_allclose(routing.domain_shares(units, 2)[0], [[1, 1 / 3, 1 / 3, 1 / 3], [0, 0, 1, 1]])
    np.testing.assert_allclose(routing.excess(routing.domain_shares(units, 2))[0, 0], [0.5, 1 / 6, -1 / 3, -1 / 3])
    with pytest.raises(ValueError, match="two domains"):
        routing.group_units(SELECTED_NE[None], DOMAIN_N, np.zeros(5, int))


def test_a_domain_without_tokens_has_no_share():
    units = routing.group_units(SELECTED_NE[None], DOMAIN_N, UNIT_N)
    share_GE = routing.domain_shares(units, 3)[0]
    assert np.isnan(share_GE[2]).all() and np.isfinite(share_GE[:2]).all()


def test_mutual_information():
    # independent rows: 0
    assert routing.mutual_information(np.array([[2, 4], [3, 6]])) == pytest.approx(0)
    # each domain has its own expert: H(domain) = ln 2
    assert routing.mutual_information(np.array([[7, 0], [0, 7]])) == pytest.approx(LN2)
    # joint 1/2 0 / 1/4 1/4: H(X) = LN2; H(E) of (3/4, 1/4) = 2 LN2 - 3/4 ln 3; H(X, E) = 1.5 LN2
    expected = LN2 + (2 * LN2 - 0.75 * np.log(3)) - 1.5 * LN2
    assert routing.mutual_information(np.array([[2, 0], [1, 1]])) == pytest.approx(expected)


def test_miller_madow():
    # 2 rows, 2 columns, 3 occupied cells, n = 4: (2 + 2 - 3 - 1) / 8 = 0
    assert routing.miller_madow(np.array([[2, 0], [1, 1]])) == 0
    # all 4 cells, n = 8: (2 + 2 - 4 - 1) / 16
    assert routing.miller_madow(np.full((2, 2), 2)) == pytest.approx(-1 / 16)
    rng = np.random.default_rng(0)
    tables = [rng.multinomial(500, np.full(60, 1 / 60)).reshape(6, 10) for _ in range(200)]
    raw = np.mean([routing.mutual_information(t) for t in tables])
    corrected = np.mean([routing.mutual_information(t) + routing.miller_madow(t) for t in tables])
    assert raw > 0.03 and abs(corrected) < 0.1 * raw  # truth: 0; bias of the raw value: 5 * 9 / 1000 = 0.045


def noise_units(rng, rows=30, experts=8, drift=0.0):
    """Rows of 100 tokens over 3 domains; with drift, each row prefers experts of its own that no domain shares."""
    logits_UE = drift * rng.standard_normal((rows, experts))
    p_UE = np.exp(logits_UE) / np.exp(logits_UE).sum(1, keepdims=True)
    routed_UE = np.stack([rng.multinomial(200, p_E) for p_E in p_UE])
    return routing.Units(routed_UE[None], np.full(rows, 100), np.arange(rows) % 3)


def test_rows_that_differ_from_each_other_do_not_pass_for_domains():
    """With topics per row and none per domain p must be uniform: at most 10 of 60 below 0.05 (99.99% of binomials)."""
    rng = np.random.default_rng(0)
    found = [routing.specialise(noise_units(rng, drift=0.5), 3, shuffles=99) for _ in range(60)]
    assert np.sum([f.p_L[0] <= 0.05 for f in found]) <= 10
    assert np.sum([f.p_top <= 0.05 for f in found]) <= 10


def test_a_planted_domain_expert_is_found():
    rng = np.random.default_rng(1)
    units = noise_units(rng, drift=0.5)
    units.routed_LUE[0, units.domain_U == 2, 5] += 60  # of 100 tokens
    found = routing.specialise(units, 3, shuffles=199)
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
    assert routing.specialise(units, 3, shuffles=199).p_top > 0.05


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """Bootstrap over 10 rows is a little narrow: of 100 intervals at 95%, between 82 and 100 hold the true 0.25."""
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(100):
        low, high = routing.share_interval(noise_units(rng), 3, samples=200)
        hits += low[0, 0, 0] <= 0.25 <= high[0, 0, 0]  # 200 slots, 8 experts, 100 tokens: 25 per row
    assert 82 <= hits <= 100


def test_one_row_has_no_interval():
    low, high = routing.share_interval(noise_units(np.random.default_rng(0), rows=5), 3)  # domains of 2, 2 and 1 rows
    assert np.isfinite(low[0, :2]).all() and np.isnan(low[0, 2]).all() and np.isnan(high[0, 2]).all()


def test_typical_tokens_by_hand():
    # 20 of id 0, 20 of id 1; expert 0 got 18 of id 0 and 2 of id 1: half of all tokens
    ids_N = np.array([0] * 20 + [1] * 20)
    selected_NE = selection(["0"] * 18 + ["1"] * 20 + ["0"] * 2)
    (token,) = routing.typical_tokens(selected_NE, ids_N, 0)
    assert token[:3] == (0, 18, 20)
    assert token.log_odds == pytest.approx(np.log(23 / 7))  # (18 + 10 / 2) / (2 + 10 / 2), at odds of 1 for chance


def test_rare_tokens_and_chance_are_not_typical():
    rng = np.random.default_rng(0)
    ids_N = np.concatenate([rng.integers(0, 20, 2000), [77] * 5, [88] * 15])
    selected_NE = np.zeros((ids_N.size, 2), bool)
    selected_NE[np.arange(ids_N.size), rng.integers(0, 2, ids_N.size)] = True
    selected_NE[ids_N > 70] = [True, False]
    # 22 ids, 2 experts: the tail must be below 0.01 / 44 = 2.3e-4; 2^-5 = 0.03 is not, 2^-15 = 3e-5 is
    assert [t.token_id for t in routing.typical_tokens(selected_NE, ids_N, 0)] == [88]
    assert routing.typical_tokens(np.ones_like(selected_NE), ids_N, 0) == []
    assert routing.typical_tokens(np.zeros_like(selected_NE), ids_N, 0) == []


def test_hash_likeness():
    rng = np.random.default_rng(0)
    ids_N = rng.integers(0, 40, 8000)
    table_VE = np.argsort(rng.random((40, 4)), axis=1) < 2
    assert routing.hash_likeness(table_VE[ids_N], ids_N) == pytest.approx(1, abs=0.02)
    at_random_NE = np.argsort(rng.random((8000, 4)), axis=1) < 2
    assert routing.hash_likeness(at_random_NE, ids_N) == pytest.approx(0, abs=0.01)
    assert np.isnan(routing.hash_likeness(np.ones((8, 4), bool), ids_N[:8]))


def test_co_activation_by_hand():
    # expert 0 is chosen 3 times: with 1 twice, with 2 once; slots: 3 2 2 1 of 8
    observed_EE, expected_EE = routing.co_activation(selection(["01", "01", "02", "23"]))
    np.testing.assert_allclose(observed_EE[0], [np.nan, 2 / 3, 1 / 3, 0])
    np.testing.assert_allclose(observed_EE[3], [0, 0, 1, np.nan])
    # K = 2: expected_01 = (2 - 1) (2 / 8) / (1 - 3 / 8) = 2 / 5
    np.testing.assert_allclose(expected_EE[0], [np.nan, 2 / 5, 2 / 5, 1 / 5])


def test_independent_choices_have_no_preferred_pairs():
    rng = np.random.default_rng(0)
    observed_EE, expected_EE = routing.co_activation(np.argsort(rng.random((40_000, 6)), axis=1) < 2)
    np.testing.assert_allclose(expected_EE[~np.eye(6, dtype=bool)], 1 / 5, rtol=0.05)  # (K - 1) / (E - 1)
    off = ~np.eye(6, dtype=bool)
    np.testing.assert_allclose(observed_EE[off], expected_EE[off], rtol=0.06)
