"""Auxiliary losses of routers as sums, and `total`, which weighs and adds up those of a step.

`train.objective` has the terms of the whole training loss and where their coefficients come from.

Letters: B batch, T time, E experts, M devices, K choices, G groups of sequences, L MoE layers.

A strategy returns unscaled sums (`Loss`), additive over micro-batches and over shards of the batch. `total` divides
them by the number of units in the whole optimizer step and applies the coefficients, so that gradient accumulation
and data parallelism change nothing. Padding counts nowhere.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing.contract import Inputs, Loss
from frugalmoe.schema import MoE

REPORTED = ("load_balance", "sequence_balance", "z")  # by every token-choice gate in every run
GATE_LOSSES = (
    *REPORTED,
    "device_balance",
    "importance",
    "marginal_entropy",
    "token_entropy",
    "mutual_information",
)
UNIT = {"sequence": "sequence", "micro_batch": "group", "global": "batch"}
TINY = 1e-20  # a probability below it counts as this in a logarithm


class Total(NamedTuple):
    loss: Array  # float32 []: sum over losses and layers of coefficient * mean over units
    metrics: dict[str, Array]  # each unscaled loss, mean over layers


def gate_losses(
    logits_BTE: Array,
    probs_BTE: Array,
    load_BE: Array,
    inputs: Inputs,
    config: MoE,
    scored_BE: Array | None = None,
) -> dict[str, Loss]:
    """The losses of any token-choice gate: those of `REPORTED` and those of `GATE_LOSSES` that the config names.

    A loss that is not asked for costs nothing; one named with coefficient 0 is reported and not trained on.
    `scored_BE`: the load as the K largest scores alone would have it, where a bias, a price or groups had a say.
    Where the last axis holds choices beyond the experts, the probabilities are the softmax of the logits.
    """
    of_load = (probs_BTE, load_BE, inputs, config)
    of_scores = (probs_BTE, load_BE if scored_BE is None else scored_BE, inputs, config)
    num_experts, on_devices = config.num_experts, of_load
    if probs_BTE.shape[-1] > num_experts:  # what is no expert lives on no device
        on_devices = (jax.nn.softmax(logits_BTE[..., :num_experts]), load_BE[:, :num_experts], inputs, config)
    makers = {
        "load_balance": lambda: load_balance(*of_load),
        "sequence_balance": lambda: sequence_balance(*of_scores),
        "z": lambda: z(logits_BTE, inputs),
        "device_balance": lambda: device_balance(*on_devices),
        "importance": lambda: importance(probs_BTE, inputs, config),
        "marginal_entropy": lambda: marginal_entropy(probs_BTE, inputs, config),
        "token_entropy": lambda: token_entropy(probs_BTE, inputs),
        "mutual_information": lambda: mutual_information(probs_BTE, inputs, config),
    }
    return {name: make() for name, make in makers.items() if name in REPORTED or name in config.losses}


# Losses of one token


def z(logits_BTE: Array, inputs: Inputs) -> Loss:
    """logsumexp(logits)^2 of each valid token (Zoph et al., ST-MoE, 2202.08906, eq. 5)."""
    lse_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    return Loss(jnp.sum(jnp.square(lse_BT), where=inputs.valid_BT), "token")


def token_entropy(probs_BTE: Array, inputs: Inputs) -> Loss:
    """The entropy of each valid token's probabilities: sharper gates (Huang et al., 2403.07652)."""
    return Loss(jnp.sum(_entropy(probs_BTE), where=inputs.valid_BT), "token")


def _entropy(probs_BTE: Array) -> Array:
    """In nats over the last axis, with a finite gradient at probability 0."""
    return -jnp.sum(probs_BTE * jnp.log(jnp.maximum(probs_BTE, TINY)), axis=-1)


