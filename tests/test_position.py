"""The two clocks of a run: updates, and batches taken from the data. A skipped batch parts them."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from runs import rows, tiny, write_text

from frugalmoe import sharding
from frugalmoe.config.checks import check_devices
from frugalmoe.data import Batch, open_data
from frugalmoe.errors import UserError
from frugalmoe.train import checkpoint
from frugalmoe.train.loop import opened, train, train_runs
from frugalmoe.train.objective import knobs
from frugalmoe.train.placing import put_batch
from frugalmoe.train.program import compiled_train_step
from frugalmoe.train.step import abstract, init

FIELDS = {
    "train.steps": 4,
    "optim.schedule": "constant",  # a run that is lengthened has the rates of a longer one
    "optim.warmup_steps": 3,  # the rate tells which update it is
    "model.num_layers": 2,
    "model.moe.router": "sigmoid_bias",
    "model.vocab_size": 320,
    "train.eval_rows": 8,
}


class Quiet:
    def __init__(self, *ignored): ...

    def __enter__(self):
        return self

    def __exit__(self, *error): ...

    def say(self, text): ...

    def update(self, *numbers): ...


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    root = tmp_path_factory.mktemp("position")
    write_text(root / "text")
    return lambda **changes: tiny(
        root / "text", root / "cache", FIELDS | {k.replace("__", "."): v for k, v in changes.items()}
    )


def mesh_of(config):
    return sharding.make_mesh(check_devices(config, 1))


def newest(config, workdir):
    with jax.set_mesh(mesh_of(config)), checkpoint.open_manager(workdir, config.checkpoint) as manager:
        return jax.device_get(checkpoint.restore_newest(manager, abstract(config))[0])


def stepped(config, positions: list[int]):
    """The state after updates from the batches of these positions, step by step."""
    mesh = mesh_of(config)
    with jax.set_mesh(mesh):
        data = open_data(config.data, batch_size=config.train.batch_size, seed=config.train.seed, progress=False)
        own = jax.tree.map(lambda number: sharding.put(mesh, number, ""), knobs(config))
        state, step = init(config), compiled_train_step(config)
        for position in positions:
            batch = Batch(*(a[None] for a in data.batch(position)))
            state, _ = step(state, put_batch(mesh, batch, "ABT"), own)
        return jax.device_get(state)


def same_bits(a, b) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a._replace(position=0), b._replace(position=0)))


@pytest.mark.slow
def test_batches_that_are_skipped_stay_skipped_and_may_come_back(make, tmp_path):
    """Batches 3 to 6; the saved run goes on with 7 and 8; then batch 0 comes after all, and 1."""
    config, workdir = make(), tmp_path / "run"
    with jax.set_mesh(mesh_of(config)), opened(config, workdir) as run:
        run.seek(3)
        train_runs([run], Quiet)
    longer = make(train__steps=6)
    train(longer, workdir, resume="force", progress=Quiet)
    state = newest(config, workdir)
    assert (state.step, state.position) == (6, 9)
    assert same_bits(state, stepped(longer, [3, 4, 5, 6, 7, 8]))
    longest = make(train__steps=8)
    with jax.set_mesh(mesh_of(longest)), opened(longest, workdir, force=True) as run:
        run.seek(0)
        train_runs([run], Quiet)
    assert same_bits(newest(config, workdir), stepped(longest, [3, 4, 5, 6, 7, 8, 0, 1]))
    logged = [row for row in rows(workdir) if "loss/ce" in row]
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row.get("data/position") for row in logged] == [4, 5, 6, 7, 8, 9, 1, 2]
    rates = [row["optim/learning_rate"] / config.optim.learning_rate for row in logged]
    np.testing.assert_allclose(rates, [1 / 3, 2 / 3, *[1] * 6], rtol=1e-5)


def test_a_position_must_be_one(make, tmp_path):
    config = make()
    with jax.set_mesh(mesh_of(config)), opened(config, tmp_path / "run") as run:
        for position in (-1, 2**31):
            with pytest.raises(UserError, match=rf"position={position}: must be from 0 to 2147483647"):
                run.seek(position)


@pytest.mark.slow
def test_a_checkpoint_of_one_clock_goes_on_with_the_batch_of_its_step(make, tmp_path):
    """As runs saved their state before there were two clocks."""
    config, old = make(), tmp_path / "old"
    train(config, old, progress=Quiet)
    assert "data/position" not in rows(old)[0]
    state = newest(config, old)
    items = {"params": state.params, "router_state": state.router_state, "opt_state": state.opt_state}
    items["step"] = {"step": state.step}
    with checkpoint.open_manager(old, config.checkpoint) as manager:
        manager.delete(4)
        manager.save(4, args=ocp.args.Composite(**{k: ocp.args.StandardSave(v) for k, v in items.items()}), force=True)
    longer = make(train__steps=6)
    train(longer, old, resume="force", progress=Quiet)
    state = newest(config, old)
    assert (state.step, state.position) == (6, 6)
    whole = stepped(longer, [0, 1, 2, 3, 4, 5])
    assert (state.guard.updates, whole.guard.updates) == (2, 6), "nor did it know of a guard"
    assert same_bits(state._replace(guard=()), whole._replace(guard=()))
