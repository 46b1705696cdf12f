"""Laws that every routing strategy obeys, over every strategy in the folder; and routers that break them, caught.

A law takes a case and asserts. What a strategy declares about itself decides which side of a law must hold.
Letters: B batch, T time, N tokens (B*T), D model, E experts, K choices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routing_cases import (
    VOCAB,
    WEIGHT,
    B,
    Case,
    D,
    T,
    arrays_of,
    carry_into,
    case_parameters,
    combine,
    compiled_route,
    eager_route,
    effects,
    extremes,
    make_case,
    make_inputs,
    make_params,
    objective,
    probe,
    route,
    selections,
)

from frugalmoe.errors import UserError
from frugalmoe.model.moe import apply_routing
from frugalmoe.routing import losses, select, stats
from frugalmoe.routing.contract import (
    About,
    ExpertPlan,
    Inputs,
    Loss,
    Router,
    Routing,
    TokenPlan,
    combine_matrix,
    linear_init,
    linear_logits,
)
from frugalmoe.schema import FrozenDict, MoE


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
        assert (changes > 0) == (case.router.causality(case.config, train) == "leak")


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
        assert np.array_equal(before, after) == (claim == "safe" or (claim == "leak" and pool == "sequence"))


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
    assert np.array_equal(routing.stats["counts"], chosen_BTE.sum((0, 1)))
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
        assert selections(case, route(case, make_inputs(seed))).max() == 1


def law_learned(case: Case) -> None:
    """The layer's output gives every parameter a gradient, if and only if the router declares itself learned."""
    norms = [float(jnp.linalg.norm(g)) for g in jax.tree.leaves(probe(case, make_inputs()).params)]
    if case.router.claim("learned", case.config):
        assert norms and min(norms) > 1e-3
    else:
        assert all(norm == 0 for norm in norms)


def law_no_gradient_into_state(case: Case) -> None:
    """There is state if and only if declared; neither the output nor a loss gives it a gradient."""
    gradients = probe(case, make_inputs(), **dict.fromkeys(case.router.about.losses, 1.0)).state
    assert bool(gradients) == case.router.about.stateful
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
    named = FrozenDict.fromkeys(case.router.about.losses, 1.0)
    routing = eager_route(case._replace(config=dataclasses.replace(case.config, losses=named)), make_inputs())
    assert set(routing.losses) == set(case.router.about.losses)
    for loss in routing.losses.values():
        assert loss.sum.shape == () and np.isfinite(loss.sum) and loss.sum >= 0


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
    assert after[loaded] < before["prob_sum"][loaded] - 1e-6


def law_state(case: Case) -> None:
    """State is float32 and moves only if declared; the update is a function of the summed stats alone."""
    state = case.router.init_state(D, case.config)
    routing = route(case, make_inputs(), state=state)
    moved = case.router.update(state, routing.stats, case.config)
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((state, moved)))
    changed = any(np.any(a != b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(moved), strict=True))
    assert changed == case.router.about.stateful


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
        assert np.array_equal(plain, other) == (not noisy)
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
        value, routing = objective(case.router.route, case.config, params, state, shard, weight_BTD, coefficients)
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
    for executor in ("dense", "grouped", "capacity"):
        assert_same(layer_output(executor, *arguments), oracle, 1e-4)


LAWS = {name.removeprefix("law_"): law for name, law in list(globals().items()) if name.startswith("law_")}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
@pytest.mark.parametrize("case", case_parameters())
def test_law(case: Case | UserError, law) -> None:
    if isinstance(case, UserError):
        raise case
    law(case)


# Routers that break a law. Each claims to be a plain safe top-k router.


def broken(route_fn, **claims) -> Case:
    about = About(
        year=0, paper="", score="softmax", selection="", weights="", balance="", losses=losses.GATE_LOSSES, **claims
    )
    state = {"init_state": lambda dim, config: {"bias_E": jnp.zeros(8)}} if route_fn is biased_shares else {}
    router = Router(about=about, route=route_fn, init=linear_init, name=route_fn.__name__, **state)
    return make_case(router)


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


def unnormalised(params, state, inputs, config):
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


BROKEN = [
    ("causal_by_perturbation", broken(sequence_mean)),
    ("causal_by_gradient", broken(sequence_mean)),
    ("decoding", broken(sequence_mean)),
    ("batch_independent", broken(batch_mean)),
    ("shards", broken(batch_mean)),
    ("no_duplicates", broken(with_replacement, learned=False, random=True)),
    ("weights", broken(unnormalised, weight_sum=1.0)),
    ("weights", broken(frozen, weight_sum="at_most_one")),
    ("extremes", broken(sigmoid_shares)),
    ("extremes", broken(clipped_shares, weight_sum=1.0)),
    ("extremes", broken(one_pass_deviation)),
    ("extremes", broken(bare_entropy)),
    ("extremes", broken(biased_shares, weight_sum=1.0, stateful=True)),
    ("extremes", broken(unnormalised, weight_sum=1.0)),
    ("learned", broken(frozen)),
    ("learned", make_case("topk_softmax", 8, 1)),
    ("finite_differences", broken(frozen)),
    ("finite_differences", broken(unnormalised, estimated_gradient=True)),
    ("decoding", broken(noise_by_index, random=True)),
    ("noise", broken(noise_by_index, random=True)),
    ("token_permutation", broken(noise_by_index, random=True)),
    ("padding", broken(unmasked_padding)),
    ("counts", broken(padding_in_stats)),
    ("precision", broken(low_precision)),
    ("expert_permutation", broken(favours_low_ids)),
    ("ties", broken(favours_low_ids)),
    ("causal_by_perturbation", broken(unnormalised, causal="leak")),
    ("causal_by_perturbation", broken(mean_in_evaluation)),
    ("causal_by_perturbation", broken(unnormalised, causal_in_evaluation="leak")),
    ("decoding", broken(mean_in_evaluation)),
    ("batch_independent", broken(unnormalised, causal="batch")),
    ("noise", broken(unnormalised, random=True)),
    ("state", broken(unnormalised, stateful=True)),
    ("no_gradient_into_state", broken(unnormalised, stateful=True)),
    ("counts", broken(unnormalised, form="expert")),
]


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
