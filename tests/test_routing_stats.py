"""Statistics of a layer and the metrics derived from them, against numbers worked out by hand.

Letters: B batch, T time, N tokens (B*T), E experts, K choices, L layers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugalmoe.laws.cases import make_case, make_inputs, route
from frugalmoe.routing import stats
from frugalmoe.routing.contract import ExpertPlan, TokenPlan


def test_load_counts_valid_tokens_of_both_forms_per_sequence() -> None:
    """Two sequences of 8 tokens; tokens 6 and 7 are padding, id 16 is the null token, id 2 the null expert."""
    inputs = make_inputs()
    expert_NK = np.full((16, 1), 2)
    expert_NK[[0, 1, 6, 9], 0] = [0, 1, 1, 1]
    token_major = TokenPlan(jnp.asarray(expert_NK), jnp.ones((16, 1)))
    expert_major = ExpertPlan(jnp.asarray([[0, 16, 16], [6, 1, 9]]), jnp.ones((2, 3)))
    for plan in (token_major, expert_major):
        np.testing.assert_array_equal(stats.load(plan, inputs, 2), [[1, 1], [0, 1]])


def test_sums_by_hand() -> None:
    inputs = make_inputs()  # 14 valid tokens
    probs_BTE = jnp.broadcast_to(jnp.asarray([0.5, 0.5, 0.0]), (2, 8, 3))
    logits_BTE = jnp.full((2, 8, 3), 2.0)
    tied_BT = jnp.arange(8) >= 5  # token 5 of both sequences, tokens 6 and 7 of the second: the first's are padding
    layer = stats.of_layer(
        jnp.asarray([[6, 0, 0], [4, 4, 0]]), inputs, logits_BTE=logits_BTE, probs_BTE=probs_BTE, tied_BT=tied_BT * ONES
    )
    lse = 2 + np.log(3)
    expected = {
        "counts": [10, 4, 0],
        "tokens": 14,
        "assigned": 14,
        "prob_sum": [7, 7, 0],
        "entropy_sum": 14 * np.log(2),
        "lse_sum": 14 * lse,
        "lse_sq_sum": 14 * lse**2,
        "ties": 4,
    }
    assert set(layer) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(layer[key], value, rtol=1e-6)


ONES = jnp.ones((2, 8), bool)


def test_metrics_by_hand_per_layer() -> None:
    """Two layers, 100 tokens of 2 experts each: one balanced, one collapsed with 50 slots dropped."""
    layers = {
        "counts": jnp.asarray([[50, 50, 50, 50], [100, 99, 1, 0]]),
        "tokens": jnp.asarray([100, 100]),
        "assigned": jnp.asarray([200, 200]),
        "dropped": jnp.asarray([0, 50]),
        "entropy_sum": jnp.asarray([100.0, 50.0]),
        "lse_sum": jnp.asarray([-20.0, 300.0]),
        "ties": jnp.asarray([0, 25]),
    }
    metrics = stats.metrics(layers)
    share = np.asarray([0.5, 0.495, 0.005])
    expected = {
        "max_violation": [0, 1],  # 50/50 - 1, 100/50 - 1
        "load_entropy": [np.log(4), -np.sum(share * np.log(share))],
        "dead_experts": [0, 1],  # below 1 % of 50 slots: 0 is, 1 is not
        "active_per_token": [2, 1.5],
        "drop_rate": [0, 0.25],
        "entropy": [1, 0.5],
        "logit_lse": [-0.2, 3],
        "tie_rate": [0, 0.25],
    }
    assert set(metrics) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5)


def test_metrics_of_nothing_are_finite() -> None:
    empty = {"counts": jnp.zeros(4, jnp.int32), "tokens": jnp.int32(0), "assigned": jnp.int32(0)}
    assert all(np.isfinite(value) for value in stats.metrics(empty).values())


@pytest.mark.parametrize("name", ["topk_softmax", "expert_choice", "expert_threshold"])
def test_stats_of_micro_batches_add_up(name: str) -> None:
    case = make_case(name)
    inputs = make_inputs()
    whole = route(case, inputs).stats
    rows = [route(case, inputs.of_sequences(lambda a, b=b: a[b : b + 1])).stats for b in (0, 1)]
    for key in whole:
        np.testing.assert_allclose(rows[0][key] + rows[1][key], whole[key], rtol=1e-5)


def test_counts_are_exact_where_bfloat16_is_not() -> None:
    """bfloat16 cannot tell 257 from 256; rounded counts flip bias updates (Megatron-LM PR 7081)."""
    inputs = make_inputs()._replace(token_ids_BT=jnp.ones((1, 513), int), segment_ids_BT=jnp.ones((1, 513), int))
    expert_NK = jnp.asarray([0] * 257 + [1] * 256)[:, None]
    load_BE = stats.load(TokenPlan(expert_NK, jnp.ones(expert_NK.shape, jnp.bfloat16)), inputs, 2)
    counts = stats.of_layer(load_BE, inputs)["counts"]
    assert counts.dtype == jnp.int32 and counts.tolist() == [257, 256]


def test_stats_carry_no_gradient() -> None:
    inputs = make_inputs()

    def value(logits_BTE: jax.Array) -> jax.Array:
        load_BE = jnp.ones((2, 4), jnp.int32)
        layer = stats.of_layer(load_BE, inputs, logits_BTE=logits_BTE, probs_BTE=jax.nn.softmax(logits_BTE))
        return layer["entropy_sum"] + layer["lse_sum"] + layer["prob_sum"].sum()

    assert np.all(jax.grad(value)(jnp.ones((2, 8, 4))) == 0)
