"""Laws of what a decision depends on: which tokens, which sequences, what order, what noise.

Letters: B batch, T time, D model, E experts, X choices (the experts first).
"""

import jax
import jax.numpy as jnp
import numpy as np

from frugalmoe.laws.cases import (
    B,
    Case,
    D,
    T,
    assert_same,
    carry_into,
    combine,
    effects,
    make_inputs,
    make_params,
    probe,
    route,
    selections,
)


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


def law_token_permutation(case: Case) -> None:
    """Permuted tokens of a sequence, with their ids, segments and positions, are permuted in the plan."""
    inputs, order = make_inputs(), np.random.default_rng(0).permutation(T)
    permuted = inputs.of_tokens(lambda a: a[:, order])
    before, after = effects(case, route(case, inputs)), effects(case, route(case, permuted))
    np.testing.assert_allclose(after, before[:, order], rtol=1e-5, atol=1e-6)


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


def expert_axes(tree: dict, permutation: np.ndarray) -> dict:
    """Every array whose name's shape letters hold E, or X for choices of which the first are E, permuted along it."""

    def permute(name: str, array: jax.Array) -> jax.Array:
        for axis, letter in enumerate(name.rpartition("_")[2]):
            if letter in "EX":
                order = np.concatenate([permutation, np.arange(len(permutation), array.shape[axis])])
                array = jnp.take(array, order, axis=axis)
        return array

    return {name: permute(name, array) for name, array in tree.items()}


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
