"""Similarity-preserving router (SimBal): `topk_softmax` whose gate is kept orthogonal instead of its load balanced.

Omi et al. (2506.14038): the loss sum_ij |W^T W - I|_ij on the gate W[D, E] makes the logits keep the angles between
tokens, so that similar tokens keep similar experts. It looks at no token and no load; its cost is D * E^2. It is 0 for
orthonormal columns, which needs E <= D. Options are those of `topk_softmax`. The loss is trained on only where it has a
coefficient, e.g. `model.moe.losses.orthogonality=0.1`; there is no load-balance loss beside it.

Letters: D model, E experts.
"""

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing.contract import About, Inputs, Loss, Params, Router, Routing, State, linear_init_with_bias
from frugalmoe.routing.strategies import topk_softmax
from frugalmoe.schema import MoE


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    routing = topk_softmax.route(params, state, inputs, config)
    terms = {"orthogonality": orthogonality(params["kernel_DE"], inputs.axis_names), "z": routing.losses["z"]}
    return routing._replace(losses=terms)


def orthogonality(kernel_DE: Array, axis_names: tuple[str, ...]) -> Loss:
    """sum |W^T W - I|, shared equally between the shards of the batch, each of which holds the whole gate."""
    gram_EE = jnp.einsum("de,df->ef", kernel_DE, kernel_DE, precision=jax.lax.Precision.HIGHEST)
    total = jnp.sum(jnp.abs(gram_EE - jnp.eye(gram_EE.shape[0])))
    return Loss(total / jax.lax.psum(1, axis_names), "batch")


ROUTER = Router(
    about=About(
        year=2025,
        paper="Omi et al., Load Balancing Mixture of Experts with Similarity Preserving Routers, 2506.14038",
        score="softmax",
        selection="K largest logits, in the best groups",
        weights="softmax probabilities, renormalized over the K or as they are",
        balance="orthogonal gate, whatever the load",
        weight_sum=topk_softmax.weight_sum,
        losses=("orthogonality", "z"),
    ),
    route=route,
    options=topk_softmax.Options,
    init=linear_init_with_bias,
    check=topk_softmax.check,
)
