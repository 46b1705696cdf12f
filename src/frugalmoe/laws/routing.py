"""Laws that every routing strategy obeys.

A law takes a case and asserts. What a strategy declares about itself decides which side of a law must hold.
Letters: B batch, T time, N tokens (B*T), D model, E experts, K choices.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from frugalmoe.errors import UserError
from frugalmoe.experts import executors
from frugalmoe.laws.cases import (
    VOCAB,
    WEIGHT,
    B,
    Case,
    D,
    T,
    arrays_of,
    carry_into,
    combine,
    compiled_route,
    eager_route,
    effects,
    extremes,
    make_inputs,
    make_params,
    objective,
    probe,
    route,
    selections,
)
from frugalmoe.model.moe import apply_routing
from frugalmoe.routing.contract import ExpertPlan, Inputs, Loss, Routing, TokenPlan, combine_matrix
from frugalmoe.schema import FrozenDict, MoE
from frugalmoe.sharding import platform


def assert_same(a: object, b: object, tolerance: float = 0.0) -> None:
    """Two trees of arrays are equal: bit for bit, or to a relative and absolute tolerance."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def law_weights(case: Case) -> None:
    """The weights of a valid token add up to what is declared, and none is negative."""
    claim = case.router.claim("weight_sum", case.config)
    inputs = make_inputs()
    g_BTE = combine(case, route(case, inputs))
    total = g_BTE.sum(-1)[np.asarray(inputs.valid_BT)]
    assert np.all(g_BTE >= 0)
    if claim == "at_most_one":
        assert np.all((total > 0) & (total <= 1 + 1e-6)) and np.any(total < 1 - 1e-3)
    elif claim != "free":
        np.testing.assert_allclose(total, claim, rtol=1e-6)
    else:  # of a router with parameters that are not as they began: a learned scale begins at 1
        params = jax.tree.map(jnp.add, make_params(case)[0], linear_like(make_params(case)[0], 0))
        total = combine(case, route(case, inputs, params)).sum(-1)[np.asarray(inputs.valid_BT)]
        apart = np.ptp(total) > 1e-5 * np.max(total)
        assert apart, f"the weights of every token add up to {total[0]:.6g}; claim About(weight_sum={total[0]:.6g})"


def law_extremes(case: Case) -> None:
    """Whatever the size of logits and bias: everything is finite, gradients too, and weights add up as declared."""
    claim = case.router.claim("weight_sum", case.config)
    for name, (inputs, params, state) in extremes(case).items():
        ones = dict.fromkeys(case.router.about.losses, 1.0)
        probed = probe(case, inputs, params=params, state=state, **ones)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(probed)), name
        for train in (True, False):
            routing = route(case, inputs._replace(train=train), params, state)
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(routing)), name
            g_BTE = combine(case, routing)
            total = g_BTE.sum(-1)[np.asarray(inputs.valid_BT)]
            assert np.all(g_BTE >= 0), name
            if claim == "at_most_one":
                assert np.all(total <= 1 + 1e-6), name
            elif claim != "free":
                np.testing.assert_allclose(total, claim, rtol=1e-6, err_msg=name)


def law_causal_by_perturbation(case: Case) -> None:
    """Other later tokens change no earlier decision, bit for bit, unless a leak is declared; then they do change some.

    In training and in evaluation, each against its own declaration.
    """
    for train in (True, False):
        changes = 0
        for seed in range(4):
            for cut in (1, 4, 6):
                here, there = (make_inputs(s, padded=False, train=train) for s in (seed, seed + 100))
                later = jnp.arange(T) >= cut
                moved = here._replace(
                    x_BTD=jnp.where(later[:, None], there.x_BTD, here.x_BTD),
                    token_ids_BT=jnp.where(later, there.token_ids_BT, here.token_ids_BT),
                )
                before, after = (effects(case, route(case, i))[:, :cut] for i in (here, moved))
                changes += np.sum(before != after)
        claim, when = case.router.causality(case.config, train), "training" if train else "evaluation"
        assert (changes > 0) == (claim == "leak"), f"{changes} earlier values change in {when}; it claims {claim!r}"


