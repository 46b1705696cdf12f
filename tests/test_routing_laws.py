"""Laws that every routing strategy obeys, over every strategy in the folder; and routers that break them, caught.

Letters: B batch, T time, N tokens (B*T), D model, E experts, K choices.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugalmoe.errors import UserError
from frugalmoe.laws.cases import Case, T, all_cases, make_case
from frugalmoe.laws.routing import LAWS
from frugalmoe.routing import losses, select, stats, strategies
from frugalmoe.routing.contract import About, Inputs, Loss, Router, Routing, linear_init, linear_logits

# Of every kind one: their laws belong to the fast tests, those of the others to the whole suite.
FAST = ("expert_choice", "hash", "random", "sigmoid_bias", "switch_top1", "topk_softmax")


def case_parameters() -> list:
    """`all_cases` as parameters of a test; a file that is no strategy yet fails under its own name alone."""
    sound = [
        pytest.param(case, id=str(case), marks=() if case.router.name in FAST else pytest.mark.slow)
        for case in all_cases()
    ]
    return sound + [pytest.param(UserError(what), id=name) for name, what in strategies.broken().items()]


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
@pytest.mark.parametrize("case", case_parameters())
def test_law(case: Case | UserError, law) -> None:
    if isinstance(case, UserError):
        raise case
    law(case)


# Routers that break a law. Each claims to be a plain safe top-k router.


def broken(route_fn, parts=None, **claims) -> Case:
    """`parts`: of the router; `claims`: of its `About`."""
    texts = dict.fromkeys(("paper", "selection", "weights", "balance"), "")
    about = About(**{"year": 0, "score": "softmax", "losses": losses.GATE_LOSSES, **texts, **claims})
    return make_case(Router(about=about, route=route_fn, init=linear_init, name=route_fn.__name__, **(parts or {})))


BIAS = {"init_state": lambda dim, config: {"bias_E": jnp.zeros(8)}, "merges": {"bias_E": "mean"}}


def finish(logits_BTE, expert_BTK, weight_BTK, inputs, config, counted: Inputs | None = None) -> Routing:
    probs_BTE = jax.nn.softmax(logits_BTE)
    plan = select.token_plan(expert_BTK, weight_BTK, inputs, config.num_experts)
    load_BE = stats.load(plan, inputs, config.num_experts)
    tied_BT = select.top_k(logits_BTE, config.num_experts_per_token).tied_BT
    return Routing(
        plan,
        losses.gate_losses(logits_BTE, probs_BTE, load_BE, inputs, config),
        stats.of_layer(load_BE, counted or inputs, logits_BTE=logits_BTE, probs_BTE=probs_BTE, tied_BT=tied_BT),
    )


def top_k_by(logits_BTE, inputs, config, counted: Inputs | None = None) -> Routing:
    expert_BTK = select.top_k(logits_BTE, config.num_experts_per_token).expert_BTK
    weight_BTK = jax.nn.softmax(select.at(logits_BTE, expert_BTK))
    return finish(logits_BTE, expert_BTK, weight_BTK, inputs, config, counted)


def sequence_mean(params, state, inputs, config):
    logits_BTE = linear_logits(params, inputs)
    return top_k_by(logits_BTE - logits_BTE.mean(1, keepdims=True), inputs, config)


def mean_in_evaluation(params, state, inputs, config):
    logits_BTE = linear_logits(params, inputs)
    mean_B1E = 0 if inputs.train else logits_BTE.mean(1, keepdims=True)
    return top_k_by(logits_BTE - mean_B1E, inputs, config)


def batch_mean(params, state, inputs, config):
    logits_BTE = linear_logits(params, inputs)
    return top_k_by(logits_BTE - logits_BTE.mean(0, keepdims=True), inputs, config)


def with_replacement(params, state, inputs, config):
    logits_BTE = linear_logits(params, inputs)
    draws = jax.vmap(lambda key: jax.random.categorical(key, jnp.zeros((T, 2, config.num_experts))))(inputs.keys_B)
    return finish(logits_BTE, draws, jnp.full(draws.shape, 0.5), inputs, config)


def unnormalized(params, state, inputs, config):
    logits_BTE = linear_logits(params, inputs)
    expert_BTK = select.top_k(logits_BTE, config.num_experts_per_token).expert_BTK
    return finish(logits_BTE, expert_BTK, select.at(jax.nn.softmax(logits_BTE), expert_BTK), inputs, config)


def sigmoid_shares(params, state, inputs, config, least: float = 1e-20):
    logits_BTE = linear_logits(params, inputs)
    expert_BTK = select.top_k(logits_BTE, config.num_experts_per_token).expert_BTK
    score_BTK = jax.nn.sigmoid(select.at(logits_BTE, expert_BTK))
    return finish(logits_BTE, expert_BTK, score_BTK / (score_BTK.sum(-1, keepdims=True) + least), inputs, config)


def clipped_shares(params, state, inputs, config):
    """Its gradients are finite, and its weights do not add up."""
    return sigmoid_shares(params, state, inputs, config, least=1e-10)


def one_pass_deviation(params, state, inputs, config):
    logits_BTE = linear_logits(params, inputs)
    variance_BT1 = jnp.mean(logits_BTE**2, -1, keepdims=True) - logits_BTE.mean(-1, keepdims=True) ** 2
    return top_k_by(logits_BTE / jnp.sqrt(variance_BT1), inputs, config)


def bare_entropy(params, state, inputs, config):
    routing = top_k_by(linear_logits(params, inputs), inputs, config)
    probs_BTE = jax.nn.softmax(linear_logits(params, inputs))
    entropy = -jnp.sum(probs_BTE * jnp.log(probs_BTE), where=inputs.valid_BT[..., None])
    return routing._replace(losses={**routing.losses, "z": Loss(entropy, "token")})


def biased_shares(params, state, inputs, config):
    """Sound at any level of the logits, but not where a bias chooses experts of no probability."""
    logits_BTE = linear_logits(params, inputs)
    choice = select.top_k(logits_BTE + state["bias_E"], config.num_experts_per_token)
    prob_BTK = select.at(jax.nn.softmax(logits_BTE - 50 * jnp.arange(8)), choice.expert_BTK)
    return finish(logits_BTE, choice.expert_BTK, prob_BTK / prob_BTK.sum(-1, keepdims=True), inputs, config)


def frozen(params, state, inputs, config):
    return top_k_by(jax.lax.stop_gradient(linear_logits(params, inputs)), inputs, config)


def noise_by_index(params, state, inputs, config):
    shape = (*inputs.token_ids_BT.shape[1:], config.num_experts)
    noise_BTE = jax.vmap(lambda key: jax.random.normal(key, shape))(inputs.keys_B)
    return top_k_by(linear_logits(params, inputs) + noise_BTE, inputs, config)


def unmasked_padding(params, state, inputs, config):
    everything = inputs._replace(segment_ids_BT=jnp.ones_like(inputs.segment_ids_BT))
    return top_k_by(linear_logits(params, everything), everything, config)


def padding_in_stats(params, state, inputs, config):
    everything = inputs._replace(segment_ids_BT=jnp.ones_like(inputs.segment_ids_BT))
    return top_k_by(linear_logits(params, inputs), inputs, config, counted=everything)


def low_precision(params, state, inputs, config):
    low = inputs.x_BTD.astype(jnp.bfloat16) @ params["kernel_DE"].astype(jnp.bfloat16)
    logits_BTE = jnp.where(inputs.x_BTD.dtype == jnp.bfloat16, low.astype(jnp.float32), linear_logits(params, inputs))
    return top_k_by(logits_BTE, inputs, config)


def favours_low_ids(params, state, inputs, config):
    return top_k_by(linear_logits(params, inputs) - 0.3 * jnp.arange(config.num_experts), inputs, config)


def undeclared_loss(params, state, inputs, config):
    routing = top_k_by(linear_logits(params, inputs), inputs, config)
    return routing._replace(losses={**routing.losses, "secret": Loss(jnp.float32(1), "batch")})


def negative_loss(params, state, inputs, config):
    return scaled_loss(params, state, inputs, config, "token_entropy", -1.0)


def scaled_loss(params, state, inputs, config, name, factor):
    routing = top_k_by(linear_logits(params, inputs), inputs, config)
    if name not in routing.losses:
        return routing
    term = routing.losses[name]
    return routing._replace(losses={**routing.losses, name: Loss(factor * term.sum, term.per)})


def halved(name):
    """A router whose loss of this name is half of what it is."""

    def route(params, state, inputs, config):
        return scaled_loss(params, state, inputs, config, name, 0.5)

    route.__name__ = f"halved_{name}"
    return route


def flipped_balance(params, state, inputs, config):
    routing = top_k_by(linear_logits(params, inputs), inputs, config)
    term = routing.losses["load_balance"]
    away = 2 * jax.lax.stop_gradient(term.sum) - term.sum  # the value is right, the slope is not
    return routing._replace(losses={**routing.losses, "load_balance": Loss(away, term.per)})


def no_balance_gradient(params, state, inputs, config):
    routing = top_k_by(linear_logits(params, inputs), inputs, config)
    term = routing.losses["load_balance"]
    still = Loss(jax.lax.stop_gradient(term.sum), term.per)
    return routing._replace(losses={**routing.losses, "load_balance": still})


def carry_in_bfloat16(params, state, inputs, config):
    logits_BTE = linear_logits(params, inputs)
    return top_k_by(logits_BTE, inputs, config)._replace(carry={"seen_BTE": logits_BTE.astype(jnp.bfloat16)})


def carry_of_another_shape(params, state, inputs, config):
    return top_k_by(linear_logits(params, inputs), inputs, config)._replace(carry={"seen_BT": inputs.x_BTD[..., 0]})


SEEN = {"init_carry": lambda config, batch, time: {"seen_BTE": jnp.zeros((batch, time, config.num_experts))}}
CALLS = []


def impure(params, state, inputs, config):
    CALLS.append(None)
    return top_k_by(linear_logits(params, inputs) + 0.1 * len(CALLS) * jnp.arange(8), inputs, config)


def scale_nobody_declares(params, state, inputs, config):
    """The experts see a scale at padding, too, so that the layer cannot leave it out."""
    routing = top_k_by(linear_logits(params, inputs), inputs, config)
    expert_NK = routing.plan.expert_NK.at[:, 0].set(routing.plan.expert_NK[:, 0] - 8)  # wraps around in one executor
    return routing._replace(plan=routing.plan._replace(expert_NK=expert_NK))


def one_weight(params, state, inputs, config):
    """Its weights are a softmax over the chosen, and it claims nothing of their sum."""
    return top_k_by(linear_logits(params, inputs), inputs, config)


def moved(state, stats, config):
    return {"bias_E": state["bias_E"] + stats["counts"]}


def summed(states, weights, config):
    return {"bias_E": sum(state["bias_E"] for state in states)}


def in_float64(states, weights, config):
    return {"bias_E": np.average([state["bias_E"] for state in states], axis=0, weights=weights).astype(np.float64)}


STATEFUL = BIAS | {"update": moved}


BROKEN = [
    ("declared_losses", broken(undeclared_loss)),
    ("declared_losses", broken(negative_loss)),
    ("declared_losses", broken(unnormalized, losses=(*losses.GATE_LOSSES, "load"))),
    *(("loss_values", broken(halved(name))) for name in losses.GATE_LOSSES),
    ("balance_direction", broken(flipped_balance)),
    ("balance_direction", broken(no_balance_gradient)),
    ("carry", broken(carry_in_bfloat16, SEEN)),
    ("carry", broken(carry_of_another_shape, SEEN)),
    ("carry", broken(unnormalized, SEEN)),
    ("pure", broken(impure)),
    ("executors", broken(scale_nobody_declares)),
    ("weights", broken(one_weight)),
    ("merge", broken(biased_shares, STATEFUL | {"merges": {}}, stateful=True)),
    ("merge", broken(biased_shares, STATEFUL | {"merge_state": lambda states, *_: states[0]}, stateful=True)),
    ("merge", broken(biased_shares, STATEFUL | {"merge_state": summed}, stateful=True)),
    ("merge", broken(biased_shares, STATEFUL | {"merge_state": in_float64}, stateful=True)),
    ("causal_by_perturbation", broken(sequence_mean)),
    ("causal_by_gradient", broken(sequence_mean)),
    ("decoding", broken(sequence_mean)),
    ("batch_independent", broken(batch_mean)),
    ("shards", broken(batch_mean)),
    ("no_duplicates", broken(with_replacement, learned=False, random=True)),
    ("weights", broken(unnormalized, weight_sum=1.0)),
    ("weights", broken(frozen, weight_sum="at_most_one")),
    ("extremes", broken(sigmoid_shares)),
    ("extremes", broken(clipped_shares, weight_sum=1.0)),
    ("extremes", broken(one_pass_deviation)),
    ("extremes", broken(bare_entropy)),
    ("extremes", broken(biased_shares, BIAS, weight_sum=1.0, stateful=True)),
    ("extremes", broken(unnormalized, weight_sum=1.0)),
    ("learned", broken(frozen)),
    ("learned", make_case("topk_softmax", 8, 1)),
    ("finite_differences", broken(frozen)),
    ("finite_differences", broken(unnormalized, estimated_gradient=True)),
    ("decoding", broken(noise_by_index, random=True)),
    ("noise", broken(noise_by_index, random=True)),
    ("token_permutation", broken(noise_by_index, random=True)),
    ("padding", broken(unmasked_padding)),
    ("counts", broken(padding_in_stats)),
    ("precision", broken(low_precision)),
    ("expert_permutation", broken(favours_low_ids)),
    ("ties", broken(favours_low_ids)),
    ("causal_by_perturbation", broken(unnormalized, causal="leak")),
    ("causal_by_perturbation", broken(mean_in_evaluation)),
    ("causal_by_perturbation", broken(unnormalized, causal_in_evaluation="leak")),
    ("decoding", broken(mean_in_evaluation)),
    ("batch_independent", broken(unnormalized, causal="batch")),
    ("noise", broken(unnormalized, random=True)),
    ("state", broken(unnormalized, stateful=True)),
    ("no_gradient_into_state", broken(unnormalized, stateful=True)),
    ("counts", broken(unnormalized, form="expert")),
]


def test_every_law_has_a_router_that_it_must_catch() -> None:
    assert {law for law, _ in BROKEN} == set(LAWS)


@pytest.mark.parametrize(("law", "case"), BROKEN, ids=[f"{law}-{case}" for law, case in BROKEN])
def test_law_catches(law: str, case: Case) -> None:
    with pytest.raises(AssertionError):
        LAWS[law](case)


def test_a_correct_router_of_this_file_passes() -> None:
    """The broken ones fail for what they break, not for how they are written."""

    def correct(params, state, inputs, config):
        return top_k_by(linear_logits(params, inputs), inputs, config)

    for law in LAWS.values():
        law(broken(correct, weight_sum=1.0))
