"""Gradients, swaps, drops and the leak meter against cases computed by hand. Letters as in their modules."""

import jax.numpy as jnp
import numpy as np
import pytest

from frugalmoe.analysis import drops, gradients, leak, swaps
from frugalmoe.experts.executors import capacity
from frugalmoe.routing.contract import TokenPlan
from frugalmoe.schema import MoE

ONE_EACH = np.arange(2)  # units


def test_shares_of_the_router_by_hand():
    # squared norms of two batches: language 9 + 7 = 4^2 and 0, auxiliary 1 + 3 = 2^2 and 0
    language_SL, auxiliary_SL = np.array([[9.0, 0], [7, 0]]), np.array([[1.0, 0], [3, 0]])
    found = gradients.language_share(language_SL, auxiliary_SL)
    np.testing.assert_allclose(found.value, [4 / (4 + 2), np.nan])
    # resamples are both, the first twice: 3 / (3 + 1), or the second twice: sqrt 14 / (sqrt 14 + sqrt 6)
    assert found.low[0] == pytest.approx(14**0.5 / (14**0.5 + 6**0.5)) and found.high[0] == pytest.approx(3 / 4)
    assert gradients.language_share(language_SL[:, :1], 0 * auxiliary_SL[:, :1]).value == [1]
    cosine = gradients.agreement(language_SL, auxiliary_SL, np.array([[-3.0, 0], [-1, 0]]))
    np.testing.assert_allclose(cosine.value, [-4 / (4 * 2), np.nan])


def test_unrelated_gradients_agree_as_chance_says():
    rng = np.random.default_rng(0)
    a_RSP, b_RSP = rng.standard_normal((2, 400, 4, 25))
    dot = lambda a, b: np.sum(a * b, axis=-1).T  # [S, R]: every draw is a layer
    found = gradients._cosine(*(x.sum(0) for x in (dot(a_RSP, a_RSP), dot(b_RSP, b_RSP), dot(a_RSP, b_RSP))))
    assert found.std() == pytest.approx(1 / (25 * 4) ** 0.5, rel=0.1) and abs(found.mean()) < 0.02  # 0.1 / sqrt(400)


def test_shares_of_experts_by_hand():
    expert_SLE = np.array([[[1.0, 0, 4]], [[0, 0, 12]]])  # norms 1, 0 and 4
    found = gradients.expert_share(expert_SLE)
    np.testing.assert_allclose(found.value, [[1 / 5, 0, 4 / 5]])
    np.testing.assert_allclose(found.high[0, 0], 1 / 3)  # the first batch twice: sqrt 2 and sqrt 8


def test_the_gap_by_hand():
    found = leak.gap(np.array([2.0, 3, 4, np.nan]), np.array([1.0, 3, 2, np.nan]), np.array([0, 0, 1, 1]))
    assert found.value == pytest.approx(1) and found.low == pytest.approx(0.5) and found.high == pytest.approx(2)


def test_gain_of_swaps_by_hand():
    nan = np.nan
    loss_N = np.array([3.0, 1.0])
    swapped_KEN = np.array(
        [
            [[nan, nan], [2.0, 4.0], [4.0, 7.0]],  # slot 0 holds expert 0
            [[nan, nan], [1.0, nan], [5.0, nan]],  # the second token has one slot
        ]
    )
    found = swaps.swap_gain(loss_N, swapped_KEN, ONE_EACH)
    assert found.gain.value == pytest.approx((2 + 0) / 2)  # 3 -> 1 by slot 1; nothing is better than 1
    np.testing.assert_allclose(found.slot_K.value, [(1 + 0) / 2, (2 + 0) / 2])
    # candidates 3, 2, 4: mean 3, best 2; 1, 4, 7: 4 and 1; slot 1: 3, 1, 5: 3 and 1; 1 alone: 1 and 1
    np.testing.assert_allclose(found.chance_K.value, [(1 + 3) / 2, (2 + 0) / 2])
    np.testing.assert_allclose(found.better_K.value, [(1 / 2 + 0) / 2, 1 / 2])
    assert found.gain.low == 0 and found.gain.high == 2