def law_causal_by_gradient(case: Case) -> None:
    """Gradient flows from earlier outputs to each token that has a part in them, and to no later input if safe."""
    if case.router.causality(case.config, train=True) == "leak":
        return
    for cut in (2, 5):
        earlier_BTD = jnp.broadcast_to((jnp.arange(T) < cut)[:, None], (B, T, D)).astype(jnp.float32)
        probed = probe(case, make_inputs(padded=False), earlier_BTD)
        served_BT = np.any(effects(case, probed.routing._replace(carry=None)) != 0, axis=-1)
        assert np.array_equal(np.any(probed.x_BTD[:, :cut] != 0, axis=-1), served_BT[:, :cut]) and served_BT.any()
        assert np.all(probed.x_BTD[:, cut:] == 0)


def law_batch_independent(case: Case) -> None:
    """A sequence is routed the same whatever the other sequences of its batch, unless declared.

    A leak over a pool of sequences has the option `pool`.
    """
    for train in (True, False):
        first, other = make_inputs(0, train=train), make_inputs(50)
        mixed = first._replace(
            x_BTD=first.x_BTD.at[1].set(other.x_BTD[1] * 5),
            token_ids_BT=first.token_ids_BT.at[1].set(other.token_ids_BT[1]),
        )
        before, after = (effects(case, route(case, i))[0] for i in (first, mixed))
        claim, pool = case.router.causality(case.config, train), getattr(case.config.options, "pool", "sequence")
        same, when = np.array_equal(before, after), "training" if train else "evaluation"
        told = f"another sequence of the batch changes {'nothing' if same else 'a decision'} in {when}"
        assert same == (claim == "safe" or (claim == "leak" and pool == "sequence")), f"{told}; it claims {claim!r}"


def law_decoding(case: Case) -> None:
    """Routing token by token gives what routing the whole sequence gives, in evaluation."""
    if case.router.causality(case.config, train=False) != "safe":
        return
    inputs = make_inputs(padded=False, train=False)
    whole = route(case, inputs)
    assert np.any(selections(case, whole))
    for t in range(T):
        step = route(case, inputs.of_tokens(lambda a, t=t: a[:, t : t + 1]))
        assert np.array_equal(selections(case, step, 1)[:, 0], selections(case, whole)[:, t])
        np.testing.assert_allclose(effects(case, step, 1)[:, 0], effects(case, whole)[:, t], rtol=1e-5, atol=1e-6)


def expert_axes(tree: dict, permutation: np.ndarray) -> dict:
    """Every array whose name's shape letters hold E, or X for choices of which the first are E, permuted along it."""

    def permute(name: str, array: jax.Array) -> jax.Array:
        for axis, letter in enumerate(name.rpartition("_")[2]):
            if letter in "EX":
                order = np.concatenate([permutation, np.arange(len(permutation), array.shape[axis])])
                array = jnp.take(array, order, axis=axis)
        return array

    return {name: permute(name, array) for name, array in tree.items()}


def law_expert_permutation(case: Case) -> None:
    """Permuted experts are permuted in the plan, and that is all (groups stay together; noise is left out)."""
    params, state = make_params(case)
    noisy = case.router.claim("random", case.config)  # noise may be drawn by expert id
    inputs, groups = make_inputs(train=not noisy), getattr(case.config.options, "num_groups", 1)
    plain, other = route(case, inputs), route(case, inputs, make_params(case, 1)[0])
    if np.array_equal(selections(case, other), selections(case, plain)):
        # Experts that no parameter selects have no order to permute.
        assert case.router.about.score == "none" or not params or not case.router.claim("learned", case.config)
        return
    rng, size = np.random.default_rng(0), case.config.num_experts // groups
    permutation = np.concatenate([g * size + rng.permutation(size) for g in rng.permutation(groups)])
    assert not np.array_equal(permutation, np.arange(case.config.num_experts))
    carry = carry_into(case, inputs)
    inputs = inputs._replace(carry=carry and expert_axes(carry, permutation))
    permuted = route(case, inputs, expert_axes(params, permutation), expert_axes(state, permutation))
    assert np.array_equal(selections(case, permuted), selections(case, plain)[..., permutation])
    np.testing.assert_allclose(combine(case, permuted), combine(case, plain)[..., permutation], rtol=1e-5)
    assert_same((permuted.added_BTD, permuted.input_scale_BT), (plain.added_BTD, plain.input_scale_BT), 1e-5)
    assert_same(permuted.carry, plain.carry and expert_axes(plain.carry, permutation), 1e-5)


