"""Default-MoE: an expert that a token did not pick puts out its average, so that every logit gets a gradient.

Panda et al. (2504.12463, section 3): with p the softmax over all experts and S the K largest,

    y = sum over S of p_e f_e(x) + sum over the others of p_e v_e

and v_e a running average of expert e's outputs: v_e <- decay * v_e + (1 - decay) * mean, once per optimizer step, from
v_e = 0. Routing uses the average of the steps before. No gradient reaches v.

The paper's mean is over all tokens that picked the expert. Here it is over `samples` of them per sequence, drawn at
random: an unbiased estimate whose noise the running average smooths, and which is the same however a batch is split
(the first tokens of a batch would be neither: they are a text's first words, and depend on the split). The samples are
computed once more: E * samples more rows in a forward pass of T * K rows per sequence, none in evaluation.

Letters: B batch, T time, N tokens (B*T), D model, E experts, K choices, C samples per expert and sequence,
Q samples per expert (B*C), R rows (E*Q).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing import gate, losses, rules, select
from frugalmoe.routing.contract import (
    About,
    ExpertPlan,
    Inputs,
    Params,
    Router,
    Routing,
    State,
    clean,
    linear_init,
    linear_logits,
    project,
)
from frugalmoe.schema import MoE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    decay: float = 0.95  # of the running average, in a step
    samples: int = 1  # outputs of each expert per sequence that the average sees


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    logits_BTE = linear_logits(params, inputs)
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    choice = select.top_k(logits_BTE, config.num_experts_per_token)
    weight_BTK = select.at(probs_BTE, choice.expert_BTK)
    routing = gate.routing(logits_BTE, probs_BTE, choice, weight_BTK, inputs, config)
    picked_BTE = jnp.any(choice.expert_BTK[..., None] == jnp.arange(config.num_experts), axis=-2)
    valid_BT1 = inputs.valid_BT[..., None]
    others_BTE = jnp.where(valid_BT1 & ~picked_BTE, probs_BTE, 0)
    sampled = sample(picked_BTE & valid_BT1, inputs, config) if inputs.train else {}
    added_BTD = project(others_BTE, jax.lax.stop_gradient(state["output_ED"]))
    return routing._replace(stats={**routing.stats, **sampled}, added_BTD=added_BTD)


def sample(picked_BTE: Array, inputs: Inputs, config: MoE) -> dict[str, Array]:
    """Outputs of each expert for up to C of its tokens in each sequence: their sum [E, D] and their number [E]."""
    batch, time, num_experts = picked_BTE.shape
    draw_BT = jax.vmap(jax.vmap(jax.random.uniform))(select.token_keys(inputs))
    rank_BET = jnp.where(picked_BTE, draw_BT[..., None], -1).swapaxes(1, 2)
    best_BEC, t_BEC = jax.lax.top_k(rank_BET, min(config.options.samples, time))
    live_EQ = _by_expert(best_BEC >= 0)
    n_EQ = _by_expert(t_BEC + time * jnp.arange(batch)[:, None, None])
    x_ND = jax.lax.stop_gradient(clean(inputs)).reshape(batch * time, -1)
    row_EQ = jnp.arange(n_EQ.size, dtype=jnp.int32).reshape(n_EQ.shape)
    plan = ExpertPlan(jnp.where(live_EQ, row_EQ, n_EQ.size), live_EQ.astype(jnp.float32))
    y_RD = inputs.run_experts(plan, x_ND[n_EQ.reshape(-1)]).astype(jnp.float32)
    return {
        "output_sum": y_RD.reshape(num_experts, -1, y_RD.shape[-1]).sum(1),
        "output_rows": live_EQ.sum(1, dtype=jnp.float32),
    }


def _by_expert(x_BEC: Array) -> Array:
    """[B, E, C] -> [E, B*C]."""
    return x_BEC.swapaxes(0, 1).reshape(x_BEC.shape[1], -1)


def update(state: State, batch_stats: Mapping[str, Array], config: MoE) -> State:
    """An expert without a sample keeps its average."""
    rows_E1 = batch_stats["output_rows"][:, None]
    mean_ED = batch_stats["output_sum"] / jnp.maximum(rows_E1, 1)
    step = jnp.where(rows_E1 > 0, 1 - config.options.decay, 0)
    return {"output_ED": state["output_ED"] + step * (mean_ED - state["output_ED"])}


def check(config: MoE) -> str | None:
    return rules.first(
        rules.decay("decay", config.options.decay),
        rules.at_least("samples", config.options.samples, 1),
    )


ROUTER = Router(
    about=About(
        year=2025,
        paper="Panda et al., Dense Backpropagation Improves Training for Sparse MoE, 2504.12463, section 3",
        score="softmax",
        selection="K largest logits",
        weights="softmax probabilities as they are; the other experts' weigh their average outputs",
        balance="auxiliary loss",
        weight_sum="at_most_one",
        stateful=True,
        losses=losses.GATE_LOSSES,
    ),
    route=route,
    options=Options,
    init=linear_init,
    init_state=lambda dim, config: {"output_ED": jnp.zeros((config.num_experts, dim), jnp.float32)},
    update=update,
    # A running mean of outputs.
    merges={"output_ED": "mean"},
    check=check,
)
