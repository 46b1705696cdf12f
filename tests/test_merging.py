"""States of replicas become one: by hand, for every strategy's own rules, and what is refused."""

import numpy as np
import pytest

from frugalmoe.errors import UserError
from frugalmoe.laws.cases import all_cases, make_case
from frugalmoe.routing import merging, strategies
from frugalmoe.routing.contract import Router


def test_by_hand() -> None:
    """Thresholds: (1 * 0 + 3 * 2) / 4 = 1.5; the longest of the averages has seen 7 batches."""
    case = make_case("expert_threshold", 2, 1)
    states = [
        {"threshold_E": np.float32([0, 4]), "updates_E": np.float32([7, 7])},
        {"threshold_E": np.float32([2, 4]), "updates_E": np.float32([3, 3])},
    ]
    merged = case.router.merge(states, [1, 3], case.config)
    np.testing.assert_array_equal(merged["threshold_E"], [1.5, 4])
    np.testing.assert_array_equal(merged["updates_E"], [7, 7])
    assert merged["threshold_E"].dtype == np.float32


def test_logits_of_two_replicas_have_the_variance_of_all_together() -> None:
    """Means -1 and 3 with weights 1 and 1, variances 2 and 4: mean 1, variance 3 + 2^2."""
    case = make_case("stochastic_warmup")
    states = [{"logit_mean": np.float32(m), "logit_square": np.float32(v)} for m, v in ((-1, 2), (3, 4))]
    merged = case.router.merge(states, [5, 5], case.config)
    assert (merged["logit_mean"], merged["logit_square"]) == (1, 7)


def test_layers_that_are_stacked_merge_as_each_alone() -> None:
    case, rng = make_case("sigmoid_bias"), np.random.default_rng(0)
    first, second = ({"bias_E": rng.normal(size=(3, 8)).astype(np.float32)} for _ in range(2))
    merged = case.router.merge([first, second], [1, 2], case.config)["bias_E"]
    for layer in range(3):
        alone = case.router.merge([{"bias_E": s["bias_E"][layer]} for s in (first, second)], [1, 2], case.config)
        np.testing.assert_array_equal(merged[layer], alone["bias_E"])


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_every_entry_of_a_state_has_a_rule(case) -> None:
    state = case.router.init_state(8, case.config)
    assert case.router.merge_state or set(state) <= set(case.router.merges)
    assert set(case.router.merges.values()) <= set(merging.RULES)
    merged = case.router.merge([state, state], [1, 1], case.config)
    assert {k: np.asarray(v).tolist() for k, v in state.items()} == {k: v.tolist() for k, v in merged.items()}


def merge(states: list, weights: list, rule: str = "mean") -> dict:
    plain = strategies.get("sigmoid_bias")
    router = Router(about=plain.about, route=plain.route, merges={"bias_E": rule})
    return router.merge(states, weights, None)


def held(*values: float) -> dict:
    return {"bias_E": np.float32(values)}


NO_WEIGHTS = (-1, np.nan, np.inf, "1", None, 10**400)


@pytest.mark.parametrize(
    ("states", "weights", "rule", "message"),
    [
        ([], [], "mean", "0 states and 0 weights"),
        ([held(1)], [1, 1], "mean", "1 states and 2 weights"),
        *(([held(1), held(2)], [1, weight], "mean", "weights of replicas") for weight in NO_WEIGHTS),
        ([held(1)], [0], "mean", "weights of replicas"),
        ([held(1), held(np.nan)], [1, 1], "mean", "'bias_E': a replica holds a value that is not finite"),
        ([held(1), held(np.inf)], [1, 0], "maximum", "not finite"),
        ([held(1), held(1, 2)], [1, 1], "mean", "different types or shapes"),
        ([held(1), {}], [1, 1], "mean", "or not at all"),
        ([held(1), {"bias_E": np.float64([1])}], [1, 1], "mean", "different types"),
        ([{"bias_E": np.int32([1])}], [1], "mean", "is int32, must be float32"),
        ([{"other_E": np.float32([1])}], [1], "mean", "'other_E': the strategy names no rule"),
        ([held(1)], [1], "middle", "names no rule to merge it, of mean, maximum, equal"),
        ([held(1), held(2)], [1, 1], "equal", "'bias_E': replicas differ"),
    ],
)
def test_what_cannot_be_merged_is_one_line(states, weights, rule, message) -> None:
    with pytest.raises(UserError) as error:
        merge(states, weights, rule)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("rule", merging.RULES)
def test_extremes_stay_finite(rule) -> None:
    big = np.finfo(np.float32).max
    for states in ([held(big, -big, 0)] * 3, [held(big, 1e-38, -0.0)] * 2):
        merged = merge(states, [1e-300, 1e300, 1][: len(states)], rule)
        np.testing.assert_array_equal(merged["bias_E"], states[0]["bias_E"])


def test_opposite_extremes_have_a_mean() -> None:
    big = np.finfo(np.float32).max
    assert merge([held(big), held(-big)], [1, 1])["bias_E"] == 0
