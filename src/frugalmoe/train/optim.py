"""Learning-rate schedules and the optimizer."""

import functools

import jax
import optax

from frugalmoe import sharding
from frugalmoe.model.transformer import declarations
from frugalmoe.schema import Config


def schedule(config: Config) -> optax.Schedule:
    """Learning rate of update i = 0, 1, ..., steps - 1: linear warmup, then the shape that the config names.

    The last update of the warmup has the peak rate (without warmup the first update, where there is another), and the
    last update of all, i = steps - 1, has exactly the final rate: wsd goes there linearly over the last
    `decay_fraction` of the updates after the warmup, at least one, from the peak (Hu et al. 2024, arXiv 2404.06395);
    cosine by half a cosine over all updates after the warmup (Loshchilov & Hutter 2017, arXiv 1608.03983). It never
    rises again. `constant`, and wsd with a `decay_fraction` of 0, stay at the peak.
    """
    o, steps = config.optim, config.train.steps
    peak, warmup = o.learning_rate, o.warmup_steps
    parts, boundaries = [], []
    if warmup:
        parts.append(optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1)))
        boundaries.append(warmup)
    parts.append(optax.constant_schedule(peak))
    if decay := _decaying_updates(config):
        if o.schedule == "cosine":
            shape = optax.cosine_decay_schedule(peak, decay, o.final_fraction)
        else:
            shape = optax.linear_schedule(peak, peak * o.final_fraction, decay)
        parts.append(lambda count: shape(count + 1))  # the update before has the peak rate
        boundaries.append(steps - decay)
    return optax.join_schedules(parts, boundaries)


def _decaying_updates(config: Config) -> int:
    """How many updates, the last ones, are below the peak rate after the warmup."""
    o, steps = config.optim, config.train.steps
    after = steps - o.warmup_steps
    if o.schedule == "constant" or (o.schedule == "wsd" and not o.decay_fraction):
        return 0
    wanted = after if o.schedule == "cosine" else max(round(o.decay_fraction * after), 1)
    return min(wanted, max(steps - 1, 1))


def decay_mask(params: dict, declarations: sharding.Declarations) -> dict:
    """True for what multiplies activations; False for norms, biases and other vectors."""
    is_matrix = lambda path, leaf: sharding.declared(path, declarations).is_matrix
    return jax.tree_util.tree_map_with_path(is_matrix, params)


def optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay (arXiv 1711.05101) after clipping by the global norm."""
    o = config.optim
    mask = functools.partial(decay_mask, declarations=declarations(config.model))
    adamw = optax.adamw(schedule(config), b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, mask=mask)
    return optax.chain(optax.clip_by_global_norm(o.clip_norm), adamw) if o.clip_norm else adamw
