"""Strategies that use more of the contract than a plan: input scale, added parts, carry, shared parameters, experts.

Letters: B batch, T time, D model, E experts, L layers, H channels of a GRU, G = 3H.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_strategies import logits_of, softmax
from test_train_step import batch, config_of, mesh_of, router, trained

from frugalmoe import sharding
from frugalmoe.errors import UserError
from frugalmoe.laws.cases import (
    WEIGHT,
    B,
    D,
    T,
    combine,
    make_case,
    make_inputs,
    make_params,
    probe,
    route,
    run_linear_experts,
    selections,
)
from frugalmoe.model.moe import Context, apply_routing
from frugalmoe.model.transformer import count_parameters, declarations, structure
from frugalmoe.optimizers import decay_mask
from frugalmoe.routing.contract import Inputs, Routing, TokenPlan
from frugalmoe.routing.strategies import recurrent, stochastic_warmup
from frugalmoe.schema import FrozenDict, MoE
from frugalmoe.train.step import init


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def refusal(name: str, k: int, options: dict) -> str | None:
    case = make_case(name, 8, k, **options)
    return case.router.check(case.config)


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
    y_BTD, dropped = apply_routing(routing, x_BTD, valid_BT, jnp.ones((1, 1, 2, 1)), jnp.ones((1, 1, 1)), config)
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
    assert decay_mask(params, declarations(shared.model))["shared_router"]["kernel_DE"]
    recurrent = config_of(router("recurrent")).model
    vectors = decay_mask(structure(recurrent)[1], declarations(recurrent))["shared_router"]
    assert vectors == {"input_PW": True, "state_PW": True, "input_bias_W": False, "new_bias_P": False}


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
        "input_PW": jnp.ones((1, 3)),
        "state_PW": jnp.full((1, 3), 0.5),
        "input_bias_W": jnp.zeros(3),
        "new_bias_P": jnp.zeros(1),
    }
    h_BTP = recurrent.gru(params, jnp.ones((1, 1, 1)), jnp.full((1, 1, 1), 2.0))
    np.testing.assert_allclose(h_BTP, [[[1.8754]]], rtol=1e-4)


def test_the_recurrence_crosses_layers_and_starts_at_zero() -> None:
    """The second layer's routing depends on the first layer's state; with a state of 0 it is the first layer's."""
    case, inputs = make_case("recurrent", hidden=8), make_inputs(padded=False)
    zeros = case.router.init_carry(case.config, B, T)
    first = route(case, inputs._replace(carry=zeros))
    second = route(case, inputs._replace(carry=first.carry))
    assert np.any(combine(case, first) != combine(case, second))
    np.testing.assert_array_equal(combine(case, first), combine(case, route(case, inputs._replace(carry=zeros))))
    params, _ = make_params(case)
    h_BTP = recurrent.gru(params, inputs.x_BTD @ params["proj_DP"], jnp.zeros((B, T, 8)))
    np.testing.assert_allclose(first.carry["hidden_BTP"], h_BTP, rtol=1e-4, atol=1e-6)


# stochastic_warmup


@pytest.mark.parametrize("base", stochastic_warmup.bases())
def test_a_warmup_starts_from_noise_alone_and_ends_as_its_base(base: str) -> None:
    """At step 0 nothing of the selection depends on x; from step `steps` on, and in evaluation, it is the base's."""
    k = 1 if refusal(base, 2, {}) else 2
    plain, wrapped = make_case(base, 8, k), make_case("stochastic_warmup", 8, k, base=base, steps=500)
    assert wrapped.router.check(wrapped.config) is None
    params, state = make_params(wrapped)
    own_state = {name: state[name] for name in plain.router.init_state(D, plain.config)}
    inputs = make_inputs()
    first = inputs._replace(step=jnp.int32(0))
    chosen = [selections(wrapped, route(wrapped, i)) for i in (first, first._replace(x_BTD=make_inputs(1).x_BTD))]
    np.testing.assert_array_equal(*chosen)
    for i in (inputs._replace(step=jnp.int32(500)), first._replace(train=False)):
        expected = combine(plain, route(plain, i, params, own_state))
        np.testing.assert_array_equal(combine(wrapped, route(wrapped, i)), expected)
        assert np.any(selections(wrapped, route(wrapped, i)) != chosen[0])


