"""Values, scopes and sums of the auxiliary losses: numbers worked out by hand, mistakes found in public code.

Letters: B batch, T time, E experts, K choices, L layers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugalmoe.laws.cases import make_case, make_inputs, probe, route
from frugalmoe.laws.routing import LAWS
from frugalmoe.routing import losses, stats
from frugalmoe.routing.contract import Inputs, Loss, TokenPlan
from frugalmoe.schema import FrozenDict, MoE

SCOPES = ({}, {"load_balance_scope": "micro_batch", "load_balance_group": 2}, {"load_balance_scope": "global"})


def inputs_of(valid_BT: np.ndarray) -> Inputs:
    """Inputs of which only the valid mask matters."""
    segment_ids = jnp.asarray(valid_BT, jnp.int32)
    return Inputs(None, segment_ids, segment_ids, None, None, None, None, train=True)


def balance(probs_BTE, expert_BTK, config: MoE, valid_BT=None) -> float:
    """`load_balance` as it is reported: its sum over its units."""
    probs_BTE, expert_BTK = jnp.asarray(probs_BTE, jnp.float32), jnp.asarray(expert_BTK)
    valid_BT = np.ones(probs_BTE.shape[:2], bool) if valid_BT is None else valid_BT
    inputs, k = inputs_of(valid_BT), expert_BTK.shape[-1]
    plan = TokenPlan(expert_BTK.reshape(-1, k), jnp.ones(expert_BTK.reshape(-1, k).shape))
    loss = losses.load_balance(probs_BTE, stats.load(plan, inputs, config.num_experts), inputs, config)
    return float(loss.sum / losses.denominators(inputs.valid_BT, config)[loss.per])


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("k", [1, 2])
def test_load_balance_is_one_at_uniform_load_and_experts_over_k_at_collapse(scope: dict, k: int) -> None:
    config = MoE(num_experts=4, num_experts_per_token=k, **scope)
    rng = np.random.default_rng(0)
    skewed_BTE = rng.dirichlet(np.ones(4), (2, 4))
    round_robin_BTK = np.tile((np.arange(4)[:, None] + np.arange(k)) % 4, (2, 1, 1))
    assert balance(skewed_BTE, round_robin_BTK, config) == pytest.approx(1)  # f = 1/E: E * sum(P / E) = 1 for any P
    collapsed_BTE = np.broadcast_to((np.arange(4) < k) / k, (2, 4, 4))
    collapsed_BTK = np.broadcast_to(np.arange(k), (2, 4, k))
    assert balance(collapsed_BTE, collapsed_BTK, config) == pytest.approx(4 / k)  # E * k * (1/k * 1/k)


def test_load_balance_of_a_batch_by_hand_in_each_scope() -> None:
    """Two sequences that overload different experts: balanced together, collapsed apart."""
    probs_BTE = np.asarray([[[0.75, 0.25]] * 2, [[0.25, 0.75]] * 2])
    expert_BTK = np.asarray([[[0]] * 2, [[1]] * 2])
    moe = {"num_experts": 2, "num_experts_per_token": 1}
    assert balance(probs_BTE, expert_BTK, MoE(**moe)) == pytest.approx(1.5)  # each: 2 * (1 * 0.75 + 0 * 0.25)
    assert balance(probs_BTE, expert_BTK, MoE(**moe, **SCOPES[1])) == pytest.approx(1)  # f = P = [0.5, 0.5]
    assert balance(probs_BTE, expert_BTK, MoE(**moe, **SCOPES[2])) == pytest.approx(1)


def test_sequence_balance_is_the_mean_of_sequences_whatever_the_scope() -> None:
    case = make_case("sigmoid_bias", moe=SCOPES[2])
    inputs = make_inputs()
    both = route(case, inputs).losses["sequence_balance"]
    alone = [
        route(case, inputs.of_sequences(lambda a, b=b: a[b : b + 1])).losses["sequence_balance"].sum for b in (0, 1)
    ]
    assert both.per == "sequence"
    assert both.sum == pytest.approx(sum(map(float, alone)), rel=1e-6)


def test_a_prompt_of_one_sequence_is_routed_whatever_the_groups_of_training() -> None:
    case = make_case("topk_softmax", moe={"load_balance_scope": "micro_batch", "load_balance_group": 4})
    inputs = make_inputs(train=False)
    inputs = inputs.of_sequences(lambda a: a[:1])
    np.testing.assert_array_equal(route(case, inputs).plan.expert_NK, route(make_case("topk_softmax"), inputs).plan.ids)


@pytest.mark.parametrize("scope", SCOPES, ids=str)
def test_padding_counts_nowhere(scope: dict) -> None:
    """Padded tokens, and whole padded sequences, leave the reported loss as it is."""
    config = MoE(num_experts=4, num_experts_per_token=1, **scope)
    rng = np.random.default_rng(1)
    probs_BTE, expert_BTK = rng.dirichlet(np.ones(4), (2, 6)), rng.integers(0, 4, (2, 6, 1))
    valid_BT = np.ones((4, 8), bool)
    valid_BT[:, 6:], valid_BT[2:] = False, False
    padded_BTE, padded_BTK = rng.dirichlet(np.ones(4), (4, 8)), rng.integers(0, 4, (4, 8, 1))
    padded_BTE[:2, :6], padded_BTK[:2, :6] = probs_BTE, expert_BTK
    assert balance(padded_BTE, padded_BTK, config, valid_BT) == pytest.approx(balance(probs_BTE, expert_BTK, config))


def test_z_is_the_squared_logsumexp_and_its_gradient() -> None:
    logits_BTE = jnp.asarray([[[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]]])
    inputs = inputs_of(np.asarray([[1, 1, 0]]))
    expected = np.log(2) ** 2 + (1 + np.log(2)) ** 2  # logsumexp([a, a]) = a + ln 2; the third token is padding
    assert losses.z(logits_BTE, inputs).sum == pytest.approx(expected, rel=1e-6)
    gradient = jax.grad(lambda z: losses.z(z, inputs).sum)(logits_BTE)
    np.testing.assert_allclose(gradient[0, 1], 2 * (1 + np.log(2)) * np.asarray([0.5, 0.5]), rtol=1e-6)  # 2 lse softmax
    np.testing.assert_array_equal(gradient[0, 2], 0)


def test_the_gradient_lowers_overloaded_experts_and_raises_starved_ones() -> None:
    """It reaches experts that were not selected too (a mean score over the K selected alone would not)."""
    config = MoE(num_experts=4, num_experts_per_token=1)
    inputs = inputs_of(np.ones((1, 2)))
    load_BE = jnp.asarray([[2, 0, 0, 0]])

    def loss(logits_BTE: jax.Array) -> jax.Array:
        return losses.load_balance(jax.nn.softmax(logits_BTE), load_BE, inputs, config).sum

    gradient = jax.grad(loss)(jnp.zeros((1, 2, 4)))
    assert np.all(gradient[..., 0] > 0) and np.all(gradient[..., 1:] < 0)


@pytest.mark.parametrize("scope", SCOPES[:2], ids=str)
def test_sums_of_micro_batches_are_the_sum_of_the_batch(scope: dict) -> None:
    case = make_case("topk_softmax", moe=scope)
    config = case.config
    rng = np.random.default_rng(2)
    probs_BTE, inputs = jnp.asarray(rng.dirichlet(np.ones(8), (4, 6)), jnp.float32), inputs_of(np.ones((4, 6)))
    load_BE = jnp.asarray(rng.multinomial(12, np.ones(8) / 8, 4))

    def loss(rows: slice) -> jax.Array:
        part = inputs_of(np.ones((4, 6))[rows])
        return losses.load_balance(probs_BTE[rows], load_BE[rows], part, config).sum

    assert loss(slice(0, 2)) + loss(slice(2, 4)) == pytest.approx(float(loss(slice(0, 4))), rel=1e-6)
    assert losses.denominators(inputs.valid_BT, config)["group"] == 4 // config.load_balance_group


def test_the_global_scope_sums_over_shards_to_the_loss_and_gradient_of_one_device() -> None:
    """No factor of the number of shards (Megatron-LM issues 3672 and 7213)."""
    config = MoE(num_experts=8, num_experts_per_token=2, load_balance_scope="global")
    rng = np.random.default_rng(3)
    logits_BTE = jnp.asarray(rng.normal(size=(4, 6, 8)) + np.linspace(-1, 1, 8), jnp.float32)
    load_BE = jnp.asarray(rng.multinomial(12, np.arange(8) / 28, 4))

    def one_device(logits_BTE: jax.Array) -> jax.Array:
        probs_BTE = jax.nn.softmax(logits_BTE)
        return losses.load_balance(probs_BTE, load_BE, inputs_of(np.ones((4, 6))), config).sum

    def shard(logits_BTE: jax.Array, load_BE: jax.Array) -> jax.Array:
        inputs = inputs_of(np.ones((2, 6)))._replace(axis_names=("data",))
        return losses.load_balance(jax.nn.softmax(logits_BTE), load_BE, inputs, config).sum

    def two_shards(logits_BTE: jax.Array) -> jax.Array:
        split = (logits_BTE.reshape(2, 2, 6, 8), load_BE.reshape(2, 2, 8))
        return jax.vmap(shard, axis_name="data")(*split).sum()

    (a, da), (b, db) = (jax.value_and_grad(f)(logits_BTE) for f in (one_device, two_shards))
    assert a == pytest.approx(float(b), rel=1e-6)
    np.testing.assert_allclose(da, db, rtol=1e-5, atol=1e-8)
    assert a > 1.05  # an unbalanced load, so that a loss that lost its shards would differ


def stacked(**sums: tuple[str, list[float]]) -> dict[str, Loss]:
    return {name: Loss(jnp.asarray(sums_L), per) for name, (per, sums_L) in sums.items()}


def test_total_by_hand() -> None:
    units = {"token": 10, "sequence": 2, "group": 1, "batch": 1}
    terms = stacked(load_balance=("sequence", [2.0, 4.0]), z=("token", [20.0, 40.0]), extra=("batch", [5.0, 7.0]))
    loss, metrics = losses.total(terms, {"load_balance": 0.01, "z": 0.001}, units)
    assert loss == pytest.approx(0.01 * (1 + 2) + 0.001 * (2 + 4))  # layers are summed, unweighed losses left out
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx({"load_balance": 1.5, "z": 3.0, "extra": 6.0})


def test_total_is_linear_in_the_coefficient_and_zero_without() -> None:
    """A coefficient is not a switch (NeMo Automodel issue 1408), nor is it added to one."""
    terms, units = stacked(z=("token", [8.0])), dict.fromkeys(("token", "sequence", "group", "batch"), 4)
    values = [float(losses.total(terms, {"z": c}, units).loss) for c in (0.0, 0.1, 0.2)]
    assert values == pytest.approx([0.0, 0.2, 0.4])


def test_opposite_imbalances_of_two_layers_do_not_cancel() -> None:
    """Layers lumped together would look balanced, with a loss of 1 (Hugging Face transformers issue 28255)."""
    config = MoE(num_experts=2, num_experts_per_token=1)
    inputs = inputs_of(np.ones((1, 4)))

    def layer(first: float) -> jax.Array:
        probs_BTE, load_BE = jnp.broadcast_to(jnp.asarray([first, 1 - first]), (1, 4, 2)), jnp.asarray([[4, 0]])
        return losses.load_balance(probs_BTE, load_BE if first > 0.5 else load_BE[:, ::-1], inputs, config)

    terms = jax.tree.map(lambda *sums: jnp.stack(sums), {"load_balance": layer(0.9)}, {"load_balance": layer(0.1)})
    _, metrics = losses.total(terms, {}, losses.denominators(inputs.valid_BT, config))
    assert metrics["load_balance"] == pytest.approx(1.8)  # 2 * 1 * 0.9 in both layers


def test_losses_pass_through_scan() -> None:
    def layer(carry: None, scale: jax.Array) -> tuple[None, dict[str, Loss]]:
        return carry, {"z": Loss(scale * 2.0, "token")}

    _, terms = jax.lax.scan(layer, None, jnp.arange(3.0))
    assert terms["z"].per == "token" and terms["z"].sum.shape == (3,)


def test_the_loss_counts_the_selection_that_was_executed() -> None:
    """Where a bias steers the selection, f is the biased load (Megatron-LM counts the unbiased one)."""
    case = make_case("sigmoid_bias", 8, 2)
    inputs = make_inputs()._replace(x_BTD=jnp.zeros_like(make_inputs().x_BTD))  # all scores 0.5, P uniform: loss 1
    state = {"bias_E": jnp.asarray([1.0, 0.9, 0, 0, 0, 0, 0, 0])}
    routing = route(case, inputs, state=state)
    assert np.array_equal(routing.stats["counts"], [14, 14, 0, 0, 0, 0, 0, 0])
    skew = inputs._replace(x_BTD=make_inputs().x_BTD)
    states = state, {"bias_E": jnp.zeros(8)}
    biased, unbiased = (route(case, skew, state=s).losses["load_balance"].sum for s in states)
    assert biased != unbiased


def test_auxiliary_gradients_reach_the_gate_at_the_size_of_their_coefficient() -> None:
    """The wrapper of NeMo Automodel (PR 1412) let none through."""
    case, silent = make_case("topk_softmax"), np.zeros((2, 8, 8), np.float32)
    once, twice = (probe(case, make_inputs(), silent, z=c).params["kernel_DE"] for c in (0.5, 1.0))
    assert np.linalg.norm(once) > 1e-3
    np.testing.assert_allclose(2 * once, twice, rtol=1e-5)


def test_scope_rules() -> None:
    micro = MoE(load_balance_scope="micro_batch", load_balance_group=3)
    whole = MoE(load_balance_scope="global")
    assert losses.scope_error(MoE(), 4, 3) is None
    assert losses.scope_error(whole, 1, 3) is None
    assert "accumulate_steps=1" in losses.scope_error(whole, 2, 3)
    assert losses.scope_error(micro, 4, 6) is None
    assert "load_balance_group=3" in losses.scope_error(micro, 1, 4)


def all_losses(scope: dict, probs_BTE: np.ndarray, load_BE: np.ndarray, valid_BT: np.ndarray) -> dict[str, float]:
    """Every loss of a gate as it is reported. Two devices, K = 1."""
    num_experts = probs_BTE.shape[-1]
    named = FrozenDict.fromkeys(losses.GATE_LOSSES, 0.0)
    config = MoE(num_experts=num_experts, num_experts_per_token=1, losses=named, load_balance_devices=2, **scope)

    @jax.jit
    def reported(probs_BTE: jax.Array, load_BE: jax.Array, segment_ids_BT: jax.Array) -> dict[str, jax.Array]:
        inputs = inputs_of(segment_ids_BT)
        terms = losses.gate_losses(jnp.log(probs_BTE + 1e-9), probs_BTE, load_BE, inputs, config)
        return losses.total(terms, {}, losses.denominators(inputs.valid_BT, config)).metrics

    return {name: float(x) for name, x in reported(jnp.asarray(probs_BTE, jnp.float32), load_BE, valid_BT).items()}


HALVES = np.asarray([[[0.5, 0.5, 0, 0]] * 2, [[0, 0, 0.5, 0.5]] * 2])  # two sequences of two tokens, four experts


def test_losses_of_the_mean_probability_by_hand_per_sequence_and_over_the_batch() -> None:
    """Each sequence is unsure between the two experts of one device; together all experts are equally probable."""
    load_BE, valid_BT = np.asarray([[1, 1, 0, 0], [0, 0, 1, 1]]), np.ones((2, 2), bool)
    ln2 = np.log(2)
    apart, together = (all_losses(scope, HALVES, load_BE, valid_BT) for scope in (SCOPES[0], SCOPES[2]))
    assert apart["device_balance"] == pytest.approx(2)  # 2 devices * (1 * 1 + 0 * 0)
    assert together["device_balance"] == pytest.approx(1)  # 2 * (1/2 * 1/2 + 1/2 * 1/2)
    assert apart["importance"] == pytest.approx(1)  # shares 1/2, 1/2, 0, 0: variance 1/16, mean 1/4
    assert together["importance"] == pytest.approx(0, abs=1e-6)
    assert apart["marginal_entropy"] == pytest.approx(ln2)  # ln 4 - ln 2
    assert together["marginal_entropy"] == pytest.approx(0, abs=1e-6)
    for reported in (apart, together):
        assert reported["token_entropy"] == pytest.approx(ln2)
    assert apart["mutual_information"] == pytest.approx(2 * ln2)  # ln 4 - 0: the token says nothing about the expert
    assert together["mutual_information"] == pytest.approx(ln2)  # ln 4 - ln 2: it says one bit


def test_device_balance_sees_devices_and_not_the_load_inside_one() -> None:
    """All tokens on experts 0 and 2, one per device: collapsed inside each device, balanced over devices."""
    probs_BTE = np.asarray([[[1.0, 0, 0, 0], [0, 0, 1.0, 0]]])
    inside = all_losses({}, probs_BTE, np.asarray([[1, 0, 1, 0]]), np.ones((1, 2), bool))
    assert inside["device_balance"] == pytest.approx(1) and inside["load_balance"] == pytest.approx(2)
    moved = all_losses({}, probs_BTE[..., [1, 0, 3, 2]], np.asarray([[0, 1, 0, 1]]), np.ones((1, 2), bool))
    assert moved["device_balance"] == pytest.approx(inside["device_balance"])


def test_load_balance_is_one_at_uniform_load_whatever_the_number_of_experts_per_token() -> None:
    """f is a share of the slots, not of K * tokens: two tokens in 4 slots, or in 12, of four experts."""
    uniform_BTE = np.full((1, 2, 4), 0.25)
    for slots in (1, 3):
        reported = all_losses({}, uniform_BTE, np.full((1, 4), slots), np.ones((1, 2), bool))
        assert reported["load_balance"] == pytest.approx(1)


@pytest.mark.parametrize("scope", SCOPES, ids=str)
def test_padding_counts_in_no_loss(scope: dict) -> None:
    rng = np.random.default_rng(4)
    probs_BTE, load_BE = rng.dirichlet(np.ones(4), (2, 6)), rng.multinomial(6, np.ones(4) / 4, 2)
    padded_BTE, valid_BT = rng.dirichlet(np.ones(4), (4, 8)), np.zeros((4, 8), bool)
    padded_BTE[:2, :6], valid_BT[:2, :6] = probs_BTE, True
    padded = all_losses(scope, padded_BTE, np.pad(load_BE, ((0, 2), (0, 0))), valid_BT)
    assert padded == pytest.approx(all_losses(scope, probs_BTE, load_BE, np.ones((2, 6), bool)), rel=1e-5)


@pytest.mark.parametrize("name", ["importance", "marginal_entropy", "mutual_information"])
def test_a_loss_that_is_not_linear_sums_over_shards_to_value_and_gradient_of_one_device(name: str) -> None:
    """Shards of 12 and 9 tokens: the mean is over all 21, not a mean of means."""
    config = MoE(num_experts=8, load_balance_scope="global")
    rng = np.random.default_rng(5)
    logits_BTE = jnp.asarray(rng.normal(size=(4, 6, 8)) + np.linspace(-1, 1, 8), jnp.float32)
    valid_BT = np.ones((4, 6), bool)
    valid_BT[3, 3:] = False

    def part(logits_BTE: jax.Array, segment_ids_BT: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        inputs = inputs_of(segment_ids_BT)._replace(axis_names=axes)
        return getattr(losses, name)(jax.nn.softmax(logits_BTE), inputs, config).sum

    def one_device(logits_BTE: jax.Array) -> jax.Array:
        return part(logits_BTE, valid_BT, ())

    def two_shards(logits_BTE: jax.Array) -> jax.Array:
        split = logits_BTE.reshape(2, 2, 6, 8), jnp.asarray(valid_BT.reshape(2, 2, 6), jnp.int32)
        return jax.vmap(lambda *arrays: part(*arrays, ("data",)), axis_name="data")(*split).sum()

    (a, da), (b, db) = (jax.jit(jax.value_and_grad(f))(logits_BTE) for f in (one_device, two_shards))
    assert a == pytest.approx(float(b), rel=1e-5)
    np.testing.assert_allclose(da, db, rtol=1e-4, atol=1e-7)
    direction, step = rng.normal(size=logits_BTE.shape), 1e-2
    low, high = (jax.jit(one_device)(logits_BTE + end * direction) for end in (-step, step))
    assert np.vdot(da, direction) == pytest.approx(float(high - low) / (2 * step), rel=2e-2)


def test_gradients_stay_finite_where_a_probability_is_zero() -> None:
    inputs, config = inputs_of(np.asarray([[1, 1], [0, 0]])), MoE(num_experts=2)

    def everything(logits_BTE: jax.Array) -> jax.Array:
        probs_BTE = jax.nn.softmax(logits_BTE)
        terms = (f(probs_BTE, inputs, config).sum for f in (losses.importance, losses.mutual_information))
        return sum(terms) + losses.token_entropy(probs_BTE, inputs).sum

    certain_BTE = jnp.broadcast_to(jnp.asarray([0.0, -500.0]), (2, 2, 2))
    assert np.all(np.isfinite(jax.jit(jax.grad(everything))(certain_BTE)))


def test_a_gate_computes_what_is_always_reported_and_what_the_config_names() -> None:
    plain, more = make_case("topk_softmax"), make_case("topk_softmax", moe={"losses": FrozenDict(importance=0.0)})
    assert set(route(plain, make_inputs()).losses) == {"load_balance", "sequence_balance", "z"}
    assert set(route(more, make_inputs()).losses) == {"load_balance", "sequence_balance", "z", "importance"}


EVERY_LOSS = {"losses": FrozenDict.fromkeys(losses.GATE_LOSSES, 0.0), "load_balance_devices": 4}


@pytest.mark.slow
@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("law", ["extremes", "finite_differences", "padding", "shards"])
def test_every_loss_at_once_obeys_the_laws(law: str, scope: dict) -> None:
    """The laws of strategies look at the losses that every run has; here at all, of one strategy."""
    if law == "shards" and "load_balance_group" in scope:
        scope = scope | {"load_balance_group": 1}  # a group of two has no place on shards of one sequence
    LAWS[law](make_case("topk_softmax", moe=EVERY_LOSS | scope))
