"""Words of experts against cases computed by hand and planted ones."""

import numpy as np
import pytest

from frugalmoe.analysis import vocabulary


def selection(rows):
    """['01', '12', ...] -> bool [N, 4]: the experts of each token."""
    return np.array([[str(e) in row for e in range(4)] for row in rows])


def test_typical_tokens_by_hand():
    # 20 of id 0, 20 of id 1; expert 0 got 18 of id 0 and 2 of id 1: half of all tokens
    ids_N = np.array([0] * 20 + [1] * 20)
    selected_NE = selection(["0"] * 18 + ["1"] * 20 + ["0"] * 2)
    (token,) = vocabulary.typical_tokens(selected_NE, ids_N, 0)
    assert token[:3] == (0, 18, 20)
    assert token.log_odds == pytest.approx(np.log(23 / 7))  # (18 + 10 / 2) / (2 + 10 / 2), at odds of 1 for chance


def test_rare_tokens_and_chance_are_not_typical():
    rng = np.random.default_rng(0)
    ids_N = np.concatenate([rng.integers(0, 20, 2000), [77] * 5, [88] * 15])
    selected_NE = np.zeros((ids_N.size, 2), bool)
    selected_NE[np.arange(ids_N.size), rng.integers(0, 2, ids_N.size)] = True
    selected_NE[ids_N > 70] = [True, False]
    # 22 ids, 2 experts: the tail must be below 0.01 / 44 = 2.3e-4; 2^-5 = 0.03 is not, 2^-15 = 3e-5 is
    assert [t.token_id for t in vocabulary.typical_tokens(selected_NE, ids_N, 0)] == [88]
    assert vocabulary.typical_tokens(np.ones_like(selected_NE), ids_N, 0) == []
    assert vocabulary.typical_tokens(np.zeros_like(selected_NE), ids_N, 0) == []


def test_hash_likeness():
    rng = np.random.default_rng(0)
    ids_N = rng.integers(0, 40, 8000)
    table_VE = np.argsort(rng.random((40, 4)), axis=1) < 2
    assert vocabulary.hash_likeness(table_VE[ids_N], ids_N) == pytest.approx(1, abs=0.02)
    at_random_NE = np.argsort(rng.random((8000, 4)), axis=1) < 2
    assert vocabulary.hash_likeness(at_random_NE, ids_N) == pytest.approx(0, abs=0.01)
    assert np.isnan(vocabulary.hash_likeness(np.ones((8, 4), bool), ids_N[:8]))


def test_vocabulary_shares_by_hand():
    ids_N = np.array([3, 3, 3, 3, 8, 8, 8, 5])
    selected_NE = selection(["01", "01", "02", "03", "23", "23", "12", "0"])
    found = vocabulary.vocabulary_shares(selected_NE, ids_N, least=3)
    assert found.ids_V.tolist() == [3, 8] and found.seen_V.tolist() == [4, 3]  # id 5 is too rare
    # id 3: expert 0 got 4 of 4, expert 1 two, 2 and 3 one each; id 8: expert 2 got all 3, expert 3 two, expert 1 one
    np.testing.assert_allclose(found.share_VE, [[1, 0.5, 0.25, 0.25], [0, 1 / 3, 1, 2 / 3]])
    assert vocabulary.vocabulary_specialisation(selected_NE, ids_N, least=3)[0] == pytest.approx(1)
    assert np.isnan(vocabulary.vocabulary_specialisation(selected_NE, ids_N, least=9)).all()


def test_vocabulary_of_noise_is_its_floor():
    """The favourite of 20 occurrences is far above K / E = 0.25 by chance; the shuffle says by how much."""
    rng = np.random.default_rng(0)
    ids_N = rng.integers(0, 100, 2000)
    shown, floor = vocabulary.vocabulary_specialisation(np.argsort(rng.random((2000, 8)), axis=1) < 2, ids_N)
    assert shown > 0.35 and shown == pytest.approx(floor, abs=0.02)


def test_predictability():
    rng = np.random.default_rng(0)
    ids_N, unit_N = rng.integers(0, 20, 4000), np.arange(4000) // 50
    table_VE = np.argsort(rng.random((20, 8)), axis=1) < 2
    hashed, chance = vocabulary.predictability(table_VE[ids_N], ids_N, unit_N)
    assert hashed.value == hashed.low == 1 and chance < 0.6
    noise, chance = vocabulary.predictability(np.argsort(rng.random((4000, 8)), axis=1) < 2, ids_N, unit_N)
    assert noise.low < 0.25 < noise.high and chance == pytest.approx(0.25, abs=0.02)  # K / E


def test_predictability_by_hand():
    # unit 0 counts id 0 with expert 1 and id 1 with expert 2; unit 1 counts id 0 with expert 1, id 2 with expert 3
    ids_N, unit_N = np.array([0, 1, 0, 2]), np.array([0, 0, 1, 1])
    found, _ = vocabulary.predictability(selection(["1", "2", "1", "3"]), ids_N, unit_N)
    # token 0 hits; token 1: id 1 is unknown to unit 1, whose commonest are 1 and 3 (the lower): no; token 2 hits; 3: no
    assert found.value == pytest.approx(0.5)


def test_token_classes():
    texts = [" The", "is", "42", " +=", "\n ", "x1", ""]
    assert vocabulary.token_classes(texts).tolist() == [0, 1, 2, 3, 4, 5, 5]
