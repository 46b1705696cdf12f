"""What is particular to one strategy: dynamic numbers of experts, groups, geometry of the gate, gradient estimators.

Letters: B batch, T time, D model, E experts, K choices or slots, G groups of experts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugalmoe.errors import UserError
from frugalmoe.laws.cases import B, D, T, combine, make_case, make_inputs, make_params, probe, route, selections
from frugalmoe.routing import stats
from frugalmoe.routing.contract import Inputs, linear_logits
from frugalmoe.routing.strategies import cosine
from frugalmoe.schema import FrozenDict


def logits_of(case, inputs: Inputs) -> np.ndarray:
    return np.asarray(linear_logits(make_params(case)[0], inputs))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def with_logits(logits_BTE: np.ndarray) -> tuple[Inputs, dict]:
    """Inputs and a linear gate whose logits are these (E = D = 8)."""
    identity = {"kernel_DE": jnp.eye(D)}
    logits_BTE = jnp.broadcast_to(jnp.asarray(logits_BTE, jnp.float32), (B, T, D))
    return make_inputs(padded=False)._replace(x_BTD=logits_BTE), identity


# top_p


def test_top_p_takes_the_smallest_set_that_reaches_the_threshold() -> None:
    """The set holds p, and less than p without its least expert; weights are the probabilities as they are."""
    case, inputs = make_case("top_p", threshold=0.6, max_experts=8), make_inputs(padded=False)
    p_BTE, g_BTE = softmax(logits_of(case, inputs)), combine(case, route(case, inputs))
    held_BT = g_BTE.sum(-1)
    least_BT = np.where(g_BTE > 0, g_BTE, 1).min(-1)
    assert np.all(np.where(g_BTE > 0, 0, p_BTE).max(-1) < least_BT)
    assert np.all(held_BT >= 0.6) and np.all(held_BT - least_BT < 0.6)
    np.testing.assert_allclose(g_BTE, np.where(g_BTE > 0, p_BTE, 0), rtol=1e-5)
    assert len(np.unique((g_BTE > 0).sum(-1))) > 2  # the number of experts does vary


@pytest.mark.parametrize(("threshold", "experts"), [(0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.99, 8)])
def test_top_p_at_the_threshold(threshold: float, experts: int) -> None:
    """p = 1/2, 1/4, 1/8 and 1/40 five times, so that prefixes hold 0.5, 0.75, 0.875, 0.9, ... 0.975, 1."""
    inputs, params = with_logits(np.log([1 / 2, 1 / 4, 1 / 8] + [1 / 40] * 5))
    case = make_case("top_p", threshold=threshold, max_experts=8)
    chosen_BTE = selections(case, route(case, inputs, params))
    assert np.all(chosen_BTE.sum(-1) == experts)
    assert np.all(chosen_BTE[..., : min(experts, 3)] == 1)


def test_top_p_counts_what_its_slots_cut() -> None:
    """All experts equal: 0.9 takes 8 of 8, 3 have a slot, 5 of each of the 16 tokens overflow."""
    inputs, params = with_logits(np.zeros(8))
    case = make_case("top_p", threshold=0.9, max_experts=3, renormalize=True)
    routing = route(case, inputs, params)
    np.testing.assert_allclose(combine(case, routing).sum(-1), 1, rtol=1e-6)
    assert routing.stats["assigned"] == 16 * 3 and routing.stats["overflow"] == 16 * 5
    metrics = stats.metrics(routing.stats)
    assert metrics["overflow_rate"] == pytest.approx(5 / 8) and metrics["active_per_token"] == 3


def test_the_entropy_loss_makes_the_sets_smaller() -> None:
    case = make_case("top_p", max_experts=8, moe={"losses": FrozenDict(token_entropy=1.0)})
    inputs = make_inputs()
    silent = np.zeros((B, T, D), np.float32)
    step = probe(case, inputs, silent, token_entropy=1.0).params
    sharper = jax.tree.map(lambda p, g: p - 0.1 * g, make_params(case)[0], step)
    before, after = route(case, inputs), route(case, inputs, sharper)
    assert after.stats["entropy_sum"] < before.stats["entropy_sum"]
    assert after.stats["assigned"] < before.stats["assigned"]


# relu


def test_relu_weights_are_the_positive_logits() -> None:
    case, inputs = make_case("relu", max_experts=8), make_inputs(padded=False)
    np.testing.assert_allclose(combine(case, route(case, inputs)), np.maximum(logits_of(case, inputs), 0), rtol=1e-5)


def test_relu_keeps_the_best_where_the_slots_do_not_reach() -> None:
    """Six positive logits, three slots: the three largest, three overflow per token."""
    inputs, params = with_logits(np.asarray([5.0, -1, 1, 4, 3, 2, -2, 6]))
    case = make_case("relu", max_experts=3)
    routing = route(case, inputs, params)
    np.testing.assert_allclose(combine(case, routing)[0, 0], [5, 0, 0, 4, 0, 0, 0, 6])
    assert routing.stats["overflow"] == 3 * B * T


def test_relu_normalized_by_its_root_mean_square() -> None:
    """R = [3, 4, 0 ...]: mean square 25/8, so weights are R * sqrt(8)/5 times the scale of the expert; zeros stay."""
    inputs, params = with_logits(np.asarray([3.0, 4, -1, -1, -1, -1, -1, -1]))
    case = make_case("relu", rms_norm=True)
    g_E = combine(case, route(case, inputs, params | {"scale_E": jnp.arange(1.0, 9)}))[0, 0]
    np.testing.assert_allclose(g_E, np.asarray([3 * 1, 4 * 2, 0, 0, 0, 0, 0, 0]) * 8**0.5 / 5, rtol=1e-5)


def test_relu_penalty_by_hand_and_its_coefficient() -> None:
    """Every token has R = [3, 1, 0 ...]: f = 1/2 for two experts, 8 * (3 + 1) / 2 = 16 per sequence, lambda times."""
    inputs, params = with_logits(np.asarray([3.0, 1, -1, -1, -1, -1, -1, -1]))
    case = make_case("relu")
    loss = route(case, inputs, params, {"log_lambda": jnp.log(0.5)}).losses["l1"]
    assert loss.per == "sequence" and loss.sum == pytest.approx(0.5 * 16 * B, rel=1e-6)


@pytest.mark.parametrize(("active", "factor"), [(3.0, 1.2), (2.0, 1.0), (1.0, 1 / 1.2)])
def test_relu_coefficient_follows_the_number_of_active_experts(active: float, factor: float) -> None:
    """K = 2: more than 2 positive logits per token raise lambda, fewer lower it. Those without a slot count too."""
    case = make_case("relu")
    summed = {"tokens": jnp.int32(100), "assigned": jnp.int32(100 * active - 50), "overflow": jnp.int32(50)}
    moved = case.router.update({"log_lambda": jnp.log(1e-3)}, summed, case.config)
    assert np.exp(moved["log_lambda"]) == pytest.approx(1e-3 * factor, rel=1e-5)
    least = case.router.init_state(D, case.config)
    assert case.router.update(least, summed, case.config)["log_lambda"] >= least["log_lambda"]


def test_the_penalty_leads_a_relu_gate_to_k_active_experts() -> None:
    """From half of all experts to K = 2 of 8, by gradient steps on the penalty alone and its controller."""
    case, inputs = make_case("relu", alpha=1.5, initial=1e-3), make_inputs(padded=False)

    @jax.jit
    def step(params: dict, state: dict) -> tuple[dict, dict, jax.Array]:
        def penalty(params: dict) -> tuple[jax.Array, dict]:
            routing = case.router.route(params, state, inputs, case.config)
            return routing.losses["l1"].sum / B, routing.stats

        gradient, summed = jax.grad(penalty, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - 0.02 * g, params, gradient)
        return params, case.router.update(state, summed, case.config), summed["assigned"] / summed["tokens"]

    params, state = make_params(case)[0], case.router.init_state(D, case.config)
    active = []
    for _ in range(60):
        params, state, mean = step(params, state)
        active.append(float(mean))
    assert active[0] > 3 and min(abs(a - 2) for a in active) <= 0.25


@pytest.mark.parametrize("name", ["relu", "top_p"])
def test_slots_default_to_four_times_the_nominal_number(name: str) -> None:
    assert route(make_case(name, 8, 1), make_inputs()).plan.expert_NK.shape[1] == 4
    assert route(make_case(name, 8, 2), make_inputs()).plan.expert_NK.shape[1] == 8


# moge


@pytest.mark.parametrize(("k", "groups"), [(2, 2), (4, 2), (4, 4), (8, 4)])
def test_every_token_takes_equally_many_experts_of_every_group(k: int, groups: int) -> None:
    """The K/G most probable of each group; so the loads of groups are equal, to the token."""
    case, inputs = make_case("moge", 8, k, num_groups=groups), make_inputs(padded=False)
    p_BTGe = softmax(logits_of(case, inputs)).reshape(B, T, groups, -1)
    cut_BTG1 = np.sort(p_BTGe, axis=-1)[..., -k // groups][..., None]
    g_BTE = combine(case, route(case, inputs))
    np.testing.assert_allclose(g_BTE.reshape(p_BTGe.shape), np.where(p_BTGe >= cut_BTG1, p_BTGe, 0), rtol=1e-5)
    load_G = selections(case, route(case, inputs)).sum((0, 1)).reshape(groups, -1).sum(-1)
    assert np.all(load_G == B * T * k // groups)


def test_one_group_is_plain_top_k() -> None:
    one, plain = make_case("moge", num_groups=1), make_case("topk_softmax", renormalize=False)
    np.testing.assert_allclose(*(combine(case, route(case, make_inputs())) for case in (one, plain)), rtol=1e-6)


# cosine


def test_cosine_ignores_the_lengths_of_tokens_and_of_experts() -> None:
    case, inputs = make_case("cosine", renormalize=False), make_inputs(padded=False)
    params = make_params(case)[0]
    stretched = params | {"expert_PE": params["expert_PE"] * jnp.linspace(0.5, 2, 8)}
    longer = inputs._replace(x_BTD=inputs.x_BTD * jnp.linspace(0.5, 3, T)[:, None])
    np.testing.assert_allclose(
        combine(case, route(case, longer, stretched)), combine(case, route(case, inputs)), rtol=1e-4
    )


@pytest.mark.parametrize(("temperature", "largest"), [(0.5, 2.0), (1e-6, 100.0)])
def test_cosine_logits_are_at_most_one_over_the_clamped_temperature(temperature: float, largest: float) -> None:
    case, inputs = make_case("cosine"), make_inputs(padded=False)
    params = make_params(case)[0] | {"log_inverse_temperature": -jnp.log(temperature)}
    aligned = params | {"projection_DP": jnp.eye(D), "expert_PE": jnp.eye(D)}
    z_BTE = cosine.logits(
        aligned, inputs._replace(x_BTD=jnp.broadcast_to(3 * jnp.eye(D), (B, T, D))), case.config.options
    )
    np.testing.assert_allclose(z_BTE, np.broadcast_to(largest * np.eye(D), (B, T, D)), rtol=1e-5, atol=1e-6)


# gemma4


def test_gemma4_ignores_the_length_of_a_token_and_scales_experts_after_normalizing() -> None:
    case, inputs = make_case("gemma4"), make_inputs(padded=False)
    params, scale_E = make_params(case)[0], np.arange(1, 9)
    x_BTD = np.asarray(inputs.x_BTD)
    direction = x_BTD / np.sqrt(np.square(x_BTD).mean(-1, keepdims=True)) / np.sqrt(D)
    p_BTE = softmax(direction @ np.asarray(params["kernel_DE"]))
    kept_BTE = np.where(p_BTE >= np.sort(p_BTE)[..., -2:-1], p_BTE, 0)
    expected = scale_E * kept_BTE / kept_BTE.sum(-1, keepdims=True)
    scaled = params | {"output_scale_E": jnp.asarray(scale_E, jnp.float32)}
    np.testing.assert_allclose(combine(case, route(case, inputs, scaled)), expected, rtol=1e-4)
    longer = inputs._replace(x_BTD=inputs.x_BTD * 7)
    np.testing.assert_allclose(combine(case, route(case, longer, scaled)), expected, rtol=1e-4)


# self_routing


def test_self_routing_reads_its_logits_off_the_input() -> None:
    case, inputs = make_case("self_routing", 4, 2), make_inputs(padded=False)
    z_BTE = np.asarray(inputs.x_BTD)[..., :4]
    kept_BTE = np.where(z_BTE >= np.sort(z_BTE)[..., -2:-1], np.exp(z_BTE), 0)
    np.testing.assert_allclose(
        combine(case, route(case, inputs)), kept_BTE / kept_BTE.sum(-1, keepdims=True), rtol=1e-5
    )
    assert make_params(case)[0] == {}


def test_self_routing_needs_a_channel_per_expert() -> None:
    case = make_case("self_routing", 16, 2)
    with pytest.raises(UserError, match=r"num_experts=16: .* at most model.dim=8"):
        make_params(case)


# sparsemixer


def test_sparsemixer_evaluates_the_largest_of_the_nearly_largest() -> None:
    """Logits 2, 1.7, 1.5, 0, ...: 2 - z > 0.2 * 2 leaves out 1.5 and less; p of the first is 1 / (1 + e^-0.3).

    Then 1.7, with 1.5 near it (0.2 < 0.34): p = 1 / (1 + e^-0.2).
    """
    inputs, params = with_logits(np.asarray([0, 2, 0, 1.7, 0, 1.5, 0, 0]))
    case = make_case("sparsemixer")
    g_E = combine(case, route(case, inputs._replace(train=False), params))[0, 0]
    expected = np.zeros(8)
    expected[[1, 3]] = 1 / (1 + np.exp([-0.3, -0.2]))
    np.testing.assert_allclose(g_E, expected, rtol=1e-5)


def many(logits_E: np.ndarray, tokens: int) -> tuple[Inputs, dict]:
    """One sequence of equal tokens, each with noise of its own."""
    x_BTD = jnp.broadcast_to(jnp.asarray(logits_E, jnp.float32), (1, tokens, logits_E.size))
    ones, positions = jnp.ones((1, tokens), jnp.int32), jnp.arange(tokens, dtype=jnp.int32)[None]
    keys = jax.random.split(jax.random.key(0), 1)
    inputs = Inputs(x_BTD, ones, ones, positions, keys, jnp.int32(0), jnp.int32(0), True)
    return inputs, {"kernel_DE": jnp.eye(logits_E.size)}


def test_sparsemixer_draws_from_its_softmax_and_shrinks_some_weights() -> None:
    """20,000 draws: frequencies are p; the largest has weight p, others p a quarter of the time and p/3 the rest."""
    logits_E, n = np.asarray([0.0, 0.4, 0.8]), 20_000
    p_E = softmax(logits_E)
    inputs, params = many(logits_E, n)
    plan = route(make_case("sparsemixer", 3, 1, epsilon=10.0), inputs, params).plan
    expert_N, weight_N = np.asarray(plan.expert_NK)[:, 0], np.asarray(plan.weight_NK)[:, 0]
    counts_E = np.bincount(expert_N, minlength=3)
    assert np.all(np.abs(counts_E - n * p_E) < 5 * np.sqrt(n * p_E * (1 - p_E)))
    np.testing.assert_allclose(weight_N[expert_N == 2], p_E[2], rtol=1e-5)
    for e in (0, 1):
        drawn = weight_N[expert_N == e]
        full = np.isclose(drawn, p_E[e], rtol=1e-5)
        np.testing.assert_allclose(drawn[~full], p_E[e] / 3, rtol=1e-5)
        assert abs(full.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / full.size)


def test_sparsemixer_estimates_the_gradient_of_the_expected_loss() -> None:
    """Loss g_s(w) = a_s w + b_s w^2 of the drawn expert's weight; by the quadrature the mean gradient over draws is

    sum_s g_s(p_s) dp_s/dz, with dp_s/dz_j = p_s ([j = s] - p_j), and for the largest expert p_s g_s'(p_s) for g_s(p_s).
    """
    logits_E, n = np.asarray([0.0, 0.4, 0.8]), 50_000
    a_E, b_E, p_E = np.asarray([1.0, -2.0, 0.5]), np.asarray([2.0, 1.0, -1.0]), softmax(logits_E)
    inputs, params = many(logits_E, n)
    case = make_case("sparsemixer", 3, 1, epsilon=10.0)

    @jax.jit
    def gradient(x_BTD: jax.Array) -> jax.Array:
        def loss(x_BTD: jax.Array) -> jax.Array:
            plan = case.router.route(params, {}, inputs._replace(x_BTD=x_BTD), case.config).plan
            a_N1, b_N1 = jnp.asarray(a_E)[plan.expert_NK], jnp.asarray(b_E)[plan.expert_NK]
            return jnp.sum(a_N1 * plan.weight_NK + b_N1 * plan.weight_NK**2)

        return jax.grad(loss)(x_BTD)[0]

    g_E = a_E * p_E + b_E * p_E**2
    g_E[2] = p_E[2] * (a_E[2] + 2 * b_E[2] * p_E[2])
    expected_E = g_E * p_E - p_E * np.sum(g_E * p_E)
    sample_NE = np.asarray(gradient(inputs.x_BTD))
    error_E = sample_NE.std(0) / np.sqrt(n)
    assert np.all(np.abs(sample_NE.mean(0) - expected_E) < 5 * error_E) and np.all(error_E < 0.02 * np.abs(g_E).max())


# lpr


def test_lpr_weights_are_a_softmax_of_cosines_in_the_latent_space() -> None:
    """By hand: layer norm, SiLU, linear; both vectors to length 1."""
    case, inputs = make_case("lpr"), make_inputs(padded=False)
    params, x_BTD = jax.tree.map(np.asarray, make_params(case)[0]), np.asarray(inputs.x_BTD)
    h_BTD = (x_BTD - x_BTD.mean(-1, keepdims=True)) / x_BTD.std(-1, keepdims=True)
    mu_BTP = (h_BTD / (1 + np.exp(-h_BTD))) @ params["encoder_DP"] + params["bias_P"]
    unit_BTP = mu_BTP / np.linalg.norm(mu_BTP, axis=-1, keepdims=True)
    prototype_PE = params["prototype_PE"] / np.linalg.norm(params["prototype_PE"], axis=0)
    p_BTE = np.exp(unit_BTP @ prototype_PE)
    kept_BTE = np.where(p_BTE >= np.sort(p_BTE)[..., -2:-1], p_BTE, 0)
    routing = route(case, inputs)
    expected = kept_BTE / kept_BTE.sum(-1, keepdims=True)
    np.testing.assert_allclose(combine(case, routing), expected, rtol=1e-4)
    assert routing.losses["latent_kl"].sum == pytest.approx(np.square(mu_BTP).sum() / 2, rel=1e-4)
    distance_BTE = 2 - 2 * unit_BTP @ prototype_PE
    assert routing.losses["prototype_alignment"].sum == pytest.approx(np.sum(expected * distance_BTE), rel=1e-4)


def test_lpr_diversity_is_zero_for_orthogonal_prototypes_and_spreads_others() -> None:
    case, inputs = make_case("lpr"), make_inputs()
    params = make_params(case)[0]
    orthogonal = params | {"prototype_PE": jnp.eye(16)[:, :8] * 3}
    assert route(case, inputs, orthogonal).losses["prototype_diversity"].sum == pytest.approx(0, abs=1e-6)
    equal = params | {"prototype_PE": jnp.ones((16, 8))}
    one = route(case, inputs, equal).losses["prototype_diversity"]
    assert one.per == "token" and one.sum / 14 == pytest.approx(56 / 64, rel=1e-5)  # 8 * 7 pairs of 64 have cosine 1
    before = route(case, inputs).losses["prototype_diversity"].sum
    silent = np.zeros((B, T, D), np.float32)
    step = probe(case, inputs, silent, prototype_diversity=1.0).params
    spread = jax.tree.map(lambda p, g: p - 1e-2 * g, params, step)
    assert route(case, inputs, spread).losses["prototype_diversity"].sum < before


# Options

REFUSED = [
    ("top_p", 2, {"threshold": 0.0}, "threshold=0.0"),
    ("top_p", 2, {"threshold": 1.5}, "threshold=1.5"),
    ("top_p", 2, {"max_experts": 1}, "max_experts=1"),
    ("top_p", 2, {"max_experts": 9}, "max_experts=9"),
    ("top_p", 1, {"max_experts": 1, "renormalize": True}, "no gradient"),
    ("relu", 2, {"alpha": 0.9}, "alpha=0.9"),
    ("relu", 2, {"initial": 0.0}, "initial=0.0"),
    ("relu", 2, {}, "model.moe.losses.l1"),
    ("moge", 3, {"num_groups": 2}, "num_groups=2"),
    ("moge", 2, {"num_groups": 0}, "num_groups=0"),
    ("moge", 1, {"num_groups": 1, "renormalize": True}, "no gradient"),
    ("cosine", 1, {}, "no gradient"),
    ("cosine", 2, {"projection": 0}, "projection=0"),
    ("cosine", 2, {"temperature": 0.001}, "temperature=0.001"),
    ("cosine", 2, {"min_temperature": 0.0}, "min_temperature=0.0"),
    ("gemma4", 1, {}, "no gradient"),
    ("self_routing", 1, {}, "no gradient"),
    ("sparsemixer", 2, {"epsilon": 0.0}, "epsilon=0.0"),
    ("lpr", 1, {}, "no gradient"),
    ("lpr", 2, {"latent": 1}, "latent=1"),
    ("lpr", 2, {"temperature": float("nan")}, "temperature=nan"),
]


@pytest.mark.parametrize(("name", "k", "options", "message"), REFUSED)
def test_a_bad_option_is_refused_in_one_line(name: str, k: int, options: dict, message: str) -> None:
    case = make_case(name, 8, k, **options)
    rule = case.router.check(case.config)
    assert message in rule and "\n" not in rule
