"""`Lab`: a checkpoint, its held-out data and its compiled evaluations, for whatever changes or watches routing.

Letters: N tokens, E experts, L MoE layers.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from frugalmoe.analysis.lab.interventions import INSTEAD, Demote, Intervention, Mask, Nothing, Swap
from frugalmoe.analysis.stored.probe import Probe, make
from frugalmoe.analysis.wording import number, percent
from frugalmoe.config import Config
from frugalmoe.errors import UserError
from frugalmoe.fields import check_seed
from frugalmoe.model import pattern
from frugalmoe.routing import strategies
from frugalmoe.train.evaluate import Traced, evaluate, limited, probe_columns
from frugalmoe.train.step import Evaluated, make_eval_step
from frugalmoe.train.weights import load_checkpoint, open_run_data

TOKENS = 65_536  # held-out tokens that are looked at, if nothing else is asked for
SAME = 1e-3  # by which K of K + 1 choices may differ from K choices: share of tokens, and nats per token


class Lab:
    """A checkpoint, its data, and its compiled evaluations."""

    def __init__(self, run: Path, step: int | None, tokens: int):
        config, self.weights, _, self.mesh, self.step = load_checkpoint(run, step)
        self.data = open_run_data(run, config)
        self.config = limited(config, len(self.data.domains), tokens)
        model, moe = config.model, config.model.moe
        self.layers = moe_layers(run, config)
        self.router = strategies.get(moe.router)
        size = self.data.tokenizer.size
        self.eval_step = jax.jit(make_eval_step(self.config, trace=True, vocabulary=size))
        wider = dataclasses.replace(moe, num_experts_per_token=moe.num_experts_per_token + 1)
        wider = dataclasses.replace(self.config, model=dataclasses.replace(model, moe=wider))
        self.spare_step = jax.jit(make_eval_step(wider, trace=True, vocabulary=size))
        self.spare_checked = False

    def check(self, intervention: Intervention) -> None:
        """Raises `UserError` for a layer, an expert or a replacement that the run does not have."""
        name, experts = type(intervention).__name__, self.config.model.moe.num_experts
        if intervention.layer is not None and intervention.layer not in self.layers:
            raise UserError(f"{name}.layer={intervention.layer}: not an MoE layer of the run; valid: {self.layers}")
        if isinstance(intervention, Mask | Swap) and not 0 <= intervention.expert < experts:
            raise UserError(f"{name}.expert={intervention.expert}: must be in 0 .. {experts - 1}")
        if isinstance(intervention, Swap) and not 0 <= intervention.slot < self.config.model.moe.num_experts_per_token:
            last = self.config.model.moe.num_experts_per_token - 1
            raise UserError(f"Swap.slot={intervention.slot}: must be in 0 .. {last}")
        if hasattr(intervention, "seed"):
            check_seed(f"{name}.seed", intervention.seed)
        if isinstance(intervention, Mask | Demote) and intervention.instead not in INSTEAD:
            raise UserError(f"{name}.instead={intervention.instead!r}: unknown; valid: {', '.join(INSTEAD)}")

    def bind(self, intervention: Intervention, before: Probe) -> Intervention:
        """Returns the intervention in the terms of the model: layers counted among MoE layers, and the spare choice."""
        if intervention.layer is not None:
            intervention = dataclasses.replace(intervention, layer=intervention.layer - self.layers[0])
        if getattr(intervention, "instead", "") != "next":
            return intervention
        total = self.router.claim("weight_sum", self.config.model.moe)
        spare = {"spare": True, "total": total if isinstance(total, float) else None}
        if not self.spare_checked:
            self._check_spare(before, spare)
        return dataclasses.replace(intervention, **spare)

    def _check_spare(self, before: Probe, spare: dict) -> None:
        moe = self.config.model.moe
        rule = f"router {moe.router!r} does not allow instead='next'"
        if moe.num_experts_per_token == moe.num_experts:
            raise UserError(f"{rule}: every token has all {moe.num_experts} experts; valid: nothing, rest")
        after = self.probe(Nothing(**spare))
        off = np.nanmean(np.abs(after.loss_N - before.loss_N))
        if (share := moved(before, after).mean()) > SAME or off > SAME:
            raise UserError(
                f"{rule}: the first K of K + 1 choices are not its K choices (for {percent(share)} of the tokens, and "
                f"the loss changes by {number(off)} nats per token); valid: nothing, rest, random"
            )
        self.spare_checked = True

    def probe(self, intervention: Intervention | Nothing, step: Callable[..., Evaluated] | None = None) -> Probe:
        """Returns losses and routing under an intervention, by the evaluation step that is given or by the run's."""
        seen = self.evaluate(step or (self.spare_step if intervention.spare else self.eval_step), intervention)
        return make(probe_columns(seen, self.layers, self.config.model.moe.num_experts))

    def evaluate(self, step: Callable[..., Evaluated], intervention: Intervention | Nothing) -> list[Traced]:
        """Returns every held-out batch with its losses and routing."""
        seen: list[Traced] = []
        with jax.set_mesh(self.mesh):
            changed = lambda params, state, batch, first_row: step(params, state, batch, intervention, first_row)
            evaluate(changed, self.weights, self.data, self.config, self.mesh, seen)
        return seen


def domain_parts(probe: Probe, domains: Sequence[str]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields (domain, which tokens [N] of it have a loss, their units 0, 1, ...), of each domain and of "all"."""
    for domain, g in [*zip(domains, range(len(domains))), ("all", None)]:
        of_N = np.isfinite(probe.loss_N) & ((probe.domain_ids_N == g) | (g is None))
        if of_N.any():
            yield domain, of_N, np.unique(probe.unit_ids_N[of_N], return_inverse=True)[1]


def moved(before: Probe, after: Probe) -> np.ndarray:
    """Returns which tokens [N] have other experts than before, in any layer."""
    return np.any(after.selected_LNE != before.selected_LNE, axis=(0, 2))


def moe_layers(run: Path, config: Config) -> list[int]:
    """Returns the index in the whole network of each MoE layer. Raises `UserError` for a run without one."""
    layers = pattern.moe_layers(config.model)
    if not layers:
        raise UserError(f"{run}: model.num_dense_layers={config.model.num_dense_layers}: no MoE layers to look at")
    return layers
