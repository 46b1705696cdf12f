"""Strategies with choices that are no experts: adamoe, moe_plus_plus and longcat, by hand.

Letters: B batch, T time, D model, E experts, X choices (experts, then the others), K choices of a token.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_strategies import softmax

from frugalmoe.laws.cases import make_case, route
from frugalmoe.routing.contract import Inputs, arrays
from frugalmoe.schema import FrozenDict

pytestmark = pytest.mark.whole


def steered(name: str, k: int, logits: list[list[float]], **options):
    """The routing of one sequence with these logits over two experts and what follows; x are the logits."""
    case = make_case(name, 2, k, **options)
    x_BTD = jnp.asarray([logits], jnp.float32)
    size, ones = x_BTD.shape[-1], jnp.ones(x_BTD.shape[:2], jnp.int32)
    params = arrays(case.router.init(jax.random.key(0), size, case.config)) | {"kernel_DX": jnp.eye(size)}
    carry = case.router.init_carry(case.config, *x_BTD.shape[:2])
    inputs = Inputs(x_BTD, ones, ones, ones, None, jnp.int32(0), jnp.int32(0), carry=carry)
    return (
        case,
        params,
        inputs,
        case.router.route(params, case.router.init_state(size, case.config), inputs, case.config),
    )


def test_adamoe_renormalizes_over_experts_and_a_token_of_nulls_gets_nothing() -> None:
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


@pytest.mark.parametrize(("name", "options"), [("adamoe", {"num_null": 1}), ("moe_plus_plus", {"num_copy": 0})])
def test_experts_far_below_what_costs_nothing_share_the_whole_weight(name: str, options: dict) -> None:
    """Two experts whose probabilities beside the null, or zero, choice are e^-199 and e^-200: weights 1/(1 + e^-1)."""
    zeros = {"num_constant": 0, "num_zero": 1} if name == "moe_plus_plus" else {}
    rows = [[-99.0, -100.0, 100.0]]
    case, params, inputs, routing = steered(name, 3, rows, **options, **zeros)
    weights = {int(e): float(w) for e, w in zip(routing.plan.expert_NK[0], routing.plan.weight_NK[0])}
    expected = 1 / (1 + np.exp(-1.0))
    assert weights == pytest.approx({2: 0.0, 0: expected, 1: 1 - expected}, rel=1e-5)
    plan = lambda x: case.router.route(params, {}, inputs._replace(x_BTD=x), case.config).plan
    gradient = jax.grad(lambda x: plan(x).weight_NK[0, 1])(inputs.x_BTD)
    slope = expected * (1 - expected)  # of expert 0's weight by its own logit
    np.testing.assert_allclose(gradient, [[[slope, -slope, 0]]], rtol=1e-4)


@pytest.mark.parametrize("name", ["adamoe", "moe_plus_plus", "longcat"])
@pytest.mark.parametrize("others", [1, 3, 4])
def test_device_balance_is_of_real_experts(name: str, others: int) -> None:
    """4 experts on 2 devices, beside choices that live on none: 2 where one device has all, 1 at uniform load."""
    count = {"adamoe": "num_null", "longcat": "num_identity", "moe_plus_plus": "num_zero"}[name]
    rest = {"num_copy": 0, "num_constant": 0} if name == "moe_plus_plus" else {}
    moe = {"load_balance_devices": 2, "losses": FrozenDict(device_balance=1.0)}
    case = make_case(name, 4, 2, moe=moe, **{count: others}, **rest)
    ones, size = jnp.ones((1, 2), jnp.int32), 4 + others
    params = arrays(case.router.init(jax.random.key(0), size, case.config)) | {"kernel_DX": jnp.eye(size)}
    state, carry = case.router.init_state(size, case.config), case.router.init_carry(case.config, 1, 2)

    def loss(x_BTD):
        inputs = Inputs(x_BTD, ones, ones, ones, None, jnp.int32(0), jnp.int32(0), carry=carry)
        return case.router.route(params, state, inputs, case.config).losses["device_balance"].sum

    for rows, expected in (
        ([[9.0, 9.0, -9, -9], [9.0, 9.0, -9, -9]], 2.0),
        ([[9.0, 8.5, -9, -9], [-9.0, -9, 9.0, 8.5]], 1.0),
        ([[-99.0, -99, -200, -200]] * 2, 2.0 if others == 1 else 0.0),  # more of the others take all slots
    ):
        value, gradient = jax.value_and_grad(loss)(jnp.asarray([[row + [0.0] * others for row in rows]]))
        assert float(value) == pytest.approx(expected, rel=1e-5) and np.all(np.isfinite(gradient))


def test_moe_plus_plus_zero_copy_and_constant_by_hand() -> None:
    """Choices: experts 0 and 1, zero 2, copy 3, constant 4; K = 2, D = 5.

    Token 0 picks expert 0 and zero: weight 1, nothing added. Token 1 picks copy and expert 1 with p in the ratio
    3 : 1: adds 0.75 x. Token 2 picks constant and zero: adds a_1 x + a_2 v, and with M = 0, a = (1/2, 1/2).
    """
    rows = [[4.0, 0, 3, 0, 0], [0, 2.0, -1, 2 + np.log(3), 0], [0, 0, 2.0, 0, 3.0]]
    case, params, inputs, _ = steered("moe_plus_plus", 2, rows, num_constant=1)
    params |= {"mix_ZD2": jnp.zeros((1, 5, 2)), "constant_ZD": jnp.full((1, 5), 8.0)}
    routing = route(case, inputs, params)
    np.testing.assert_array_equal(routing.plan.expert_NK, [[0, 2], [2, 1], [2, 2]])
    np.testing.assert_allclose(routing.plan.weight_NK, [[1, 0], [0, 0.25], [0, 0]], rtol=1e-5)
    x_TD = np.asarray(rows)
    expected = [0 * x_TD[0], 0.75 * x_TD[1], 0.5 * x_TD[2] + 0.5 * 8]
    np.testing.assert_allclose(routing.added_BTD[0], expected, rtol=1e-5, atol=1e-6)


def test_moe_plus_plus_counts_zero_cost_choices_tau_times() -> None:
    """One token picks expert 0 and copy, counts 1 and tau = 1/2: 4 * (2/3 * p_0 + 1/3 * p_copy)."""
    row = [3.0, 0.0, 0.0, 2.0]
    _, _, _, routing = steered("moe_plus_plus", 2, [row], num_constant=0, tau=0.5)
    p = softmax(np.asarray(row))
    np.testing.assert_allclose(routing.losses["load_balance"].sum, 4 * (2 / 3 * p[0] + p[3] / 3), rtol=1e-5)


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


def test_longcat_identity_adds_its_probability_times_x_and_weights_are_not_renormalized() -> None:
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
