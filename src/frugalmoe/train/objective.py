"""The training loss: every term of it with its coefficient is an entry of `TERMS`; and what a step reports.

A term is formed for each micro-batch as a share of the step's loss: sums over its tokens, divided by how many units of
a kind the whole step has. So shares add up, over micro-batches and over devices.

Letters: A micro-batches of a step, B sequences, T time, D model, V vocabulary, L layers (MoE ones, or modules that
predict further ahead), E experts.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from frugalmoe import sharding
from frugalmoe.data.batches import Batch
from frugalmoe.model import depths, multi_token
from frugalmoe.model.cross_entropy import cross_entropy
from frugalmoe.model.moe import Context
from frugalmoe.model.transformer import Output, Transformer, structure
from frugalmoe.routing import losses as aux_losses
from frugalmoe.routing import stats as routing_stats
from frugalmoe.routing.contract import Loss
from frugalmoe.schema import Config, FrozenDict, Guard
from frugalmoe.train import guard, optim


class Knobs(NamedTuple):
    """Numbers of a config that are arguments of the step: runs that differ in them alone share its program, and can be
    trained at once under `jax.vmap`.
    """

    seed: Array  # uint32 []
    losses: Mapping[str, Array]  # float32 []: coefficient of each auxiliary loss of routers
    terms: Mapping[str, Array]  # float32 []: of each other loss beside the next token's
    optim: optim.Numbers
    limits: guard.Limits
    taken: Array  # int32 []: batches that the step takes from the data: 0 for one that comes again


def knobs(config: Config) -> Knobs:
    """Returns the config's own knobs."""
    model = config.model
    losses = {name: np.float32(value) for name, value in model.moe.losses.items()}
    terms = {
        "logit_z": np.float32(config.optim.logit_z_loss),
        "depth_predictor": np.float32(model.mixture_of_depths.predictor_loss),
        "mtp": np.float32(model.multi_token_prediction.coefficient),
    }
    of_optim, limits = optim.numbers(config), guard.limits(config.guard)
    return Knobs(np.uint32(config.train.seed), losses, terms, of_optim, limits, np.int32(1))


def without_knobs(config: Config) -> Config:
    """Returns what a compiled program depends on, a config that is equal for runs that differ in name and `Knobs` only.

    The names of losses that are computed only where a config names them stay in it.
    """
    model = config.model
    named = FrozenDict.fromkeys(model.moe.losses.keys() - aux_losses.REPORTED, 0.0)
    model = dataclasses.replace(
        model,
        moe=dataclasses.replace(model.moe, losses=named),
        mixture_of_depths=dataclasses.replace(model.mixture_of_depths, predictor_loss=0.0),
        multi_token_prediction=dataclasses.replace(model.multi_token_prediction, coefficient=0.0),
    )
    config = optim.without_numbers(config)
    of_optim, train = dataclasses.replace(config.optim, logit_z_loss=0.0), dataclasses.replace(config.train, seed=0)
    return dataclasses.replace(config, name="", model=model, optim=of_optim, train=train, guard=Guard())


class OfStep(NamedTuple):
    """What all micro-batches of a step share."""

    step: Array  # int32 []
    knobs: Knobs
    units: Mapping[str, Array]  # see `units`


class Micro(NamedTuple):
    """A micro-batch that went through the model: what terms of the loss are made from."""

    model: Transformer
    out: Output
    batch: Batch
    of_step: OfStep
    config: Config


class Term(NamedTuple):
    """A term of the training loss.

    `share(micro)` -> (the micro-batch's share of the step's loss, float32 [], coefficient included; a pytree of sums),
    or None where the model has nothing of the kind. The sums, added up over micro-batches, are what
    `metrics(sums, of_step, config)` makes the values of metrics.jsonl from, by name. Of these, `coefficients(knobs)`
    names the losses that `share` adds up, without `loss/`, and gives what each is multiplied with.
    """

    share: Callable[[Micro], tuple[Array, Any] | None]
    metrics: Callable[[Any, OfStep, Config], dict[str, Array]]
    coefficients: Callable[[Knobs], Mapping[str, float | Array]]


