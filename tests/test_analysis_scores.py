"""Measures of a router's numbers, and of experts' likeness, against cases computed by hand."""

import itertools

import numpy as np
import pytest

from frugalmoe.analysis import scores, similarity

LN2 = np.log(2)
PROBS_NE = np.array([[0.5, 0.25, 0.25, 0], [0.25, 0.25, 0.25, 0.25]])


def test_certainty_by_hand():
    np.testing.assert_allclose(scores.router_entropy(PROBS_NE), [1.5 * LN2, 2 * LN2])  # LN2 / 2 + 2 (2 LN2) / 4
    np.testing.assert_allclose(scores.margin(PROBS_NE, 1), [0.25, 0])
    np.testing.assert_allclose(scores.margin(PROBS_NE, 3), [0.25, 0])
    np.testing.assert_allclose(scores.top_ratio(PROBS_NE), [2, 1])
    selected_NE = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool)
    np.testing.assert_allclose(scores.mass_captured(PROBS_NE, selected_NE), [0.75, 0.5])  # K / E for the undecided one
    np.testing.assert_allclose(scores.weight_effective(np.array([[2.0, 2], [1, 0], [0, 0]])), [2, 1, np.nan])


def test_logit_scale_by_hand():
    found = scores.logit_scale(np.array([[0.0, 0], [-3, -3]]))
    # lse = ln 2 and ln 2 - 3; rms = sqrt((0 + 0 + 9 + 9) / 4)
    assert found["max_abs"] == 3 and found["rms"] == pytest.approx(4.5**0.5)
    assert found["mean_lse_sq"] == pytest.approx((LN2**2 + (LN2 - 3) ** 2) / 2)


def test_bias_by_hand():
    scores_NE = np.array([[0.9, 0.8, 0.1], [0.9, 0.2, 0.1]])
    assert scores.override_rate(scores_NE, np.array([0, -0.75, 0]), 2).tolist() == [1, 1]  # 0.05 and -0.55 below 0.1
    assert scores.override_rate(scores_NE, np.array([0, -0.15, 0]), 2).tolist() == [0, 1]  # 0.65 stays, 0.05 does not
    assert scores.override_rate(scores_NE, np.array([0.3, 0.3, 0.3]), 2).tolist() == [0, 0]
    assert scores.bias_spread(np.array([-1, 0, 1, 4])) == {"mean": 1, "std": pytest.approx(3.5**0.5), "range": 5}


def test_optimality_by_hand():
    # both want expert 0; balance allows one token each: the best is 3 + 1 (or 2 + 1): 4; greedy has 3 + 2
    scores_NE = np.array([[3.0, 1.0], [2.0, 1.0]])
    assert scores.optimality(scores_NE, np.array([[1, 0], [1, 0]], bool)) == pytest.approx(5 / 4)
    assert scores.optimality(scores_NE, np.array([[0, 1], [1, 0]], bool)) == pytest.approx(3 / 4)


def test_optimality_against_all_assignments():
    rng = np.random.default_rng(0)
    scores_NE = rng.random((3, 4))
    pairs = list(itertools.combinations(range(4), 2))
    best, chosen = 0, None
    for triple in itertools.product(pairs, repeat=3):
        selected_NE = np.array([[e in pair for e in range(4)] for pair in triple])
        if selected_NE.sum(0).max() <= 2 and (scores_NE * selected_NE).sum() > best:  # ceil(2 * 3 / 4)
            best, chosen = (scores_NE * selected_NE).sum(), selected_NE
    assert scores.optimality(scores_NE, chosen) == pytest.approx(1)


def test_router_rows():
    kernel_DE = np.array([[1.0, 2, 0], [0, 0, 3]])
    found_EE = similarity.router_similarity(kernel_DE)
    assert found_EE[0, 1] == pytest.approx(1) and found_EE[0, 2] == pytest.approx(0) and np.isnan(found_EE[1, 1])
    assert similarity.off_diagonal_mean(found_EE) == pytest.approx(1 / 3)  # of three pairs one is alike
    random_EE = similarity.router_similarity(np.random.default_rng(0).standard_normal((256, 40)))
    assert np.nanstd(random_EE) == pytest.approx(similarity.cosine_floor(256), rel=0.1)