def law_token_permutation(case: Case) -> None:
    """Permuted tokens of a sequence, with their ids, segments and positions, are permuted in the plan."""
    inputs, order = make_inputs(), np.random.default_rng(0).permutation(T)
    permuted = inputs.of_tokens(lambda a: a[:, order])
    before, after = effects(case, route(case, inputs)), effects(case, route(case, permuted))
    np.testing.assert_allclose(after, before[:, order], rtol=1e-5, atol=1e-6)


def law_counts(case: Case) -> None:
    """The stats count exactly the plan's slots of valid tokens, and a null slot has no weight."""
    inputs = make_inputs()
    routing = route(case, inputs)
    chosen_BTE = selections(case, routing)
    counts_E, chosen_E = np.asarray(routing.stats["counts"]), chosen_BTE.sum((0, 1))
    assert np.array_equal(counts_E, chosen_E), f"stats count {counts_E} slots per expert, the plan has {chosen_E}"
    assert routing.stats["assigned"] == chosen_BTE.sum()
    assert routing.stats["tokens"] == inputs.valid_BT.sum()
    assert isinstance(routing.plan, TokenPlan) == (case.router.about.form == "token")
    ids, weights = (np.asarray(a) for a in routing.plan)
    null = case.config.num_experts if case.router.about.form == "token" else B * T
    assert np.sum(ids != null) == routing.stats["assigned"]
    assert np.all(weights[ids == null] == 0)


def law_no_duplicates(case: Case) -> None:
    """No token has the same expert twice."""
    for seed in range(3):
        most = selections(case, route(case, make_inputs(seed))).max()
        assert most == 1, f"a token names an expert {most} times"


def law_learned(case: Case) -> None:
    """The layer's output gives every parameter a gradient, if and only if the router declares itself learned."""
    norms = [float(jnp.linalg.norm(g)) for g in jax.tree.leaves(probe(case, make_inputs()).params)]
    if case.router.claim("learned", case.config):
        assert norms and min(norms) > 1e-3, f"norms of the parameters' gradients: {norms}; it claims to be learned"
    else:
        assert all(norm == 0 for norm in norms), f"norms of the parameters' gradients: {norms}; it claims not to learn"


def law_no_gradient_into_state(case: Case) -> None:
    """There is state if and only if declared; neither the output nor a loss gives it a gradient."""
    gradients = probe(case, make_inputs(), **dict.fromkeys(case.router.about.losses, 1.0)).state
    assert bool(gradients) == case.router.about.stateful, f"state: {sorted(gradients)}, claimed or not otherwise"
    assert all(np.all(gradient == 0) for gradient in jax.tree.leaves(gradients))


def law_finite_differences(case: Case) -> None:
    """The gradient of output and losses is the slope of their value where no selection changes, unless declared."""
    if not case.router.claim("learned", case.config):
        return
    coefficients, step, slopes, gradients = dict.fromkeys(case.router.about.losses, 0.1), 5e-4, [], []
    params, _ = make_params(case)
    for seed in range(3):
        inputs, direction = make_inputs(seed), linear_like(params, seed)
        low, high = (jax.tree.map(lambda p, d, s=s: p + s * d, params, direction) for s in (-step, step))
        low, middle, high = (probe(case, inputs, params=p, **coefficients) for p in (low, params, high))
        if all(np.array_equal(end.routing.plan.ids, middle.routing.plan.ids) for end in (low, high)):
            slopes.append((high.value - low.value) / (2 * step))
            gradients.append(jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, middle.params, direction)))
    assert slopes
    assert np.allclose(slopes, gradients, rtol=5e-3, atol=1e-2) != case.router.about.estimated_gradient


def linear_like(params: dict, seed: int) -> dict:
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, [n / jnp.linalg.norm(n) for n in noise])


def law_declared_losses(case: Case) -> None:
    """A router returns the losses that it declares, no others, if the config names them; each finite, not negative."""
    routing = route(with_all_losses(case), make_inputs())
    returned, declared = sorted(routing.losses), sorted(case.router.about.losses)
    assert returned == declared, f"route returns the losses {returned}, About(losses=...) declares {declared}"
    for name, loss in routing.losses.items():
        assert loss.sum.shape == () and np.isfinite(loss.sum) and loss.sum >= 0, f"{name} is {loss.sum}"


