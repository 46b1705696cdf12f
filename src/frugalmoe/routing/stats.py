"""Statistics of one layer's routing, additive over micro-batches and shards, and the metrics derived from their sums.

Letters: B batch, T time, N tokens (B*T), E experts, K choices, C slots per expert.

| key | dtype, shape | sum over valid tokens of |
|---|---|---|
| counts | int32 [E] | slots that name the expert, before any drop |
| tokens | int32 [] | 1 |
| assigned | int32 [] | slots that name an expert |
| dropped | int32 [] | slots that an executor dropped (the layer adds it) |
| prob_sum | float32 [E] | router probability, where the router has probabilities |
| entropy_sum | float32 [] | entropy of the router probability, nats |
| lse_sum, lse_sq_sum | float32 [] | logsumexp of the logits and its square, where the router has logits |
| overflow | int32 [] | experts wanted beyond a token's slots, where the number of experts varies per token |
| ties | int32 [] | 1 if the k-th and the next selection score are equal, where the router ranks scores per token |
| busiest | int32 [] | slots that the busiest device of each exchange executes, over all of its devices (the layer) |
| cut_sum | float32 [E] | the score at which the expert's share of the token's pool is cut off (`threshold.py`) |

Counts are integers: a count that is rounded flips the sign of a bias update (Megatron-LM PR 7081).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing.contract import Inputs, Plan, TokenPlan

Stats = dict[str, Array]
DEAD_SHARE = 0.01  # an expert is dead if it gets less than this share of a uniform load


def load(plan: Plan, inputs: Inputs, num_experts: int) -> Array:
    """Selected slots per sequence and expert, int32 [B, E], of valid tokens."""
    batch, time = inputs.token_ids_BT.shape
    valid_BT = inputs.valid_BT
    if isinstance(plan, TokenPlan):
        return load_of_choices(plan.expert_NK.reshape(batch, time, -1), inputs, num_experts)
    hit_BEC = plan.token_EC // time == jnp.arange(batch)[:, None, None]
    valid_EC = jnp.append(valid_BT, False)[plan.token_EC]
    return jnp.sum(hit_BEC & valid_EC, axis=-1, dtype=jnp.int32)


def load_of_choices(expert_BTK: Array, inputs: Inputs, num_experts: int) -> Array:
    """The same of experts, or other choices, that no plan holds."""
    hit_BTKE = expert_BTK[..., None] == jnp.arange(num_experts)
    return jnp.sum(hit_BTKE & inputs.valid_BT[..., None, None], axis=(1, 2), dtype=jnp.int32)


def of_layer(
    load_BE: Array,
    inputs: Inputs,
    *,
    logits_BTE: Array | None = None,
    probs_BTE: Array | None = None,
    tied_BT: Array | None = None,
) -> Stats:
    """The statistics of one layer; what a router does not have (logits, probabilities, ties) is left out."""
    valid_BT = inputs.valid_BT
    counts = load_BE.sum(0, dtype=jnp.int32)
    stats = {"counts": counts, "tokens": valid_BT.sum(dtype=jnp.int32), "assigned": counts.sum(dtype=jnp.int32)}
    if probs_BTE is not None:
        probs_BTE = jnp.where(valid_BT[..., None], jax.lax.stop_gradient(probs_BTE), 0)
        stats["prob_sum"] = probs_BTE.sum((0, 1))
        stats["entropy_sum"] = jax.scipy.special.entr(probs_BTE).sum()
    if logits_BTE is not None:
        lse_BT = jnp.where(valid_BT, jax.nn.logsumexp(jax.lax.stop_gradient(logits_BTE), axis=-1), 0)
        stats |= {"lse_sum": lse_BT.sum(), "lse_sq_sum": jnp.square(lse_BT).sum()}
    if tied_BT is not None:
        stats["ties"] = jnp.sum(tied_BT & valid_BT, dtype=jnp.int32)
    return stats


def metrics(stats: Mapping[str, Array]) -> dict[str, Array]:
    """What is reported, from summed stats. Leading axes (layers) of the stats are kept: a metric is [] or [L].

    `max_violation` has a noise floor of about 0.8 * sqrt(2 ln E * E / (K N)): compare at equal numbers of tokens.
    """
    counts = jnp.asarray(stats["counts"], jnp.float32)
    tokens = jnp.maximum(jnp.asarray(stats["tokens"], jnp.float32), 1)
    assigned = jnp.asarray(stats["assigned"], jnp.float32)
    dropped = jnp.asarray(stats.get("dropped", 0), jnp.float32)
    mean = jnp.maximum(counts.mean(-1), 1e-9)
    share = counts / jnp.maximum(counts.sum(-1, keepdims=True), 1)
    values = {
        "max_violation": counts.max(-1) / mean - 1,
        "load_entropy": jax.scipy.special.entr(share).sum(-1),
        "dead_experts": jnp.sum(counts < DEAD_SHARE * mean[..., None], axis=-1, dtype=jnp.int32),
        "active_per_token": (assigned - dropped) / tokens,
        "drop_rate": dropped / jnp.maximum(assigned, 1),
    }
    if "busiest" in stats:  # 1 where the experts of every device get equally many slots; a step waits for the busiest
        values["device_load"] = jnp.asarray(stats["busiest"], jnp.float32) / jnp.maximum(assigned, 1)
    if "overflow" in stats:
        overflow = jnp.asarray(stats["overflow"], jnp.float32)
        values["overflow_rate"] = overflow / jnp.maximum(assigned + overflow, 1)
    per_token = {"entropy": "entropy_sum", "logit_lse": "lse_sum", "tie_rate": "ties"}
    return values | {name: stats[key] / tokens for name, key in per_token.items() if key in stats}