def test_warmup_noise_has_the_running_mean_and_deviation() -> None:
    """A mean of 3 and a mean squared distance of 4 from it give a deviation of 2; 8,192 numbers know it to 1 %.

    With K = E the weights are softmax(noise), and their logarithms differ as the noise does.
    """
    case, time = make_case("stochastic_warmup", 8, 8), 1024
    ones, positions = jnp.ones((1, time), jnp.int32), jnp.arange(time, dtype=jnp.int32)[None]
    keys_B = jax.random.split(jax.random.key(0), 1)
    inputs = Inputs(jnp.ones((1, time, D)), ones, ones, positions, keys_B, jnp.int32(0), jnp.int32(0), True)
    routing = route(case, inputs, state={"logit_mean": jnp.float32(3), "logit_square": jnp.float32(4)})
    variance_N = np.log(routing.plan.weight_NK).var(axis=1, ddof=1)
    assert np.sqrt(variance_N.mean()) == pytest.approx(2, rel=0.05)
    lse = routing.stats["lse_sum"] / time  # log of a sum of E lognormals: between mu + ln E and mu + ln E + sigma^2 / 2
    assert 3 + np.log(8) < lse < 3 + np.log(8) + 2


def test_running_averages_by_hand() -> None:
    """4 experts, 3 tokens: 12 logits of sum 6 and square sum 24, so mean 0.5 and mean square 2; decay 0.75.

    The mean square goes to 0.75 * 1 + 0.25 * 2 = 1.25 about 0, which is 1.25 - 0.125^2 about the new mean.
    """
    case = make_case("stochastic_warmup", 4, 2, decay=0.75)
    stats = {"tokens": jnp.int32(3), "logit_sum": jnp.float32(6), "logit_square_sum": jnp.float32(24)}
    moved = case.router.update({"logit_mean": jnp.float32(0), "logit_square": jnp.float32(1)}, stats, case.config)
    assert (float(moved["logit_mean"]), float(moved["logit_square"])) == (0.125, 1.25 - 0.125**2)


def test_running_averages_see_the_deviation_of_logits_far_from_zero() -> None:
    """Logits of deviation 1 about 3000, of which the squares about 0 have no such digit."""
    case = make_case("stochastic_warmup", decay=0.9)
    rng, ones = np.random.default_rng(0), jnp.ones((2, 64), jnp.int32)
    x_BTD = jnp.asarray(rng.normal(size=(2, 64, 8)) + 3000, jnp.float32)
    inputs = Inputs(x_BTD, ones, ones, ones, jax.random.split(jax.random.key(0), 2), jnp.int32(0), jnp.int32(0), True)
    state, params = case.router.init_state(8, case.config), {"kernel_DE": jnp.eye(8)}
    for _ in range(300):
        state = case.router.update(state, route(case, inputs, params, state).stats, case.config)
    assert float(state["logit_mean"]) == pytest.approx(float(x_BTD.mean()), rel=1e-6)
    assert float(state["logit_square"]) == pytest.approx(np.var(np.asarray(x_BTD, np.float64)), rel=1e-3)


def test_options_of_the_base_are_set_and_checked_as_its_own() -> None:
    warm = {"model.moe.router": "stochastic_warmup", "model.moe.options.base": "sigmoid_bias"}
    moe = config_of(warm | {"model.moe.options.base_options.scale": 2.5}).model.moe
    assert make_case("stochastic_warmup").router.claim("weight_sum", moe) == 2.5
    for field, value, message in (
        ("base", "sigmoid_bia", "did you mean 'sigmoid_bias'"),
        ("base", "hash", "options.base='hash'"),
        ("base", "stochastic_warmup", "options.base='stochastic_warmup'"),
        ("base_options.scal", 2.5, "options.base_options.scal: unknown config field; did you mean 'scale'"),
        ("base_options.scale", "big", "options.base_options.scale='big': expected float"),
        ("base_options.scale", -1.0, "options.scale=-1.0"),
        ("steps", 0, "options.steps=0"),
        ("decay", 1.0, "options.decay=1.0"),
    ):
        with pytest.raises(UserError) as error:
            config_of(warm | {f"model.moe.options.{field}": value})
        assert message in str(error.value) and "\n" not in str(error.value)
    jitter = FrozenDict(jitter=0.1)
    assert "noise of its own" in refusal("stochastic_warmup", 1, {"base": "switch_top1", "base_options": jitter})


# default_moe


def test_default_moe_adds_the_average_outputs_of_the_other_experts() -> None:
    case, inputs = make_case("default_moe"), make_inputs()
    _, state = make_params(case)
    routing, p_BTE = route(case, inputs), softmax(logits_of(case, inputs))
    others_BTE = np.where(selections(case, routing) > 0, 0, p_BTE) * np.asarray(inputs.valid_BT)[..., None]
    np.testing.assert_allclose(routing.added_BTD, others_BTE @ np.asarray(state["output_ED"]), rtol=1e-4, atol=1e-6)
    unrenormalized = make_case("topk_softmax", renormalize=False)
    np.testing.assert_array_equal(combine(case, routing), combine(unrenormalized, route(unrenormalized, inputs)))
    assert not np.any(route(case, inputs, state={"output_ED": jnp.zeros((8, D))}).added_BTD)


