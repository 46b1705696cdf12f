"""Sinkhorn: selection from scores that are scaled until every expert has the same total, weights from the plain ones.

S-BASE of Clark et al. (2202.01169), in the form of Megatron-LM. In training, exp(z)
of a sequence is scaled to equal row sums (tokens) and equal column sums (experts) by a fixed number of alternating
steps, and each token takes the K experts with the largest scaled scores. The scaling looks at all tokens of the
sequence, later ones too: a leak. In evaluation: the K largest logits. Weights, always without the scaling and with the
only gradient: softmax over all experts, or sigmoid for K = 1.

Letters: B batch, T time, E experts, K choices.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing import losses, rules, select, stats
from frugalmoe.routing.contract import About, Inputs, Params, Router, Routing, State, linear_init, linear_logits
from frugalmoe.schema import MoE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    iterations: int = 8  # each scales all tokens, then all experts


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    k, logits_BTE = config.num_experts_per_token, linear_logits(params, inputs)
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    score_BTE = scaled(logits_BTE, inputs.valid_BT, config.options.iterations) if inputs.train else logits_BTE
    choice = select.top_k(score_BTE, k)
    weight_BTK = select.at(jax.nn.sigmoid(logits_BTE) if k == 1 else probs_BTE, choice.expert_BTK)
    plan = select.token_plan(choice.expert_BTK, weight_BTK, inputs, config.num_experts)
    load_BE = stats.load(plan, inputs, config.num_experts)
    return Routing(
        plan,
        {"z": losses.z(logits_BTE, inputs)},
        stats.of_layer(load_BE, inputs, logits_BTE=logits_BTE, probs_BTE=probs_BTE, tied_BT=choice.tied_BT),
    )


def scaled(logits_BTE: Array, valid_BT: Array, iterations: int) -> Array:
    """log of the scaled exp(logits), up to a constant: each token's sum is 1, each expert's n/E of n valid tokens."""
    z_BTE, valid_BT1 = jax.lax.stop_gradient(logits_BTE), valid_BT[..., None]
    tokens_B11 = jnp.maximum(valid_BT1.sum(1, keepdims=True), 1).astype(jnp.float32)

    def over_experts(z_BTE: Array) -> Array:
        return z_BTE - jax.nn.logsumexp(z_BTE, axis=-1, keepdims=True)

    def step(_, z_BTE: Array) -> Array:
        z_BTE = over_experts(z_BTE)
        total_B1E = jax.nn.logsumexp(z_BTE, axis=1, keepdims=True, where=valid_BT1)
        total_B1E = jnp.where(jnp.any(valid_BT1, axis=1, keepdims=True), total_B1E, 0)
        return z_BTE - total_B1E + jnp.log(tokens_B11 / z_BTE.shape[-1])

    return over_experts(jax.lax.fori_loop(0, iterations, step, z_BTE))


ROUTER = Router(
    about=About(
        year=2022,
        paper="Clark et al., Unified Scaling Laws for Routed Language Models, 2202.01169 (S-BASE); as in Megatron-LM",
        score="softmax, sigmoid for K = 1",
        selection="K largest scores after Sinkhorn scaling over the sequence; in evaluation K largest logits",
        weights="softmax probability or sigmoid as it is",
        balance="doubly normalized scores",
        causal="leak",
        causal_in_evaluation="safe",
        weight_sum="at_most_one",
        losses=("z",),
    ),
    route=route,
    options=Options,
    init=linear_init,
    check=lambda config: rules.at_least("iterations", config.options.iterations, 1),
    cases=((1, {"iterations": 2}),),
)
