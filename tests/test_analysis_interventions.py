"""Changes of a plan, by hand and as laws of every router that is asked. Letters: N tokens, E experts, K choices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugalmoe import sharding
from frugalmoe.analysis.lab.interventions import Demote, Mask, Nothing, RandomChoice, Swap
from frugalmoe.analysis.lab.weights import router_columns
from frugalmoe.config import default, override, resolve
from frugalmoe.data import Batch
from frugalmoe.errors import UserError
from frugalmoe.routing.contract import ExpertPlan, Inputs, TokenPlan, combine_matrix, selection_matrix, token_major

E = 4
PLAN = TokenPlan(
    jnp.array([[0, 1, 2], [3, 0, 1], [2, 4, 4]]),  # the last token has one expert only
    jnp.array([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [1.0, 0, 0]]),
)


def inputs(tokens=3, layer=0):
    ones = jnp.ones((1, tokens), jnp.int32)
    keys = jax.random.key(0)[None]
    return Inputs(jnp.zeros((1, tokens, 2)), ones, ones, jnp.arange(tokens)[None], keys, jnp.int32(0), jnp.int32(layer))


def dense(plan, tokens=3):
    return np.asarray(combine_matrix(plan, tokens, E))


BEFORE = dense(PLAN)


@pytest.mark.parametrize("change", [Mask(1, 0), Demote(1), RandomChoice(1)])
def test_other_layers_stay_as_they_are(change):
    np.testing.assert_array_equal(dense(change(PLAN, inputs(layer=0), E)), BEFORE)
    assert (dense(change(PLAN, inputs(layer=1), E)) != BEFORE).any()


def test_a_masked_expert_gives_way_to_nothing():
    np.testing.assert_allclose(dense(Mask(0, 0)(PLAN, inputs(), E)), BEFORE * [0, 1, 1, 1])


def test_a_masked_expert_gives_way_to_the_rest():
    after = dense(Mask(0, 0, "rest")(PLAN, inputs(), E))
    # token 0: 0.3 and 0.2 share 1: 0.6, 0.4; token 1: 0.6 and 0.1 share 1: 6/7, 1/7; token 2 did not have it
    np.testing.assert_allclose(after, [[0, 0.6, 0.4, 0], [0, 1 / 7, 0, 6 / 7], [0, 0, 1, 0]], rtol=1e-6)
    # token 2 has nobody else: nothing is left
    np.testing.assert_allclose(dense(Mask(0, 2, "rest")(PLAN, inputs(), E))[2], 0)


def test_a_masked_expert_gives_way_to_the_next():
    plan = Mask(0, 0, "next", spare=True, total=1.0)(PLAN, inputs(), E)
    # K = 2 of three choices; token 0: 1, 2 with 0.3, 0.2 of 0.5; token 1: 3, 1 with 0.6, 0.1 of 0.7
    np.testing.assert_allclose(dense(plan), [[0, 0.6, 0.4, 0], [0, 1 / 7, 0, 6 / 7], [0, 0, 1, 0]], rtol=1e-6)
    # a token that does not have the expert among its K keeps them: expert 1 is the spare of token 1
    plan = Mask(0, 1, "next", spare=True)(PLAN, inputs(), E)
    np.testing.assert_allclose(dense(plan)[1], [0.3, 0, 0, 0.6])
    # without an intervention the spare is dropped
    np.testing.assert_allclose(dense(Nothing(spare=True)(PLAN, inputs(), E))[0], [0.5, 0.3, 0, 0])


def test_a_random_expert_is_one_that_the_token_does_not_have():
    change = jax.jit(lambda seed: Mask(0, 0, "random", seed=seed)(PLAN, inputs(), E))
    drawn = set()
    for seed in range(20):
        after = dense(change(seed))
        assert after[0].tolist() == pytest.approx([0, 0.3, 0.2, 0.5])  # only expert 3 is free
        assert after[1, 2] == pytest.approx(0.3)  # only 2
        np.testing.assert_allclose(after[2], BEFORE[2])
        drawn.add(int(np.argmax(dense(Mask(0, 2, "random", seed=seed)(PLAN, inputs(), E))[2])))
    assert drawn == {0, 1, 3}
    everyone = TokenPlan(jnp.array([[0, 1, 2, 3]]), jnp.full((1, 4), 0.25))
    np.testing.assert_allclose(
        dense(Mask(0, 1, "random")(everyone, inputs(1), E), 1)[0], [0.25, 0, 0.25, 0.25]
    )  # nobody is free


def test_the_first_choice_can_be_taken_away():
    np.testing.assert_allclose(dense(Demote(0)(PLAN, inputs(), E)), [[0, 0.3, 0.2, 0], [0.3, 0.1, 0, 0], [0, 0, 0, 0]])
    after = dense(Demote(0, "next", spare=True, total=1.0)(PLAN, inputs(), E))
    np.testing.assert_allclose(after[:2], [[0, 0.6, 0.4, 0], [0.75, 0.25, 0, 0]], rtol=1e-6)


def test_random_experts_are_distinct_uniform_and_keep_the_weights():
    tokens = 4000
    plan = TokenPlan(jnp.tile(jnp.array([[0, 1]]), (tokens, 1)), jnp.tile(jnp.array([[0.7, 0.3]]), (tokens, 1)))
    after = RandomChoice()(plan, inputs(tokens), E)
    chosen_NE = np.asarray(selection_matrix(after, tokens, E))
    assert (chosen_NE.sum(1) == 2).all()
    # binomial: K / E = 1/2 with standard deviation sqrt(1/4 / 4000) = 0.008
    np.testing.assert_allclose(chosen_NE.mean(0), 0.5, atol=0.032)
    np.testing.assert_allclose(np.sort(dense(after, tokens), axis=1)[:, 2:], np.tile([0.3, 0.7], (tokens, 1)))
    again = RandomChoice(seed=1)(plan, inputs(tokens), E)
    assert (np.asarray(again.expert_NK) != np.asarray(after.expert_NK)).any()


def test_a_swap_changes_one_slot_of_who_can():
    # token 0 has 0, 1, 2; token 1 has 3, 0, 1; token 2 has 2 alone
    after = dense(Swap(0, 1, 3)(PLAN, inputs(), E))
    np.testing.assert_allclose(after, [[0.5, 0, 0.2, 0.3], [0.3, 0.1, 0, 0.6], [0, 0, 1, 0]])
    after = dense(Swap(0, 0, 1)(PLAN, inputs(), E))
    np.testing.assert_allclose(after, [[0.5, 0.3, 0.2, 0], [0.3, 0.1, 0, 0.6], [0, 1, 0, 0]])
    at_2 = dense(Swap(0, 0, 3, position=2)(PLAN, inputs(), E))
    np.testing.assert_allclose(at_2, [*dense(PLAN)[:2], [0, 0, 0, 1]])
    np.testing.assert_allclose(dense(Swap(1, 0, 3)(PLAN, inputs(), E)), dense(PLAN))  # another layer


def test_an_expert_major_plan_means_the_same_token_by_token():
    plan = ExpertPlan(
        jnp.array([[0, 1], [2, 3], [0, 2], [3, 3]]),  # token 3 = N is an empty slot
        jnp.array([[0.9, 0.2], [0.4, 0], [0.1, 0.0], [0, 0]]),  # expert 2 has token 2 with weight 0
    )
    tokens = token_major(plan, 3, E)
    np.testing.assert_allclose(combine_matrix(tokens, 3, E), combine_matrix(plan, 3, E))
    np.testing.assert_array_equal(selection_matrix(tokens, 3, E), selection_matrix(plan, 3, E))
    assert tokens.expert_NK[0].tolist() == [0, 2, 4, 4]  # the heaviest first, then empty ones
    after = dense(Mask(0, 0)(plan, inputs(), E))
    np.testing.assert_allclose(after, np.asarray(combine_matrix(plan, 3, E)) * [0, 1, 1, 1])


@pytest.fixture(scope="module")
def evaluation_of_a_router_that_adds():
    """Shapes alone: nothing is compiled."""
    from frugalmoe.train.step import abstract, make_eval_step

    fields = {"model.moe.router": "moe_plus_plus", "model.vocab_size": 16, "model.dim": 8, "model.head_dim": 4}
    fields |= {"model.num_heads": 2, "model.num_kv_heads": 2, "model.num_layers": 1, "model.moe.num_experts": E}
    config = resolve(override(default(), fields))
    mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1))
    with jax.set_mesh(mesh):
        state, step = abstract(config), make_eval_step(config, trace=True)
        batch = Batch(*(sharding.put(mesh, np.zeros((1, 4), t), "BT") for t in "iiii?i"))
        yield lambda change: jax.eval_shape(step, state.params, state.router_state, batch, change)


@pytest.mark.parametrize(
    "change", [Demote(0), Demote(0, "random"), Mask(0, 1, "next", spare=True), Nothing(spare=True)]
)
def test_a_router_that_adds_is_refused_what_ranks_its_choices(change, evaluation_of_a_router_that_adds):
    with pytest.raises(UserError, match=r"choices that are no experts.*; valid: RandomChoice, or Mask"):
        evaluation_of_a_router_that_adds(change)


@pytest.mark.parametrize("change", [Nothing(), Mask(0, 1), Mask(0, 1, "rest"), Mask(0, 1, "random"), RandomChoice()])
def test_a_router_that_adds_allows_what_concerns_experts_alone(change, evaluation_of_a_router_that_adds):
    assert evaluation_of_a_router_that_adds(change).plan.expert_NK.shape == (1, 1, 4, 2)


def test_columns_of_a_router():
    kernel_LDX = np.arange(12.0).reshape(1, 2, 6)
    np.testing.assert_array_equal(router_columns({"kernel_DE": kernel_LDX}, 6), kernel_LDX)
    # four experts, then two choices that are none
    np.testing.assert_array_equal(router_columns({"kernel_DX": kernel_LDX}, 4)[0], [[0, 1, 2, 3], [6, 7, 8, 9]])
    scaled = router_columns({"kernel_DE": kernel_LDX, "scale_D": np.array([[1.0, 10]])}, 6)
    np.testing.assert_array_equal(scaled[0, 1], [60, 70, 80, 90, 100, 110])  # z = (x * s) W = x (s W)
    assert router_columns({"expert_PE": kernel_LDX}, 6) is None
