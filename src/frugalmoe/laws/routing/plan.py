"""Laws of the plan: its weights and counts, no expert twice, padding and ties, at ordinary numbers and extreme ones.

Letters: B batch, T time, D model, E experts.
"""

import jax
import jax.numpy as jnp
import numpy as np

from frugalmoe.laws.cases import (
    VOCAB,
    B,
    Case,
    D,
    T,
    assert_same,
    combine,
    direction_like,
    effects,
    extremes,
    make_inputs,
    make_params,
    probe,
    route,
    selections,
)
from frugalmoe.routing.contract import TokenPlan


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
        params = jax.tree.map(jnp.add, make_params(case)[0], direction_like(make_params(case)[0], 0))
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