def with_all_losses(case: Case) -> Case:
    """The case with every loss that its router declares named in the config."""
    names = FrozenDict.fromkeys(case.router.about.losses, 1.0)
    return case._replace(config=dataclasses.replace(case.config, losses=names, load_balance_devices=2))


# What a loss is when all choices of a token have equal probabilities, whatever the load; X choices.
AT_EQUAL_LOGITS = {
    "load_balance": lambda num_choices: 1.0,
    "sequence_balance": lambda num_choices: 1.0,
    "device_balance": lambda num_choices: 1.0,
    "marginal_entropy": lambda num_choices: 0.0,
    "token_entropy": np.log,
    "mutual_information": np.log,
}


def of_load(counts_E: Any, stats: Mapping[str, Any]) -> tuple[float]:
    """E * sum_e f_e P_e, with f from these counts."""
    counts_E, mean_E = (np.asarray(a, np.float64) for a in (counts_E, stats["prob_sum"] / stats["tokens"]))
    return (counts_E.size * np.dot(counts_E / counts_E.sum(), mean_E),)


def from_stats(routing: Routing) -> dict[str, tuple[float, ...]]:
    """What each loss of a gate is for equal sequences, by its definition from the statistics; some have two forms."""
    stats = {name: np.asarray(value, np.float64) for name, value in routing.stats.items()}
    mean_E, num_experts = np.maximum(stats["prob_sum"] / stats["tokens"], 1e-20), stats["counts"].size
    marginal = np.log(num_experts) + np.sum(mean_E * np.log(mean_E))
    first_E = np.bincount(np.asarray(routing.plan[0])[:, 0], minlength=num_experts)[:num_experts]
    variation = lambda amount_E: (np.var(amount_E) / np.mean(amount_E) ** 2,)
    return {
        # f counts all choices, or the first alone (GShard).
        "load_balance": (*of_load(stats["counts"], stats), *of_load(first_E, stats)),
        # Of probabilities, or of weights (Shazeer et al.).
        "importance": (*variation(mean_E), *variation(weight_of_experts(routing.plan, num_experts))),
        "marginal_entropy": (marginal,),
        "token_entropy": (stats["entropy_sum"] / stats["tokens"],),
        "mutual_information": (marginal + stats["entropy_sum"] / stats["tokens"],),
    }


def weight_of_experts(plan: TokenPlan, num_experts: int) -> np.ndarray:
    """The weights that each expert has over all tokens [E]."""
    ids, weights = (np.asarray(a).reshape(-1) for a in plan)
    return np.bincount(ids, np.float64(weights), minlength=num_experts)[:num_experts]


def law_loss_values(case: Case) -> None:
    """A loss of gates has the value that its definition gives it: 1 for a balance loss at uniform probabilities."""
    check_equal_logits(with_all_losses(case))
    check_equal_sequences(with_all_losses(case))


def units(loss: Loss) -> int:
    """How many of the units that it is divided by the test inputs hold, without padding."""
    return {"token": B * T, "sequence": B, "group": B, "batch": 1}[loss.per]


def assert_value(name: str, value: float, *forms: float) -> None:
    close = np.isclose(value, forms, rtol=1e-4, atol=1e-5)
    assert np.any(close), f"{name} is {value:.6g}, by its definition {forms[0]:.6g}"


def check_equal_logits(case: Case) -> None:
    """Tokens of zeros, for which a gate without offsets has equal logits and so every balance loss its least value."""
    inputs = make_inputs(padded=False)
    routing = route(case, inputs._replace(x_BTD=jnp.zeros_like(inputs.x_BTD)))
    if not {"entropy_sum", "lse_sum"} <= routing.stats.keys():
        return
    num_choices = round(float(np.exp(routing.stats["lse_sum"] / routing.stats["tokens"])))
    if not np.isclose(routing.stats["entropy_sum"] / routing.stats["tokens"], np.log(num_choices), rtol=1e-5):
        return
    for name in AT_EQUAL_LOGITS.keys() & routing.losses.keys():
        loss = routing.losses[name]
        assert_value(name, float(loss.sum) / units(loss), AT_EQUAL_LOGITS[name](num_choices))


