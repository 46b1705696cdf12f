"""Stochastic routing warmup around another strategy: at first tokens are spread by noise, later by the gate.

Ling (2503.05139, eq. 3): the gate's logits z are replaced, in step i of training, by

    a z + (1 - a) (mu + sigma * eps),  a = min(i / steps, 1),  eps ~ N(0, 1) of each token and expert

with running averages mu and sigma of the mean and standard deviation of z. The report says neither whether these are
per expert nor how fast they move nor how long the warmup is. Here they are one number each per layer, so that the first
selection is uniform whatever the gate's offsets, and move by 1 - `decay` of the difference in a step. From step `steps`
on, and in evaluation, this is the base strategy bit for bit.

`base` is any strategy of one linear gate without noise of its own; it sees the mixed logits through `Inputs.logit_map`.

Letters: B batch, T time, E experts.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.fields import build
from frugalmoe.routing import losses, merging, rules, select, strategies
from frugalmoe.routing.contract import (
    LINEAR,
    About,
    Inputs,
    NewParams,
    Params,
    Router,
    Routing,
    State,
    linear_logits,
)
from frugalmoe.schema import FrozenDict, MoE

RUNNING = ("logit_mean", "logit_square")  # this wrapper's own state; all else is the base's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    base: str = "topk_softmax"  # the strategy that is warmed up
    base_options: Mapping[str, Any] = FrozenDict()  # its options
    steps: int = 2000  # length of the warmup
    decay: float = 0.99  # of the running averages


def bases() -> tuple[str, ...]:
    """The strategies that can be wrapped: one linear gate, no noise, no look at other tokens, the usual losses."""
    return tuple(name for name in strategies.sound() if _wrappable(name))


def _wrappable(name: str) -> bool:
    if name == __name__.rpartition(".")[2]:
        return False
    router = strategies.get(name)
    about = router.about
    plain = about.causal == "safe" and about.form == "token" and about.losses == losses.GATE_LOSSES
    return plain and about.learned is True and about.random is not True and router.init in LINEAR


def unwrap(config: MoE) -> tuple[Router, MoE]:
    """The base strategy, and the config with the base's options. Raises UserError where they are not valid."""
    o: Options = config.options
    if o.base not in strategies.names() or not _wrappable(o.base):
        raise UserError(f"options.base={o.base!r}: no strategy of one linear gate; {did_you_mean(o.base, bases())}")
    router = strategies.get(o.base)
    return router, dataclasses.replace(config, options=build(router.options, o.base_options, "options.base_options"))


def route(params: Params, state: State, inputs: Inputs, config: MoE) -> Routing:
    router, base_config = unwrap(config)
    base_state = {name: value for name, value in state.items() if name not in RUNNING}
    logits_BTE = jax.lax.stop_gradient(linear_logits(params, inputs))
    if inputs.train:
        noise_BTE = _noise(inputs, state, config)
        share = jnp.minimum(inputs.step / config.options.steps, 1.0)
        inputs = inputs._replace(logit_map=lambda z_BTE: share * z_BTE + (1 - share) * noise_BTE)
    routing = router.route(params, base_state, inputs, base_config)
    apart_BTE = jnp.where(inputs.valid_BT[..., None], logits_BTE - jax.lax.stop_gradient(state["logit_mean"]), 0)
    sums = {"logit_sum": apart_BTE.sum(), "logit_square_sum": jnp.square(apart_BTE).sum()}
    return routing._replace(stats={**routing.stats, **sums})


def _noise(inputs: Inputs, state: State, config: MoE) -> Array:
    mean, square = jax.lax.stop_gradient((state["logit_mean"], state["logit_square"]))
    draw = jax.vmap(jax.vmap(lambda key: jax.random.normal(key, (config.num_experts,))))
    return mean + jnp.sqrt(jnp.maximum(square, 0)) * draw(select.token_keys(inputs))


def init(key: Array, dim: int, config: MoE) -> NewParams:
    router, base_config = unwrap(config)
    return router.init(key, dim, base_config)


def init_state(dim: int, config: MoE) -> State:
    """A mean of 0 and a mean square of the distance from it of 1, near those of a fresh gate."""
    router, base_config = unwrap(config)
    return {"logit_mean": jnp.zeros(()), "logit_square": jnp.ones(())} | dict(router.init_state(dim, base_config))


def update(state: State, batch_stats: Mapping[str, Array], config: MoE) -> State:
    router, base_config = unwrap(config)
    base_state = {name: value for name, value in state.items() if name not in RUNNING}
    count = jnp.maximum(batch_stats["tokens"], 1) * config.num_experts
    # Sums of distances from the running mean, so that the variance of logits far from 0 loses no digits.
    keep, new = config.options.decay, 1 - config.options.decay
    step = new * batch_stats["logit_sum"] / count
    square = keep * state["logit_square"] + new * batch_stats["logit_square_sum"] / count - step**2
    running = {"logit_mean": state["logit_mean"] + step, "logit_square": square}
    return running | dict(router.update(base_state, batch_stats, base_config))


def merge_state(states: Sequence[State], weights: Sequence[float], config: MoE) -> State:
    """The base's entries by its own rules; mean and variance of all replicas' logits taken together.

    The square is the mean of the replicas' squares and of their means' squared distances from the common mean.
    """
    router, base_config = unwrap(config)
    base = [{name: value for name, value in state.items() if name not in RUNNING} for state in states]
    own = merging.by_rules({"logit_mean": "mean"}, [{"logit_mean": state["logit_mean"]} for state in states], weights)
    apart = [state["logit_square"] + np.square(state["logit_mean"] - own["logit_mean"]) for state in states]
    return {**own, "logit_square": merging.mean(apart, weights), **router.merge(base, weights, base_config)}


def check(config: MoE) -> str | None:
    o: Options = config.options
    try:
        router, base_config = unwrap(config)
    except UserError as error:
        return str(error)
    noisy = f"options.base={o.base!r}: has noise of its own with these options"
    return rules.first(
        rules.at_least("steps", o.steps, 1),
        rules.decay("decay", o.decay),
        router.check(base_config),
        noisy if router.claim("random", base_config) else None,
    )


def weight_sum(config: MoE) -> float | str:
    router, base_config = unwrap(config)
    return router.claim("weight_sum", base_config)


ROUTER = Router(
    about=About(
        year=2025,
        paper="Ling team, Every FLOP Counts, 2503.05139, eq. 3",
        score="as the base strategy",
        selection="as the base strategy, from logits that are noise at first",
        weights="as the base strategy",
        balance="as the base strategy",
        weight_sum=weight_sum,
        stateful=True,
        random=True,
        losses=losses.GATE_LOSSES,
    ),
    route=route,
    options=Options,
    init=init,
    init_state=init_state,
    update=update,
    merge_state=merge_state,
    check=check,
    cases=((2, {"base": "default_moe", "base_options": FrozenDict(samples=3), "steps": 1500}),),
)
