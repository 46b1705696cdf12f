"""Learning-rate schedules, a run's optimizer, which parameters it trains, and the bytes that it needs."""

from typing import Any, NamedTuple

import jax
import optax

from frugalmoe.model.transformer import declarations, structure
from frugalmoe.optimizers import OPTIMIZERS, trained, with_rates
from frugalmoe.schema import Config


def schedule(config: Config) -> optax.Schedule:
    """Returns the learning rate of update i = 0, 1, ..., steps - 1: linear warmup, then the shape that `optim` names.

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
    if decay := decaying_updates(config):
        if o.schedule == "cosine":
            shape = optax.cosine_decay_schedule(peak, decay, o.final_fraction)
        else:
            shape = optax.linear_schedule(peak, peak * o.final_fraction, decay)
        parts.append(lambda count: shape(count + 1))  # the update before has the peak rate
        boundaries.append(steps - decay)
    return optax.join_schedules(parts, boundaries)


def decaying_updates(config: Config) -> int:
    """Returns how many updates at the end are below the peak rate."""
    o, steps = config.optim, config.train.steps
    after = steps - o.warmup_steps
    if o.schedule == "constant" or (o.schedule == "wsd" and not o.decay_fraction):
        return 0
    wanted = after if o.schedule == "cosine" else max(round(o.decay_fraction * after), 1)
    return min(wanted, max(steps - 1, 1))


def optimizer(config: Config, factor: jax.Array | None = None) -> optax.GradientTransformation:
    """Returns the optimizer of the trained parameters: the one that the config names, after clipping by the global norm
    of their gradients, with the rates of each role. factor: on the learning rate of this update.
    """
    o, declared, rate = config.optim, declarations(config.model), schedule(config)
    # Of an update a factor would be rounded on its own, and 1.0 change bits: XLA adds what the rate multiplies at once.
    tx = OPTIMIZERS[o.name](o, rate if factor is None else lambda count: factor * rate(count), declared)
    tx = optax.chain(optax.clip_by_global_norm(o.clip_norm), tx) if o.clip_norm else tx
    return with_rates(tx, o.rates, declared)


def split(params: dict, config: Config) -> tuple[dict, dict]:
    """Returns (trained, frozen): the parameters, or what has their structure, as two trees without each other's leaves.

    `joined` makes one of them again. Where all are trained, as by default, the first is `params` itself.
    """
    chosen = trained(config.optim, declarations(config.model))
    if chosen is None:
        return params, {}
    return _pruned(params, (), chosen, True), _pruned(params, (), chosen, False)


def joined(trained: dict, frozen: dict) -> dict:
    """Returns the parameters that `split` parted."""
    if not frozen:
        return trained
    both = {**frozen, **trained}
    inner = lambda name: isinstance(both[name], dict) and name in trained and name in frozen
    return {name: joined(trained[name], frozen[name]) if inner(name) else leaf for name, leaf in both.items()}


def _pruned(tree: dict, path: tuple[str, ...], chosen: frozenset[tuple[str, ...]], inside: bool) -> dict:
    """The leaves whose paths are among the chosen, or those whose are not; no dict is empty."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            if inner := _pruned(value, (*path, str(name)), chosen, inside):
                found[name] = inner
        elif ((*path, str(name)) in chosen) == inside:
            found[name] = value
    return found


class Bytes(NamedTuple):
    """What a run's numbers take, without padding."""

    parameters: int
    gradients: int  # of the parameters that are trained
    optimizer: int  # its state


def bytes_of(config: Config) -> Bytes:
    """Returns the bytes of a run, from shapes alone. The config must say the size of its vocabulary."""
    _, params, _ = structure(config.model)
    gradients, _ = split(params, config)
    state = jax.eval_shape(optimizer(config).init, gradients)
    total = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return Bytes(total(params), total(gradients), total(state))
