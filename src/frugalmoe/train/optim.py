"""Learning-rate schedules and the optimizer."""

import jax
import optax

from frugalmoe.config.schema import Config


def schedule(config: Config) -> optax.Schedule:
    """Learning rate of update i = 0, 1, ...: linear warmup, then the shape that the config names.

    wsd: constant, then linear to the final rate over the last `decay_fraction` of the steps (Hu et al. 2024,
    arXiv 2404.06395); cosine: half a cosine to the final rate (Loshchilov & Hutter 2017, arXiv 1608.03983).
    """
    o, steps = config.optim, config.train.steps
    peak, final, warmup = o.learning_rate, o.learning_rate * o.final_fraction, o.warmup_steps
    parts, boundaries = [], []
    if warmup:
        parts.append(optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1)))
        boundaries.append(warmup)
    if o.schedule == "cosine":
        parts.append(optax.cosine_decay_schedule(peak, max(steps - warmup, 1), o.final_fraction))
    else:
        parts.append(optax.constant_schedule(peak))
    if o.schedule == "wsd" and (decay := round(o.decay_fraction * (steps - warmup))):
        parts.append(optax.linear_schedule(peak, final, decay))
        boundaries.append(steps - decay)
    return optax.join_schedules(parts, boundaries)


def decay_mask(params: dict) -> dict:
    """True for matrices; False for norms, biases and vectors. Stacked layers carry one more axis."""

    def is_matrix(path, leaf) -> bool:
        names = [str(getattr(k, "key", k)) for k in path]
        stacked = names[0].endswith(("blocks", "depths"))
        return leaf.ndim - stacked >= 2 and "bias" not in names[-1]

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay (arXiv 1711.05101) after clipping by the global norm."""
    o = config.optim
    adamw = optax.adamw(schedule(config), b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, mask=decay_mask)
    return optax.chain(optax.clip_by_global_norm(o.clip_norm), adamw) if o.clip_norm else adamw
