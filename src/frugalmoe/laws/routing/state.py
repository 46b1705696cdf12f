"""Laws of what outlives a layer: the state, over updates and replicas, and the carry, over layers.

Letters: B batch, T time, D model.
"""

import jax
import jax.numpy as jnp
import numpy as np

from frugalmoe.errors import UserError
from frugalmoe.laws.cases import B, Case, D, T, assert_same, make_inputs, make_params, route


def law_state(case: Case) -> None:
    """State is float32 and moves only if declared; the update is a function of the summed stats alone."""
    state = case.router.init_state(D, case.config)
    routing = route(case, make_inputs(), state=state)
    moved = case.router.update(state, routing.stats, case.config)
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((state, moved)))
    changed = any(np.any(a != b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(moved), strict=True))
    assert changed == case.router.about.stateful, "state moves" if changed else "claims a state, and none moves"


def law_merge(case: Case) -> None:
    """States of replicas merge into one: equal ones into themselves, in any order or grouping, or are refused."""
    first = {name: np.asarray(value) for name, value in make_params(case)[1].items()}
    noise = lambda seed, shape: np.abs(np.random.default_rng(seed).normal(size=shape)).astype(np.float32)
    second, third = ({name: value + noise(seed, value.shape) for name, value in first.items()} for seed in (1, 2))
    merge = lambda states, weights: case.router.merge(states, weights, case.config)
    try:
        merged = merge([first, second, third], [1, 2, 4])
    except UserError as e:
        raise AssertionError(str(e)) from e
    kinds = lambda state: {name: (value.dtype, value.shape) for name, value in state.items()}
    assert kinds(merged) == kinds(first), f"the merged state is {kinds(merged)}, those of replicas {kinds(first)}"
    assert_same(merge([first, first, first], [1, 2, 4]), first)
    assert_same(merge([first], [3]), first)
    assert_same(merge([third, first, second], [4, 1, 2]), merged, 1e-5)
    assert_same(merge([first, second, third], [10, 20, 40]), merged, 1e-5)
    assert_same(merge([merge([first, second], [1, 2]), third], [3, 4]), merged, 1e-5)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(route(case, make_inputs(), state=merged)))
    bad = [{name: np.full_like(value, np.nan) for name, value in first.items()}] if first else []
    wrong = [([], []), ([first], [np.nan]), ([first, first], [1, -1]), ([first], [0]), ([first], [1, 1])]
    for states, weights in [*wrong, *(([first, state], [1, 1]) for state in bad)]:
        try:
            merge(states, weights)
        except UserError:
            continue
        raise AssertionError(f"merge accepts {len(states)} states with weights {weights}, one of them not fit")


def law_carry(case: Case) -> None:
    """A layer hands on what it takes: arrays of the names, shapes and dtypes that come before the first layer."""
    handed_on = route(case, make_inputs()).carry
    assert jax.tree.map(jnp.shape, handed_on) == jax.tree.map(jnp.shape, case.router.init_carry(case.config, B, T))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(handed_on))