def _language(micro: Micro) -> tuple[Array, dict[str, Array]]:
    """Returns the share of the next token's cross-entropy and of `optim.logit_z_loss` times the squared log-normalizer
    of the logits, and the sums of both.
    """
    batch = micro.batch
    targets = (batch.targets_BT, batch.loss_mask_BT)
    z = micro.of_step.knobs.terms["logit_z"]
    loss, ce_BT, lse_sq = token_losses(micro.model, micro.out.hidden_BTD, *targets, micro.config, z_coefficient=z)
    ce = jnp.sum(ce_BT * batch.loss_mask_BT)
    return loss / micro.of_step.units["target"], {"ce": ce, "lse_sq": lse_sq}


def _language_metrics(sums: Mapping[str, Array], of_step: OfStep, config: Config) -> dict[str, Array]:
    targets = of_step.units["target"]
    return {"loss/ce": sums["ce"] / targets, "loss/logit_z": sums["lse_sq"] / targets}


def _auxiliary(
    losses: Callable[[Output], Mapping[str, Loss] | None],
    coefficients: Callable[[Knobs], Mapping[str, float | Array]],
) -> Term:
    """Returns a term of named losses that parts of the model give as sums, each with a coefficient: see
    `routing.losses.total`.
    """

    def total(sums: Mapping[str, Loss], of_step: OfStep, config: Config) -> aux_losses.Total:
        return aux_losses.total(sums, coefficients(of_step.knobs), of_step.units)

    def share(micro: Micro) -> tuple[Array, Mapping[str, Loss]] | None:
        sums = losses(micro.out)
        return None if sums is None else (total(sums, micro.of_step, micro.config).loss, sums)

    def metrics(sums: Mapping[str, Loss], of_step: OfStep, config: Config) -> dict[str, Array]:
        return {f"loss/{name}": mean for name, mean in total(sums, of_step, config).metrics.items()}

    return Term(share, metrics, coefficients)


def _further(micro: Micro) -> tuple[Array, Array] | None:
    """Returns the share of the cross-entropy of tokens further ahead, mean over modules, times its coefficient; and the
    sum of each module [L].
    """
    if micro.out.further_LBTD is None:
        return None
    section, targets_L = micro.config.model.multi_token_prediction, micro.of_step.units["further"]
    targets_LBT, mask_LBT = _targets_further(micro.batch, section.depth)
    weight_LBT = mask_LBT / (section.depth * targets_L[:, None, None])
    where = (micro.out.further_LBTD, targets_LBT, weight_LBT)
    loss, ce_LBT, _ = token_losses(micro.model, *where, micro.config)
    return micro.of_step.knobs.terms["mtp"] * loss, jnp.sum(ce_LBT * mask_LBT, axis=(1, 2))


def _further_metrics(ce_L: Array, of_step: OfStep, config: Config) -> dict[str, Array]:
    return {"loss/mtp": jnp.mean(ce_L / of_step.units["further"])}


def _targets_further(batch: Batch, depth: int) -> tuple[Array, Array]:
    """Returns (target, whether there is one) of each token for module m = 1 .. depth, [L, ..., B, T]: the token m + 1
    places ahead.
    """
    of_tokens = (batch.targets_BT, batch.loss_mask_BT.astype(jnp.int32))
    targets_LBT, mask_LBT = multi_token.look_ahead(of_tokens, batch.segment_ids_BT, depth)
    return targets_LBT, mask_LBT > 0


