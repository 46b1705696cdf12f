"""Sampling with a cache equals recomputing the whole sequence for every token.

Letters: T tokens, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_train_step import WITH_DEPTHS, config_of, mesh_of, router

from frugalmoe import sharding
from frugalmoe.config.schema import MoE
from frugalmoe.data.tokenizer import ByteTokenizer
from frugalmoe.errors import UserError
from frugalmoe.generate import Sampling, Weights, generate, sample_text, stream
from frugalmoe.model.moe import Context
from frugalmoe.model.transformer import structure
from frugalmoe.routing import strategies
from frugalmoe.train.step import init


def causal(name: str) -> bool:
    strategy = strategies.get(name)
    return strategy.causality(MoE(options=strategy.options()), train=False) == "safe"


CAUSAL = [name for name in strategies.names() if causal(name)]
BYTES = {"model.vocab_size": 320, "model.init_std": 0.2}  # weights large enough that tokens differ


def weights_of(config) -> Weights:
    state = init(config)
    return Weights(state.params, state.router_state)


MODELS = [
    *(pytest.param(router(n), id=n, marks=[] if n == "topk_softmax" else pytest.mark.slow) for n in CAUSAL),
    WITH_DEPTHS,
]


@pytest.mark.parametrize("fields", MODELS)
def test_cached_tokens_equal_recomputed_ones(fields):
    """Greedy tokens after a prompt, against the argmax of a forward pass over all tokens so far, without a cache."""
    config = config_of(fields | BYTES)
    mesh = mesh_of()
    prompt = np.arange(5, 12).astype(np.int32)
    with jax.set_mesh(mesh):
        weights = weights_of(config)
        produced = list(generate(config, weights, prompt, Sampling(temperature=0.0, max_tokens=20)))
        graphdef, _, _ = structure(config.model)
        tokens_T = np.concatenate([prompt, produced]).astype(np.int32)

        @jax.jit
        def logits(weights, tokens_BT):
            model = nnx.merge(graphdef, *weights)
            position_BT = sharding.reshard(jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape), "BT")
            keys_B = sharding.reshard(jax.random.key(config.train.seed)[None], "B")
            context = Context(tokens_BT, jnp.ones_like(tokens_BT), position_BT, keys_B, jnp.int32(0))
            return model.logits(model(context).hidden_BTD)[0]

        logits_TV = logits(weights, sharding.put(mesh, tokens_T[None], "BT"))
    expected = np.argmax(logits_TV, axis=-1)[len(prompt) - 1 : -1]
    np.testing.assert_array_equal(produced, expected)
    assert len(set(produced)) > 3, "a constant output would pass for the wrong reason"


@pytest.mark.slow
def test_seeds_differ_and_repeat_and_top_p_zero_limit_is_greedy():
    config = config_of(BYTES)
    prompt = np.arange(4, dtype=np.int32)
    with jax.set_mesh(mesh_of()):
        weights = weights_of(config)
        draw = lambda **kw: list(generate(config, weights, prompt, Sampling(max_tokens=12, **kw)))
        assert draw(temperature=1.0, seed=1) == draw(temperature=1.0, seed=1) != draw(temperature=1.0, seed=2)
        assert draw(temperature=1.0, top_p=1e-6, seed=3) == draw(temperature=0.0)


def test_streamed_pieces_join_to_the_text_and_stop_texts_end_it():
    config = config_of(BYTES)
    with jax.set_mesh(mesh_of()):
        weights, tokenizer = weights_of(config), ByteTokenizer()
        run = lambda **kw: list(
            stream(config, weights, tokenizer, "ab", Sampling(temperature=0.0, max_tokens=40, **kw))
        )
        whole = "".join(run())
        stop = whole[6:8]
        assert "".join(run(stop=(stop,))) == whole[: whole.index(stop)]


def test_a_router_that_sees_the_future_cannot_be_sampled():
    config = config_of(router("expert_choice") | {"model.moe.options.evaluate": "choice"} | BYTES)
    with jax.set_mesh(mesh_of()):
        state = init(config)
        with pytest.raises(UserError, match=r"expert_choice.*causal=leak"):
            next(generate(config, Weights(state.params, state.router_state), np.zeros(3, np.int32), Sampling()))
        assert "cannot be sampled" in sample_text(config, state, ByteTokenizer())["why"]
