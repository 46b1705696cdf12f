"""The capacity executor: who is dropped, whether that depends on the future, and what is computed for the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugalmoe.experts import ORDERS, execute_here
from frugalmoe.experts.executors import capacity
from frugalmoe.laws.executors import run_dense
from frugalmoe.routing.contract import TokenPlan
from frugalmoe.schema import MoE

NULL = 2  # the null expert of two experts

# One sequence of four tokens, two experts, two choices. capacity_factor 0.5: C = ceil(0.5 * 4 * 2 / 2) = 2 slots.
EXPERT = [[0, 1], [0, 1], [1, 0], [0, NULL]]
WEIGHT = [[0.3, 0.1], [0.9, 0.8], [0.5, 0.4], [0.7, 0.0]]
# Queue of expert 0 in token order: t0, t1, t2, t3; by choice: t0, t1, t3, then t2; by weight: t1, t3, t2, t0.
# Queue of expert 1 in token order: t0, t1, t2;     by choice: t2 (first choice), t0, t1;     by weight: t1, t2, t0.
KEPT = {
    "token": [[0, 1], [0, 1], [NULL, NULL], [NULL, NULL]],
    "choice": [[0, 1], [0, NULL], [1, NULL], [NULL, NULL]],
    "weight": [[NULL, NULL], [0, 1], [1, NULL], [0, NULL]],
}


def config(order="token", factor=0.5, num_experts=2, k=2):
    return MoE(
        num_experts=num_experts,
        num_experts_per_token=k,
        executor="capacity",
        capacity_factor=factor,
        drop_order=order,
    )


def plan_of(expert, weight):
    return TokenPlan(jnp.array(expert, jnp.int32), jnp.array(weight, jnp.float32))


def random_plan(seed, tokens, num_experts, k):
    rng = np.random.default_rng(seed)
    expert = rng.permuted(np.tile(np.arange(num_experts), (tokens, 1)), axis=1)[:, :k]
    return plan_of(expert, rng.uniform(0.1, 1, (tokens, k)))


def test_every_order_is_in_the_hand_computed_table():
    assert set(KEPT) == set(ORDERS)


@pytest.mark.parametrize("order", ORDERS)
def test_drop_order_by_hand(order):
    plan, dropped = capacity.limit(plan_of(EXPERT, WEIGHT), config(order), num_sequences=1)
    np.testing.assert_array_equal(plan.expert_NK, KEPT[order])
    kept = np.array(KEPT[order]) != NULL
    np.testing.assert_array_equal(plan.weight_NK, np.where(kept, np.float32(WEIGHT), 0))
    assert dropped == 7 - kept.sum()  # seven of the eight slots were routed


@pytest.mark.parametrize("order", ORDERS)
def test_sequences_have_queues_of_their_own(order):
    two = plan_of(EXPERT + EXPERT[::-1], WEIGHT + WEIGHT[::-1])
    both, dropped = capacity.limit(two, config(order), num_sequences=2)
    first, first_dropped = capacity.limit(plan_of(EXPERT, WEIGHT), config(order), 1)
    second, second_dropped = capacity.limit(plan_of(EXPERT[::-1], WEIGHT[::-1]), config(order), 1)
    np.testing.assert_array_equal(both.expert_NK, np.concatenate([first.expert_NK, second.expert_NK]))
    assert dropped == first_dropped + second_dropped


@pytest.mark.parametrize("order", ORDERS)
def test_causality_is_as_declared(order):
    """Replace the later half of a sequence 20 times: does the fate of the earlier half change?"""
    tokens, num_experts, k = 32, 4, 2
    settings = config(order, factor=0.6, num_experts=num_experts, k=k)
    limit = jax.jit(lambda plan: capacity.limit(plan, settings, 1)[0].expert_NK[: tokens // 2])
    base = random_plan(0, tokens, num_experts, k)
    changes = 0
    for seed in range(1, 21):
        other = random_plan(seed, tokens, num_experts, k)
        mixed = TokenPlan(*(jnp.concatenate([a[: tokens // 2], b[tokens // 2 :]]) for a, b in zip(base, other)))
        changes += int(jnp.any(limit(mixed) != limit(base)))
    assert (changes == 0) == (ORDERS[order] == "safe"), changes


@pytest.mark.parametrize("order", ORDERS)
def test_no_queue_exceeds_its_capacity_and_counts_add_up(order):
    tokens, num_experts, k, sequences = 60, 5, 3, 2
    plan = random_plan(3, tokens, num_experts, k)
    kept, dropped = capacity.limit(plan, config(order, 0.75, num_experts, k), sequences)
    counts = [np.bincount(half.ravel(), minlength=6)[:5] for half in np.split(np.asarray(kept.expert_NK), sequences)]
    assert np.max(counts) == 14  # ceil(0.75 * 30 tokens * 3 / 5) = ceil(13.5)
    assert np.sum(counts) + dropped == tokens * k


@pytest.mark.parametrize("order", ORDERS)
def test_executes_the_limited_plan(order):
    """Value and gradients are the oracle's on what is left, and a dropped slot's weight has no gradient."""
    tokens, num_experts, k, dim, hidden = 48, 4, 2, 16, 8
    plan, settings = random_plan(5, tokens, num_experts, k), config(order, 0.7, num_experts, k)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, dim))
    gate_up = jax.random.normal(keys[1], (num_experts, dim, 2, hidden)) * dim**-0.5
    down = jax.random.normal(keys[2], (num_experts, hidden, dim)) * hidden**-0.5

    def by_capacity(weight, *arrays):
        y, dropped = execute_here(plan._replace(weight_NK=weight), *arrays, settings, 2)
        return jnp.sum(jnp.sin(y)), dropped

    def by_oracle(weight, *arrays):
        left, dropped = capacity.limit(plan._replace(weight_NK=weight), settings, 2)
        return jnp.sum(jnp.sin(run_dense(left, *arrays))), dropped

    args = (plan.weight_NK, x, gate_up, down)
    (value, dropped), got = jax.jit(jax.value_and_grad(by_capacity, (0, 1, 2, 3), has_aux=True))(*args)
    (oracle, expected_dropped), expected = jax.jit(jax.value_and_grad(by_oracle, (0, 1, 2, 3), has_aux=True))(*args)
    assert dropped == expected_dropped > 0
    for a, b in zip((value, *got), (oracle, *expected)):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
    gone = capacity.limit(plan, settings, 2)[0].expert_NK == num_experts
    assert np.all(np.asarray(got[0])[gone] == 0)
