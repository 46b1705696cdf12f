"""Routing bugs of public code, and the test here that fails if one of them comes back.

A bug that fits into one function is put back (`put_back`) and its test must fail. One that takes a whole router is
among the broken routers of `test_routing_laws` (`breaks`), whose law must fail. The others name the test that fails.
Letters: B batch, T time, E experts, K choices, L layers.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
import test_routing_laws

from frugalmoe import routing
from frugalmoe.laws.cases import make_case, make_inputs, route
from frugalmoe.model.scan import remat
from frugalmoe.routing import losses, select, stats, strategies
from frugalmoe.routing.contract import combine_matrix, linear_logits
from frugalmoe.routing.strategies import sinkhorn

BALANCE, LOAD, TOTAL = losses.load_balance, stats.load, losses.total


def switch(terms, coefficients, units):
    return TOTAL(terms, {name: float(c > 0) for name, c in coefficients.items()}, units)


def one_more(terms, coefficients, units):
    return TOTAL(terms, {name: 1 + c for name, c in coefficients.items()}, units)


def mean_over_layers(terms, coefficients, units):
    loss, metrics = TOTAL(terms, coefficients, units)
    return losses.Total(loss / 2, metrics)  # the layers of the test


def sum_to_k(probs_BTE, load_BE, inputs, config):
    loss = BALANCE(probs_BTE, load_BE, inputs, config)
    return dataclasses.replace(loss, sum=config.num_experts_per_token * loss.sum)


def own_shard(probs_BTE, load_BE, inputs, config):
    return BALANCE(probs_BTE, load_BE, inputs._replace(axis_names=()), config)


def constant(probs_BTE, load_BE, inputs, config):
    return BALANCE(jnp.full_like(probs_BTE, probs_BTE.mean()), load_BE, inputs, config)


def rounded(plan, inputs, num_experts):
    return LOAD(plan, inputs, num_experts).astype(jnp.bfloat16).astype(jnp.int32)


class Bug(NamedTuple):
    what: str
    where: str
    test: str  # module::function
    put_back: tuple[object, str, Callable] | None = None  # (module, name, the function with the bug)
    args: tuple = ()  # of the test, where the bug is put back
    breaks: str = ""  # name of a broken router of test_routing_laws that `test`, a law, must catch


BUGS = (
    Bug(
        "auxiliary gradients never reach the gate",
        "NeMo Automodel issue 1408",
        "test_routing_losses::test_auxiliary_gradients_reach_the_gate_at_the_size_of_their_coefficient",
    ),
    Bug(
        "the coefficient is a switch",
        "NeMo Automodel issue 1408",
        "test_routing_losses::test_total_is_linear_in_the_coefficient_and_zero_without",
        (losses, "total", switch),
    ),
    Bug(
        "the coefficient is added to one",
        "EasyDeL qwen3_moe, mixtral, deepseek_v3",
        "test_routing_losses::test_total_is_linear_in_the_coefficient_and_zero_without",
        (losses, "total", one_more),
    ),
    Bug(
        "a coefficient gets weaker with depth: the loss is a mean over layers",
        "MaxText train.py",
        "test_routing_losses::test_total_by_hand",
        (losses, "total", mean_over_layers),
    ),
    Bug(
        "layers are lumped together before f times P, imbalances cancel",
        "transformers issue 28255",
        "test_routing_losses::test_opposite_imbalances_of_two_layers_do_not_cancel",
    ),
    Bug(
        "f sums to k, not to 1",
        "transformers issue 43688",
        "test_routing_losses::test_load_balance_is_one_at_uniform_load_and_experts_over_k_at_collapse",
        (losses, "load_balance", sum_to_k),
        ({}, 2),
    ),
    Bug(
        "the global loss knows its own shard alone",
        "Megatron-LM issue 3672",
        "test_routing_losses::test_the_global_scope_sums_over_shards_to_the_loss_and_gradient_of_one_device",
        (losses, "load_balance", own_shard),
    ),
    Bug(
        "denominators are those of one micro-batch; auxiliary gradients divided away under accumulation",
        "Megatron-LM issue 7213, MaxText gradient_accumulation.py",
        "test_train_step::test_micro_batches_equal_one_batch",
    ),
    Bug(
        "the loss is nearly constant: its mean score does not depend on the expert",
        "hyper-parallel issue 752",
        "test_routing_losses::test_the_gradient_lowers_overloaded_experts_and_raises_starved_ones",
        (losses, "load_balance", constant),
    ),
    Bug(
        "the balance loss takes a softmax of scores that are no logits",
        "MaxText moe.py",
        "test_strategies::test_probabilities_are_normalized_scores_not_a_softmax_of_scores",
    ),
    Bug(
        "the loss counts a selection without the bias that was executed",
        "Megatron-LM compute_routing_scores_for_aux_loss",
        "test_routing_losses::test_the_loss_counts_the_selection_that_was_executed",
    ),
    Bug(
        "the reported language-model loss has auxiliary losses in it",
        "open_lm PR 255",
        "test_train_step::test_the_reported_cross_entropy_has_no_auxiliary_loss_in_it",
    ),
    Bug(
        "counts and losses doubled under recomputation",
        "Megatron-LM issue 1330, torchtitan PR 1593",
        "test_train_step::test_remat_changes_nothing",
    ),
    Bug(
        "the recomputation routes near-ties anew",
        "NeMo Automodel issue 3325",
        "test_public_bugs::test_a_recomputed_layer_takes_the_saved_choice",
    ),
    Bug(
        "an evaluation's counts move the bias",
        "torchtitan PR 4148",
        "test_train_step::test_evaluation_changes_no_state_and_is_not_touched_by_noise",
    ),
    Bug(
        "bias updates differ between replicas",
        "MaxText moe.py",
        "test_layouts::test_eight_devices_equal_one",
    ),
    Bug(
        "bfloat16 counts flip the sign of a bias update",
        "Megatron-LM PR 7081",
        "test_routing_stats::test_counts_are_exact_where_bfloat16_is_not",
        (stats, "load", rounded),
    ),
    Bug(
        "the bias is not in the checkpoint",
        "FlagScale PR 412",
        "test_runs::test_killed_and_restarted_it_ends_in_the_same_bits",
    ),
    Bug(
        "the bias leaks into the weights",
        "MaxText moe.py, models of other names than deepseek",
        "test_strategies::test_bias_steers_the_selection_and_never_the_weights",
    ),
    Bug(
        "groups are masked with 0, which beats negative biased scores",
        "gates that multiply by a mask of groups",
        "test_strategies::test_masked_groups_never_win_over_negative_biased_scores",
    ),
    Bug(
        "padded rows put NaN into gradients",
        "MaxText PR 3699",
        "frugalmoe.laws.routing.plan::law_padding",
        breaks="unmasked_padding",
    ),
    Bug(
        "random experts are drawn with replacement",
        "MaxText random_routing",
        "frugalmoe.laws.routing.plan::law_no_duplicates",
        breaks="with_replacement",
    ),
    Bug(
        "a gate whose weight is constant learns nothing",
        "EasyDeL switch, any k = 1 with normalized weights",
        "frugalmoe.laws.routing.gradients::law_learned",
        breaks="topk_softmax",
    ),
    Bug(
        "expert choice keeps a token's top k",
        "EasyDeL _moe_module.py",
        "test_strategies::test_every_expert_takes_its_c_best_tokens_of_each_sequence",
    ),
    Bug(
        "hash routing keeps a learned top k",
        "EasyDeL _moe_module.py",
        "test_strategies::test_hash_looks_at_the_token_id_the_layer_and_the_seed_alone",
    ),
    Bug(
        "the zero expert's share is taken away before the others are normalized, so that it gives them its weight",
        "SkyworkAI MoE-plus-plus, released code",
        "test_strategies_zero_cost::test_moe_plus_plus_zero_copy_and_constant_by_hand",
    ),
    Bug(
        "scaling goes on until an error is small: as many steps as the data asks for",
        "Megatron-LM sinkhorn",
        "test_public_bugs::test_sinkhorn_takes_a_fixed_number_of_steps",
    ),
    Bug(
        "a causal router begins with steps of expert choice",
        "expert threshold, 2603.11535, its first 4,000 steps",
        "test_public_bugs::test_expert_threshold_is_causal_from_its_first_step",
    ),
    Bug(
        "experts are chosen by an approximate top k",
        "gemma _moe.py",
        "test_public_bugs::test_no_router_chooses_approximately",
    ),
)


def resolved(name: str) -> Callable:
    module, _, function = name.partition("::")
    return getattr(importlib.import_module(module), function)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.where}: {bug.what}"[:70])
def test_each_bug_is_caught(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    test = resolved(bug.test)
    if bug.breaks:
        law = test.__name__.removeprefix("law_")
        (case,) = (case for name, case in test_routing_laws.BROKEN if (name, case.router.name) == (law, bug.breaks))
        with pytest.raises(AssertionError):
            test(case)
    elif bug.put_back:
        monkeypatch.setattr(*bug.put_back)
        with pytest.raises(AssertionError):
            test(*bug.args)


def gradient_program(choose: Callable, policy: str) -> str:
    """The jaxpr of the gradient of a recomputed gate that chooses two experts."""
    inputs = make_inputs()

    def gate(params: dict) -> jax.Array:
        logits_BTE = linear_logits(params, inputs)
        return jax.nn.softmax(select.at(logits_BTE, choose(logits_BTE))[..., :1] * jnp.arange(2.0))

    body = lambda params, _: (params, gate(params))
    value = lambda params: remat(body, policy)(params, None)[1].sum()
    return str(jax.make_jaxpr(jax.grad(value))({"kernel_DE": jnp.ones((8, 8))}))


@pytest.mark.parametrize("policy", ["dots", "full"])
def test_a_recomputed_layer_takes_the_saved_choice(policy: str) -> None:
    """The backward pass chooses no experts again, so that rounding cannot choose others; indices by hand would."""
    assert gradient_program(lambda z: select.top_k(z, 2).expert_BTK, policy).count("top_k[") == 1
    assert gradient_program(lambda z: jax.lax.top_k(z, 2)[1], policy).count("top_k[") == 2


def test_no_router_chooses_approximately() -> None:
    sources = list(Path(routing.__file__).parent.rglob("*.py"))
    assert len(sources) > len(strategies.names())
    assert not [path for path in sources if "approx_max_k" in path.read_text()]


def test_sinkhorn_takes_a_fixed_number_of_steps() -> None:
    """A loop whose length is known is a scan; one that ends by its data is a while."""
    scaled = functools.partial(sinkhorn.scaled, iterations=3)
    program = str(jax.make_jaxpr(scaled)(jnp.ones((1, 4, 2)), jnp.ones((1, 4), bool)))
    assert "length=3" in program and "while" not in program


def test_expert_threshold_is_causal_from_its_first_step() -> None:
    case, inputs = make_case("expert_threshold"), make_inputs(padded=False)._replace(step=jnp.int32(0))
    assert inputs.train
    later = inputs._replace(x_BTD=inputs.x_BTD.at[:, -1].add(100.0))
    first, second = (combine_matrix(route(case, i).plan, i.segment_ids_BT.size, 8) for i in (inputs, later))
    time = inputs.segment_ids_BT.shape[1]
    before_N = jnp.arange(inputs.segment_ids_BT.size) % time < time - 1
    assert jnp.any(first[~before_N] != second[~before_N])
    assert jnp.array_equal(first[before_N], second[before_N])
