"""Checkpoints that older versions wrote, in the names of then; the state of each optimizer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train_step import DEPTHS, batch, config_of, mesh_of

from frugalmoe.data import Batch
from frugalmoe.errors import UserError
from frugalmoe.optimizers import OPTIMIZERS
from frugalmoe.routing.contract import declare, linear_init
from frugalmoe.routing.strategies import topk_softmax
from frugalmoe.train import checkpoint, guard
from frugalmoe.train.checkpoint import RENAMED
from frugalmoe.train.placing import put_batch
from frugalmoe.train.step import State, abstract, init, make_train_step

pytestmark = pytest.mark.whole

# Between them they have every array that was renamed.
OLD = {
    "recurrent": DEPTHS | {"model.num_layers": 3, "model.num_dense_layers": 1, "model.qkv_bias": True},
    "moe_plus_plus": {"model.moe.router": "moe_plus_plus", "optim.name": "muon"},
}


def in_old_names(tree):
    """As a version before `RENAMED` had it."""
    old = {new: name for name, new in RENAMED.items()}
    if isinstance(tree, dict):
        return {old.get(name, name): in_old_names(value) for name, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(in_old_names, tree))
    return tuple(map(in_old_names, tree)) if isinstance(tree, tuple) else tree


def names_in(tree) -> set[str]:
    return {key.key for path, _ in jax.tree_util.tree_leaves_with_path(tree) for key in path if hasattr(key, "key")}


def saved(directory, *states: State) -> checkpoint.ocp.CheckpointManager:
    manager = checkpoint.open_manager(directory, config_of().checkpoint)
    for step, state in enumerate(states):
        checkpoint.save(manager, step, state)
    manager.wait_until_finished()
    return manager


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y) and x.dtype == y.dtype, a, b))


def started(config) -> State:
    """A state whose parts all differ."""
    count = iter(range(10**6))
    number = lambda tree: jax.tree.map(lambda a: a + jnp.asarray(next(count) % 7, a.dtype), tree)
    return jax.jit(number)(init(config))


def weights(state: State) -> tuple[dict, dict]:
    return state.params, state.router_state


@pytest.mark.parametrize("form", OLD)
def test_a_checkpoint_in_old_names_is_read_with_those_of_today(form, tmp_path):
    """Parameters, the optimizer's moments and the state of routers; all of it, or the weights alone."""
    config = config_of(OLD[form])
    with jax.set_mesh(mesh_of()):
        state = started(config)
        old = State(*map(in_old_names, state))
        assert names_in(old.opt_state) & RENAMED.keys() and not names_in(state) & RENAMED.keys()
        with saved(tmp_path, old) as manager:
            assert_same(checkpoint.restore(manager, 0, abstract(config)), state)
            newest, step, broken = checkpoint.restore_newest(manager, abstract(config), ("params", "router_state"))
            assert (step, broken) == (0, [])
            assert_same(weights(newest), weights(state))
            with pytest.raises(UserError, match=r"checkpoint of another model: params.* has shape") as refused:
                checkpoint.restore(manager, 0, abstract(config_of(OLD[form] | {"model.dim": 48})))
            assert "\n" not in str(refused.value)


def test_every_renamed_array_is_in_one_of_the_old_checkpoints():
    with jax.set_mesh(mesh_of()):
        known = set().union(*(names_in(abstract(config_of(fields)).params) for fields in OLD.values()))
    assert known >= set(RENAMED.values()) and not known & RENAMED.keys()
    assert len(set(RENAMED.values())) == len(RENAMED)


def test_an_array_of_ones_own_router_may_have_an_old_name(tmp_path):
    init_own = lambda key, dim, config: {**linear_init(key, dim, config), "proj_DH": declare(jnp.ones((dim, 3)), "DH")}
    config = config_of({"model.moe.router": dataclasses.replace(topk_softmax.ROUTER, init=init_own, name="own")})
    with jax.set_mesh(mesh_of()):
        state = started(config)
        assert "proj_DH" in names_in(state.params) & RENAMED.keys()
        with saved(tmp_path, state) as manager:
            assert_same(checkpoint.restore(manager, 0, abstract(config)), state)


def test_a_checkpoint_of_before_there_was_a_guard_begins_with_a_fresh_one(tmp_path):
    """And the next step takes the program that a step of today's states has: types are written alike."""
    config = config_of()
    with jax.set_mesh(mesh_of()):
        state = started(config)
        with saved(tmp_path, state._replace(guard=())) as manager:
            restored = checkpoint.restore(manager, 0, abstract(config))
        assert_same(restored, state._replace(guard=guard.fresh()))
        written = lambda tree: [leaf.sharding for leaf in jax.tree.leaves(tree)]
        assert written(restored.guard) == written(state.guard)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_every_optimizer_comes_back_and_is_looked_at_for_what_is_not_finite(name, tmp_path):
    config = config_of({"optim.name": name})
    with jax.set_mesh(mesh_of()):
        state = started(config)
        moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 2]
        assert bool(moments) == (name != "sgd")
        last = [*jax.tree.leaves(state.params), *moments][-1]
        spoilt = lambda a: a.at[(0,) * a.ndim].set(jnp.nan) if a is last else a
        spoil = lambda tree: jax.tree.map(spoilt, tree)
        bad = state._replace(params=spoil(state.params), opt_state=spoil(state.opt_state))
        with saved(tmp_path, state, bad) as manager:
            newest, step, broken = checkpoint.restore_newest(manager, abstract(config))
            assert (step, broken) == (0, [(1, "not finite")])
            assert_same(newest, state)


@pytest.mark.slow
def test_muon_goes_on_bit_for_bit(tmp_path):
    config, mesh = config_of({"optim.name": "muon"}), mesh_of()
    with jax.set_mesh(mesh):
        step = jax.jit(make_train_step(config))
        after = lambda state, n: step(state, put_batch(mesh, Batch(*(a[None] for a in batch(n))), "ABT"))[0]
        first = after(init(config), 0)
        with saved(tmp_path, first) as manager:
            assert_same(after(checkpoint.restore(manager, 0, abstract(config)), 1), after(first, 1))
        assert step._cache_size() == 1, "a restored state has the types of a step's results"


@pytest.mark.parametrize("fields", [{"optim.name": "muon"}, {"optim.clip_norm": 0.0}], ids=str)
def test_the_state_of_another_optimizer_is_refused_in_one_line(fields, tmp_path):
    with jax.set_mesh(mesh_of()), saved(tmp_path, init(config_of())) as manager:
        with pytest.raises(UserError, match=r"checkpoint of another optimizer \(optim.name, .*: opt_state") as refused:
            checkpoint.restore(manager, 0, abstract(config_of(fields)))
        assert "\n" not in str(refused.value)
        newest, _, _ = checkpoint.restore_newest(manager, abstract(config_of(fields)), ("params", "router_state"))
        assert_same(weights(newest), weights(init(config_of())))
