"""What is particular to strategies that choose by thresholds, by assignment over a pool, or by no router at all.

Letters: B batch, T time, D model, E experts, K choices, P pools, n tokens of a pool.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from frugalmoe.laws.cases import B, D, T, combine, make_case, make_inputs, make_params, route, selections
from frugalmoe.routing import stats, threshold
from frugalmoe.routing.contract import Inputs, linear_logits
from frugalmoe.routing.strategies import base, recycle, sinkhorn


def logits_of(case, inputs) -> np.ndarray:
    return np.asarray(linear_logits(make_params(case)[0], inputs))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


REFUSED = [
    ("expert_choice", 2, {"pool": "sequences"}, "did you mean 'sequence'"),
    ("expert_choice", 2, {"evaluate": "chioce"}, "did you mean 'choice'"),
    ("expert_choice", 2, {"decay": 1.0}, "decay=1.0"),
    ("recycle", 2, {"capacity_factor": 0.9}, "capacity_factor=0.9"),
    ("sinkhorn", 2, {"iterations": 0}, "iterations=0"),
    ("base", 2, {}, "num_experts_per_token=2"),
    ("base", 1, {"tolerance": 0.0}, "tolerance=0.0"),
    ("base", 1, {"rounds": 0}, "rounds=0"),
    ("expert_threshold", 2, {"max_experts": 1}, "max_experts=1"),
    ("expert_threshold", 2, {"max_experts": 9}, "max_experts=9"),
    ("expert_threshold", 8, {}, "num_experts_per_token=8"),
    ("expert_threshold", 2, {"update": "signs"}, "did you mean 'sign'"),
    ("expert_threshold", 2, {"rate": -1.0}, "rate=-1.0"),
]


@pytest.mark.parametrize(("name", "k", "options", "message"), REFUSED)
def test_a_bad_option_is_refused_in_one_line(name: str, k: int, options: dict, message: str) -> None:
    case = make_case(name, 8, k, **options)
    rule = case.router.check(case.config)
    assert message in rule and "\n" not in rule


# Thresholds


def test_a_pool_is_ranked_and_cut_by_hand() -> None:
    """Share 0.5: two of four tokens, one of two valid ones, none of none; cuts 0.7*4 + 0.3*2 and 0.2*4 + 0.6*2."""
    score_PEn = [[[0.9, 0.1, 0.7, 0.2], [0.1, 0.2, 0.1, 0.8]], [[0.1, 0.3, 0.9, 0.9], [0.6, 0.5, 0.9, 0.9]]]
    score_PnE = np.swapaxes([*score_PEn, np.ones((2, 4))], 1, 2).astype(np.float32)
    valid_Pn = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    ranked = threshold.rank(jnp.asarray(score_PnE), jnp.asarray(valid_Pn), 0.5)
    full_PEC = np.broadcast_to(np.array([[1, 1], [1, 0], [0, 0]], bool)[:, None], (3, 2, 2))
    np.testing.assert_array_equal(ranked.full_PEC, full_PEC)
    np.testing.assert_array_equal(np.where(full_PEC, ranked.token_PEC, -1)[:2], [[[0, 2], [3, 1]], [[1, -1], [0, -1]]])
    np.testing.assert_allclose(ranked.cut_E, [3.4, 2.0], rtol=1e-6)


def test_experts_are_active_from_their_threshold_up_to_the_slots_by_margin() -> None:
    """Margins 0.1, -0.1, 0, 0.5 and, for the other sequence, 1, 1, 1, 1: three and four reach, two slots."""
    inputs = make_inputs(padded=False)
    inputs = inputs.of_tokens(lambda a: a[:, :1])
    score_BTE = jnp.asarray([[[0.6, 0.4, 0.25, 1.0]], [[1.5, 1.5, 1.25, 1.5]]])
    active = threshold.activate(score_BTE, 10 * score_BTE, jnp.asarray([0.5, 0.5, 0.25, 0.5]), 2, inputs)
    np.testing.assert_array_equal(active.plan.expert_NK, [[3, 0], [0, 1]])
    np.testing.assert_allclose(active.plan.weight_NK, [[10, 6], [15, 15]])
    assert active.overflow == 1 + 2 and active.tied_BT.tolist() == [[False], [True]]
    few = threshold.activate(score_BTE - 0.3, score_BTE, jnp.asarray([0.5, 0.5, 0.25, 0.5]), 2, inputs)
    np.testing.assert_array_equal(few.plan.expert_NK[0], [3, 4])  # 4: no expert
    assert few.plan.weight_NK[0, 1] == 0


def test_a_threshold_is_the_mean_of_the_cuts_until_the_decay_forgets() -> None:
    """Cuts 0.2, 0.4, 0.9 at decay 0.5: 0.2, then (0.2 + 0.4) / 2, then (0.3 + 0.9) / 2 where the mean has thirds."""
    state = threshold.initial(9.0, 1)
    for cut, expected in ((0.2, 0.2), (0.4, 0.3), (0.9, 0.6)):
        state = threshold.follow(state, {"cut_sum": jnp.asarray([cut * 5]), "tokens": jnp.int32(5)}, 0.5)
        np.testing.assert_allclose(state["threshold_E"], [expected], rtol=1e-6)


# expert_choice


def test_a_pool_of_the_whole_batch_is_ranked_as_one() -> None:
    """C = B * T * K / E = 4 of 16 tokens, wherever they are."""
    case, inputs = make_case("expert_choice", pool="batch"), make_inputs(padded=False)
    p_NE = softmax(logits_of(case, inputs)).reshape(B * T, -1)
    expected = np.where(p_NE >= np.sort(p_NE, axis=0)[-4], p_NE, 0).reshape(B, T, -1)
    np.testing.assert_allclose(combine(case, route(case, inputs)), expected, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_evaluation_by_the_cuts_of_the_same_pool_is_the_choice(padded: bool) -> None:
    """With one pool the first update's threshold is its C-th probability: the ranking's own cut."""
    case, inputs = make_case("expert_choice", pool="batch"), make_inputs(padded=padded)
    trained = route(case, inputs)
    state = case.router.update(case.router.init_state(D, case.config), trained.stats, case.config)
    state = state | {"threshold_E": state["threshold_E"] * (1 - 1e-6)}  # rounding of the mean
    evaluated = route(case, inputs._replace(train=False), state=state)
    np.testing.assert_allclose(combine(case, evaluated), combine(case, trained), rtol=1e-5)
    assert evaluated.stats["overflow"] == 0


def test_evaluation_has_four_slots_for_each_of_k() -> None:
    """K = 1, thresholds below every probability: 8 experts reach each of the 14 tokens, 4 of them stay."""
    case, inputs = make_case("expert_choice", 8, 1), make_inputs(train=False)
    routing = route(case, inputs, state=threshold.initial(-1.0, 8))
    assert routing.stats["overflow"] == 14 * 4 and routing.stats["assigned"] == 14 * 4
    assert stats.metrics(routing.stats)["overflow_rate"] == 0.5


def test_a_study_can_evaluate_by_the_training_rule() -> None:
    case, inputs = make_case("expert_choice", evaluate="choice"), make_inputs()
    same = combine(case, route(case, inputs)), combine(case, route(case, inputs._replace(train=False)))
    np.testing.assert_array_equal(*same)


# expert_threshold


def test_thresholds_at_the_cuts_of_a_sequence_are_expert_choice() -> None:
    """K = 1: the best token of every sequence for every expert. One sequence: the cut is its own, not a mean."""
    case, inputs = make_case("expert_threshold", 8, 1, max_experts=8), make_inputs(padded=False)
    inputs = inputs.of_sequences(lambda a: a[:1])
    first = route(case, inputs)
    state = case.router.update(case.router.init_state(D, case.config), first.stats, case.config)
    z_TE = logits_of(case, inputs)[0]
    np.testing.assert_allclose(state["threshold_E"], z_TE.max(0), rtol=1e-6)
    state = state | {"threshold_E": state["threshold_E"] - 1e-5}  # rounding of the mean
    plan = route(case, inputs, state=state).plan
    g_TE = np.zeros((T, 9), np.float32)
    np.put_along_axis(g_TE, np.asarray(plan.expert_NK), np.asarray(plan.weight_NK), axis=1)
    sigmoid_TE = 1 / (1 + np.exp(-z_TE))
    np.testing.assert_allclose(g_TE[:, :8], np.where(z_TE == z_TE.max(0), sigmoid_TE, 0), rtol=1e-5)


def test_the_initial_thresholds_give_k_experts_on_standard_normal_logits() -> None:
    """2 of 8: the share above is 1/4, within five standard deviations over 8 * 4096 logits."""
    case = make_case("expert_threshold")
    (value,) = set(np.asarray(case.router.init_state(D, case.config)["threshold_E"]).tolist())
    above = np.random.default_rng(0).normal(size=8 * 4096) > value
    assert abs(above.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / above.size)


def test_the_sign_update_by_hand() -> None:
    """Loads 4, 10, 6, 0 of 8 tokens, K = 2: signs -1, 1, 1, -1 of mean 0, and 20 of 16 wanted: +1 for all."""
    case = make_case("expert_threshold", 4, 2, update="sign", rate=0.5)
    sums = {"counts": jnp.asarray([4, 10, 6, 0]), "tokens": jnp.int32(8)}
    moved = case.router.update(threshold.initial(1.0, 4), sums, case.config)
    np.testing.assert_allclose(moved["threshold_E"], [1, 2, 2, 1])
    few = case.router.update(threshold.initial(1.0, 4), sums | {"tokens": jnp.int32(12)}, case.config)
    np.testing.assert_allclose(few["threshold_E"], [0, 1, 1, 0])


@pytest.mark.parametrize(("update", "steps"), [("quantile", 3), ("sign", 150)])
def test_the_update_brings_a_skewed_load_to_k_experts_per_token(update: str, steps: int) -> None:
    """Logits with a different mean per expert: each expert ends at a quarter of 512 tokens, within a tenth of them."""
    case = make_case("expert_threshold", 8, 2, max_experts=8, update=update, rate=2e-2)
    x_BTD = np.random.default_rng(0).normal(size=(4, 128, 8)) + np.linspace(-1, 1, 8)
    ones = jnp.ones((4, 128), jnp.int32)
    inputs = Inputs(jnp.asarray(x_BTD, jnp.float32), ones, ones, ones, None, None, None)

    @jax.jit
    def run(state: dict) -> tuple[jax.Array, jax.Array]:
        def step(state: dict, _) -> tuple[dict, jax.Array]:
            sums = case.router.route({"kernel_DE": jnp.eye(8)}, state, inputs, case.config).stats
            return case.router.update(state, sums, case.config), sums["counts"] / 512

        return jax.lax.scan(step, state, None, steps)[1]

    share_SE = np.asarray(run(case.router.init_state(D, case.config)))
    assert np.ptp(share_SE[0]) > 0.4
    np.testing.assert_allclose(share_SE[-1], 0.25, atol=0.025)


# sinkhorn and base: in training an assignment over the sequence, in evaluation the token's own best


def test_sinkhorn_scaling_gives_tokens_one_and_experts_their_share() -> None:
    """Six valid tokens of row 0 and eight of row 1 over 8 experts: column sums 6/8 and 1; what is scaled is exp(z)."""
    case, inputs = make_case("sinkhorn"), make_inputs()
    z_BTE, valid_BT1 = logits_of(case, inputs), np.asarray(inputs.valid_BT)[..., None]
    log_BTE = np.asarray(jax.jit(sinkhorn.scaled)(jnp.asarray(z_BTE), inputs.valid_BT, 50))
    pi_BTE = np.where(valid_BT1, np.exp(log_BTE), 0)
    np.testing.assert_allclose(pi_BTE.sum(-1)[valid_BT1[..., 0]], 1, rtol=1e-5)
    np.testing.assert_allclose(pi_BTE.sum(1), [[6 / 8] * 8, [1] * 8], rtol=1e-3)
    ratio_TE = np.where(valid_BT1[0], log_BTE[0] - z_BTE[0], 0)[:6]  # u_t + v_e: differences of rows are constant
    np.testing.assert_allclose(np.diff(ratio_TE - ratio_TE[:1], axis=1), 0, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2])
def test_sinkhorn_weights_know_nothing_of_the_scaling(k: int) -> None:
    case, inputs = make_case("sinkhorn", 8, k), make_inputs(padded=False)
    z_BTE = logits_of(case, inputs)
    weight_BTE = 1 / (1 + np.exp(-z_BTE)) if k == 1 else softmax(z_BTE)
    for train in (True, False):
        routing = route(case, inputs._replace(train=train))
        chosen_BTE = selections(case, routing)
        np.testing.assert_allclose(combine(case, routing), chosen_BTE * weight_BTE, rtol=1e-5)
        plain_BTE = z_BTE >= np.sort(z_BTE, axis=-1)[..., -k:][..., :1]
        assert np.array_equal(chosen_BTE, plain_BTE) == (not train)


def test_sinkhorn_balances_a_skewed_load() -> None:
    """Three quarters of 64 tokens prefer expert 0 of 4; after scaling none has more than a half above its share."""
    rng = np.random.default_rng(0)
    z_BTE = rng.normal(size=(1, 64, 4)) + np.asarray([2.0, 0, 0, 0])
    counts = lambda score: np.bincount(np.asarray(score)[0].argmax(-1), minlength=4)
    assert counts(z_BTE).max() >= 48
    assert counts(jax.jit(sinkhorn.scaled)(jnp.asarray(z_BTE), jnp.ones((1, 64), bool), 8)).max() <= 24


@pytest.mark.parametrize(
    ("tokens", "num_experts", "tolerance"), [(8, 8, 1e-3), (12, 4, 1e-3), (10, 4, 1e-3), (64, 8, 0.03)]
)
def test_base_assignment_is_the_best_balanced_one(tokens: int, num_experts: int, tolerance: float) -> None:
    """Against the Hungarian method with ceil(n/E) copies of every expert: 1, 3, 3 and 8."""
    solve = jax.jit(functools.partial(base.assign, tolerance=tolerance, rounds=1000))
    slots = -(-tokens // num_experts)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        score_TE = (rng.normal(size=(tokens, num_experts)) + rng.normal(size=num_experts)).astype(np.float32)
        expert_T = np.asarray(solve(jnp.asarray(score_TE), jnp.ones(tokens, bool)))
        assert np.bincount(expert_T, minlength=num_experts).max() <= slots
        rows, columns = linear_sum_assignment(-np.repeat(score_TE, slots, axis=1))
        best = score_TE[rows, columns // slots].sum()
        total = np.take_along_axis(score_TE, expert_T[:, None], axis=1).sum()
        assert best - tokens * tolerance - 1e-4 <= total <= best + 1e-4


def test_base_is_balanced_after_too_few_rounds_too() -> None:
    """All 13 valid tokens of 16 want expert 0 of 4 at one price: ceil(13/4) = 4 get it, the others what is left."""
    score_TE = jnp.asarray(np.tile([5.0, 0, 0, 0], (16, 1)), jnp.float32)
    valid_T = jnp.arange(16) < 13
    expert_T = np.asarray(base.assign(score_TE, valid_T, tolerance=0.1, rounds=1))[:13]
    np.testing.assert_array_equal(np.bincount(expert_T, minlength=4), [4, 4, 4, 1])


def test_base_trains_on_the_assignment_and_evaluates_by_the_largest_logit() -> None:
    """Eight tokens on eight experts: one each; weights are sigmoid(logit) in both."""
    case, inputs = make_case("base", 8, 1), make_inputs(padded=False)
    z_BTE = logits_of(case, inputs)
    trained, evaluated = (selections(case, route(case, inputs._replace(train=train))) for train in (True, False))
    assert np.all(trained.sum(1) == 1) and np.all(trained.sum(2) == 1)
    np.testing.assert_array_equal(evaluated, z_BTE == z_BTE.max(-1, keepdims=True))
    sigmoid_BTE = 1 / (1 + np.exp(-z_BTE))
    np.testing.assert_allclose(combine(case, route(case, inputs)), trained * sigmoid_BTE, rtol=1e-5)


# recycle


def queue(ranked_TE, draw_K, order_T, valid_T, slots: int) -> list:
    """The queue of one sequence where every token draws the same numbers."""
    draw_TK = jnp.broadcast_to(jnp.asarray(draw_K), (len(ranked_TE), len(draw_K)))
    return jax.jit(recycle._queue)(
        jnp.asarray(ranked_TE), draw_TK, jnp.asarray(order_T), jnp.asarray(valid_T), slots
    ).tolist()


def test_overflow_goes_to_the_drawn_expert_with_room_by_hand() -> None:
    """Two slots, four experts; a draw of u is expert floor(u * number open) of those with room, best first."""
    ranked_TE, valid_T = [[0, 3, 2, 1]] * 3 + [[3, 2, 1, 0]] * 2, [True] * 5
    # The third token finds 0 full and 3, 2, 1 open: floor(0.5 * 3) = 1 is expert 2.
    assert queue(ranked_TE, [0.5], range(5), valid_T, 2) == [[0], [0], [2], [3], [3]]
    # In the order 4, 3, 2, 1, 0 it is token 0 that finds 0 and 3 full: of 2, 1 it draws floor(0.5 * 2) = 1, expert 1.
    assert queue(ranked_TE, [0.5], range(4, -1, -1), valid_T, 2) == [[1], [0], [0], [3], [3]]
    # Padding takes no slot.
    assert queue(ranked_TE, [0.5], range(5), [True, False, True, True, True], 2)[2:] == [[0], [3], [3]]
    # One slot, two choices: the second token has 2, then 1 (floor(0.9 * 2) = 1, then the only one); the third has none.
    assert queue([[0, 3, 1, 2]] * 3, [0.9, 0.9], range(3), [True] * 3, 1) == [[0, 3], [2, 1], [4, 4]]


def test_recycled_tokens_are_spread_uniformly_over_the_experts_with_room() -> None:
    """900 pairs of tokens want expert 0, which has one slot: the second goes to 1, 2 or 3, each 300 +- 5 deviations."""
    draw_BTK = jax.random.uniform(jax.random.key(0), (900, 2, 1))
    ranked_TE, order_T = jnp.tile(jnp.arange(4), (2, 1)), jnp.arange(2)
    solve = jax.jit(jax.vmap(lambda draw_TK: recycle._queue(ranked_TE, draw_TK, order_T, order_T >= 0, 1)))
    counts = np.bincount(np.asarray(solve(draw_BTK))[:, 1, 0], minlength=4)
    assert counts[0] == 0 and np.all(np.abs(counts[1:] - 300) < 5 * np.sqrt(900 * 2 / 9))


@pytest.mark.parametrize("k", [1, 2])
def test_recycling_fills_no_expert_beyond_its_slots_and_loses_no_token(k: int) -> None:
    """C = K of 8 tokens on 8 experts; each token's first choice always finds room. Evaluation: the K largest logits."""
    case, inputs = make_case("recycle", 8, k), make_inputs(padded=False)
    p_BTE = softmax(logits_of(case, inputs))
    trained, evaluated = (selections(case, route(case, inputs._replace(train=train))) for train in (True, False))
    assert trained.sum(1).max() <= k < evaluated.sum(1).max()
    assert trained.sum(2).min() >= 1 and (k > 1 or np.all(trained.sum(2) == 1))
    np.testing.assert_array_equal(evaluated, p_BTE >= np.sort(p_BTE, axis=-1)[..., -k:][..., :1])
    np.testing.assert_allclose(combine(case, route(case, inputs)), trained * p_BTE, rtol=1e-5)


