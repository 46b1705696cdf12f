"""`train_step(state, batch) -> (state, metrics)` and `eval_step`: pure functions, jitted once.

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
from frugalmoe.model import depths
from frugalmoe.model.block import Report
from frugalmoe.model.cross_entropy import cross_entropy
from frugalmoe.model.moe import Context
from frugalmoe.model.transformer import Output, Transformer, declarations, split, structure
from frugalmoe.routing import losses as aux_losses
from frugalmoe.routing import stats as routing_stats
from frugalmoe.routing import strategies
from frugalmoe.routing.contract import TokenPlan
from frugalmoe.schema import Config, FrozenDict
from frugalmoe.train import optim

EVAL_SEED = 0  # the same for every run, so that runs compare and share a compiled program


class Knobs(NamedTuple):
    """Numbers of a config that are arguments of the step: runs that differ in them alone share its program, and can be
    trained at once under `jax.vmap`.
    """

    seed: Array  # uint32 []
    losses: Mapping[str, Array]  # float32 []: coefficient of each auxiliary loss


class State(NamedTuple):
    """Everything that a run carries from step to step; `step` is the only clock."""

    step: Array  # int32 []
    params: dict  # float32
    router_state: dict  # float32
    opt_state: optax.OptState


def init(config: Config) -> State:
    """The state before the first step, on the mesh in context."""
    return _compiled_fresh(without_knobs(config))(np.uint32(config.train.seed))


@functools.lru_cache(64)
def _compiled_fresh(config: Config) -> Callable[[Array], State]:
    def fresh(seed: Array) -> State:
        # Else a stacked scalar state has the type P(), a step's result P(None), and the step would compile twice.
        return sharding.store(_fresh(config, seed), declarations(config.model))

    # It runs once: an optimized program would take longer to compile than it saves.
    return jax.jit(fresh, compiler_options={"xla_backend_optimization_level": 0})


def abstract(config: Config) -> State:
    """Shapes, dtypes and shardings of the state on the mesh in context; nothing is allocated."""
    return sharding.placed(jax.eval_shape(lambda: _fresh(config, config.train.seed)), declarations(config.model))


def knobs(config: Config) -> Knobs:
    """The config's own, on the host."""
    return Knobs(np.uint32(config.train.seed), {k: np.float32(v) for k, v in config.model.moe.losses.items()})


def _fresh(config: Config, seed: int | Array) -> State:
    _, params, router_state = split(Transformer(config.model, jax.random.key(seed)))
    return State(jnp.int32(0), params, router_state, optim.optimizer(config).init(params))


def without_knobs(config: Config) -> Config:
    """What a compiled program depends on: equal for runs that differ in name and `Knobs` only.

    The names of losses that are computed only where a config names them stay.
    """
    named = FrozenDict.fromkeys(config.model.moe.losses.keys() - aux_losses.REPORTED, 0.0)
    moe = dataclasses.replace(config.model.moe, losses=named)
    model, train = dataclasses.replace(config.model, moe=moe), dataclasses.replace(config.train, seed=0)
    return dataclasses.replace(config, name="", model=model, train=train)


def make_train_step(config: Config) -> Callable[..., tuple[State, dict]]:
    """The step for batches [A, B, T]; A micro-batches are accumulated before the one update.

    Its third argument replaces the config's own `Knobs`.
    """
    own, gradient = knobs(config), make_gradient(config)
    tx, rate = optim.optimizer(config), optim.schedule(config)

    def train_step(state: State, batch: Batch, knobs: Knobs = own) -> tuple[State, dict]:
        grads, sums, denominators = gradient(state.params, state.router_state, batch, state.step, knobs)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        new_state = State(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            router_state=update_router_state(state.router_state, sums["stats"], config),
            opt_state=opt_state,
        )
        metrics = _metrics(sums, denominators, knobs, config)
        metrics["optim/gradient_norm"] = optax.tree.norm(grads)
        metrics["optim/parameter_norm"] = optax.tree.norm(new_state.params)
        metrics["optim/learning_rate"] = rate(state.step)
        # Adam's moments are finite where the norms are; they are looked at before they are saved, not at every step.
        metrics["finite"] = {"router_state": finite(new_state.router_state)}
        return new_state, metrics

    return train_step


