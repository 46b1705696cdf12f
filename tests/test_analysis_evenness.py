"""Measures of load against cases computed by hand; the arithmetic is beside each number."""

import numpy as np
import pytest

from frugalmoe.analysis import evenness, information

LN2 = np.log(2)


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
    assert evenness.max_violation(counts_E) == pytest.approx(violation)
    assert information.entropy(counts_E) == pytest.approx(entropy)
    assert evenness.effective_experts(counts_E) == pytest.approx(np.exp(entropy))
    assert evenness.gini(counts_E) == pytest.approx(gini)
    stacked_LE = np.stack([counts_E, counts_E[::-1]])
    for measure in (evenness.max_violation, information.entropy, evenness.effective_experts, evenness.gini):
        np.testing.assert_allclose(measure(stacked_LE), measure(counts_E))  # leading axes stay, order does not matter


@pytest.mark.parametrize("experts, k, tokens", [(8, 2, 4096), (32, 4, 4096), (64, 8, 2048)])
def test_violation_floor_is_what_a_uniform_router_shows(experts, k, tokens):
    rng = np.random.default_rng(0)
    shown = []
    for _ in range(40):
        chosen_NK = np.argpartition(rng.random((tokens, experts)), k, axis=1)[:, :k]
        shown.append(evenness.max_violation(np.bincount(chosen_NK.ravel(), minlength=experts)))
    floor = evenness.violation_floor(experts, k * tokens)
    assert 0.75 * floor < np.mean(shown) < 1.25 * floor


# counts -> min violation, min / max, CV, inverse Simpson, dead experts
UNEVEN = [
    ([5, 5, 5, 5], 0, 1, 0, 4, 0),
    ([20, 0, 0, 0], 1, 0, 3**0.5, 1, 3),  # CV^2 = E sum(p^2) - 1 = 4 - 1
    # mean 2; deviations 2 0 0 -2: std = sqrt(8 / 4), CV = sqrt(2) / 2; 8^2 / (16 + 4 + 4) = 64 / 24
    ([4, 2, 2, 0], 1, 0, 0.5**0.5, 64 / 24, 1),
    ([6, 4, 4, 2], 0.5, 1 / 3, 2**0.5 / 4, 256 / 72, 0),
]


@pytest.mark.parametrize("counts, lack, ratio, cv, simpson, dead", UNEVEN)
def test_unevenness(counts, lack, ratio, cv, simpson, dead):
    counts_E = np.array(counts)
    assert evenness.min_violation(counts_E) == pytest.approx(lack)
    assert evenness.min_max_ratio(counts_E) == pytest.approx(ratio)
    assert evenness.variation(counts_E) == pytest.approx(cv)
    assert evenness.inverse_simpson(counts_E) == pytest.approx(simpson)
    assert evenness.inverse_simpson(counts_E) == pytest.approx(4 / (1 + cv**2))
    assert evenness.dead_experts(counts_E) == dead


def uniform_counts(rng, experts, k, tokens):
    return np.bincount(np.argpartition(rng.random((tokens, experts)), k, axis=1)[:, :k].ravel(), minlength=experts)


def test_sampling_floors():
    """A uniform router shows the floors: CV sqrt((E - K) / (K N)), Gini CV / sqrt(pi), E (E - 1) / (2 n) off E."""
    rng = np.random.default_rng(0)
    counts_RE = np.stack([uniform_counts(rng, 16, 2, 1000) for _ in range(300)])
    floor = evenness.variation_floor(16, 2, 1000)
    assert floor == pytest.approx((14 / 2000) ** 0.5)
    assert np.sqrt(np.mean(evenness.variation(counts_RE) ** 2)) == pytest.approx(floor, rel=0.05)
    assert evenness.gini(counts_RE).mean() == pytest.approx(floor / np.pi**0.5, rel=0.05)
    multinomial_RE = rng.multinomial(2000, np.full(16, 1 / 16), 300)
    assert 16 - evenness.effective_experts(multinomial_RE).mean() == pytest.approx(16 * 15 / 4000, rel=0.05)


def test_devices():
    # experts 0 1 | 2 3: loads 3 and 9, mean 6, of 6 tokens with K = 2
    counts_M = evenness.by_device(np.array([1, 2, 4, 5]), 2)
    assert counts_M.tolist() == [3, 9]
    assert evenness.max_violation(counts_M) == pytest.approx(0.5)
    assert evenness.straggler_slowdown(counts_M) == pytest.approx(1.5)
    assert evenness.imbalance_score(counts_M, 6) == pytest.approx(1)
    # 12 rows filled of 4 experts with 5 slots each
    assert evenness.padding_waste(np.array([1, 2, 4, 5]), 5) == pytest.approx(1 - 12 / 20)


def test_sequences_and_fan_out():
    selected_NE = np.array([[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]], bool)
    # sequence 0: counts 2 1 0 1, mean 1: 2 / 1 - 1; sequence 2: 0 0 1 1, mean 1/2: 1; sequence 1 is empty
    np.testing.assert_allclose(evenness.sequence_violation(selected_NE, np.array([0, 0, 2, 2])), [1, 1])
    assert evenness.fan_out(selected_NE).tolist() == [2, 2, 2, 0]


def test_idle_steps():
    # the last step gave expert 1 a token, the one before expert 0, none ever expert 2
    assert evenness.idle_steps(np.array([[4, 0, 0], [1, 0, 0], [0, 2, 0]])).tolist() == [1, 0, 3]
