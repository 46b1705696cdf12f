"""The leak test: on independent uniform tokens no causal model beats ln V, so a loss below it has read the future.

A small model with every strategy trains on fresh tokens in each step; the loss of a step is taken before its update, so
it is one on unseen data. A router that claims to be causal must stay at the floor. Expert choice over a sequence must
fall below it, and other assignments over one: whether an expert takes a token depends on the tokens after it, and the
model learns to read that. So does mixture of depths: whether a token passes a block.

Excess over ln 4 = 1.3863 nats in the last 50 of 250 steps, seeds 0, 1, 2:

| strategy | excess |
|---|---|
| base | -0.166, -0.127, -0.131 |
| expert_choice | -0.170, -0.101, -0.054 |
| sinkhorn | -0.259, -0.279, -0.167 |
| mixture of depths, half of the tokens in each block | -0.046, -0.070, -0.066 |
| causal strategies | from +0.0004 (random, round_robin) to +0.0016 (switch_top1) |

A declared leak need not be caught here: it must also be easy to learn. The perturbation law finds them all.

Letters: B sequences, T time, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugalmoe import sharding
from frugalmoe.config import Config
from frugalmoe.data import Batch
from frugalmoe.laws.cases import Case, all_cases
from frugalmoe.model import depths
from frugalmoe.schema import MixtureOfDepths, Model, Optim, Train
from frugalmoe.train.step import init, make_train_step

B, T, V, STEPS, LAST = 64, 4, 4, 250, 50
OFF = MixtureOfDepths()
CASES = {case.router.name: case for case in reversed(all_cases())}  # the first case of each: its default options
CAUSAL = sorted(name for name, case in CASES.items() if case.router.causality(case.config, train=True) != "leak")


def config_of(case: Case, seed: int, around_blocks: MixtureOfDepths) -> Config:
    moe = dataclasses.replace(case.config, router=case.router.name, expert_dim=16, executor="dense")
    model = Model(vocab_size=V, dim=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, init_std=0.1, moe=moe)
    return Config(
        model=dataclasses.replace(model, mixture_of_depths=around_blocks),
        optim=Optim(learning_rate=5e-3, warmup_steps=20, weight_decay=0.0, schedule="constant"),
        train=Train(steps=STEPS, batch_size=B, seed=seed, loss_chunk=B * T),
    )


def excess(case: Case, seed: int = 0, around_blocks: MixtureOfDepths = OFF) -> float:
    """Nats per token over the entropy of the tokens, at the end of a training run; below 0 is a leak."""
    config, shape = config_of(case, seed, around_blocks), (1, B, T)
    with jax.set_mesh(sharding.make_mesh(dict.fromkeys(sharding.AXES, 1))):
        step = make_train_step(config)

        def on_fresh_tokens(state, key):
            tokens = jax.random.randint(key, (1, B, T + 1), 0, V, jnp.int32)
            ones, positions = jnp.ones(shape, jnp.int32), jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), shape)
            batch = Batch(tokens[..., :-1], tokens[..., 1:], ones, positions, ones > 0, 0 * ones)
            state, metrics = step(state, Batch(*(sharding.reshard(a, "ABT") for a in batch)))
            return state, metrics.metrics["loss/ce"]

        keys = jax.random.split(jax.random.key(seed), STEPS)
        _, ce = jax.jit(lambda state: jax.lax.scan(on_fresh_tokens, state, keys))(init(config))
    return float(np.mean(ce[-LAST:]) - np.log(V))


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_router_stays_at_the_entropy_floor(name: str) -> None:
    assert -0.003 < excess(CASES[name]) < 0.01  # above: the model did not learn that the tokens are uniform


@pytest.mark.slow
@pytest.mark.parametrize("name", ["expert_choice", "base", "sinkhorn"])
def test_a_leak_is_caught_reading_the_future(name: str) -> None:
    assert excess(CASES[name]) < -0.02


@pytest.mark.slow
def test_mixture_of_depths_is_caught_reading_the_future() -> None:
    assert depths.ABOUT.causal == "leak"
    assert excess(CASES["topk_softmax"], around_blocks=MixtureOfDepths(capacity=0.5, every=1)) < -0.02
