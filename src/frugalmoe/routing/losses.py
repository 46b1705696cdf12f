"""Auxiliary losses of routers, and the only place where they are added up.

Letters: B batch, T time, E experts, K choices, G groups of sequences, L MoE layers.

A strategy returns unscaled sums (`Loss`), additive over micro-batches and over shards of the batch. `total` divides
them by the number of units in the whole optimizer step and applies the coefficients, so that gradient accumulation
and data parallelism change nothing. Padding counts nowhere.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.config.schema import MoE
from frugalmoe.routing.contract import Inputs, Loss

GATE_LOSSES = ("load_balance", "sequence_balance", "z")
UNIT = {"sequence": "sequence", "micro_batch": "group", "global": "batch"}


class Total(NamedTuple):
    loss: Array  # float32 []: sum over losses and layers of coefficient * mean over units
    metrics: dict[str, Array]  # each unscaled loss, mean over layers


def gate_losses(logits_BTE: Array, probs_BTE: Array, load_BE: Array, inputs: Inputs, config: MoE) -> dict[str, Loss]:
    """The losses of any token-choice gate, by the names in `GATE_LOSSES`."""
    return {
        "load_balance": load_balance(probs_BTE, load_BE, inputs, config),
        "sequence_balance": sequence_balance(probs_BTE, load_BE, inputs, config),
        "z": z(logits_BTE, inputs),
    }


def load_balance(probs_BTE: Array, load_BE: Array, inputs: Inputs, config: MoE) -> Loss:
    """E * sum_e f_e P_e over each group of `config.load_balance_scope` (Fedus et al., 2101.03961, eq. 4-6).

    f_e = count_e / (K * tokens) sums to 1 over experts, P_e is the mean of probabilities that sum to 1, so the loss is
    1 at uniform load and E/K at collapse. Counts are those of the selection that was executed, its bias included.
    Scopes: `sequence`, one group per sequence; `micro_batch`, `config.load_balance_group` consecutive sequences;
    `global`, the whole batch, over `inputs.axis_names` too (Qiu et al., 2501.11873).
    """
    batch = load_BE.shape[0]
    size = {"sequence": 1, "micro_batch": config.load_balance_group, "global": batch}[config.load_balance_scope]
    axes = inputs.axis_names if config.load_balance_scope == "global" else ()
    return Loss(_balance(probs_BTE, load_BE, inputs, config, size, axes), UNIT[config.load_balance_scope])


def sequence_balance(probs_BTE: Array, load_BE: Array, inputs: Inputs, config: MoE) -> Loss:
    """The complementary sequence-wise loss of DeepSeek-V3 (2412.19437, eq. 17-20): always one group per sequence."""
    return Loss(_balance(probs_BTE, load_BE, inputs, config, 1, ()), "sequence")


def _balance(probs_BTE: Array, load_BE: Array, inputs: Inputs, config: MoE, size: int, axes: tuple[str, ...]) -> Array:
    """Sum over groups of `size` sequences of E * sum_e f_e P_e.

    Over `axes` only the integer counts are reduced: each shard keeps its own part of P, the parts add up to the loss,
    and no gradient crosses a collective.
    """
    valid_BT, num_experts = inputs.valid_BT, load_BE.shape[-1]
    prob_BE = jnp.sum(probs_BTE, axis=1, where=valid_BT[..., None])
    count_GE, tokens_G = _group(load_BE, size), _group(valid_BT.sum(-1, dtype=jnp.int32), size)
    if axes:
        count_GE, tokens_G = jax.lax.psum((count_GE, tokens_G), axes)
    tokens_G1 = jnp.maximum(tokens_G, 1)[:, None].astype(jnp.float32)
    f_GE = count_GE / (config.num_experts_per_token * tokens_G1)
    return num_experts * jnp.sum(f_GE * _group(prob_BE, size) / tokens_G1)


def _group(x_B: Array, size: int) -> Array:
    """Sums over groups of `size` consecutive entries of the first axis."""
    return x_B.reshape(x_B.shape[0] // size, size, *x_B.shape[1:]).sum(1)


def z(logits_BTE: Array, inputs: Inputs) -> Loss:
    """logsumexp(logits)^2 of each valid token (Zoph et al., ST-MoE, 2202.08906, eq. 5)."""
    lse_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    return Loss(jnp.sum(jnp.square(lse_BT), where=inputs.valid_BT), "token")


def denominators(valid_BT: Array, config: MoE) -> dict[str, Array]:
    """Units of each kind in an optimizer step. `valid_BT` is the whole step's: all micro-batches, all shards."""
    tokens_B = valid_BT.sum(-1, dtype=jnp.int32)
    size = config.load_balance_group if config.load_balance_scope == "micro_batch" else 1
    return {
        "token": tokens_B.sum(),
        "sequence": jnp.sum(tokens_B > 0),
        "group": jnp.sum(_group(tokens_B, size) > 0),
        "batch": jnp.ones((), jnp.int32),
    }


def total(
    losses_by_layer: Mapping[str, Loss], coefficients: Mapping[str, float], denominators: Mapping[str, Array]
) -> Total:
    """All auxiliary losses of a step. `losses_by_layer` holds sums stacked over layers [L].

    Layers are summed, as the papers do: each layer's loss is formed from its own counts (never from layers lumped
    together, where imbalances cancel) and has the coefficient's full strength whatever the depth. The metrics are
    means over layers, to be read per layer. A loss without a coefficient is reported and not trained on.
    """
    loss, metrics = jnp.zeros((), jnp.float32), {}
    for name, term in losses_by_layer.items():
        mean_L = term.sum / jnp.maximum(denominators[term.per], 1)
        metrics[name] = jax.lax.stop_gradient(mean_L.mean())
        loss += coefficients.get(name, 0.0) * mean_L.sum()
    return Total(loss, metrics)


def scope_error(config: MoE, accumulate_steps: int, micro_batch_sequences: int) -> str | None:
    """The rule that `config.load_balance_scope` breaks, or None.

    `micro_batch_sequences` counts one micro-batch on one device: groups are formed there.
    """
    scope, size = config.load_balance_scope, config.load_balance_group
    if scope == "global" and accumulate_steps != 1:
        return (
            f"needs train.accumulate_steps=1, not {accumulate_steps}, because a micro-batch does not know the load of "
            "the others; use sequence or micro_batch"
        )
    if scope == "micro_batch" and (size < 1 or micro_batch_sequences % size):
        return (
            f"model.moe.load_balance_group={size} must divide the {micro_batch_sequences} sequences of a micro-batch "
            "on one device"
        )
    return None
