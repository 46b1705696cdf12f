"""Parts of the model against hand-made oracles: NormHead, rotary fraction, remat and bfloat16 policies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_train_step import batch, config_of, mesh_of, trained

from frugalmoe.model.layers import NORMS, LayerNorm
from frugalmoe.model.rotary import rotary, rotate
from frugalmoe.model.transformer import Transformer, split, structure
from frugalmoe.schema import RopeScaling
from frugalmoe.train.objective import forward
from frugalmoe.train.placing import put_batch
from frugalmoe.train.step import EVAL_SEED, init, make_eval_step


def test_norm_head_divides_each_channel_by_its_norm_over_the_vocabulary_and_detaches_it():
    config = config_of({"model.norm_head": True}).model
    graphdef, params, state = split(Transformer(config, jax.random.key(0)))
    head = np.asarray(params["head_DV"])
    norm_D1 = np.linalg.norm(head, axis=1, keepdims=True)
    np.testing.assert_allclose(nnx.merge(graphdef, params, state).head(), head / norm_D1, rtol=1e-5)
    g_DV = jax.random.normal(jax.random.key(1), head.shape)
    grad = jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p, state).head() * g_DV))(params)["head_DV"]
    np.testing.assert_allclose(grad, g_DV / norm_D1, rtol=1e-5)


def test_tied_head_is_the_embedding():
    config = config_of({"model.tie_embeddings": True}).model
    graphdef, params, state = split(Transformer(config, jax.random.key(0)))
    assert "head_DV" not in params
    np.testing.assert_array_equal(nnx.merge(graphdef, params, state).head(), params["embed_VD"].T)


def test_rotation_keeps_norms_depends_on_distance_alone_and_leaves_the_rest():
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 16)) for i in (0, 1))
    at = lambda x, position: rotate(x, rotary(jnp.array([[position]]), 8, 1e4, RopeScaling()))
    dot = lambda i, j: float(jnp.sum(at(q, i) * at(k, j)))
    assert dot(3, 1) == pytest.approx(dot(10, 8), rel=1e-5)
    assert abs(dot(3, 1) - dot(3, 2)) > 1e-3
    np.testing.assert_array_equal(at(q, 7)[..., 8:], q[..., 8:])
    assert float(jnp.linalg.norm(at(q, 7))) == pytest.approx(float(jnp.linalg.norm(q)), rel=1e-6)


@pytest.mark.slow
def test_bfloat16_computes_near_float32_with_float32_parameters_and_routing():
    losses = {}
    with jax.set_mesh(mesh_of()) as _:
        mesh = mesh_of()
        for dtype in ("float32", "bfloat16"):
            config = config_of({"model.compute_dtype": dtype})
            state = init(config)
            assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
            out = jax.jit(make_eval_step(config))(state.params, state.router_state, put_batch(mesh, batch(0), "BT"))
            losses[dtype] = np.asarray(out.ce_BT)[batch(0).loss_mask_BT].mean()
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=5e-3)
    assert losses["bfloat16"] != losses["float32"]


def test_predicted_ids_are_the_best_of_float32_logits_within_the_vocabulary():
    """In bfloat16 a head of 1,024 ids has ties and wrong winners at every other token; padding is never predicted."""
    config = config_of({"model.compute_dtype": "bfloat16", "model.vocab_size": 1024, "model.num_layers": 2})
    mesh, one, size = mesh_of(), batch(0), 1000
    with jax.set_mesh(mesh):
        state, placed = init(config), put_batch(mesh, one, "BT")
        head_DV = state.params["head_DV"]
        # A padding id that would win everywhere else, and an id beside its twin, of which the lower one is predicted.
        head_DV = (
            head_DV.at[:, 1010].multiply(30).at[:, 1011].set(-head_DV[:, 1010] * 30).at[:, 501].set(head_DV[:, 500])
        )
        state.params["head_DV"] = head_DV
        graphdef, _, _ = structure(config.model)

        @jax.jit
        def hidden_and_head(params, router_state, batch):
            model = nnx.merge(graphdef, params, router_state)
            return forward(model, batch, 0, jnp.int32(0), EVAL_SEED, train=False).hidden_BTD, model.head()

        evaluated = jax.jit(make_eval_step(config, trace=True, vocabulary=size))(
            state.params, state.router_state, placed
        )
        hidden_BTD, head_DV = hidden_and_head(state.params, state.router_state, placed)
    assert hidden_BTD.dtype == head_DV.dtype == jnp.bfloat16
    logits_BTV = np.einsum("btd,dv->btv", *(np.asarray(a, np.float64) for a in (hidden_BTD, head_DV)))
    real_BT = one.segment_ids_BT > 0
    assert (np.argmax(logits_BTV, -1)[real_BT] >= size).mean() > 0.9, "padding would win"
    expected_BT = np.argmax(logits_BTV[..., :size], -1)
    np.testing.assert_array_equal(np.asarray(evaluated.predicted_BT)[real_BT], expected_BT[real_BT])
    rounded_BT = np.argmax(jnp.asarray(logits_BTV[..., :size], jnp.bfloat16), -1)
    assert (rounded_BT != expected_BT)[real_BT].any(), "rounded logits would pass too"


def test_a_bias_is_in_logits_losses_and_predictions():
    config = config_of({"model.head_bias": True, "model.multipliers.logits": 2.0, "model.num_layers": 2})
    mesh, one = mesh_of(), batch(0)
    with jax.set_mesh(mesh):
        state, placed = init(config), put_batch(mesh, one, "BT")
        assert not state.params["head_bias_V"].any()
        state.params["head_bias_V"] = jax.random.normal(jax.random.key(1), state.params["head_bias_V"].shape)
        model = nnx.merge(structure(config.model)[0], state.params, state.router_state)
        hidden_BTD = forward(model, placed, 0, jnp.int32(0), EVAL_SEED, train=False).hidden_BTD
        logits_BTV = np.asarray(model.logits(hidden_BTD))
        found = jax.jit(make_eval_step(config, trace=True))(state.params, state.router_state, placed)
    expected_BTV = (np.asarray(hidden_BTD) @ state.params["head_DV"] + state.params["head_bias_V"]) / 2
    np.testing.assert_allclose(logits_BTV, expected_BTV, atol=1e-5)
    real_BT, logp_BTV = one.loss_mask_BT, jax.nn.log_softmax(logits_BTV)
    ce_BT = -np.take_along_axis(logp_BTV, one.targets_BT[..., None], -1)[..., 0]
    np.testing.assert_allclose(np.asarray(found.ce_BT)[real_BT], ce_BT[real_BT], rtol=1e-4)
    np.testing.assert_array_equal(np.asarray(found.predicted_BT)[real_BT], np.argmax(logits_BTV, -1)[real_BT])


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_is_its_definition(affine):
    x_BD = np.random.default_rng(0).normal(3, 2, (5, 8)).astype(np.float32)
    scale_D, bias_D = np.arange(8, dtype=np.float32) - 3, np.linspace(-1, 1, 8, dtype=np.float32)
    norm = LayerNorm(8, 1e-2, "D", affine)
    if affine:
        norm.scale[...], norm.bias[...] = jnp.asarray(scale_D), jnp.asarray(bias_D)
    own = (scale_D, bias_D) if affine else (1, 0)
    x64 = x_BD.astype(np.float64)
    expected = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-2) * own[0] + own[1]
    np.testing.assert_allclose(norm(jnp.asarray(x_BD)), expected, rtol=1e-5, atol=1e-5)
    low = norm(jnp.asarray(x_BD, jnp.bfloat16))
    assert low.dtype == jnp.bfloat16 and np.allclose(np.asarray(low, np.float32), expected, atol=0.1)


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_of_few_bits_keeps_its_input_alone(kind):
    """No float32 array of the input's size is kept for the gradient, which is that of the norm as it is written."""
    norm = NORMS[kind](8, 1e-2, "D")
    x_BD = jnp.asarray(np.random.default_rng(0).normal(1, 2, (5, 8)), jnp.bfloat16)
    dy_BD = jnp.cos(jnp.arange(40.0)).reshape(5, 8).astype(jnp.bfloat16)
    y_BD, pull = jax.vjp(norm, x_BD)
    kept = [a.dtype for a in jax.tree.leaves(pull) if a.shape == x_BD.shape]
    assert kept and set(kept) == {jnp.dtype(jnp.bfloat16)}
    as_written = lambda x_BD: norm(x_BD.astype(jnp.float32)).astype(jnp.bfloat16)
    expected, pull_float32 = jax.vjp(as_written, x_BD)
    np.testing.assert_array_equal(y_BD, expected)
    np.testing.assert_array_equal(pull(dy_BD)[0], pull_float32(dy_BD)[0])


def test_stacked_layers_start_different():
    _, params, _ = split(Transformer(config_of().model, jax.random.key(0)))
    stacked = params["moe_blocks"]["moe"]["gate_up_ED2F"]
    assert stacked.shape[0] == 2 and not np.allclose(stacked[0], stacked[1])
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, structure(config_of().model)[1])


# Three steps of the tiny model on fixed random tokens, float32 on a CPU.
GOLDEN = {
    "loss/ce": [4.17198, 4.153842, 4.170068],
    "optim/gradient_norm": [0.559455, 0.574828, 0.564957],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_step(name):
    """If this fails and you did not mean to change the numbers, a refactoring changed them: find out which.

    If you meant to, say so in the commit, and write the new values here.
    """
    _, reports = trained({"optim.eps": 1e-8}, steps=3)
    np.testing.assert_allclose([float(m.metrics[name]) for m in reports], GOLDEN[name], rtol=2e-5)
