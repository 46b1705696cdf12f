"""What is particular to one strategy: dynamic numbers of experts, groups, geometry of the gate, gradient estimators.

Letters: B batch, T time, D model, E experts, K choices or slots, G groups of experts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routing_cases import B, D, T, combine, make_case, make_inputs, make_params, probe, route, selections

from frugalmoe.config.schema import FrozenDict
from frugalmoe.routing import stats
from frugalmoe.routing.contract import Inputs, linear_logits


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


def test_relu_normalised_by_its_root_mean_square() -> None:
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
    least = case.router.init_state(case.config)
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

    params, state = make_params(case)[0], case.router.init_state(case.config)
    active = []
    for _ in range(60):
        params, state, mean = step(params, state)
        active.append(float(mean))
    assert active[0] > 3 and min(abs(a - 2) for a in active) <= 0.25


@pytest.mark.parametrize("name", ["relu", "top_p"])
def test_slots_default_to_four_times_the_nominal_number(name: str) -> None:
    assert route(make_case(name, 8, 1), make_inputs()).plan.expert_NK.shape[1] == 4
    assert route(make_case(name, 8, 2), make_inputs()).plan.expert_NK.shape[1] == 8


REFUSED = [
    ("top_p", 2, {"threshold": 0.0}, "threshold=0.0"),
    ("top_p", 2, {"threshold": 1.5}, "threshold=1.5"),
    ("top_p", 2, {"max_experts": 1}, "max_experts=1"),
    ("top_p", 2, {"max_experts": 9}, "max_experts=9"),
    ("top_p", 1, {"max_experts": 1, "renormalize": True}, "no gradient"),
    ("relu", 2, {"alpha": 0.9}, "alpha=0.9"),
    ("relu", 2, {"initial": 0.0}, "initial=0.0"),
    ("relu", 2, {}, "model.moe.losses.l1"),
]


@pytest.mark.parametrize(("name", "k", "options", "message"), REFUSED)
def test_a_bad_option_is_refused_in_one_line(name: str, k: int, options: dict, message: str) -> None:
    case = make_case(name, 8, k, **options)
    rule = case.router.check(case.config)
    assert message in rule and "\n" not in rule
