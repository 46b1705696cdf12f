"""Strategies that use more of the contract than a plan: input scale, added parts, carry, shared parameters, experts.

Letters: B batch, T time, D model, F expert hidden, E experts, L layers, H channels of a GRU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from routing_cases import B, T, combine, make_case, make_inputs, make_params, route
from test_strategies import logits_of, softmax
from test_train_step import batch, config_of, mesh_of, router

from frugalmoe import sharding
from frugalmoe.config.schema import MoE
from frugalmoe.model.moe import Context, execute
from frugalmoe.model.transformer import count_parameters, structure
from frugalmoe.routing.contract import Inputs, Routing, TokenPlan
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


# Choices that are no experts: adamoe, moe_plus_plus, longcat


def steered(name: str, k: int, logits: list[list[float]], **options):
    """The routing of one sequence with these logits over two experts and what follows; x are the logits."""
    case = make_case(name, 2, k, **options)
    x_BTD = jnp.asarray([logits], jnp.float32)
    size, ones = x_BTD.shape[-1], jnp.ones(x_BTD.shape[:2], jnp.int32)
    params = dict(case.router.init(jax.random.key(0), size, case.config)) | {"kernel_DX": jnp.eye(size)}
    carry = case.router.init_carry(case.config, *x_BTD.shape[:2])
    inputs = Inputs(x_BTD, ones, ones, ones, None, jnp.int32(0), jnp.int32(0), carry=carry)
    return (
        case,
        params,
        inputs,
        case.router.route(params, case.router.init_state(size, case.config), inputs, case.config),
    )


def test_adamoe_renormalises_over_experts_and_a_token_of_nulls_gets_nothing() -> None:
    """Experts 0 and 1, nulls 2 and 3, K = 2. Logits ln 3, 0: both experts, 3/4 and 1/4. One expert and a null: 1."""
    rows = [[np.log(3), 0.0, -5, -5], [4.0, 0.0, 3.0, -5], [0.0, 0.0, 3.0, 2.0]]
    _, _, _, routing = steered("adamoe", 2, rows, num_null=2)
    np.testing.assert_array_equal(routing.plan.expert_NK, [[0, 1], [0, 2], [2, 2]])
    np.testing.assert_allclose(routing.plan.weight_NK, [[0.75, 0.25], [1.0, 0.0], [0.0, 0.0]], rtol=1e-6)
    assert routing.stats["assigned"] == 3 and routing.added_BTD is None


def test_adamoe_counts_its_nulls_at_their_mean_load() -> None:
    """The loss is 4 * sum_x f_x P_x with f = (2, 1, 1.5, 1.5) / 6: nulls were picked 3 and 0 times."""
    rows = [[np.log(3), 0.0, 0.5, -9], [4.0, 0.0, 3.0, -5], [0.0, 1.0, 3.0, 0.5]]
    _, _, _, routing = steered("adamoe", 2, rows, num_null=2)
    np.testing.assert_array_equal(routing.stats["counts"], [2, 1])
    expected = 4 * np.sum(np.asarray([2, 1, 1.5, 1.5]) / 6 * softmax(np.asarray(rows)).mean(0))
    np.testing.assert_allclose(routing.losses["load_balance"].sum, expected, rtol=1e-5)


def test_moe_plus_plus_zero_copy_and_constant_by_hand() -> None:
    """Choices: experts 0 and 1, zero 2, copy 3, constant 4; K = 2, D = 5.

    Token 0 picks expert 0 and zero: weight 1, nothing added. Token 1 picks copy and expert 1 with p in the ratio
    3 : 1: adds 0.75 x. Token 2 picks constant and zero: adds a_1 x + a_2 v, and with M = 0, a = (1/2, 1/2).
    """
    rows = [[4.0, 0, 3, 0, 0], [0, 2.0, -1, 2 + np.log(3), 0], [0, 0, 2.0, 0, 3.0]]
    case, params, inputs, _ = steered("moe_plus_plus", 2, rows, num_constant=1)
    params |= {"mix_CDM": jnp.zeros((1, 5, 2)), "constant_CD": jnp.full((1, 5), 8.0)}
    routing = route(case, inputs, params)
    np.testing.assert_array_equal(routing.plan.expert_NK, [[0, 2], [2, 1], [2, 2]])
    np.testing.assert_allclose(routing.plan.weight_NK, [[1, 0], [0, 0.25], [0, 0]], rtol=1e-5)
    x_TD = np.asarray(rows)
    expected = [0 * x_TD[0], 0.75 * x_TD[1], 0.5 * x_TD[2] + 0.5 * 8]
    np.testing.assert_allclose(routing.added_BTD[0], expected, rtol=1e-5, atol=1e-6)


def test_moe_plus_plus_counts_zero_cost_choices_tau_times() -> None:
    """One token picks expert 0 and copy: 4 * (1/2 * p_0 + tau * 1/2 * p_copy)."""
    row = [3.0, 0.0, 0.0, 2.0]
    _, _, _, routing = steered("moe_plus_plus", 2, [row], num_constant=0, tau=0.5)
    p = softmax(np.asarray(row))
    np.testing.assert_allclose(routing.losses["load_balance"].sum, 4 * (p[0] / 2 + 0.5 * p[3] / 2), rtol=1e-5)


def test_the_gating_residual_adds_the_previous_logits() -> None:
    """z = x W + z_before R: without R the gate sees its own logits alone, with R = 1 the sum of both."""
    rows = [[1.0, 2.0, 0.0, -1.0]]
    case, params, inputs, plain = steered("moe_plus_plus", 2, rows, num_constant=0)
    np.testing.assert_allclose(plain.carry["logits_BTX"], [rows], rtol=1e-6)
    before = jnp.asarray([[[0.0, -3.0, 0.0, 5.0]]])
    params["residual_XX"] = jnp.eye(4)
    summed = route(case, inputs._replace(carry={"logits_BTX": before}), params)
    np.testing.assert_allclose(summed.carry["logits_BTX"], [[[1.0, -1.0, 0.0, 4.0]]], rtol=1e-6)
    np.testing.assert_array_equal(summed.plan.expert_NK, [[2, 0]])  # copy, then expert 0


def test_longcat_identity_adds_its_probability_times_x_and_weights_are_not_renormalised() -> None:
    rows = [[3.0, 0.0, 2.0], [0.0, 3.0, 1.0]]
    _, _, _, routing = steered("longcat", 2, rows, num_identity=1, scale=2.0)
    p_TX = softmax(np.asarray(rows))
    np.testing.assert_allclose(routing.added_BTD[0], 2 * p_TX[:, 2:] * np.asarray(rows), rtol=1e-5)
    np.testing.assert_allclose(routing.plan.weight_NK, [[2 * p_TX[0, 0], 0], [2 * p_TX[1, 1], 0]], rtol=1e-5)


def test_longcat_bias_moves_in_proportion_to_the_error_of_each_share() -> None:
    """E = 2, K = 2, K_e = 1, 10 tokens: wanted 1 / (2 * 2) = 0.25; shares 8 / 20 and 3 / 20, so errors -0.15, +0.1."""
    case = make_case("longcat", 2, 2, num_identity=2, update_rate=0.5)
    stats = {"counts": jnp.asarray([8, 3]), "tokens": jnp.int32(10)}
    moved = case.router.update({"bias_E": jnp.asarray([0.0, 1.0])}, stats, case.config)["bias_E"]
    np.testing.assert_allclose(moved, [-0.075, 1.05], rtol=1e-5)


def test_longcat_settles_at_the_wanted_number_of_experts_per_token() -> None:
    """8 experts, 4 identities, K = 3, from logits that prefer experts: 1.2 of them per token within 5 %."""
    case = make_case("longcat", 8, 3, mean_experts=1.2, update_rate=0.05)
    x_BTD = np.random.default_rng(0).normal(size=(2, 128, 12)) + np.repeat([1.0, 0.0], [8, 4])
    ones = jnp.ones((2, 128), jnp.int32)
    inputs = Inputs(jnp.asarray(x_BTD, jnp.float32), ones, ones, ones, None, None, None)

    @jax.jit
    def step(state: dict) -> tuple[dict, jax.Array]:
        stats = case.router.route({"kernel_DX": jnp.eye(12)}, state, inputs, case.config).stats
        return case.router.update(state, stats, case.config), stats["assigned"] / stats["tokens"]

    state, active = case.router.init_state(12, case.config), []
    for _ in range(200):
        state, mean = step(state)
        active.append(float(mean))
    assert active[0] > 2 and np.mean(active[-20:]) == pytest.approx(1.2, rel=0.05)


REFUSED = [
    ("llama4", 2, {}, "num_experts_per_token=2"),
    ("recurrent", 2, {"hidden": 0}, "hidden=0"),
    ("recurrent", 1, {}, "no gradient"),
    ("shared_router", 1, {}, "no gradient"),
    ("adamoe", 2, {"num_null": 0}, "num_null=0"),
    ("adamoe", 1, {}, "no gradient"),
    ("moe_plus_plus", 2, {"tau": 0.0}, "tau=0.0"),
    ("moe_plus_plus", 2, {"num_copy": -1}, "num_copy=-1"),
    ("moe_plus_plus", 2, {"num_zero": 0, "num_copy": 0, "num_constant": 0}, "one of them must be positive"),
    ("longcat", 2, {"mean_experts": 3.0}, "mean_experts=3.0"),
    ("longcat", 2, {"num_identity": 0}, "num_identity=0"),
]


@pytest.mark.parametrize(("name", "k", "options", "message"), REFUSED)
def test_a_bad_option_is_refused_in_one_line(name: str, k: int, options: dict, message: str) -> None:
    case = make_case(name, 8, k, **options)
    rule = case.router.check(case.config)
    assert message in rule and "\n" not in rule
