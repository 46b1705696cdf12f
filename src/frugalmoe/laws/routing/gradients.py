"""Laws of gradients: what gets one, and that it is the slope."""

import jax
import jax.numpy as jnp
import numpy as np

from frugalmoe.laws.cases import Case, direction_like, make_inputs, make_params, probe


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
        inputs, direction = make_inputs(seed), direction_like(params, seed)
        low, high = (jax.tree.map(lambda p, d, s=s: p + s * d, params, direction) for s in (-step, step))
        low, middle, high = (probe(case, inputs, params=p, **coefficients) for p in (low, params, high))
        if all(np.array_equal(end.routing.plan.ids, middle.routing.plan.ids) for end in (low, high)):
            slopes.append((high.value - low.value) / (2 * step))
            gradients.append(jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, middle.params, direction)))
    assert slopes
    assert np.allclose(slopes, gradients, rtol=5e-3, atol=1e-2) != case.router.about.estimated_gradient