def finite(tree: Any) -> Array:
    """Whether all numbers of a tree of arrays are finite, bool []; integers are."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return functools.reduce(jnp.logical_and, (jnp.all(jnp.isfinite(leaf)) for leaf in leaves), jnp.bool_(True))


def make_gradient(config: Config) -> Callable[..., tuple[dict, dict, dict]]:
    """`gradient(params, router_state, batch[A, B, T], step, knobs)`: the gradient of a step's loss before clipping,
    with the sums and the denominators that metrics are made of.
    """
    graphdef, _, _ = structure(config.model)

    def gradient(
        params: dict, router_state: dict, batch: Batch, step: Array, knobs: Knobs
    ) -> tuple[dict, dict, dict[str, Array]]:
        denominators = _denominators(batch, config)
        of_step = (step, knobs, denominators, config)

        def loss(params: dict, index: Array, micro_batch: Batch) -> tuple[Array, dict]:
            return _micro_loss(params, router_state, graphdef, micro_batch, index, *of_step)

        if config.train.accumulate_steps == 1:
            first = jax.tree.map(lambda a: a[0], batch)
            (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params, jnp.int32(0), first)
        else:
            grads, sums = _accumulate(loss, params, config.train.accumulate_steps, batch)
        return grads, sums, denominators

    return gradient


def _accumulate(loss: Callable, params: dict, count: int, batch: Batch) -> tuple[dict, dict]:
    """Sums of gradients and statistics over micro-batches, one after the other.

    A micro-batch has no gradients of its own: its backward pass adds to the sums in place, layer by layer.
    """
    totals = jax.tree.map(lambda a: jax.new_ref(jnp.zeros_like(a)), params)

    def micro(index: Array, micro_batch: Batch) -> dict:
        _, backward, sums = jax.vjp(lambda params: loss(params, index, micro_batch), params, has_aux=True)
        backward.with_refs(totals)(jnp.float32(1))
        return sums

    shapes = jax.eval_shape(micro, jnp.int32(0), jax.tree.map(lambda a: a[0], batch))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding.spec), shapes)

    def body(total: dict, xs: tuple) -> tuple[dict, None]:
        return jax.tree.map(jnp.add, total, micro(*xs)), None

    sums, _ = jax.lax.scan(body, zeros, (jnp.arange(count, dtype=jnp.int32), batch))
    return jax.tree.map(jax.freeze, totals), sums


def _denominators(batch: Batch, config: Config) -> dict[str, Array]:
    """How many units of each kind the whole step has: sums over micro-batches and shards are divided by these."""
    valid_ABT = batch.segment_ids_BT > 0
    per_micro_batch = jax.vmap(lambda valid_BT: aux_losses.denominators(valid_BT, config.model.moe))(valid_ABT)
    targets = jnp.maximum(jnp.sum(batch.loss_mask_BT, dtype=jnp.int32), 1)
    return {"target": targets, **jax.tree.map(jnp.sum, per_micro_batch)}


def _forward(
    model: Transformer,
    batch: Batch,
    first_row: Array | int,
    step: Array,
    seed: int | Array,
    train: bool,
    trace: bool = False,
    intervention: Callable | None = None,
) -> Output:
    """Keys follow the sequence's place in the step or in the held-out set, not in the batch or on the device."""
    rows_B = sharding.reshard(jnp.arange(batch.tokens_BT.shape[0], dtype=jnp.int32), "B")
    key = jax.random.fold_in(jax.random.key(seed), step)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows_B + first_row)
    of_batch = (batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT, keys_B)
    return model(Context(*of_batch, step, train, trace, intervention))


def _losses(model: Transformer, hidden_BTD: Array, batch: Batch, config: Config) -> tuple[Array, Array, Array]:
    """(sum over targets of ce + z-loss, ce of every token [B, T], sum of squared log-normalisers)."""
    coefficient, chunk = config.optim.logit_z_loss, config.train.loss_chunk

    def on_shard(hidden_BTD, head_DV, targets_BT, mask_BT):
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        targets_N, weights_N = targets_BT.reshape(-1), mask_BT.reshape(-1).astype(jnp.float32)
        out = cross_entropy(
            hidden_ND, head_DV, targets_N, weights_N, z_coefficient=coefficient, chunk=chunk, axis="tensor"
        )
        loss, lse_sq = jax.lax.psum((out.loss, out.lse_sq_sum), (*sharding.TOKEN_AXES, "tensor"))
        return loss, out.ce_N.reshape(targets_BT.shape), lse_sq

    apply = sharding.local(on_shard, ("BTD", "DV", "BT", "BT"), ("", "BT", ""))
    return apply(hidden_BTD, model.head(), batch.targets_BT, batch.loss_mask_BT)


def _micro_loss(params, router_state, graphdef, batch: Batch, index, step, knobs: Knobs, denominators, config: Config):
    """A micro-batch's share of the step's loss, and the sums that the metrics are made of."""
    model = nnx.merge(graphdef, params, router_state)
    out = _forward(model, batch, index * batch.tokens_BT.shape[0], step, knobs.seed, train=True)
    loss, ce_BT, lse_sq = _losses(model, out.hidden_BTD, batch, config)
    total = loss / denominators["target"]
    routed = {"losses": {}, "stats": {}}
    if out.routed is not None:
        total += aux_losses.total(out.routed.losses, knobs.losses, denominators).loss
        routed = {"losses": out.routed.losses, "stats": out.routed.stats}
    if out.depths is not None:
        total += _depth_losses(out.depths, denominators, config).loss
    ce = jnp.sum(ce_BT * batch.loss_mask_BT)
    return total, jax.lax.stop_gradient({"total": total, "ce": ce, "lse_sq": lse_sq, "depths": out.depths, **routed})