def check_equal_sequences(case: Case) -> None:
    """A sequence and its twin, against what the statistics say; of probabilities only where all are of experts."""
    inputs = make_inputs(padded=False)
    twins = inputs.of_sequences(lambda a: jnp.stack([a[0], a[0]]))
    routing = route(case, twins)
    stats = routing.stats
    if "z" in routing.losses and "lse_sq_sum" in stats:
        assert_value("z", float(routing.losses["z"].sum) / (B * T), float(stats["lse_sq_sum"]) / (B * T))
    if "entropy_sum" not in stats or not np.isclose(stats["prob_sum"].sum(), stats["tokens"], rtol=1e-5):
        return
    for name, forms in from_stats(routing).items():
        if name not in routing.losses:
            continue
        value = float(routing.losses[name].sum) / units(routing.losses[name])
        if name == "load_balance" and not np.any(np.isclose(value, forms, rtol=1e-4)):
            # f may count what the gate alone would choose, as it does in evaluation.
            forms += of_load(route(case, twins._replace(train=False)).stats["counts"], stats)
        assert_value(name, value, *forms)


def law_balance_direction(case: Case) -> None:
    """One step down the load-balance loss lowers the probability of the most loaded expert."""
    if "load_balance" not in case.router.about.losses:
        return
    inputs = make_inputs(padded=False)
    inputs = inputs._replace(x_BTD=inputs.x_BTD[:1, :1] + 0.01 * inputs.x_BTD)  # tokens alike: one expert overloaded
    before = probe(case, inputs, np.zeros_like(WEIGHT), load_balance=1.0)
    params = jax.tree.map(lambda p, g: p - 1e-2 * g, make_params(case)[0], before.params)
    after = route(case, inputs, params).stats["prob_sum"]
    before = before.routing.stats
    loaded = int(jnp.argmax(before["counts"] * 1e6 + before["prob_sum"]))
    drop = float(before["prob_sum"][loaded] - after[loaded])
    assert drop > 1e-6, f"a step down load_balance changes the busiest expert's probability by {-drop:.3g}"


def law_state(case: Case) -> None:
    """State is float32 and moves only if declared; the update is a function of the summed stats alone."""
    state = case.router.init_state(D, case.config)
    routing = route(case, make_inputs(), state=state)
    moved = case.router.update(state, routing.stats, case.config)
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((state, moved)))
    changed = any(np.any(a != b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(moved), strict=True))
    assert changed == case.router.about.stateful, "state moves" if changed else "claims a state, and none moves"


def law_merge(case: Case) -> None:
    """States of replicas merge into one: equal ones into themselves, in any order or grouping, or are refused."""
    first = {name: np.asarray(value) for name, value in make_params(case)[1].items()}
    noise = lambda seed, shape: np.abs(np.random.default_rng(seed).normal(size=shape)).astype(np.float32)
    second, third = ({name: value + noise(seed, value.shape) for name, value in first.items()} for seed in (1, 2))
    merge = lambda states, weights: case.router.merge(states, weights, case.config)
    try:
        merged = merge([first, second, third], [1, 2, 4])
    except UserError as e:
        raise AssertionError(str(e)) from e
    kinds = lambda state: {name: (value.dtype, value.shape) for name, value in state.items()}
    assert kinds(merged) == kinds(first), f"the merged state is {kinds(merged)}, those of replicas {kinds(first)}"
    assert_same(merge([first, first, first], [1, 2, 4]), first)
    assert_same(merge([first], [3]), first)
    assert_same(merge([third, first, second], [4, 1, 2]), merged, 1e-5)
    assert_same(merge([first, second, third], [10, 20, 40]), merged, 1e-5)
    assert_same(merge([merge([first, second], [1, 2]), third], [3, 4]), merged, 1e-5)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(route(case, make_inputs(), state=merged)))
    bad = [{name: np.full_like(value, np.nan) for name, value in first.items()}] if first else []
    wrong = [([], []), ([first], [np.nan]), ([first, first], [1, -1]), ([first], [0]), ([first], [1, 1])]
    for states, weights in [*wrong, *(([first, state], [1, 1]) for state in bad)]:
        try:
            merge(states, weights)
        except UserError:
            continue
        raise AssertionError(f"merge accepts {len(states)} states with weights {weights}, one of them not fit")


def law_carry(case: Case) -> None:
    """A layer hands on what it takes: arrays of the names, shapes and dtypes that come before the first layer."""
    handed_on = route(case, make_inputs()).carry
    assert jax.tree.map(jnp.shape, handed_on) == jax.tree.map(jnp.shape, case.router.init_carry(case.config, B, T))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(handed_on))


