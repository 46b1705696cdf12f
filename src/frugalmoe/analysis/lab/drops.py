"""Which slots a capacity-limited executor drops: by rank of the choice, by place in the sequence, whole tokens.

A slot that found room is 0, a dropped one 1, one that names no expert NaN. Without a dependence on rank or place, every
group would show the mean over all slots, which is the drop rate. Intervals are over sequences, whose tokens queue for
the same slots.

Letters: L MoE layers, B sequences, T time, N tokens (B*T), K choices, I places, U units (see `uncertainty`).
"""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from frugalmoe import experts, sharding
from frugalmoe.analysis.lab.interventions import Nothing
from frugalmoe.analysis.lab.lab import TOKENS, Lab
from frugalmoe.analysis.measures.uncertainty import Estimate, mean
from frugalmoe.errors import UserError
from frugalmoe.routing.contract import TokenPlan
from frugalmoe.schema import MoE


class Drops(NamedTuple):
    """What became of each choice of the held-out tokens, padding left out."""

    layers_L: np.ndarray  # index in the whole network
    lost_LNK: np.ndarray  # 1 dropped, 0 kept, NaN no expert; choices in the router's order
    place_N: np.ndarray  # in the sequence, 0 .. T - 1
    sequence_N: np.ndarray  # 0, 1, ...
    domain_ids_N: np.ndarray


def by_rank(lost_LNK: np.ndarray, unit_N: np.ndarray) -> Estimate:
    """Share [L, K] of the k-th choices that are dropped. A queue of first choices before second drops the last most."""
    return mean(np.moveaxis(lost_LNK, -1, -2), unit_N)


def by_place(lost_LNK: np.ndarray, place_N: np.ndarray, unit_N: np.ndarray) -> Estimate:
    """Share [L, I] of the slots of the tokens at each place 0 .. I - 1 (or bucket of places) that are dropped.

    NaN for a place without slots. A queue in the order of tokens drops late ones.
    """
    slots = lost_LNK.shape[-1]
    lost_LI, unit_I = lost_LNK.reshape(*lost_LNK.shape[:-2], -1), np.repeat(unit_N, slots)
    at_I = lambda place: np.repeat(place_N == place, slots)
    found = [mean(np.where(at_I(place), lost_LI, np.nan), unit_I) for place in range(place_N.max() + 1)]
    return Estimate(*(np.stack(values, axis=-1) for values in zip(*found)))


def whole_tokens(lost_LNK: np.ndarray, unit_N: np.ndarray) -> Estimate:
    """Share [L] of the tokens with an expert that lose all their slots: the layer leaves them as they are, but for
    shared experts.

    If slots were dropped independently of each other it would be the K-th power of the drop rate.
    """
    named_LN = np.isfinite(lost_LNK).any(-1)
    return mean(np.where(named_LN, (lost_LNK != 0).all(-1), np.nan), unit_N)


def load_drops(run: str | Path, *, checkpoint: int | None = None, tokens: int = TOKENS) -> Drops:
    """Routes held-out tokens through a run's checkpoint, the newest by default, and says what its capacity drops.

    Raises `UserError` for a run whose executor drops nothing. Cost: one evaluation.
    """
    lab = Lab(Path(run), checkpoint, tokens)
    moe = lab.config.model.moe
    drops = experts.pick(moe, sharding.platform()).drops
    if drops is None:
        able = ", ".join(name for name in experts.executors.sound() if experts.executors.get(name).drops)
        raise UserError(f"{run}: model.moe.executor={moe.executor!r}: drops nothing; valid: {able}")
    if lab.router.about.form == "expert":
        raise UserError(f"{run}: router {moe.router!r} gives each expert a list of tokens, of which nothing is dropped")
    seen = lab.evaluate(lab.eval_step, Nothing())
    limited = jax.jit(jax.vmap(lambda plan: drops.limit(plan, moe, seen[0].batch.tokens_BT.shape[0])[0].expert_NK))
    lost, real = [], []
    for traced in seen:
        plan_LNK = TokenPlan(*(a.reshape(len(lab.layers), -1, a.shape[-1]) for a in traced.out.plan))
        lost.append(_lost(plan_LNK.expert_NK, np.asarray(limited(plan_LNK)), moe))
        real.append(traced.batch.segment_ids_BT.reshape(-1) > 0)
    real_N, time = np.concatenate(real), seen[0].batch.tokens_BT.shape[1]
    sequence_N = np.unique(np.arange(real_N.size)[real_N] // time, return_inverse=True)[1]
    return Drops(
        layers_L=np.array(lab.layers),
        lost_LNK=np.concatenate(lost, axis=1)[:, real_N],
        place_N=np.arange(real_N.size)[real_N] % time,
        sequence_N=sequence_N,
        domain_ids_N=np.concatenate([t.batch.domain_ids_BT.reshape(-1) for t in seen])[real_N],
    )


def _lost(named_NK: np.ndarray, kept_NK: np.ndarray, moe: MoE) -> np.ndarray:
    """Returns which choices were lost, from the experts of a plan before and after the limit; the null expert is
    `num_experts`.
    """
    return np.where(named_NK < moe.num_experts, kept_NK == moe.num_experts, np.nan)