# Losses of a group of sequences. All but `sequence_balance` are formed over the groups of `config.load_balance_scope`:
# `sequence`, one group per sequence; `micro_batch`, `config.load_balance_group` consecutive sequences; `global`, the
# whole batch, over `inputs.axis_names` too (Qiu et al., 2501.11873).


def load_balance(probs_BTE: Array, load_BE: Array, inputs: Inputs, config: MoE) -> Loss:
    """E * sum_e f_e P_e over each group (Fedus et al., 2101.03961, eq. 4-6).

    f_e, the share of the group's slots that name the expert, sums to 1 over experts; P_e is the mean of probabilities
    that sum to 1. So the loss is 1 at uniform load and E/K at collapse. Counts are those of the selection, its bias
    included, before any drop; a strategy that counts something else says so.
    """
    scope = _scope(load_BE.shape[0], inputs, config)
    return Loss(_balance(probs_BTE, load_BE, inputs, scope), scope.per)


def sequence_balance(probs_BTE: Array, load_BE: Array, inputs: Inputs, config: MoE) -> Loss:
    """The complementary sequence-wise loss of DeepSeek-V3 (2412.19437, eq. 17-20): always one group per sequence.

    f counts the K largest scores (eq. 18), without the bias and the groups by which experts are chosen; so does
    Megatron-LM, while torchtitan counts the choice itself. Where experts are drawn, or a token takes as many as it
    wants, it counts those that it took.
    """
    scope = Scope(1, (), "sequence")
    return Loss(_balance(probs_BTE, load_BE, inputs, scope), scope.per)