TERMS = {
    "language": Term(_language, _language_metrics, lambda knobs: {"ce": 1.0, "logit_z": knobs.terms["logit_z"]}),
    "routers": _auxiliary(lambda out: out.routed and out.routed.losses, lambda knobs: knobs.losses),
    "depths": _auxiliary(
        lambda out: out.depths and out.depths.losses,
        lambda knobs: {"depth_predictor": knobs.terms["depth_predictor"]},
    ),
    "multi_token": Term(_further, _further_metrics, lambda knobs: {"mtp": knobs.terms["mtp"]}),
}


def coefficients(config: Config) -> dict[str, float]:
    """Returns what the training loss multiplies each named loss with; a loss that is not in it is not trained on."""
    own = knobs(config)
    return {name: float(c) for term in TERMS.values() for name, c in term.coefficients(own).items()}


class Sums(NamedTuple):
    """What is known of one micro-batch or, added up, of several. No gradient passes through it."""

    total: Array  # the share of the step's loss
    terms: Mapping[str, Any]  # the sums of each term that has a part in the loss
    stats: Mapping[str, Array]  # of each MoE layer's routing [L, ...]; empty if there is none
    depths: Mapping[str, Array]  # of each block that mixture of depths routes; empty if there is none


class StepReport(NamedTuple):
    """What a step says of itself: arrays on the device, which the loop reads one step late."""

    metrics: dict[str, Array]  # under the names of metrics.jsonl; those of routers have a leading axis L
    depths: dict[str, Array]  # likewise, of each block that mixture of depths routes; empty if there is none
    counts_LE: Array | None  # int32, slots that name each expert; None without MoE layers
    tokens: Array  # int32 [], without padding
    position: Array  # int32 [], see `step.State`
    finite: dict[str, Array]  # bool []: whether what no metric shows is finite
    verdict: guard.Verdict  # on the batch

    def essentials(self) -> "StepReport":
        """What is looked at of each step. A copy to the host costs by the array, and the others are only logged."""
        return self._replace(metrics={name: self.metrics[name] for name in EACH_STEP}, depths={})


EACH_STEP = ("loss/ce", "loss/total", "optim/gradient_norm", "optim/parameter_norm")  # of metrics


def make_objective(config: Config, together: bool = False) -> Callable[..., tuple[Array, Sums]]:
    """Returns `objective(params, router_state, batch[B, T], index, of_step)`, which gives a micro-batch's share of the
    step's loss, and its `Sums`. `index` is the micro-batch's number in the step. together: under `jax.vmap`, over runs.
    """
    graphdef, _, _ = structure(config.model)

    def objective(params: dict, router_state: dict, batch: Batch, index: Array, of_step: OfStep) -> tuple[Array, Sums]:
        model = nnx.merge(graphdef, params, router_state)
        first_row = index * batch.tokens_BT.shape[0]
        alone = {"accumulates": config.train.accumulate_steps > 1, "together": together}
        clock = (of_step.step, of_step.knobs.seed)
        out = forward(model, batch, first_row, *clock, train=True, **alone, further=True)
        micro = Micro(model, out, batch, of_step, config)
        found = {name: term.share(micro) for name, term in TERMS.items()}
        found = {name: share for name, share in found.items() if share is not None}
        total = functools.reduce(jnp.add, (share for share, _ in found.values()))
        stats = out.routed.stats if out.routed is not None else {}
        passed = out.depths.stats if out.depths is not None else {}
        sums = Sums(total, {name: sums for name, (_, sums) in found.items()}, stats, passed)
        return total, jax.lax.stop_gradient(sums)

    return objective


def metrics(sums: Sums, of_step: OfStep, config: Config) -> dict[str, Array]:
    """Returns the step's losses and its routers' metrics, under their names."""
    values = {"loss/total": sums.total}
    for name, of_term in sums.terms.items():
        values |= TERMS[name].metrics(of_term, of_step, config)
    if sums.stats:
        values |= {f"router/{k}": v for k, v in jax.vmap(routing_stats.metrics)(sums.stats).items()}
    return values


