"""`train_step(state, batch) -> (state, report)` and `eval_step`: pure functions, jitted once.

Letters: A micro-batches of a step, B sequences, T time, D model, L MoE layers, E experts.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from frugalmoe import sharding
from frugalmoe.data.batches import Batch
from frugalmoe.model import pattern
from frugalmoe.model.transformer import Transformer, declarations, split, structure, to_logits
from frugalmoe.routing import strategies
from frugalmoe.routing.contract import TokenPlan
from frugalmoe.schema import Config
from frugalmoe.train import guard, objective, optim
from frugalmoe.train.guard import Guard
from frugalmoe.train.objective import Knobs, OfStep, StepReport, Sums, without_knobs

EVAL_SEED = 0  # the same for every run, so that runs compare and share a compiled program


class State(NamedTuple):
    """Everything that a run carries from step to step, with two clocks.

    `step` counts updates: schedules, noise and logs go by it. `position` counts batches taken from the data, and the
    next batch is that of its number. They are equal until a batch is skipped or comes again: see `run.Run.seek` and
    `train.guard`.
    """

    step: Array  # int32 []
    position: Array  # int32 []
    params: dict  # float32
    router_state: dict  # float32
    opt_state: optax.OptState
    guard: Guard | tuple[()] = ()  # empty: of what is not trained


def init(config: Config) -> State:
    """Returns the state before the first step, on the mesh in context."""
    same = without_knobs(config)
    model = dataclasses.replace(same.model, remat="none")
    of_parameters = dataclasses.replace(Config(), model=model, optim=same.optim)  # they depend on nothing else
    return _compiled_fresh(of_parameters)(np.uint32(config.train.seed))


@functools.lru_cache(64)
def _compiled_fresh(config: Config) -> Callable[[Array], State]:
    def fresh(seed: Array) -> State:
        # Without `store` a stacked scalar of the state would have the type P() and a step's result P(None), so that the
        # step would be compiled twice.
        return sharding.store(_fresh(config, seed), declarations(config.model))

    # It runs once: an optimized program would take longer to compile than it saves.
    return jax.jit(fresh, compiler_options={"xla_backend_optimization_level": 0})


def abstract(config: Config) -> State:
    """Returns shapes, dtypes and shardings of the state on the mesh in context; nothing is allocated."""
    return _abstract(without_knobs(config), jax.sharding.get_mesh())


@functools.lru_cache(4)  # a start asks several times, and each would be traced
def _abstract(config: Config, mesh: jax.sharding.Mesh) -> State:
    return sharding.placed(jax.eval_shape(lambda: _fresh(config, config.train.seed)), declarations(config.model))


def _fresh(config: Config, seed: int | Array) -> State:
    _, params, router_state = split(Transformer(config.model, jax.random.key(seed)))
    trained, _ = optim.split(params, config)
    opt_state = optim.optimizer(config).init(trained)
    return State(jnp.int32(0), jnp.int32(0), params, router_state, opt_state, guard.fresh())


def make_train_step(config: Config, together: bool = False) -> Callable[..., tuple[State, StepReport]]:
    """Returns the step for batches [A, B, T]: it adds up the gradients of A micro-batches and makes one update, unless
    `guard.judge` says that it is to be skipped.

    The step's third argument replaces the config's own `Knobs`. together: it is to be called under `jax.vmap`, of runs.
    """
    gradient = make_gradient(config, together)

    def train_step(state: State, batch: Batch, knobs: Knobs | None = None) -> tuple[State, StepReport]:
        knobs = objective.knobs(config) if knobs is None else knobs
        grads, sums, of_step = gradient(state.params, state.router_state, batch, state.step, knobs)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(grads)
        verdict, remembered = guard.judge(state.guard, knobs.limits, state.step, sums.total, norm, knobs.taken > 0)
        trained, frozen = optim.split(state.params, config)
        update = lambda before, *given: updated(*before, *given, config)
        before, given = (trained, state.opt_state), (grads, knobs.optim, verdict.rate)
        with jax.named_scope("optimizer"):
            trained, opt_state = guard.unless(verdict.skipped, update, before, *given)
        router_state = update_router_state(state.router_state, sums.stats, config)
        new_state = State(
            step=state.step + jnp.where(verdict.skipped, 0, 1),
            position=state.position + knobs.taken,
            params=optim.joined(trained, frozen),
            router_state=guard.chosen(verdict.skipped, router_state, state.router_state),
            opt_state=opt_state,
            guard=remembered,
        )
        metrics = objective.metrics(sums, of_step, config)
        metrics["optim/gradient_norm"] = norm
        metrics["optim/parameter_norm"] = optax.tree.norm(new_state.params)
        metrics["optim/learning_rate"] = verdict.rate * knobs.optim.rates_S[state.step]
        report = StepReport(
            metrics=metrics,
            depths=objective.depth_metrics(sums),
            counts_LE=sums.stats.get("counts"),
            tokens=of_step.units["token"],
            position=new_state.position,
            # The optimizer's state is finite where the norms are, so that it is checked before a save, not every step.
            finite={"router_state": finite(new_state.router_state)},
            verdict=verdict,
        )
        return new_state, report

    return train_step


def updated(
    trained: dict, opt_state: optax.OptState, grads: dict, numbers: optim.Numbers, rate: Array, config: Config
) -> tuple[dict, optax.OptState]:
    """Returns the trained parameters and the optimizer's state after an update. rate: factor on the learning rate."""
    updates, opt_state = optim.optimizer(config, numbers, rate).update(grads, opt_state, trained)
    return optax.apply_updates(trained, updates), opt_state