def device_balance(probs_BTE: Array, load_BE: Array, inputs: Inputs, config: MoE) -> Loss:
    """The load-balance loss of `config.load_balance_devices` devices of consecutive experts, 1 at uniform load.

    DeepSeekMoE (2401.06066, eq. 15-17): the mean over a device of its experts' f, times the sum of their P. How the
    load spreads inside a device does not matter. Probabilities and load are of real experts alone: null and zero-cost
    choices live on no device.
    """
    devices = config.load_balance_devices
    prob_BTM = probs_BTE.reshape(*probs_BTE.shape[:2], devices, -1).sum(-1)
    return load_balance(prob_BTM, load_BE.reshape(-1, devices, load_BE.shape[1] // devices).sum(-1), inputs, config)


def importance(probs_BTE: Array, inputs: Inputs, config: MoE) -> Loss:
    """The squared coefficient of variation of the experts' summed probabilities over each group.

    Shazeer et al. (1701.06538, eq. 6-7) sum the weights of the K selected; the probabilities of all experts give those
    that were not selected a gradient too.
    """
    return variation(probs_BTE, inputs, config)


def variation(amount_BTE: Array, inputs: Inputs, config: MoE) -> Loss:
    """The squared coefficient of variation over experts of any summed amounts: variance / mean^2."""

    def of_mean(mean_E: Array) -> Array:
        return jnp.var(mean_E) / jnp.square(jnp.maximum(jnp.mean(mean_E), 1e-6))

    return _of_mean(of_mean, amount_BTE, inputs, config)


def marginal_entropy(probs_BTE: Array, inputs: Inputs, config: MoE) -> Loss:
    """ln E - H(mean probability) of each group: 0 where all experts are equally probable on average.

    The entropy regularisation of sigma-MoE (Csordas et al., 2310.10837), which is -H, shifted by ln E so as
    not to be negative.
    """
    return _of_mean(_from_uniform, probs_BTE, inputs, config)


def mutual_information(probs_BTE: Array, inputs: Inputs, config: MoE) -> Loss:
    """ln E - I(expert; token) = ln E - H(mean probability) + mean entropy of a token, in each group.

    0 where every token is sure of its expert and all experts are equally likely. The loss of ModuleFormer (Shen et al.,
    2306.04640) is -I, shifted by ln E here.
    """
    marginal = marginal_entropy(probs_BTE, inputs, config)
    scope = _scope(probs_BTE.shape[0], inputs, config)
    entropy_B = jnp.sum(_entropy(probs_BTE), axis=1, where=inputs.valid_BT)
    _, tokens_G = _tokens(inputs, scope)
    return Loss(marginal.sum + jnp.sum(_group(entropy_B, scope.size) / tokens_G), marginal.per)


class Scope(NamedTuple):
    size: int  # consecutive sequences of a group on this shard
    axes: tuple[str, ...]  # mesh axes over which the group goes on
    per: str  # the unit of `Loss`


def _scope(batch: int, inputs: Inputs, config: MoE) -> Scope:
    """In evaluation, whose batches may have any size and whose losses nobody reads, a micro-batch is one sequence."""
    name = config.load_balance_scope if inputs.train or config.load_balance_scope == "global" else "sequence"
    size = {"sequence": 1, "micro_batch": config.load_balance_group, "global": batch}[name]
    return Scope(size, inputs.axis_names if name == "global" else (), UNIT[name])


def _balance(probs_BTE: Array, load_BE: Array, inputs: Inputs, scope: Scope) -> Array:
    """Sum over groups of E * sum_e f_e P_e.

    Over `scope.axes` only the integer counts are reduced: each shard keeps its own part of P, the parts add up to the
    loss, and no gradient crosses a collective.
    """
    prob_BE = jnp.sum(probs_BTE, axis=1, where=inputs.valid_BT[..., None])
    count_GE = _over(scope.axes, _group(load_BE, scope.size))
    _, tokens_G = _tokens(inputs, scope)
    f_GE = count_GE / jnp.maximum(count_GE.sum(-1, keepdims=True), 1).astype(jnp.float32)
    return load_BE.shape[-1] * jnp.sum(f_GE * _group(prob_BE, scope.size) / tokens_G[:, None])


def _of_mean(function: Callable[[Array], Array], probs_BTE: Array, inputs: Inputs, config: MoE) -> Loss:
    """Sum over groups of a function of the mean probability (or other amount) [E] that is not linear in it.

    Each shard returns the value at the mean of the whole group times its share of the tokens, with the gradient through
    its own part of the mean: both add up to those of the whole, and no gradient crosses a collective.
    """
    scope = _scope(probs_BTE.shape[0], inputs, config)
    own_G, tokens_G = _tokens(inputs, scope)
    prob_BE = jnp.sum(probs_BTE, axis=1, where=inputs.valid_BT[..., None])
    part_GE = _group(prob_BE, scope.size) / tokens_G[:, None]
    fixed_GE = jax.lax.stop_gradient(part_GE)
    value_G, slope_GE = jax.vmap(jax.value_and_grad(function))(jnp.maximum(_over(scope.axes, fixed_GE), TINY))
    return Loss(jnp.sum(value_G * own_G / tokens_G) + jnp.sum(slope_GE * (part_GE - fixed_GE)), scope.per)


def _from_uniform(mean_E: Array) -> Array:
    """Kullback-Leibler divergence from the uniform distribution: ln E - H."""
    return jnp.sum(mean_E * jnp.log(mean_E * mean_E.size))


def _tokens(inputs: Inputs, scope: Scope) -> tuple[Array, Array]:
    """Valid tokens of each group on this shard, and at least 1 of the whole group; float32 [G]."""
    own_G = _group(inputs.valid_BT.sum(-1, dtype=jnp.int32), scope.size)
    return own_G.astype(jnp.float32), jnp.maximum(_over(scope.axes, own_G), 1).astype(jnp.float32)


def _over(axes: tuple[str, ...], x: Array) -> Array:
    return jax.lax.psum(x, axes) if axes else x


def _group(x_B: Array, size: int) -> Array:
    """Sums over groups of `size` consecutive entries of the first axis."""
    return x_B.reshape(x_B.shape[0] // size, size, *x_B.shape[1:]).sum(1)


# The losses of a step


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
    """The rule that `config.load_balance_scope` breaks, or None; it is the scope of every loss of a group.

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