def test_a_router_that_draws_has_the_gain_of_chance():
    loss_MN = np.random.default_rng(0).random((6, 4000))
    found = swaps.swap_gain(loss_MN[0], loss_MN[None, 1:], np.arange(4000))
    # of 6 uniform numbers the smallest is 1 / 7 on average: 1 / 2 - 1 / 7
    assert found.slot_K.value == pytest.approx(5 / 14, abs=0.015)
    assert found.chance_K.value == pytest.approx(5 / 14, abs=0.015)
    assert found.better_K.value == pytest.approx(1 / 2, abs=0.015)


def test_drops_by_hand():
    # one sequence of 4 tokens, 2 experts with ceil(0.5 * 4 * 2 / 2) = 2 slots; the last token has one choice
    expert_NK = jnp.array([[0, 1], [0, 2], [0, 1], [1, 0]])
    moe = MoE(num_experts=2, num_experts_per_token=2, capacity_factor=0.5, expert_dim=1)
    plan = TokenPlan(expert_NK, jnp.ones((4, 2)))
    kept, dropped = capacity.limit(plan, moe, 1)
    lost_NK = drops._lost(np.asarray(expert_NK), np.asarray(kept.expert_NK), moe)
    # expert 0: tokens 0 and 1 keep it, 2 and 3 lose it; expert 1: 0 and 2 keep it, 3 loses it
    np.testing.assert_array_equal(lost_NK, [[0, 0], [0, np.nan], [1, 0], [1, 1]])
    assert dropped == 3 == np.nansum(lost_NK)
    lost_LNK, unit_N = lost_NK[None], np.zeros(4, int)
    np.testing.assert_allclose(drops.by_rank(lost_LNK, unit_N).value, [[2 / 4, 1 / 3]])
    np.testing.assert_allclose(drops.by_place(lost_LNK, np.arange(4), unit_N).value, [[0, 0, 1 / 2, 1]])
    np.testing.assert_allclose(drops.by_place(lost_LNK, np.array([0, 0, 2, 2]), unit_N).value, [[0, np.nan, 3 / 4]])
    np.testing.assert_allclose(drops.whole_tokens(lost_LNK, unit_N).value, [1 / 4])


def test_who_comes_last_in_the_queue_is_dropped():
    """Sequences of tokens that all want experts 0 and 1: by token late places lose, by choice late choices."""
    tokens, sequences = 8, 3
    plan = TokenPlan(jnp.tile(jnp.array([[0, 1], [1, 0]]), (tokens * sequences // 2, 1)), jnp.ones((24, 2)))
    lost = {}
    for order in ("token", "choice"):
        moe = MoE(num_experts=4, num_experts_per_token=2, capacity_factor=1.0, drop_order=order, expert_dim=1)
        kept, _ = capacity.limit(plan, moe, sequences)
        lost[order] = drops._lost(np.asarray(plan.expert_NK), np.asarray(kept.expert_NK), moe)[None]
    place_N, sequence_N = np.tile(np.arange(tokens), sequences), np.repeat(np.arange(sequences), tokens)
    # 4 slots for the 8 who want an expert: the first 4 tokens, or each one's first choice
    by_token, by_choice = (drops.by_rank(lost[order], sequence_N).value for order in ("token", "choice"))
    np.testing.assert_allclose(by_token, [[0.5, 0.5]])
    np.testing.assert_allclose(by_choice, [[0, 1]])
    by_token, by_choice = (drops.by_place(lost[order], place_N, sequence_N).value for order in ("token", "choice"))
    np.testing.assert_allclose(by_token, [[0, 0, 0, 0, 1, 1, 1, 1]])
    np.testing.assert_allclose(by_choice, [[0.5] * 8])
    assert drops.whole_tokens(lost["token"], sequence_N).value == 0.5
    assert drops.whole_tokens(lost["choice"], sequence_N).value == 0
