"""Strategies that use more of the contract than a plan: input scale, added parts, carry, shared parameters, experts.

Letters: B batch, T time, D model, F expert hidden, E experts, L layers, H channels of a GRU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from routing_cases import B, T, combine, make_case, make_inputs, make_params, route
from test_strategies import logits_of
from test_train_step import batch, config_of, mesh_of, router

from frugalmoe import sharding
from frugalmoe.config.schema import MoE
from frugalmoe.model.moe import Context, execute
from frugalmoe.model.transformer import count_parameters, structure
from frugalmoe.routing.contract import Routing, TokenPlan
from frugalmoe.routing.strategies import recurrent
from frugalmoe.train.optim import decay_mask
from frugalmoe.train.step import init


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# The layer


def test_the_input_scale_is_inside_the_expert_and_what_is_added_is_outside() -> None:
    """One expert with gate = up = down = 1, D = F = 1: f(x) = silu(x) * x, so f(2) = 2 * sigmoid(2) * 2 = 3.5232.

    y = G * f(s * x) + a = 0.5 * f(2 * 1) + 10 = 11.7616, where G * s * f(1) + a would be 10.7311. The padding's a is 0.
    """
    valid_BT = jnp.asarray([[True, False]])
    routing = Routing(
        TokenPlan(jnp.asarray([[0], [1]], jnp.int32), jnp.asarray([[0.5], [0.0]])),
        {},
        {},
        added_BTD=jnp.asarray([[[10.0], [0.0]]]),
        input_scale_BT=jnp.asarray([[2.0, 7.0]]),
    )
    x_BTD = jnp.asarray([[[1.0], [jnp.nan]]])
    config = MoE(num_experts=1, num_experts_per_token=1, executor="blocks")
    y_BTD, dropped = execute(routing, x_BTD, valid_BT, jnp.ones((1, 1, 2, 1)), jnp.ones((1, 1, 1)), config)
    np.testing.assert_allclose(y_BTD[0, :, 0], [11.7616, 0.0], rtol=1e-5)
    assert dropped == 0


# llama4


def test_llama4_scales_the_input_by_the_sigmoid_of_the_largest_logit() -> None:
    case, inputs = make_case("llama4", 8, 1), make_inputs(padded=False)
    routing, z_BTE = route(case, inputs), logits_of(case, inputs)
    np.testing.assert_allclose(routing.input_scale_BT, sigmoid(z_BTE.max(-1)), rtol=1e-5)
    np.testing.assert_array_equal(combine(case, routing), np.eye(8)[z_BTE.argmax(-1)])


# Parameters that all layers share: shared_router and recurrent


def test_shared_parameters_exist_once_and_count_once() -> None:
    """`shared_router` has one matrix of 32 x 8 where `topk_softmax` has one in each of two layers."""
    own, shared = config_of(), config_of(router("shared_router"))
    _, params, _ = structure(shared.model)
    assert params["shared_router"]["kernel_DE"].shape == (32, 8)
    assert "router" not in params["moe_blocks"]["moe"]
    for kind in ("total", "active"):
        assert count_parameters(own.model)[kind] - count_parameters(shared.model)[kind] == 32 * 8
    assert decay_mask(params)["shared_router"]["kernel_DE"]
    vectors = decay_mask(structure(config_of(router("recurrent")).model)[1])["shared_router"]
    assert vectors == {"input_HG": True, "state_HG": True, "input_bias_G": False, "new_bias_H": False}


def model_loss(config, params: dict) -> tuple[jax.Array, dict]:
    """Some function of the hidden states of fixed tokens, and its gradients."""
    graphdef, _, _ = structure(config.model)
    one = batch(0)
    weight_BTD = np.sin(np.arange(8 * 32 * 32)).reshape(8, 32, 32)
    keys_B = jax.random.split(jax.random.key(0), 8)

    @jax.jit
    def value(params: dict, *arrays: jax.Array) -> jax.Array:
        arrays = (sharding.reshard(a, letters) for a, letters in zip(arrays, ("BT", "BT", "BT", "B"), strict=True))
        hidden_BTD = nnx.merge(graphdef, params, {})(Context(*arrays, jnp.int32(0))).hidden_BTD
        return jnp.sum(sharding.reshard(hidden_BTD, "...") * weight_BTD)

    return jax.value_and_grad(value)(params, one.tokens_BT, one.segment_ids_BT, one.positions_BT, keys_B)


@pytest.mark.slow
def test_the_gradient_of_a_shared_matrix_is_the_sum_over_the_layers() -> None:
    """Against a model of the same weights in which every layer has its own copy of the matrix."""
    shared, own = config_of(router("shared_router")), config_of()
    with jax.set_mesh(mesh_of()):
        state = init(shared)
        kernel_DE = state.params["shared_router"]["kernel_DE"]
        params = {k: v for k, v in state.params.items() if k != "shared_router"}
        moe = params["moe_blocks"]["moe"] | {"router": {"kernel_DE": jnp.stack([kernel_DE] * 2)}}
        params["moe_blocks"] = params["moe_blocks"] | {"moe": moe}
        value, gradient = model_loss(shared, state.params)
        copied_value, copied = model_loss(own, params)
    np.testing.assert_allclose(value, copied_value, rtol=1e-6)
    total_DE = copied["moe_blocks"]["moe"]["router"]["kernel_DE"].sum(0)
    np.testing.assert_allclose(gradient["shared_router"]["kernel_DE"], total_DE, rtol=1e-4, atol=1e-5)
    assert np.abs(total_DE).max() > 1e-2


def test_the_gru_by_hand() -> None:
    """H = 1, x' = 1, h = 2; all input weights 1, all state weights 0.5, no bias.

    r = u = sigmoid(1 + 0.5 * 2) = sigmoid(2) = 0.8808; n = tanh(1 + r * 0.5 * 2) = tanh(1.8808) = 0.9545;
    h' = (1 - u) * n + u * 2 = 0.1192 * 0.9545 + 1.7616 = 1.8754.
    """
    params = {
        "input_HG": jnp.ones((1, 3)),
        "state_HG": jnp.full((1, 3), 0.5),
        "input_bias_G": jnp.zeros(3),
        "new_bias_H": jnp.zeros(1),
    }
    h_BTH = recurrent.gru(params, jnp.ones((1, 1, 1)), jnp.full((1, 1, 1), 2.0))
    np.testing.assert_allclose(h_BTH, [[[1.8754]]], rtol=1e-4)


def test_the_recurrence_crosses_layers_and_starts_at_zero() -> None:
    """The second layer's routing depends on the first layer's state; with a state of 0 it is the first layer's."""
    case, inputs = make_case("recurrent", hidden=8), make_inputs(padded=False)
    zeros = case.router.init_carry(case.config, B, T)
    first = route(case, inputs._replace(carry=zeros))
    second = route(case, inputs._replace(carry=first.carry))
    assert np.any(combine(case, first) != combine(case, second))
    np.testing.assert_array_equal(combine(case, first), combine(case, route(case, inputs._replace(carry=zeros))))
    params, _ = make_params(case)
    h_BTH = recurrent.gru(params, inputs.x_BTD @ params["proj_DH"], jnp.zeros((B, T, 8)))
    np.testing.assert_allclose(first.carry["hidden_BTH"], h_BTH, rtol=1e-4, atol=1e-6)
