"""`optim.train`: which parameters learn, what the others cost, and that they keep their bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train_step import batch, config_of, mesh_of

from frugalmoe.cli import main
from frugalmoe.data import Batch
from frugalmoe.errors import UserError
from frugalmoe.model.transformer import declarations, structure
from frugalmoe.optimizers import OPTIMIZERS
from frugalmoe.train import checkpoint, optim
from frugalmoe.train.objective import knobs
from frugalmoe.train.placing import put_batch
from frugalmoe.train.step import abstract, init, make_gradient, make_train_step, update_router_state

pytestmark = pytest.mark.whole

STATEFUL = {"model.moe.router": "sigmoid_bias", "optim.weight_decay": 0.1, "optim.learning_rate": 0.01}
SOME = "router,head*,*/attention/*"


def config(train: str = "*", **fields):
    return config_of(STATEFUL | {"optim.train": train} | {k.replace("__", "."): v for k, v in fields.items()})


def by_path(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def chosen(config) -> set[str]:
    declared = declarations(config.model)
    return {"/".join(path) for path in optim.trained(config.optim, declared) or declared}


def batch_of(config, step: int) -> Batch:
    a = config.train.accumulate_steps
    return put_batch(mesh_of(), Batch(*(x.reshape(a, -1, *x.shape[1:]) for x in batch(step))), "ABT")


def begin(config):
    """A first state in which each parameter has a negative zero, whose sign an added zero would lose."""
    state = init(config)
    return state._replace(params=jax.tree.map(lambda a: a.at[(0,) * a.ndim].set(-0.0), state.params))


@functools.cache
def stepped(config, steps: int = 3):
    with jax.set_mesh(mesh_of()):
        state, step = begin(config), jax.jit(make_train_step(config))
        for i in range(steps):
            state, report = step(state, batch_of(config, i))
        assert step._cache_size() == 1
    return jax.device_get(state), jax.device_get(report)


def bits(array) -> np.ndarray:
    return np.asarray(array).view(np.uint32)


def under_masks(config, learns: set[str], steps: int = 3):
    """Parameters and the norm of the last gradient: the gradient of all parameters, set to zero where frozen, and the
    whole optimizer with the whole state, whose updates are set to zero there too.
    """
    gradient, tx = make_gradient(config), optim.optimizer(config)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    masked = lambda tree: jax.tree_util.tree_map_with_path(lambda p, a: a * float(name(p) in learns), tree)

    @jax.jit
    def step(params, router_state, opt_state, batch, i):
        gradients, sums, _ = gradient(params, router_state, batch, i, knobs(config))
        updates, opt_state = tx.update(masked(gradients), opt_state, params)
        params = optax.apply_updates(params, masked(updates))
        return (params, update_router_state(router_state, sums.stats, config), opt_state), optax.tree.norm(
            masked(gradients)
        )

    with jax.set_mesh(mesh_of()):
        first = begin(config)
        carried = first.params, first.router_state, first.opt_state
        for i in range(steps):
            carried, norm = step(*carried, batch_of(config, i), jnp.int32(i))
    return jax.device_get((first.params, carried[0], norm))


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_frozen_bits_stay_and_the_others_learn_as_under_full_masks(name, accumulate):
    fields = {"optim__name": name, "train__accumulate_steps": accumulate}
    some = config(SOME, **fields)
    learns, (state, report) = chosen(some), stepped(some)
    first, expected, norm = under_masks(config(**fields), learns)
    after, first, expected = by_path(state.params), by_path(first), by_path(expected)
    assert learns and after.keys() - learns and after.keys() == first.keys()
    for path, was in first.items():
        if path in learns:
            np.testing.assert_allclose(after[path], expected[path], rtol=1e-4, atol=1e-5, err_msg=path)
            assert not np.array_equal(after[path], was), path
        else:
            np.testing.assert_array_equal(bits(after[path]), bits(was), err_msg=path)
    assert float(report.metrics["optim/gradient_norm"]) == pytest.approx(float(norm), rel=1e-5)


def test_the_optimizer_has_no_state_of_what_is_frozen():
    some, whole = config(SOME), config()
    _, shapes, _ = structure(some.model)
    learns, sizes = chosen(some), {path: 4 * a.size for path, a in by_path(shapes).items()}
    found, everything = optim.bytes_of(some), optim.bytes_of(whole)
    assert everything.parameters == everything.gradients == found.parameters == sum(sizes.values())
    assert found.gradients == sum(size for path, size in sizes.items() if path in learns)
    counters = found.optimizer - 2 * found.gradients
    assert 0 < counters < 64 and everything.optimizer == 2 * everything.gradients + counters
    state, _ = stepped(some)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)) == found.optimizer


@pytest.mark.parametrize("train", ["router", "*/attention/*", "vector", "embedding"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_a_part_of_any_kind(name, train):
    """Muon without a matrix, and with nothing but matrices."""
    some = config(train, optim__name=name)
    _, shapes, _ = structure(some.model)
    params, frozen = optim.split(jax.tree.map(lambda a: jnp.ones(a.shape), shapes), some)
    assert by_path(params).keys() == chosen(some) and not by_path(frozen).keys() & chosen(some)
    assert jax.tree.structure(optim.joined(params, frozen)) == jax.tree.structure(shapes)
    tx = optim.optimizer(some)
    with jax.set_mesh(mesh_of()):
        update = jax.jit(tx.update, compiler_options={"xla_backend_optimization_level": 0})
        updates, state = update(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert all(np.all(np.isfinite(leaf)) and np.any(leaf) for leaf in jax.tree.leaves(updates))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) < 2 * size + 64


@pytest.mark.slow
def test_it_goes_on_bit_for_bit_and_not_with_another_choice(tmp_path):
    some = config(SOME)
    whole, _ = stepped(some)
    with jax.set_mesh(mesh_of()), checkpoint.open_manager(tmp_path, some.checkpoint) as manager:
        step, state = jax.jit(make_train_step(some)), begin(some)
        for i in range(3):
            if i == 2:
                checkpoint.save(manager, 2, state)
                manager.wait_until_finished()
                state = checkpoint.restore(manager, 2, abstract(some))
            state, _ = step(state, batch_of(some, i))
        for another in (config(), config("router")):
            with pytest.raises(UserError, match=r"checkpoint of another optimizer \(optim.name, optim.train, "):
                checkpoint.restore(manager, 2, abstract(another))
    assert jax.tree.structure(whole) == jax.tree.structure(state)
    same = lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert jax.tree.all(jax.tree.map(same, whole, jax.device_get(state)))


def test_everything_is_what_it_was():
    """All parameters, by default or by patterns that leave none out."""
    default, all_roles = config(), config("matrix,vector,embedding,head,router")
    assert optim.trained(default.optim, declarations(default.model)) is None
    params = {"a": {"b": 1}}
    assert optim.split(params, default)[0] is params and optim.joined(params, {}) is params
    with jax.set_mesh(mesh_of()):
        assert jax.tree.structure(abstract(default)) == jax.tree.structure(abstract(all_roles))
    assert optim.bytes_of(default) == optim.bytes_of(all_roles)


@pytest.mark.parametrize(
    "train, said",
    [
        (
            "rooter",
            "optim.train='rooter': 'rooter' matches no parameter; valid: embedding, head, matrix, router, vector; or",
        ),
        ("router,haed*", "optim.train='router,haed*': 'haed*' matches no parameter"),
        ("", "optim.train='': names no parameter"),
        (" , ", "optim.train=' , ': names no parameter"),
        ("Router", "'Router' matches no parameter"),
        ("3", "optim.train=3: expected str, got int"),
    ],
)
def test_a_wrong_choice_is_one_line(train, said, capsys):
    assert main(["config", "--config=quickstart", f"--config.optim.train={train}"]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_the_config_command_shows_it(capsys):
    assert main(["config", "--changed", f"--config.optim.train={SOME}", "--config.train.steps=200"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("optim.train"))
    assert SOME in line and "the rest is frozen" in line