def finite(tree: Any) -> Array:
    """Returns whether all numbers of a tree of arrays are finite, bool []. Integers always are."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return functools.reduce(jnp.logical_and, (jnp.all(jnp.isfinite(leaf)) for leaf in leaves), jnp.bool_(True))


def make_gradient(config: Config, together: bool = False) -> Callable[..., tuple[dict, Sums, OfStep]]:
    """Returns `gradient(params, router_state, batch[A, B, T], step, knobs)`, which gives the gradient of a step's loss
    before clipping, of the parameters that `optim.train` chooses, and the sums and units that metrics are made of.
    together: see `make_train_step`.
    """
    share = objective.make_objective(config, together)

    def gradient(
        params: dict, router_state: dict, batch: Batch, step: Array, knobs: Knobs
    ) -> tuple[dict, Sums, OfStep]:
        of_step = OfStep(step, knobs, objective.units(batch, config))
        trained, frozen = optim.split(params, config)

        def loss(trained: dict, index: Array, micro_batch: Batch) -> tuple[Array, Sums]:
            return share(optim.joined(trained, frozen), router_state, micro_batch, index, of_step)

        if config.train.accumulate_steps == 1:
            first = jax.tree.map(lambda a: a[0], batch)
            (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(trained, jnp.int32(0), first)
        else:
            grads, sums = _accumulate(loss, trained, config.train.accumulate_steps, batch)
        return grads, sums, of_step

    return gradient


def _accumulate(loss: Callable, params: dict, count: int, batch: Batch) -> tuple[dict, Sums]:
    """Returns the sums of gradients and of statistics over micro-batches, which are computed one after the other.

    The gradients of one micro-batch are never held: its backward pass adds to the sums in place, layer by layer.
    """
    totals = jax.tree.map(lambda a: jax.new_ref(jnp.zeros_like(a)), params)

    def micro(index: Array, micro_batch: Batch) -> Sums:
        _, backward, sums = jax.vjp(lambda params: loss(params, index, micro_batch), params, has_aux=True)
        backward.with_refs(totals)(jnp.float32(1))
        return sums

    sums_of = lambda micro_batch: loss(params, jnp.int32(0), micro_batch)[1]
    shapes = jax.eval_shape(sums_of, jax.tree.map(lambda a: a[0], batch))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding.spec), shapes)

    def body(total: Sums, xs: tuple) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, total, micro(*xs)), None

    sums, _ = jax.lax.scan(body, zeros, (jnp.arange(count, dtype=jnp.int32), batch))
    return jax.tree.map(jax.freeze, totals), sums


def update_router_state(router_state: dict, stats: Mapping[str, Array], config: Config) -> dict:
    """Returns the router state after one optimizer step: the strategy updates every layer's by the statistics of the
    whole batch.
    """
    if not router_state:
        return router_state
    moe = config.model.moe
    update = jax.vmap(lambda state, stats: strategies.get(moe.router).update(state, stats, moe))
    count = len(pattern.moe_layers(config.model))
    of_blocks = lambda blocks, stats: {"moe": {"router_state": update(blocks["moe"]["router_state"], stats)}}
    found = {"moe_blocks": of_blocks(router_state["moe_blocks"], jax.tree.map(lambda a: a[:count], stats))}
    if modules := router_state.get("multi_token"):
        found["multi_token"] = {"block": of_blocks(modules["block"], jax.tree.map(lambda a: a[count:], stats))}
    return found


class Evaluated(NamedTuple):
    ce_BT: Array  # nats; 0 where there is no target
    stats: Mapping[str, Array]  # of each MoE layer [L, ...]; additive over batches; empty without MoE layers
    depths: Mapping[str, Array]  # likewise, of each block that mixture of depths routes; empty if there is none
    selected_LBTE: Array | None  # bool; None without `trace`, as the next two
    plan: TokenPlan | None  # token-major [L, B, T, K], after an intervention
    predicted_BT: Array | None  # int32, the most likely next token


def make_eval_step(
    config: Config, trace: bool = False, as_in_training: int | None = None, vocabulary: int | None = None
) -> Callable[..., Evaluated]:
    """Returns `eval_step(params, router_state, batch, intervention=None, first_row=0)`: losses and routing of held-out
    tokens [B, T], without noise and without an update of router state.

    - `intervention` changes plans: see `model.moe.Context`.
    - `first_row` is the number of the batch's first row among all that are evaluated. A router that draws needs it.
    - `as_in_training` is the number of a step: tokens are routed as training routes them then, with its noise.
    - `vocabulary` is the tokenizer's size. Ids from there on only pad the model's vocabulary: none is predicted.
    """
    graphdef, _, _ = structure(config.model)
    train = as_in_training is not None
    step = as_in_training if train else 0

    def eval_step(
        params: dict,
        router_state: dict,
        batch: Batch,
        intervention: Callable | None = None,
        first_row: Array | int = 0,
    ) -> Evaluated:
        model = nnx.merge(graphdef, params, router_state)
        out = objective.forward(
            model, batch, first_row, jnp.int32(step), EVAL_SEED, train=train, trace=trace, intervention=intervention
        )
        _, ce_BT, _ = objective.token_losses(model, out.hidden_BTD, batch.targets_BT, batch.loss_mask_BT, config)
        routed = out.routed
        stats, *traced = (routed.stats, routed.selected_BTE, routed.plan) if routed is not None else ({}, None, None)
        passed = {} if out.depths is None else out.depths.stats
        predicted = predicted_tokens(model, out.hidden_BTD, config, vocabulary) if trace else None
        return Evaluated(ce_BT * batch.loss_mask_BT, stats, passed, *traced, predicted)

    return eval_step


def predicted_tokens(model: Transformer, hidden_BTD: Array, config: Config, vocabulary: int | None) -> Array:
    """Returns the most likely next token [B, T], the lowest id among equals.

    Logits are those of the loss, float32 whatever the dtype of hidden states, for `loss_chunk` tokens at one time.
    """

    def on_shard(hidden_BTD, head_DV, bias_V):
        logits = lambda hidden_D: to_logits(hidden_D, head_DV, bias_V)[:vocabulary]
        best = lambda hidden_D: jnp.argmax(logits(hidden_D)).astype(jnp.int32)
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        return jax.lax.map(best, hidden_ND, batch_size=config.train.loss_chunk).reshape(hidden_BTD.shape[:2])

    bias_V = model.head_bias()
    head = (sharding.reshard(model.head(), "D."), None if bias_V is None else sharding.reshard(bias_V, "."))
    return sharding.local(on_shard, ("BTD", "D.", "."), "BT")(hidden_BTD, *head)