# Controls


def test_a_frozen_router_is_its_seeds_and_layers_and_passes_a_gradient_to_the_token() -> None:
    case, inputs = make_case("frozen_random"), make_inputs(padded=False)
    assert make_params(case)[0] == {}
    chosen = selections(case, route(case, inputs))
    reseeded = make_case("frozen_random", seed=1)
    assert not np.array_equal(chosen, selections(reseeded, route(reseeded, inputs)))
    assert not np.array_equal(chosen, selections(case, route(case, inputs._replace(layer=jnp.int32(1)))))
    value = lambda x: jnp.sum(case.router.route({}, {}, inputs._replace(x_BTD=x), case.config).plan.weight_NK[:, 0])
    assert float(jnp.linalg.norm(jax.jit(jax.grad(value))(inputs.x_BTD))) > 0.1


def test_round_robin_loads_every_expert_alike_in_document_order() -> None:
    """Positions 0..7, K = 2, E = 8: tokens 0 and 4 get experts 0 and 1, and every expert is named twice."""
    case, inputs = make_case("round_robin"), make_inputs(padded=False)
    chosen_BTE = selections(case, route(case, inputs))
    assert np.all(chosen_BTE.sum(1) == 2)
    np.testing.assert_array_equal(np.flatnonzero(chosen_BTE[0, 4]), [0, 1])
    np.testing.assert_array_equal(np.flatnonzero(chosen_BTE[0, 7]), [6, 7])
    packed = selections(case, route(case, make_inputs()))[0]  # documents of three tokens
    np.testing.assert_array_equal(packed[:3], packed[3:6])
