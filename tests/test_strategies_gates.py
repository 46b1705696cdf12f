"""What is specific to the strategies with noise and with losses of their own, against numbers by hand.

Letters: B batch, T time, N tokens (B*T), D model, E experts, K choices.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_strategies_bias import logits_of, refused_in_one_line, softmax
from test_train_step import largest_difference, trained

from frugalmoe.config import default, override, resolve
from frugalmoe.laws.cases import D, T, combine, make_case, make_inputs, make_params, probe, route
from frugalmoe.routing import losses, select, strategies
from frugalmoe.routing.contract import Inputs
from frugalmoe.routing.strategies import noisy_topk
from frugalmoe.routing.strategies.similarity_preserving import orthogonality
from frugalmoe.schema import MoE

REFUSED = [
    ("gshard_top2", 1, {}, "num_experts_per_token=1"),
    ("noisy_topk", 1, {}, "no gradient"),
    ("noisy_topk", 8, {}, "num_experts_per_token=8"),
    ("similarity_preserving", 2, {"softmax": "afer"}, "did you mean 'after'"),
    ("norm_logits", 1, {}, "no gradient"),
    ("norm_logits", 2, {"logit_std": 0.0}, "logit_std=0.0"),
    ("norm_logits", 2, {"gain": -1.0}, "gain=-1.0"),
    ("norm_logits", 2, {"decay": 1.0}, "decay=1.0"),
]


@pytest.mark.parametrize(("name", "k", "options", "message"), REFUSED)
def test_a_bad_option_is_refused_in_one_line(name: str, k: int, options: dict, message: str) -> None:
    refused_in_one_line(name, k, options, message)


# gshard_top2


def alike(time: int, logits_E: list[float], train: bool = True) -> Inputs:
    """One sequence of tokens with the same logits, under an identity gate; only their positions differ."""
    ones, positions = jnp.ones((1, time), jnp.int32), jnp.arange(time, dtype=jnp.int32)[None]
    x_BTD = jnp.broadcast_to(jnp.asarray(logits_E), (1, time, len(logits_E)))
    keys = jax.random.split(jax.random.key(0), 1)
    return Inputs(x_BTD, ones, ones, positions, keys, jnp.int32(0), jnp.int32(0), train)


def test_the_second_expert_is_drawn_in_proportion_to_its_probability() -> None:
    """p = (.5, .3, .15, .05): the first is 0, the second 1, 2, 3 by .6, .3, .1, each within 5 deviations."""
    case, time = make_case("gshard_top2", 4, 2), 2048
    p = np.asarray([0.5, 0.3, 0.15, 0.05])
    gate = {"kernel_DE": jnp.eye(4)}
    routing = route(case, alike(time, np.log(p)), gate)
    second = np.asarray(routing.plan.expert_NK[:, 1])
    assert np.all(routing.plan.expert_NK[:, 0] == 0)
    share = p[1:] / 0.5
    counts = np.bincount(second, minlength=4)
    assert counts[0] == 0
    assert np.all(np.abs(counts[1:] - share * time) < 5 * np.sqrt(time * share * (1 - share)))
    np.testing.assert_allclose(routing.plan.weight_NK[:, 1], p[second] / (0.5 + p[second]), rtol=1e-5)
    runner_up = route(case, alike(4, np.log(p), train=False), gate).plan
    np.testing.assert_array_equal(runner_up.expert_NK, [[0, 1]] * 4)


def test_the_balance_loss_counts_first_choices_alone() -> None:
    """All first choices are expert 0: E * 1 * p_0 = 4 * 0.5 per sequence, whatever the second choices were."""
    case = make_case("gshard_top2", 4, 2)
    routing = route(case, alike(64, np.log([0.5, 0.3, 0.15, 0.05])), {"kernel_DE": jnp.eye(4)})
    np.testing.assert_allclose(routing.losses["load_balance"].sum, 2.0, rtol=1e-5)
    np.testing.assert_allclose(routing.losses["sequence_balance"].sum, 2.0, rtol=1e-5)
    assert routing.stats["counts"].sum() == 128  # the statistics count every slot


# noisy_topk


def test_chances_by_hand_and_by_drawing_the_noise_again() -> None:
    """K = 1, h = (1, 0, -1), z = (.5, 0, 0), sizes (1, 2, 1): the largest other is 0 for expert 0 and 1 for the others.

    Phi(.5), Phi(-1 / 2) and Phi(-1).
    """
    clean, noisy = jnp.asarray([[[0.5, 0.0, 0.0]]]), jnp.asarray([[[1.0, 0.0, -1.0]]])
    size = jnp.asarray([[[1.0, 2.0, 1.0]]])
    chance = np.asarray(noisy_topk.chances(clean, noisy, size, 1))[0, 0]
    np.testing.assert_allclose(chance, [0.691462, 0.308538, 0.158655], rtol=1e-5)
    draws = np.random.default_rng(0).normal(size=20_000)
    for e, others in enumerate([0.0, 1.0, 1.0]):
        share = np.mean(float(clean[0, 0, e]) + float(size[0, 0, e]) * draws > others)
        assert abs(share - chance[e]) < 5 * np.sqrt(chance[e] * (1 - chance[e]) / len(draws))


def test_weights_are_a_softmax_of_noisy_logits_and_evaluation_has_no_noise() -> None:
    case, inputs = make_case("noisy_topk"), make_inputs(padded=False)
    z_BTE = logits_of(case, inputs)
    plain = make_case("topk_softmax")
    quiet = inputs._replace(train=False)
    params = {"kernel_DE": make_params(case)[0]["kernel_DE"]}
    np.testing.assert_allclose(
        combine(case, route(case, quiet)), combine(plain, route(plain, quiet, params)), rtol=1e-5
    )
    eps_BTE = np.asarray(select.noise(inputs, lambda key: jax.random.normal(key, (8,))))
    h_BTE = z_BTE + eps_BTE * (np.log(2) + 0.01)  # W_n = 0: softplus(0) = ln 2
    kept_BTE = np.where(h_BTE >= np.sort(h_BTE, axis=-1)[..., -2:-1], np.exp(h_BTE), 0)
    g_BTE = combine(case, route(case, inputs))
    np.testing.assert_allclose(g_BTE, kept_BTE / kept_BTE.sum(-1, keepdims=True), rtol=1e-4)


SCOPES = ({}, {"load_balance_scope": "micro_batch", "load_balance_group": 2}, {"load_balance_scope": "global"})


def amounts(rows: np.ndarray) -> tuple[jax.Array, Inputs]:
    """Summed amounts per sequence [B, E] as one valid token each, and a padded token with nonsense."""
    amount_BTE = jnp.stack([jnp.asarray(rows), jnp.full(rows.shape, 7.0)], axis=1)
    segments = jnp.tile(jnp.asarray([1, 0]), (len(rows), 1))
    return amount_BTE, Inputs(None, segments, segments, None, None, None, None, train=True)


def test_variation_by_hand_in_each_scope() -> None:
    """(3, 1): mean 2, variance 1, CV^2 = 1/4. (1, 3) the same; both together (4, 4): 0. An empty group is 0."""
    amount_BTE, inputs = amounts(np.asarray([[3.0, 1.0], [1.0, 3.0], [0.0, 0.0], [0.0, 0.0]]))
    configs = [MoE(num_experts=2, **scope) for scope in SCOPES]
    sums = jax.jit(lambda a: [losses.variation(a, inputs, config) for config in configs])(amount_BTE)
    np.testing.assert_allclose([loss.sum for loss in sums], [0.5, 0, 0], atol=1e-6)
    assert [loss.per for loss in sums] == ["sequence", "group", "batch"]


def test_variation_over_shards_has_value_and_gradient_of_one_device() -> None:
    config, amount_BE = MoE(num_experts=8, load_balance_scope="global"), np.random.default_rng(0).random((4, 8))
    one = lambda a: losses.variation(*amounts(a), config).sum

    def shard(rows: jax.Array) -> jax.Array:
        amount_BTE, inputs = amounts(rows)
        return losses.variation(amount_BTE, inputs._replace(axis_names=("data",)), config).sum

    two = lambda a: jax.vmap(shard, axis_name="data")(a.reshape(2, 2, 8)).sum()
    (a, da), (b, db) = (jax.jit(jax.value_and_grad(f))(jnp.asarray(amount_BE, jnp.float32)) for f in (one, two))
    total_E = amount_BE.sum(0)
    np.testing.assert_allclose([a, b], total_E.var() / total_E.mean() ** 2, rtol=1e-4)
    np.testing.assert_allclose(da, db, rtol=1e-4, atol=1e-7)
    assert np.abs(da).max() > 1e-3


def test_the_load_loss_has_a_gradient_where_counts_have_none() -> None:
    case, silent = make_case("noisy_topk"), np.zeros((2, T, D), np.float32)
    for name in ("importance", "load"):
        gradients = probe(case, make_inputs(), silent, **{name: 1.0}).params
        assert all(np.linalg.norm(g) > 1e-3 for g in gradients.values())


# similarity_preserving


def test_orthogonality_is_zero_for_orthonormal_columns_alone() -> None:
    """Columns (1, 0), (3/5, 4/5): off the diagonal 3/5 twice, on it 1. Twice the identity: |4 - 1| twice."""
    value = lambda kernel: float(orthogonality(jnp.asarray(kernel), ()).sum)
    assert value(np.eye(4, 3)) == 0
    assert value([[1.0, 0.6], [0.0, 0.8]]) == pytest.approx(1.2, rel=1e-5)
    assert value(2 * np.eye(2)) == pytest.approx(6)


def test_orthogonality_looks_at_no_token() -> None:
    case, silent = make_case("similarity_preserving"), np.zeros((2, T, D), np.float32)
    one, other = (probe(case, make_inputs(seed), silent, orthogonality=1.0).params["kernel_DE"] for seed in (0, 1))
    np.testing.assert_array_equal(one, other)
    assert np.linalg.norm(one) > 1e-3
    plain = make_case("topk_softmax")
    np.testing.assert_array_equal(*(combine(c, route(c, make_inputs())) for c in (case, plain)))


ORTHOGONAL = {"model.moe.router": "similarity_preserving", "model.moe.losses.orthogonality": 0.1}


@pytest.mark.slow
def test_the_loss_of_a_gate_does_not_grow_with_micro_batches() -> None:
    whole, whole_metrics = trained(ORTHOGONAL)
    parts, parts_metrics = trained(ORTHOGONAL | {"train.accumulate_steps": 4})
    assert largest_difference(whole_metrics, parts_metrics) < 2e-4
    assert largest_difference(whole.params, parts.params) < 1e-4
    weaker, _ = trained(ORTHOGONAL | {"model.moe.losses.orthogonality": 0.025})
    assert largest_difference(whole.params, weaker.params) > 1e-3  # a factor of 4 would have been seen


# norm_logits


def test_normalized_logits_by_hand_do_not_depend_on_scale_and_shift() -> None:
    """Logits (1, 2, 3, 6), mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5; lambda = 2."""
    case = make_case("norm_logits", 4, 2, logit_std=2.0, renormalize=False)
    z = np.asarray([1.0, 2.0, 3.0, 6.0])
    p = softmax(2 * (z - 3) / np.sqrt(3.5))
    for logits in (z, 10 * z - 7):
        plan = route(case, alike(1, logits), {"kernel_DE": jnp.eye(4)}).plan
        np.testing.assert_array_equal(plan.expert_NK, [[3, 2]])
        np.testing.assert_allclose(plan.weight_NK, [[p[3], p[2]]], rtol=1e-4)


@pytest.mark.parametrize("offset", [300.0, 3000.0, -3e4])
def test_normalized_logits_do_not_know_a_common_offset(offset: float) -> None:
    """Against float64 on the same float32 logits, of deviation 1 about the offset."""
    case = make_case("norm_logits", 8, 2)
    z_BTE = (np.random.default_rng(0).normal(size=(1, 32, 8)) + offset).astype(np.float32)
    inputs = alike(32, z_BTE[0, 0])._replace(x_BTD=jnp.asarray(z_BTE))
    apart_BTE = z_BTE.astype(np.float64) - z_BTE.astype(np.float64).mean(-1, keepdims=True)
    probs_BTE = softmax(apart_BTE / np.sqrt(np.mean(apart_BTE**2, axis=-1, keepdims=True) + 1e-6))
    best_NK = np.sort(probs_BTE[0], axis=-1)[:, :-3:-1]
    plan = route(case, inputs, {"kernel_DE": jnp.eye(8)}).plan
    np.testing.assert_allclose(plan.weight_NK, best_NK / best_NK.sum(-1, keepdims=True), rtol=1e-5)


def test_the_strength_follows_the_drop_rate_and_is_capped() -> None:
    """Counts (10, 6, 4, 0), mean 5, capacity 1.2 * 5: 4 of 20 slots above it. 0.8 * 0.5 + 0.2 * min(gain * 0.2, 1)."""
    counts = {"counts": jnp.asarray([10, 6, 4, 0])}
    for gain, expected in ((2.0, 0.48), (100.0, 0.6)):
        case = make_case("norm_logits", 4, 2, moe={"capacity_factor": 1.2}, gain=gain, decay=0.8)
        moved = case.router.update({"strength_1": jnp.full(1, 0.5)}, counts, case.config)["strength_1"]
        np.testing.assert_allclose(moved, expected, rtol=1e-5)
    dropping = make_case("norm_logits", 4, 2, moe={"executor": "capacity"}, gain=2.0, decay=0.8)
    moved = dropping.router.update(
        {"strength_1": jnp.full(1, 0.5)}, counts | {"dropped": jnp.int32(1)}, dropping.config
    )
    np.testing.assert_allclose(moved["strength_1"], 0.42, rtol=1e-5)  # 1 of 20 dropped: 0.4 + 0.2 * 2 * 0.05


def test_the_adaptive_loss_is_the_balance_loss_at_its_strength() -> None:
    case = make_case("norm_logits")
    terms = route(case, make_inputs(), state={"strength_1": jnp.full(1, 0.25)}).losses
    np.testing.assert_allclose(terms["adaptive_balance"].sum, 0.25 * terms["load_balance"].sum, rtol=1e-6)
    assert terms["adaptive_balance"].per == terms["load_balance"].per


def test_a_warmed_up_gate_has_the_bias_that_its_options_ask_for():
    fields = {"model.moe.router": "stochastic_warmup", "model.moe.options.base_options": {"logit_bias": True}}
    moe = resolve(override(default(), fields)).model.moe
    made = strategies.get("stochastic_warmup").new_params(jax.random.key(0), 16, moe)
    assert {name: value.shape for name, value in made.items()} == {"kernel_DE": (16, 8), "bias_E": (8,)}