def depth_metrics(sums: Sums) -> dict[str, Array]:
    """Returns what mixture of depths reports of its blocks, by name."""
    return {f"depth/{k}": v for k, v in depths.metrics(sums.depths).items()} if sums.depths else {}


def units(batch: Batch, config: Config) -> dict[str, Array]:
    """Returns the number of units of each kind in the whole step, by which sums over its parts are divided."""
    valid_ABT = batch.segment_ids_BT > 0
    per_micro_batch = jax.vmap(lambda valid_BT: aux_losses.denominators(valid_BT, config.model.moe))(valid_ABT)
    targets = jnp.maximum(jnp.sum(batch.loss_mask_BT, dtype=jnp.int32), 1)
    found = {"target": targets, **jax.tree.map(jnp.sum, per_micro_batch)}
    if depth := config.model.multi_token_prediction.depth:
        _, mask_LABT = _targets_further(batch, depth)
        found["further"] = jnp.maximum(jnp.sum(mask_LABT, axis=(1, 2, 3), dtype=jnp.int32), 1)
    return found


def forward(
    model: Transformer,
    batch: Batch,
    first_row: Array | int,
    step: Array,
    seed: int | Array,
    *,
    train: bool,
    accumulates: bool = False,
    together: bool = False,
    trace: bool = False,
    intervention: Callable | None = None,
    further: bool = False,
) -> Output:
    """Returns what the model makes of a batch; with `further` its modules that predict further ahead run too."""
    options = {"train": train, "accumulates": accumulates, "together": together}
    options |= {"trace": trace, "intervention": intervention}
    seen = context(batch, first_row, step, seed, **options)
    out = model(seen)
    return model.further(seen, out) if further else out


def context(
    batch: Batch,
    first_row: Array | int,
    step: Array,
    seed: int | Array,
    *,
    train: bool,
    accumulates: bool = False,
    together: bool = False,
    trace: bool = False,
    intervention: Callable | None = None,
) -> Context:
    """Returns what every layer may look at of a batch.

    A sequence's key depends on its place in the step or in the held-out set, not on that in the batch or on a device.
    """
    rows_B = sharding.reshard(jnp.arange(batch.tokens_BT.shape[0], dtype=jnp.int32), "B")
    key = jax.random.fold_in(jax.random.key(seed), step)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows_B + first_row)
    of_batch = (batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT, keys_B)
    return Context(*of_batch, step, train, accumulates, together, trace, intervention)


def token_losses(
    model: Transformer,
    hidden_BTD: Array,
    targets_BT: Array,
    weights_BT: Array,
    config: Config,
    z_coefficient: float | Array = 0.0,
) -> tuple[Array, Array, Array]:
    """Returns (weighted sum over tokens of ce + z-loss, ce of every token [B, T], weighted sum of squared
    log-normalizers).

    All arrays may have the same axes before B.
    """
    chunk = config.train.loss_chunk

    def on_shard(hidden_BTD, head_DV, bias_V, targets_BT, weights_BT, z_coefficient):
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        targets_N, weights_N = targets_BT.reshape(-1), weights_BT.reshape(-1).astype(jnp.float32)
        options = {"bias_V": bias_V, "z_coefficient": z_coefficient, "chunk": chunk, "axis": "tensor"}
        out = cross_entropy(hidden_ND, head_DV, targets_N, weights_N, **options)
        loss, lse_sq = jax.lax.psum((out.loss, out.lse_sq_sum), (*sharding.TOKEN_AXES, "tensor"))
        return loss, out.ce_N.reshape(targets_BT.shape), lse_sq

    tokens = "." * (targets_BT.ndim - 2) + "BT"
    apply = sharding.local(on_shard, (tokens + "D", "DV", "V", tokens, tokens, ""), ("", tokens, ""))
    with jax.named_scope("head"):
        return apply(hidden_BTD, model.head(), model.head_bias(), targets_BT, weights_BT, jnp.float32(z_coefficient))