def _depth_losses(report: Report, denominators: dict, config: Config) -> aux_losses.Total:
    coefficients = {"depth_predictor": config.model.mixture_of_depths.predictor_loss}
    return aux_losses.total(report.losses, coefficients, denominators)


def update_router_state(router_state: dict, stats: Mapping[str, Array], config: Config) -> dict:
    """The strategy's own update of every layer, from the statistics of the whole batch; once per optimizer step."""
    if not router_state:
        return router_state
    moe = config.model.moe
    update = jax.vmap(lambda state, stats: strategies.get(moe.router).update(state, stats, moe))
    state = router_state["moe_blocks"]["moe"]["router_state"]
    return {"moe_blocks": {"moe": {"router_state": update(state, stats)}}}


def _metrics(sums: dict, denominators: dict, knobs: Knobs, config: Config) -> dict[str, Array]:
    """Device arrays under the names of metrics.jsonl; those of layers, or of routed blocks, have a leading axis."""
    metrics = {
        "loss/total": sums["total"],
        "loss/ce": sums["ce"] / denominators["target"],
        "loss/logit_z": sums["lse_sq"] / denominators["target"],
        "count/tokens": denominators["token"],
    }
    if sums["stats"]:
        auxiliary = aux_losses.total(sums["losses"], knobs.losses, denominators)
        metrics |= {f"loss/{name}": mean for name, mean in auxiliary.metrics.items()}
        for name, value_L in jax.vmap(routing_stats.metrics)(sums["stats"]).items():
            metrics[f"router/{name}"] = value_L
        metrics["counts_LE"] = sums["stats"]["counts"]
    if sums["depths"] is not None:
        metrics |= {f"loss/{k}": v for k, v in _depth_losses(sums["depths"], denominators, config).metrics.items()}
        metrics |= {f"depth/{k}": v for k, v in depths.metrics(sums["depths"].stats).items()}
    return metrics


class Evaluated(NamedTuple):
    ce_BT: Array  # nats; 0 where there is no target
    stats: Mapping[str, Array]  # of each layer [L, ...]; additive over batches
    depths: Mapping[str, Array]  # the same of the blocks that mixture of depths routes; empty without
    selected_LBTE: Array | None  # bool, with `trace`, as the next two
    plan: TokenPlan | None  # token-major [L, B, T, K], after an intervention
    predicted_BT: Array | None  # int32, the most likely next token


def make_eval_step(
    config: Config, trace: bool = False, as_in_training: int | None = None, vocabulary: int | None = None
) -> Callable[..., Evaluated]:
    """Losses and routing of held-out tokens [B, T]: no noise, no update of router state.

    `eval_step(params, router_state, batch, intervention=None, first_row=0)`; see `model.moe.Context.intervention`.
    `first_row` is the number of the batch's first row among all that are evaluated: the keys of a router that draws
    follow it. `as_in_training` is a step: tokens are routed as training routes them then, with its noise. `vocabulary`
    is the tokenizer's size, from which on ids pad the model's vocabulary and are predicted never.
    """
    graphdef, _, _ = structure(config.model)
    at, train = as_in_training or 0, as_in_training is not None

    def eval_step(
        params: dict,
        router_state: dict,
        batch: Batch,
        intervention: Callable | None = None,
        first_row: Array | int = 0,
    ) -> Evaluated:
        model = nnx.merge(graphdef, params, router_state)
        out = _forward(model, batch, first_row, jnp.int32(at), EVAL_SEED, train, trace, intervention)
        _, ce_BT, _ = _losses(model, out.hidden_BTD, batch, config)
        routed = out.routed
        stats, *traced = (routed.stats, routed.selected_BTE, routed.plan) if routed is not None else ({}, None, None)
        passed = {} if out.depths is None else out.depths.stats
        predicted = _predicted(model, out.hidden_BTD, config, vocabulary) if trace else None
        return Evaluated(ce_BT * batch.loss_mask_BT, stats, passed, *traced, predicted)

    return eval_step


def _predicted(model: Transformer, hidden_BTD: Array, config: Config, vocabulary: int | None) -> Array:
    """The most likely next token [B, T], the lowest of equals; logits of `loss_chunk` tokens exist at one time.

    Logits are those of the loss: float32, whatever the hidden states are.
    """

    def on_shard(hidden_BTD, head_DV):
        logits = lambda hidden_D: jnp.dot(hidden_D, head_DV, preferred_element_type=jnp.float32)[:vocabulary]
        best = lambda hidden_D: jnp.argmax(logits(hidden_D)).astype(jnp.int32)
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        return jax.lax.map(best, hidden_ND, batch_size=config.train.loss_chunk).reshape(hidden_BTD.shape[:2])

    whole_head = sharding.reshard(model.head(), "D.")
    return sharding.local(on_shard, ("BTD", "D."), "BT")(hidden_BTD, whole_head)