def test_weights_do_not_depend_on_the_order_of_neurons():
    rng = np.random.default_rng(0)
    first_FD = rng.standard_normal((12, 64))
    found_EE = similarity.weight_similarity(np.stack([first_FD, 2 * rng.permutation(first_FD), first_FD * 0 + 1]))
    assert found_EE[0, 1] == pytest.approx(1) and found_EE[1, 0] == found_EE[0, 1]
    strangers = similarity.weight_similarity(rng.standard_normal((6, 12, 64)))
    floor = similarity.matched_floor(12, 64)
    assert floor > 0.1 and np.nanmean(strangers) == pytest.approx(floor, rel=0.1)


def test_linear_cka():
    # outputs x and 3x + 1: 1; x and y without correlation: 0. x = -1 1 -1 1, y = -1 -1 1 1
    x_N, y_N = np.array([-1.0, 1, -1, 1]), np.array([-1.0, -1, 1, 1])
    found_EE = similarity.linear_cka(np.stack([x_N, 3 * x_N + 1, y_N])[..., None])
    assert found_EE[0, 1] == pytest.approx(1) and found_EE[0, 2] == pytest.approx(0, abs=1e-12)
    # (x, y) against x alone: ||(x'x, y'x)||^2 = 16; / (||x'x|| ||diag(4, 4)||_F) = 16 / (4 * 4 sqrt 2)
    pair_ENO = np.stack([np.stack([x_N, y_N], 1), np.stack([x_N, 0 * x_N], 1)])
    assert similarity.linear_cka(pair_ENO)[0, 1] == pytest.approx(2**-0.5)


def test_linear_cka_of_strangers_is_its_floor():
    rng = np.random.default_rng(0)
    noise_ENO = rng.standard_normal((4, 100, 32))
    rotation_OO = np.linalg.qr(rng.standard_normal((32, 32)))[0]
    noise_ENO[1] = 5 * noise_ENO[0] @ rotation_OO
    found_EE, floor_EE = similarity.linear_cka(noise_ENO), similarity.cka_floor(noise_ENO)
    assert found_EE[0, 1] == pytest.approx(1)
    assert floor_EE[2, 3] > 0.15 and found_EE[2, 3] == pytest.approx(floor_EE[2, 3], abs=0.03)


def test_pairwise_output_similarity_by_hand():
    output_ENO = np.array([[[1.0, 0], [0, 2]], [[3, 0], [0, -1]], [[1, 1], [1, 1]]])
    found_EE = similarity.pairwise_output_similarity(output_ENO)
    assert found_EE[0, 1] == pytest.approx(0)  # (1 - 1) / 2
    assert found_EE[0, 2] == pytest.approx(2**-0.5) and np.isnan(found_EE[0, 0])


def test_alignment():
    output_ENO = np.array([[[3.0, 4], [0, 0]], [[0, 1], [0, 3]]])  # norms: token 0: 5 1; token 1: 0 3
    # less each expert's mean: 2.5 -1 / -2.5 1; p less its mean: 0.25 -0.25 / -0.25 0.25
    probs_NE = np.array([[0.75, 0.25], [0.25, 0.75]])
    # (2 * 2.5 + 2 * 1) * 0.25 / sqrt(4 * 0.0625 * (12.5 + 2)) = 1.75 / sqrt(3.625)
    assert similarity.alignment(probs_NE, output_ENO) == pytest.approx(1.75 / 3.625**0.5)
    rng = np.random.default_rng(0)
    assert abs(similarity.alignment(rng.random((400, 4)), rng.standard_normal((4, 400, 3)))) < 4 / 1600**0.5