def law_noise(case: Case) -> None:
    """Keys matter if and only if declared; a learned router has no noise in evaluation; equal keys, equal plans."""
    for train in (True, False):
        inputs = make_inputs(train=train)
        rekeyed = inputs._replace(keys_B=jax.random.split(jax.random.key(99), B))
        relayered = inputs._replace(layer=jnp.int32(1))
        plain, again, other, deeper = (effects(case, route(case, i)) for i in (inputs, inputs, rekeyed, relayered))
        noisy = case.router.claim("random", case.config) and (train or not case.router.claim("learned", case.config))
        assert np.array_equal(plain, again)
        matter = not np.array_equal(plain, other)
        assert matter == noisy, f"keys {'change' if matter else 'do not change'} the plan, train={train}"
        assert not noisy or not np.array_equal(plain, deeper)


def law_padding(case: Case) -> None:
    """Padding gets no expert, counts nowhere, changes nothing, and garbage in it reaches no gradient."""
    inputs = make_inputs()
    valid_BT = np.asarray(inputs.valid_BT)
    garbage = inputs._replace(
        x_BTD=jnp.where(valid_BT[..., None], inputs.x_BTD, jnp.nan),
        token_ids_BT=jnp.where(valid_BT, inputs.token_ids_BT, VOCAB - 1),
    )
    plain, dirty = route(case, inputs), route(case, garbage)
    assert not np.any(selections(case, plain)[~valid_BT])
    assert_same(plain, dirty)
    gradients = probe(case, garbage, **dict.fromkeys(case.router.about.losses, 1.0))
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))
    assert np.all(gradients.x_BTD[~valid_BT] == 0)

    longer = inputs.of_tokens(lambda a: jnp.pad(a, ((0, 0), (0, 3)) + ((0, 0),) * (a.ndim - 2)))
    extended = route(case, longer)
    np.testing.assert_allclose(effects(case, extended, T + 3)[:, :T], effects(case, plain), rtol=1e-5, atol=1e-6)
    assert plain.added_BTD is None or not np.any(plain.added_BTD[~valid_BT])
    assert_same((extended.losses, extended.stats), (plain.losses, plain.stats), 1e-5)


def law_precision(case: Case) -> None:
    """bfloat16 activations change no dtype of the routing and lose nothing after the cast: scores are float32."""
    inputs = make_inputs()
    low = inputs._replace(x_BTD=inputs.x_BTD.astype(jnp.bfloat16))
    routing = eager_route(case, low)
    integers = {key for key in routing.stats if key in ("counts", "tokens", "assigned", "ties", "overflow")}
    assert routing.plan.ids.dtype == jnp.int32 and routing.plan.weights.dtype == jnp.float32
    assert all(routing.stats[key].dtype == jnp.int32 for key in integers)
    rest = {key: value for key, value in routing.stats.items() if key not in integers}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((rest, routing.losses, make_params(case))))
    assert_same(routing, eager_route(case, low._replace(x_BTD=low.x_BTD.astype(jnp.float32))))


def law_ties(case: Case) -> None:
    """Equal logits give no NaN and no duplicate, and every such tie is counted (where no noise breaks it)."""
    inputs = make_inputs(train=False)._replace(x_BTD=jnp.zeros((B, T, D)))
    routing = route(case, inputs, state=case.router.init_state(D, case.config))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((routing, probe(case, inputs))))
    assert selections(case, routing).max() <= 1
    ranks_experts = case.router.about.form == "token" and case.router.about.score != "none"
    assert ("ties" in routing.stats) == ranks_experts
    if ranks_experts:
        assert routing.stats["ties"] == routing.stats["tokens"]
        assert route(case, make_inputs()).stats["ties"] == 0


def law_pure(case: Case) -> None:
    """Eager, compiled or recomputed in the backward pass, the routing is the same; new data compile nothing."""
    inputs = make_inputs()
    compiled = route(case, inputs)
    assert_same(compiled, eager_route(case, inputs), 1e-5)
    assert_same(compiled, probe(case, inputs).routing, 1e-5)
    size = compiled_route._cache_size()
    route(case, make_inputs(1))
    assert compiled_route._cache_size() == size


