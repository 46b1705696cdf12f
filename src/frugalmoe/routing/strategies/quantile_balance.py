"""Quantile balancing: an expert's price is the quantile of its scores at which it gets its share of the tokens.

Su (kexue.fm/archives/11619, February 2026, top-K form; `quantile_balancing` in Megatron-LM). With scores s, K of E
experts and the prices beta of earlier steps:

- selection: the K largest of s - beta; weights from s without beta;
- alpha_i, the (K+1)-th largest of s_i - beta: what an expert must exceed to be chosen by token i;
- new beta_j, the (q+1)-th largest over tokens of s_ij - alpha_i, with q = tokens * K / E: q tokens would choose j;
- beta is centred (a common shift changes no choice) and may be averaged with the old one (`ema`).

A step routes by the old beta, so the future does not leak. There is no step size, and any range of scores will do.

The quantile of a batch is not a sum over its parts, so each sequence gives its own, with q from its own tokens
(between two ranks where q is no integer), and beta is their mean weighted by tokens. Megatron-LM takes the mean over
micro-batches and ranks likewise; by sequence it depends on neither, nor on padding. It is exact where sequences have
alike scores, and rough where a sequence has fewer than some E / K tokens.

Letters: B batch, T time, E experts, K choices.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing import gate, losses, rules, select
from frugalmoe.routing.contract import About, Inputs, Params, Router, Routing, State, linear_init, linear_logits
from frugalmoe.schema import MoE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    score: str = "sigmoid"  # sigmoid | softmax | sqrt_softplus
    renormalize: bool = True  # weights of the K experts sum to `scale`
    scale: float = 1.0  # factor on all weights
    ema: float = 0.0  # share of the old prices that a step keeps


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    options: Options = config.options
    logits_BTE = linear_logits(params, inputs)
    score_BTE = select.SCORES[options.score](logits_BTE)
    net_BTE = jax.lax.stop_gradient(score_BTE) - state["beta_E"]
    choice = select.top_k(net_BTE, config.num_experts_per_token)
    routing = gate.by_scores(logits_BTE, choice, inputs, config)
    tokens_B1 = inputs.valid_BT.sum(-1, dtype=jnp.int32)[:, None]
    beta_BE = state["beta_E"] + quantiles(net_BTE, inputs.valid_BT, config.num_experts_per_token)
    return routing._replace(stats={**routing.stats, "beta_sum": jnp.sum(beta_BE * tokens_B1, axis=0)})


def quantiles(net_BTE: Array, valid_BT: Array, k: int) -> Array:
    """The change of beta [B, E] by which each sequence alone would give every expert its share."""
    time, num_experts = net_BTE.shape[1:]
    alpha_BT1 = jax.lax.top_k(net_BTE, k + 1)[0][..., -1:]
    margin_BTE = jnp.where(valid_BT[..., None], net_BTE - alpha_BT1, -jnp.inf)
    slots = min(time, time * k // num_experts + 2)
    best_BES = jax.lax.top_k(margin_BTE.swapaxes(1, 2), slots)[0]
    tokens_B = valid_BT.sum(-1, dtype=jnp.int32)
    rank_B, rest_B = jnp.divmod(tokens_B * k, num_experts)  # q = rank + rest / E; rank 0 is the largest

    def at_rank(rank_B: Array) -> Array:
        index_B = jnp.clip(rank_B, 0, jnp.maximum(tokens_B - 1, 0))
        return jnp.take_along_axis(best_BES, index_B[:, None, None], axis=-1)[..., 0]

    weight_B1 = rest_B[:, None] / num_experts
    between_BE = (1 - weight_B1) * at_rank(rank_B) + weight_B1 * at_rank(rank_B + 1)
    return jnp.where(tokens_B[:, None] > 0, between_BE, 0)


def init_state(dim: int, config: MoE) -> State:
    return {"beta_E": jnp.zeros(config.num_experts, jnp.float32)}


def update(state: State, batch_stats: Mapping[str, Array], config: MoE) -> State:
    new_E = batch_stats["beta_sum"] / jnp.maximum(batch_stats["tokens"], 1)
    beta_E = config.options.ema * state["beta_E"] + (1 - config.options.ema) * new_E
    return {"beta_E": beta_E - beta_E.mean()}


def check(config: MoE) -> str | None:
    o, k, num_experts = config.options, config.num_experts_per_token, config.num_experts
    return rules.first(
        rules.one_of("score", o.score, select.SCORES),
        rules.positive("scale", o.scale),
        rules.decay("ema", o.ema),
        rules.gradient_at_one(config, o.renormalize, "set options.renormalize=False"),
        None if k < num_experts else f"num_experts_per_token={k}: must be less than num_experts={num_experts}",
    )


ROUTER = Router(
    about=About(
        year=2026,
        paper="Su, kexue.fm/archives/11619; Megatron-LM, quantile_balancing",
        score="sigmoid, softmax or sqrt(softplus)",
        selection="K largest of score - price",
        weights="scores without the price, normalized over the K or as they are",
        balance="price per expert, a quantile of the last step's scores",
        weight_sum=gate.weight_sum,
        stateful=True,
        losses=losses.GATE_LOSSES,
    ),
    route=route,
    options=Options,
    init=linear_init,
    init_state=init_state,
    update=update,
    # As over sequences: a mean by tokens of what each part alone would have.
    merges={"beta_E": "mean"},
    check=check,
    cases=((1, {"renormalize": False, "score": "softmax"}), (3, {"score": "sqrt_softplus", "ema": 0.5})),
)
