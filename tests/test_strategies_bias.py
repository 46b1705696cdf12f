"""What is specific to the strategies that steer by a bias or a price and limit groups, against numbers by hand.

Letters: B batch, T time, N tokens (B*T), D model, E experts, K choices.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train_step import trained

from frugalmoe.laws.cases import D, combine, make_case, make_inputs, make_params, route, selections
from frugalmoe.laws.routing import LAWS
from frugalmoe.routing import groups, select
from frugalmoe.routing.contract import Inputs, combine_matrix, linear_logits
from frugalmoe.routing.strategies import quantile_balance
from frugalmoe.schema import FrozenDict

REFUSED = [
    ("topk_softmax", 2, {"num_groups": 3}, "num_groups=3"),
    ("topk_softmax", 3, {"num_groups": 4, "groups_per_token": 1}, "num_experts_per_token=3"),
    ("sigmoid_bias", 2, {"score": "sigmoidal"}, "did you mean 'sigmoid'"),
    ("sigmoid_bias", 2, {"group_score": "top3"}, "did you mean 'top2'"),
    ("sigmoid_bias", 2, {"update": "momentums"}, "did you mean 'momentum'"),
    ("sigmoid_bias", 2, {"momentum": 1.0}, "momentum=1.0"),
    ("sigmoid_bias", 2, {"sharpness": 0.0}, "sharpness=0.0"),
    ("sigmoid_bias", 2, {"hash_layers": -1}, "hash_layers=-1"),
    ("sigmoid_bias", 2, {"group_mask": "zeros"}, "did you mean 'zero'"),
    ("sigmoid_bias", 2, {"bias_on": "logits"}, "did you mean 'logit'"),
    ("sigmoid_bias", 2, {"shared": 2}, "shared=2: must be less than num_experts_per_token=2"),
    ("sigmoid_bias", 2, {"shared": -1}, "shared=-1"),
    ("sigmoid_bias", 2, {"softcap": -1.0}, "softcap=-1.0"),
    ("sigmoid_bias", 2, {"epsilon": float("nan")}, "epsilon=nan"),
    ("sigmoid_bias", 2, {"least_sum": float("inf")}, "least_sum=inf"),
    ("quantile_balance", 1, {}, "no gradient"),
    ("quantile_balance", 8, {}, "num_experts_per_token=8"),
    ("quantile_balance", 2, {"score": "sigmoidal"}, "did you mean 'sigmoid'"),
    ("quantile_balance", 2, {"ema": 1.0}, "ema=1.0"),
]


@pytest.mark.parametrize(("name", "k", "options", "message"), REFUSED)
def test_a_bad_option_is_refused_in_one_line(name: str, k: int, options: dict, message: str) -> None:
    refused_in_one_line(name, k, options, message)


def refused_in_one_line(name: str, k: int, options: dict, message: str) -> None:
    case = make_case(name, 8, k, **options)
    rule = case.router.check(case.config)
    assert message in rule and "\n" not in rule


def logits_of(case, inputs) -> np.ndarray:
    return np.asarray(linear_logits(make_params(case)[0], inputs))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_weights_over_a_sum_with_something_added_by_hand() -> None:
    """Scores 1/4 and 1/2: over 3/4 + 1/4; over 3/4, which is more than 1/2; over 1, which is more than 3/4."""
    log = jnp.log(jnp.asarray([0.25, 0.5]))
    np.testing.assert_allclose(select.over_sum(log), [1 / 3, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(select.over_sum(log, epsilon=0.25), [0.25, 0.5], rtol=1e-6)
    np.testing.assert_allclose(select.over_sum(log, least=0.5), [1 / 3, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(select.over_sum(log, least=1.0), [0.25, 0.5], rtol=1e-6)


def test_shared_experts_are_in_every_choice_and_no_step_moves_them() -> None:
    """Loads 1, 3, 2 of the routed and 6 of the shared one: the mean of the routed is 2."""
    case = make_case("sigmoid_bias", 8, 3, shared=1)
    state = case.router.init_state(D, case.config)
    chosen_BTE = selections(case, route(case, make_inputs(), state=state))
    assert np.all(chosen_BTE[np.asarray(make_inputs().valid_BT)][:, -1] == 1)
    four = make_case("sigmoid_bias", 4, 2, shared=1, update_rate=0.5)
    moved = four.router.update(
        four.router.init_state(D, four.config), {"counts": jnp.asarray([1, 3, 2, 6])}, four.config
    )
    np.testing.assert_array_equal(moved["bias_E"], [0.5, -0.5, 0, 1e6])


# Scores and groups


def test_scores_by_hand() -> None:
    """sqrt(ln(1 + e^0)) = sqrt(ln 2); for large z it is sqrt(z), with the slope 1 / (2 sqrt(z))."""
    z = jnp.asarray([0.0, 100.0])
    np.testing.assert_allclose(select.SCORES["sqrt_softplus"](z), [np.sqrt(np.log(2)), 10], rtol=1e-6)
    slope = jax.vmap(jax.grad(select.SCORES["sqrt_softplus"]))
    np.testing.assert_allclose(slope(z), [0.5 / (2 * np.sqrt(np.log(2))), 0.05], rtol=1e-6)
    assert np.all(np.isfinite(slope(jnp.asarray([-60.0, -200.0, -1e6]))))
    np.testing.assert_allclose(select.SCORES["sigmoid"](z), [0.5, 1], rtol=1e-6)
    np.testing.assert_allclose(select.SCORES["softmax"](jnp.log(jnp.asarray([1.0, 3.0]))), [0.25, 0.75], rtol=1e-6)


LOG_SCORES = {  # name -> (log s, its slope), float64
    "sigmoid": (lambda z: -np.logaddexp(0, -z), lambda z: 1 / (1 + np.exp(z))),
    "softmax": (lambda z: z, np.ones_like),
    "sqrt_softplus": (lambda z: log_softplus(z) / 2, lambda z: np.exp(-np.logaddexp(0, -z) - log_softplus(z)) / 2),
}


def log_softplus(z: np.ndarray) -> np.ndarray:
    return np.where(z < -20, z, np.log(np.logaddexp(0, np.maximum(z, -20))))


@pytest.mark.parametrize("level", [-1e4, -90.0, -46.0, -16.0, 0.0, 16.0, 90.0])
@pytest.mark.parametrize("name", LOG_SCORES)
def test_shares_of_scores_that_float32_does_not_have(name: str, level: float) -> None:
    """Weights s_e / sum s and their gradients against float64, with all logits about a level; e^-90 is 0 in float32."""
    z_E = (level + np.asarray([0.0, -0.5, 1.25, 2.0])).astype(np.float32)
    log_score, slope = LOG_SCORES[name]
    expected_E = softmax(log_score(z_E.astype(np.float64)))
    shares = lambda z_E: select.shares(select.LOG_SCORES[name](z_E))
    np.testing.assert_allclose(shares(z_E), expected_E, rtol=1e-5)
    jacobian_EE = (np.diag(expected_E) - np.outer(expected_E, expected_E)) * slope(z_E.astype(np.float64))
    np.testing.assert_allclose(jax.jacobian(shares)(z_E), jacobian_EE, rtol=1e-4, atol=1e-6)
    plain = np.exp(log_score(z_E.astype(np.float64))) if name != "softmax" else expected_E
    np.testing.assert_allclose(select.SCORES[name](z_E), plain, rtol=2e-5, atol=1e-37)


@pytest.mark.parametrize("name", ["sigmoid_bias", "quantile_balance"])
@pytest.mark.parametrize("score", LOG_SCORES)
def test_the_choice_by_a_bias_beyond_all_scores_has_exact_weights(name: str, score: str) -> None:
    """Experts 6 and 7 by their bias, whose logits are the least: -90, and 100 below those of others."""
    case, rows = make_case(name, score=score), np.asarray([[20, 0, 0, 0, 0, 0, -90, -89], [10.0] * 6 + [-90, -89]])
    ones = jnp.ones((1, 2), jnp.int32)
    inputs = Inputs(jnp.asarray(rows[None], jnp.float32), ones, ones, ones, None, jnp.int32(0), jnp.int32(0))
    bias_E = 1e3 * (jnp.arange(8) >= 6)
    state = {"bias_E": bias_E} if name == "sigmoid_bias" else {"beta_E": -bias_E}
    g_TE = combine_matrix(route(case, inputs, {"kernel_DE": jnp.eye(8)}, state).plan, 2, 8)
    expected = softmax(LOG_SCORES[score][0](rows[:, 6:]))
    np.testing.assert_allclose(g_TE[:, 6:], expected, rtol=1e-5)


def test_the_sequence_loss_counts_the_largest_scores_whatever_bias_and_groups_chose() -> None:
    """DeepSeek-V3, eq. 18; `load_balance` counts what was executed."""
    limits = {"num_groups": 4, "groups_per_token": 1}
    for name, options in (("sigmoid_bias", {}), ("topk_softmax", limits), ("quantile_balance", {}), ("moge", {})):
        case, inputs = make_case(name, **options), make_inputs(padded=False)
        state = {key: 3.0 * (-1) ** jnp.arange(8) for key in case.router.init_state(D, case.config)}
        routing, z_BTE = route(case, inputs, state=state), logits_of(case, inputs)
        s_BTE = softmax(z_BTE) if name in ("topk_softmax", "moge") else 1 / (1 + np.exp(-z_BTE))
        f_BTE = s_BTE >= np.sort(s_BTE, axis=-1)[..., -2:-1]
        assert not np.array_equal(f_BTE, selections(case, routing))
        p_BTE = s_BTE / s_BTE.sum(-1, keepdims=True)
        loss_B = 8 / 2 * np.sum(f_BTE.mean(1) * p_BTE.mean(1), axis=-1)
        np.testing.assert_allclose(routing.losses["sequence_balance"].sum, loss_B.sum(), rtol=1e-5)
        assert abs(float(routing.losses["load_balance"].sum) - loss_B.sum()) > 1e-3


def test_a_group_scores_its_largest_or_its_two_largest() -> None:
    """Groups (0.9, 0.1, 0) and (0.6, 0.5, 0): the first has the maximum, the second the sum, 1.1 against 1.0."""
    score = jnp.asarray([[[0.9, 0.1, 0.0, 0.6, 0.5, 0.0]]])
    assert groups.top_k(score, 2, 2, 1, best=1).expert_BTK.tolist() == [[[0, 1]]]
    assert groups.top_k(score, 2, 2, 1, best=2).expert_BTK.tolist() == [[[3, 4]]]
    assert groups.top_k(score, 2, 2, 2, best=2).expert_BTK.tolist() == [[[0, 3]]]


def test_topk_softmax_takes_the_groups_of_the_largest_logits() -> None:
    """Device-limited routing: groups of two, one group per token, which is then that of the largest logit."""
    case, inputs = make_case("topk_softmax", num_groups=4, groups_per_token=1), make_inputs(padded=False)
    z_BTE = logits_of(case, inputs)
    kept_BTE = np.repeat(np.eye(4)[z_BTE.argmax(-1) // 2], 2, axis=-1)
    p_BTE = np.exp(z_BTE) * kept_BTE
    np.testing.assert_allclose(combine(case, route(case, inputs)), p_BTE / p_BTE.sum(-1, keepdims=True), rtol=1e-5)


# sigmoid_bias


@pytest.mark.parametrize("score", ["softmax", "sqrt_softplus"])
def test_weights_are_the_chosen_score_and_the_bias_steers_it(score: str) -> None:
    case, inputs = make_case("sigmoid_bias", score=score, scale=1.5), make_inputs(padded=False)
    z_BTE, bias_E = logits_of(case, inputs), np.linspace(-0.3, 0.3, 8).astype(np.float32)
    s_BTE = softmax(z_BTE) if score == "softmax" else np.sqrt(np.log1p(np.exp(z_BTE)))
    cut_BT1 = np.sort(s_BTE + bias_E, axis=-1)[..., -2:-1]
    kept_BTE = np.where(s_BTE + bias_E >= cut_BT1, s_BTE, 0)
    g_BTE = combine(case, route(case, inputs, state={"bias_E": jnp.asarray(bias_E)}))
    np.testing.assert_allclose(g_BTE, 1.5 * kept_BTE / kept_BTE.sum(-1, keepdims=True), rtol=1e-4)


def test_proportional_update_by_hand() -> None:
    case = make_case("sigmoid_bias", 4, 2, update="proportional", update_rate=0.5)
    state = {"bias_E": jnp.asarray([0.0, 1.0, 0.0, 0.0])}
    moved = case.router.update(state, {"counts": jnp.asarray([4, 10, 6, 0])}, case.config)["bias_E"]
    np.testing.assert_allclose(moved, [0.1, 0.5, -0.1, 0.5], rtol=1e-6)  # mean 5: (1, -5, -1, 5) / 5 / 2
    still = case.router.update(state, {"counts": jnp.zeros(4, jnp.int32)}, case.config)["bias_E"]
    np.testing.assert_array_equal(still, state["bias_E"])  # a layer that saw no token


def test_momentum_update_by_hand() -> None:
    """Counts (20, 0, 0, 0), mean 5: v = tanh(0.5 * (-3, 1, 1, 1)), less its mean; m = v / 4, then 1.75 v / 4."""
    case = make_case("sigmoid_bias", 4, 2, update="momentum", update_rate=0.1, momentum=0.75, sharpness=0.5)
    v = np.tanh([-1.5, 0.5, 0.5, 0.5])
    v -= v.mean()
    state = case.router.init_state(D, case.config)
    assert set(state) == {"bias_E", "momentum_E"}
    counts = {"counts": jnp.asarray([20, 0, 0, 0])}
    once = case.router.update(state, counts, case.config)
    np.testing.assert_allclose(once["bias_E"], 0.1 * v / 4, rtol=1e-5)
    twice = case.router.update(once, counts, case.config)
    np.testing.assert_allclose(twice["momentum_E"], (0.75 + 1) * v / 4, rtol=1e-5)
    np.testing.assert_allclose(twice["bias_E"], 0.1 * (v / 4 + 1.75 * v / 4), rtol=1e-5)
    np.testing.assert_allclose(twice["bias_E"].sum(), 0, atol=1e-7)


def test_a_momentum_step_is_bounded_by_the_rate() -> None:
    """|v| <= 1 whatever the load, and centring takes its mean of E entries away: |v - mean| <= 2 (1 - 1/E)."""
    case = make_case("sigmoid_bias", 4, 2, update="momentum", update_rate=0.1, sharpness=100.0)
    state = case.router.init_state(D, case.config)
    for _ in range(50):
        moved = case.router.update(state, {"counts": jnp.asarray([10**6, 0, 0, 0])}, case.config)
        assert np.abs(moved["bias_E"] - state["bias_E"]).max() <= 0.1 * 1.5 + 1e-6
        state = moved


HASHED = make_case("sigmoid_bias", hash_layers=1, score="sqrt_softplus")
# Laws of layers that compare scores; the balance losses of the others are 0, see the next test.
STEERED_ONLY = {"expert_permutation", "balance_direction", "loss_values", "state", "ties"}


@pytest.mark.slow
@pytest.mark.parametrize("law", sorted(set(LAWS) - STEERED_ONLY))
def test_a_hash_layer_obeys_the_laws(law: str) -> None:
    LAWS[law](HASHED)


def test_hash_layers_choose_by_token_id_and_weigh_by_score() -> None:
    inputs, plain = make_inputs(padded=False), make_case("sigmoid_bias", score="sqrt_softplus")
    first = route(HASHED, inputs)
    chosen_BTE = selections(HASHED, first)
    np.testing.assert_array_equal(chosen_BTE, selections(make_case("hash"), route(make_case("hash"), inputs)))
    kept_BTE = chosen_BTE * np.sqrt(np.log1p(np.exp(logits_of(HASHED, inputs))))
    np.testing.assert_allclose(combine(HASHED, first), kept_BTE / kept_BTE.sum(-1, keepdims=True), rtol=1e-4)
    assert first.losses["load_balance"].sum == first.losses["sequence_balance"].sum == first.stats["ties"] == 0
    devices = {"load_balance_devices": 2, "losses": FrozenDict(device_balance=1.0)}
    of_devices = make_case("sigmoid_bias", moe=devices, hash_layers=1)
    assert route(of_devices, inputs).losses["device_balance"].sum == 0
    deeper = inputs._replace(layer=jnp.int32(1))
    np.testing.assert_array_equal(*(combine(case, route(case, deeper)) for case in (HASHED, plain)))
    assert route(HASHED, deeper).losses["load_balance"].sum > 0


@pytest.mark.slow
def test_the_bias_of_hash_layers_stays_and_that_of_the_others_moves() -> None:
    state, _ = trained({"model.moe.router": "sigmoid_bias", "model.moe.options.hash_layers": 1})
    bias_LE = state.router_state["moe_blocks"]["moe"]["router_state"]["bias_E"]
    assert np.all(bias_LE[0] == 0) and np.all(bias_LE[1] != 0)


# quantile_balance


def test_quantiles_by_hand() -> None:
    """Four tokens, two experts, K = 1, q = 2: the third largest of s - alpha, alpha the smaller score of the token.

    Scores .9 .8 .7 .6 and .1 .2 .3 .4: margins of expert 0 are .8 .6 .4 .2, of expert 1 are 0. The second sequence has
    the first three tokens: q = 1.5, halfway between the second and third of .8 .6 .4. The third is empty.
    """
    score = jnp.tile(jnp.asarray([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]), (3, 1, 1))
    valid_BT = jnp.asarray([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_allclose(quantile_balance.quantiles(score, valid_BT, 1), [[0.4, 0], [0.5, 0], [0, 0]], rtol=1e-6)


def test_sums_of_prices_add_up_over_parts_of_the_batch() -> None:
    case, inputs = make_case("quantile_balance"), make_inputs()
    whole = route(case, inputs).stats["beta_sum"]
    parts = [route(case, inputs.of_sequences(lambda a, b=b: a[b : b + 1])).stats["beta_sum"] for b in (0, 1)]
    np.testing.assert_allclose(parts[0] + parts[1], whole, rtol=1e-5, atol=1e-6)


def test_prices_are_means_over_tokens_centred_and_averaged() -> None:
    """Sums (4, 0) over 10 tokens: (0.4, 0), centred (0.2, -0.2); with ema 0.75, 0.75 * (1, -1) + 0.25 * (0.4, 0)."""
    sums = {"beta_sum": jnp.asarray([4.0, 0.0]), "tokens": jnp.int32(10)}
    old = {"beta_E": jnp.asarray([1.0, -1.0])}
    for ema, expected in ((0.0, [0.2, -0.2]), (0.75, [0.8, -0.8])):  # 0.85, -0.75 less their mean 0.05
        case = make_case("quantile_balance", 2, 1, renormalize=False, ema=ema)
        np.testing.assert_allclose(case.router.update(old, sums, case.config)["beta_E"], expected, rtol=1e-6)


def test_prices_steer_the_selection_and_never_the_weights() -> None:
    case, inputs = make_case("quantile_balance", scale=2.0), make_inputs(padded=False)
    beta_E = np.linspace(-0.3, 0.3, 8).astype(np.float32)
    s_BTE = 1 / (1 + np.exp(-logits_of(case, inputs)))
    kept_BTE = np.where(s_BTE - beta_E >= np.sort(s_BTE - beta_E, axis=-1)[..., -2:-1], s_BTE, 0)
    g_BTE = combine(case, route(case, inputs, state={"beta_E": jnp.asarray(beta_E)}))
    np.testing.assert_allclose(g_BTE, 2 * kept_BTE / kept_BTE.sum(-1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("score", ["sigmoid", "softmax", "sqrt_softplus"])
def test_a_few_steps_balance_a_skewed_load_whatever_the_range_of_the_scores(score: str) -> None:
    """From a violation above 1 to below 0.1 in five steps on a frozen batch, with no step size to choose."""
    case = make_case("quantile_balance", 8, 2, score=score)
    x_BTD = np.random.default_rng(0).normal(size=(4, 256, 8)) + np.linspace(-1.5, 1.5, 8)
    ones = jnp.ones((4, 256), jnp.int32)
    inputs = Inputs(jnp.asarray(x_BTD, jnp.float32), ones, ones, ones, None, None, None)

    @jax.jit
    def step(state: dict) -> tuple[dict, jax.Array]:
        sums = case.router.route({"kernel_DE": jnp.eye(8)}, state, inputs, case.config).stats
        return case.router.update(state, sums, case.config), sums["counts"].max() / sums["counts"].mean() - 1

    state, violations = case.router.init_state(D, case.config), []
    for _ in range(6):
        state, violation = step(state)
        violations.append(float(violation))
    assert violations[0] > 1 and violations[-1] < 0.1, violations
    np.testing.assert_allclose(state["beta_E"].sum(), 0, atol=1e-5)