def law_shards(case: Case) -> None:
    """One sequence per shard of the batch gives the value, counts and gradients of the whole batch."""
    params, state = make_params(case)
    inputs, coefficients = make_inputs(), dict.fromkeys(case.router.about.losses, 1.0)
    of_sequences = arrays_of(inputs)
    layer = {name: of_sequences.pop(name) for name in ("step", "layer")}

    def one_shard(params: dict, weight_TD: jax.Array, carry: dict, arrays: dict) -> tuple[jax.Array, jax.Array]:
        weight_BTD, carry, arrays = jax.tree.map(lambda a: a[None], (weight_TD, carry, arrays))
        shard = Inputs(**arrays, **layer, train=True, carry=carry, axis_names=("data",))
        named = {"weight_BTD": weight_BTD, "coefficients": coefficients}
        value, routing = objective(case.router.route, case.config, params, state, shard, **named)
        return jax.lax.psum((value, routing.stats["counts"]), "data")

    def all_shards(params: dict, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        in_axes = (None, *[0] * len(arrays))
        return jax.tree.map(lambda a: a[0], jax.vmap(one_shard, in_axes, axis_name="data")(params, *arrays))

    arrays = carry_into(case, inputs), of_sequences
    (value, counts), gradient = jax.jit(jax.value_and_grad(all_shards, has_aux=True))(params, WEIGHT, *arrays)
    whole = probe(case, inputs, **coefficients)
    assert_same((value, counts, gradient), (whole.value, whole.routing.stats["counts"], whole.params), 1e-4)


@functools.partial(jax.jit, static_argnums=0)
def layer_output(executor: str | None, routing: Routing, valid_BT: jax.Array, *arrays: jax.Array) -> tuple:
    """Value, output and gradients of sum(WEIGHT * y) of SwiGLU experts; no executor: y by its definition."""
    ids, weights = routing.plan
    others = routing.added_BTD, routing.input_scale_BT

    def value(weights: jax.Array, others: tuple, x_BTD: jax.Array, gate_up_ED2F: jax.Array, down_EFD: jax.Array):
        num_experts, (added_BTD, scale_BT) = down_EFD.shape[0], others
        plan = (TokenPlan if ids.shape[0] == B * T else ExpertPlan)(ids, weights)
        if executor is None:
            g_NE = combine_matrix(plan, B * T, num_experts)
            x_ND = (x_BTD if scale_BT is None else x_BTD * scale_BT[..., None]).reshape(-1, D)
            h_NE2F = jnp.einsum("nd,edgf->negf", x_ND, gate_up_ED2F)
            y_ND = jnp.einsum("ne,nef,efd->nd", g_NE, jax.nn.silu(h_NE2F[:, :, 0]) * h_NE2F[:, :, 1], down_EFD)
            y_BTD, dropped = y_ND.reshape(B, T, D) + (0 if added_BTD is None else added_BTD), 0
        else:
            no_drop = float(num_experts)  # every expert has room for all tokens
            moe = MoE(num_experts=num_experts, num_experts_per_token=1, executor=executor, capacity_factor=no_drop)
            made = Routing(plan, {}, {}, added_BTD=added_BTD, input_scale_BT=scale_BT)
            y_BTD, dropped = apply_routing(made, x_BTD, valid_BT, gate_up_ED2F, down_EFD, moe)
        return jnp.sum(y_BTD * WEIGHT), (y_BTD, dropped)

    return jax.value_and_grad(value, argnums=(0, 1, 2, 3, 4), has_aux=True)(weights, others, *arrays)


def law_executors(case: Case) -> None:
    """Every executor gives the output that a routing defines, and its gradients, for this router's decisions."""
    inputs, rng = make_inputs(), np.random.default_rng(0)
    gate_up_ED2F, down_EFD = (rng.normal(size=s).astype(np.float32) / 3 for s in ((8, D, 2, 4), (8, 4, D)))
    decided = route(case, inputs)._replace(losses={}, stats={}, carry=None)
    arguments = decided, inputs.valid_BT, inputs.x_BTD, gate_up_ED2F, down_EFD
    oracle = layer_output(None, *arguments)
    for name in executors.sound():
        if not executors.get(name).platforms or platform() in executors.get(name).platforms:
            assert_same(layer_output(name, *arguments), oracle, 1e-4)


LAWS = {name.removeprefix("law_"): law for name, law in list(globals().items()) if name.startswith("law_")}