def test_default_moe_samples_are_outputs_of_tokens_that_picked_the_expert() -> None:
    """All of them where `samples` allows; else as many, each among them; and none in evaluation."""
    inputs = make_inputs()
    every, one = make_case("default_moe", samples=T), make_case("default_moe", samples=1)
    routing = route(every, inputs)
    chosen_NE = selections(every, routing).reshape(B * T, 8).astype(np.float32)
    x_ND = np.asarray(inputs.x_BTD).reshape(B * T, D)
    alone = lambda e: TokenPlan(jnp.full((B * T, 1), e, jnp.int32), jnp.ones((B * T, 1)))
    y_END = np.stack([run_linear_experts(8, alone(e), x_ND) for e in range(8)])
    expected = np.einsum("ne,end->ed", chosen_NE, y_END)
    np.testing.assert_allclose(routing.stats["output_sum"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(routing.stats["output_rows"], chosen_NE.sum(0))

    first_row = inputs._replace(segment_ids_BT=inputs.segment_ids_BT.at[1].set(0))
    sampled = route(one, first_row)
    chosen_BTE = selections(one, sampled)
    for e in range(8):
        picked = [y_END[e, n] for n in range(T) if chosen_BTE[0, n, e]]
        assert sampled.stats["output_rows"][e] == min(len(picked), 1)
        assert not picked or min(np.abs(y - sampled.stats["output_sum"][e]).max() for y in picked) < 1e-4
    assert "output_sum" not in route(one, inputs._replace(train=False)).stats


def test_default_moe_averages_move_by_hand_and_stay_without_a_sample() -> None:
    """decay 0.75, mean of the first expert's outputs (4, 8) / 2 = (2, 4): from (0, 4) to (0.5, 4)."""
    case = make_case("default_moe", 2, 1, decay=0.75)
    stats = {"output_sum": jnp.asarray([[4.0, 8.0], [0.0, 0.0]]), "output_rows": jnp.asarray([2.0, 0.0])}
    moved = case.router.update({"output_ED": jnp.asarray([[0.0, 4.0], [1.0, 1.0]])}, stats, case.config)
    np.testing.assert_allclose(moved["output_ED"], [[0.5, 4.0], [1.0, 1.0]])


# dense_gradient


def test_dense_gradient_is_top_k_forwards_and_the_dense_mixture_backwards() -> None:
    case, inputs = make_case("dense_gradient"), make_inputs()
    plain = make_case("topk_softmax", renormalize=False)
    routing = route(case, inputs)
    np.testing.assert_array_equal(combine(case, routing), combine(plain, route(plain, inputs)))
    assert not np.any(routing.added_BTD) and route(case, inputs._replace(train=False)).added_BTD is None

    def dense(params: dict) -> jax.Array:
        x_BTD = jnp.where(inputs.valid_BT[..., None], inputs.x_BTD, 0)
        p_NE = jax.nn.softmax(x_BTD @ params["kernel_DE"]).reshape(B * T, 8)
        ids_NE = jnp.broadcast_to(jnp.arange(8), p_NE.shape)
        return jnp.sum(run_linear_experts(8, TokenPlan(ids_NE, p_NE), x_BTD.reshape(-1, D)) * WEIGHT.reshape(-1, D))

    expected = jax.grad(dense)(make_params(case)[0])["kernel_DE"]
    np.testing.assert_allclose(probe(case, inputs).params["kernel_DE"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_hook_gives_experts_no_gradient() -> None:
    """After one step the last layer's experts are those of plain top k, while its router is not."""
    unclipped = {"optim.clip_norm": 0.0}
    dense, _ = trained(router("dense_gradient") | unclipped, steps=1)
    plain, _ = trained(router("topk_softmax") | unclipped | {"model.moe.options.renormalize": False}, steps=1)
    last = [state.params["moe_blocks"]["moe"] for state in (dense, plain)]
    for name in ("gate_up_ED2F", "down_EFD"):
        np.testing.assert_allclose(*(moe[name][-1] for moe in last), rtol=1e-5, atol=1e-8)
    assert np.any(np.abs(last[0]["router"]["kernel_DE"][-1] - last[1]["router"]["kernel_DE"][-1]) > 1e-6)


REFUSED = [
    ("default_moe", 2, {"decay": 1.0}, "decay=1.0"),
    ("default_moe", 2, {"samples": 0}, "samples=0"),
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
    rule = refusal(name, k, options)
    assert message in rule and "\n" not in rule
