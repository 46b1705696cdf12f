"""Learning-rate schedules, a run's optimizer, which parameters it trains, and the bytes that it needs.

Letters: S steps of a run.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from frugalmoe.config.checks import decaying_updates, dropped_at
from frugalmoe.model.transformer import declarations, structure
from frugalmoe.optimizers import OPTIMIZERS, trained, with_rates
from frugalmoe.schema import Config, FrozenDict


def schedule(config: Config) -> optax.Schedule:
    """Returns the learning rate of update i = 0, 1, ..., steps - 1: linear warmup, then the shape that `optim` names.

    The last update of the warmup has the peak rate (without warmup the first update, where there is another), and the
    last update of all, i = steps - 1, has exactly the final rate: wsd goes there linearly over the last
    `decay_fraction` of the updates after the warmup, at least one, from the peak (Hu et al. 2024, arXiv 2404.06395);
    cosine by half a cosine over all updates after the warmup (Loshchilov & Hutter 2017, arXiv 1608.03983). It never
    rises again. `constant`, and wsd with a `decay_fraction` of 0, stay at the peak. With `drop_after` the rate that
    stays is `drop_factor` of the peak from update round(drop_after * steps) on, and wsd decays from there.
    """
    o, steps = config.optim, config.train.steps
    peak, warmup = o.learning_rate, o.warmup_steps
    parts, boundaries = [], []
    if warmup:
        parts.append(optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1)))
        boundaries.append(warmup)
    parts.append(optax.constant_schedule(peak))
    stays = peak
    if o.drop_after:
        stays = peak * o.drop_factor
        parts.append(optax.constant_schedule(stays))
        boundaries.append(dropped_at(config))
    if decay := decaying_updates(config):
        if o.schedule == "cosine":
            shape = optax.cosine_decay_schedule(peak, decay, o.final_fraction)
        else:
            shape = optax.linear_schedule(stays, peak * o.final_fraction, decay)
        parts.append(lambda count: shape(count + 1))  # the update before has the peak rate
        boundaries.append(steps - decay)
    return optax.join_schedules(parts, boundaries)


LEAST_RATES = 1024  # of a table of rates, whose length is a power of two


class Numbers(NamedTuple):
    """Numbers of the section `optim` that are arguments of a step: runs that differ in them alone share its program."""

    rates_S: Array  # float32: the learning rate of each update
    weight_decay: Array  # float32 []
    clip_norm: Array  # float32 []
    of_roles: Mapping[str, Array]  # float32 []: `rates`


def numbers(config: Config) -> Numbers:
    """Returns the config's own numbers. The table of rates is longer than the run, by its last rate again and again, so
    that runs of other lengths share its program too.
    """
    o, last = config.optim, config.train.steps - 1
    length = max(LEAST_RATES, 1 << last.bit_length())
    rates_S = _compiled_schedule(_of_schedule(config))(np.minimum(np.arange(length, dtype=np.int32), last))
    of_roles = {role: np.float32(factor) for role, factor in o.rates.items()}
    return Numbers(rates_S, np.float32(o.weight_decay), np.float32(o.clip_norm), of_roles)


def _of_schedule(config: Config) -> Config:
    """The config without what has no part in its learning rates."""
    return dataclasses.replace(
        Config(), optim=config.optim, train=dataclasses.replace(Config().train, steps=config.train.steps)
    )


@functools.lru_cache(64)
def _compiled_schedule(config: Config) -> Any:
    return jax.jit(lambda update_S: jnp.broadcast_to(schedule(config)(update_S), update_S.shape).astype(jnp.float32))


def without_numbers(config: Config) -> Config:
    """Returns a config that is equal for those that differ in `Numbers` only. Of no clipping the program is another."""
    o, same = config.optim, Config().optim
    others = {name: getattr(same, name) for name in ("learning_rate", "schedule", "warmup_steps", "decay_fraction")}
    others |= {name: getattr(same, name) for name in ("final_fraction", "drop_after", "drop_factor", "weight_decay")}
    clip_norm, rates = same.clip_norm if o.clip_norm else 0.0, FrozenDict.fromkeys(o.rates, 1.0)
    return dataclasses.replace(config, optim=dataclasses.replace(o, **others, clip_norm=clip_norm, rates=rates))


def optimizer(
    config: Config, numbers: Numbers | None = None, factor: Array | None = None
) -> optax.GradientTransformation:
    """Returns the optimizer of the trained parameters: the one that the config names, after clipping by the global norm
    of their gradients, with the rates of each role.

    numbers: in the place of the config's own. factor: on the learning rate of this update.
    """
    o, declared, rate = config.optim, declarations(config.model), schedule(config)
    clips = bool(o.clip_norm)
    if numbers is not None:
        rate = lambda count: numbers.rates_S[count]
        of_roles = {role: numbers.of_roles[role] for role in o.rates}
        o = dataclasses.replace(o, weight_decay=numbers.weight_decay, clip_norm=numbers.clip_norm, rates=of_roles)
    # Of an update a factor would be rounded on its own, and 1.0 change bits: XLA adds what the rate multiplies at once.
    tx = OPTIMIZERS[o.name](o, rate if factor is None else lambda count: factor * rate(count), declared)
    tx = optax.chain(_clip(o.clip_norm), tx) if clips else tx
    return with_rates(tx, o.rates, declared)


def _clip(limit: float | Array) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm`, whose state it has, with one factor for all gradients; 1 where they stay.

    Optax divides every number by the norm: a factor is within 1.5 of a last place of that, and XLA for CPUs writes
    divided gradients of all parameters to memory, where it multiplies as it reads them.
    """

    def update(gradients: dict, state: optax.OptState, params: dict | None = None) -> tuple[dict, optax.OptState]:
        norm = optax.tree.norm(gradients)
        factor = jnp.where(norm < limit, 1, limit / norm)
        return jax.tree.map(lambda gradient: gradient * factor.astype(gradient.dtype), gradients), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


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
