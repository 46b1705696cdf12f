"""The penalty of pseudo-gradients of EDiT (arXiv 2412.07210; as its released code computes it), layer by layer.

1. Elimination. Of each layer's contribution the norm n goes into a moving mean and variance (alpha 0.02):
   d = n - mean; mean += alpha d; m2 = (1 - alpha) (m2 + alpha d d'), with d' = n - mean after its change; both begin
   at 0. It is left out where z = (n - mean) / sqrt(m2) is above 3 max(1, deviation of the recent z). Small norms never
   are. Norms of what is left out do not go into the history.
2. Average, with weights softmax(-n / T).
3. Clip: the average times min(1, clip / (|average| + 1e-6)).

Where the released code has each worker test its own norm while it trains, here one committer tests all of a round
against the history before the round, whose moments hold the norms of all islands in the order of their names. Three
deviations are passed by honest norms too, by about one of a thousand where they are normal: that layer of that island
does not count in that round.

What is ours, since EDiT's islands start together, are equally fast and report every step, and these do none of that:

- In the first rounds, in which the history decides nothing (EDiT: 120 updates), and whenever it holds few norms, what
  is above 10 times the median of the round is left out, as a norm and also as a norm per step: an island that made few
  steps shall not make the others look absurd. Of an even number the median is the lower of the two.
- A contribution of nothing but zeros is left out while others are not: softmax(-n) would give it the most weight.
- A contribution that points against the others is left out, where there are three at least: a flipped sign has a norm
  like any other. See `_opposed`.
- Where a layer of all contributions was left out in several rounds that follow on each other, its history begins anew:
  norms that have changed for good would otherwise be outliers for ever.
"""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from frugalmoe.islands.contract import Merge, Merged, Offered, Options, norms, weights

FEW = 20  # norms, below which a moving mean and variance say little
RECENT = 30  # values of z that are kept
RESTART = 3  # rounds that follow on each other, of which all contributions of a layer were outliers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit(Options):
    alpha: float = 0.02  # of the moving mean and variance
    threshold: float = 3.0  # deviations above the mean
    warmup: int = 30  # rounds of a layer before its history decides; with four islands the 120 norms of EDiT
    absurd: float = 10.0  # times the median of a round, before that
    temperature: float = 1.0  # T of softmax(-norm / T)
    clip: float = 10.0  # largest norm of a layer's average
    against: bool = True  # leave out what points against the others
    margin: float = 0.05  # cosine; see `_opposed`


def _check(o: Edit) -> str | None:
    if not 0 < o.alpha < 1:
        return f"alpha={o.alpha!r}: must be in (0, 1)"
    if o.absurd < 1:
        return f"absurd={o.absurd!r}: must be at least 1"
    if o.warmup < 0:
        return f"warmup={o.warmup!r}: must not be negative"
    for name in ("threshold", "temperature", "clip", "margin"):
        if not getattr(o, name) > 0:
            return f"{name}={getattr(o, name)!r}: must be positive"
    return None


def merge(offered: Offered, history: Mapping[str, Any], options: Edit) -> Merged:
    """A layer is the tensors with one `layer` that are offered; history is kept by the name of the first of them, so
    that parts of a layer in different fragments have histories of their own.
    """
    left_out = _empty(offered) or {}
    if options.against:
        left_out |= _opposed(offered, options.margin, left_out)
    kept_M = np.array([name not in left_out for name in offered.islands])
    coefficients_MQ, out_of = np.zeros((len(kept_M), len(offered.tensors))), {name: [] for name in offered.islands}
    layers, after = _layers(offered), dict(history)
    for layer, indices in layers.items():
        key, gram_MM = offered.tensors[indices[0]].name, offered.gram_QMM[indices].sum(0)
        state = _State(**history[key]) if key in history else _State()
        norm_M = norms(gram_MM)
        usual_M = kept_M & ~_outliers(offered, norm_M, kept_M, state, options)
        coefficients_MQ[:, indices] = _average(offered, gram_MM, usual_M, options)[:, None]
        after[key] = dataclasses.asdict(_next(offered, norm_M, kept_M, usual_M, state, options))
        for m in np.flatnonzero(kept_M & ~usual_M):
            out_of[offered.islands[m]].append(layer)
    notes = {}
    for name, names in out_of.items():
        if len(names) == len(layers):
            left_out[name] = f"its norms are outliers in all of {len(layers)} layers"
        elif names:
            notes[name] = f"its norms are outliers in {len(names)} of {len(layers)} layers: {', '.join(names)}"
    return Merged(coefficients_MQ, left_out, after, notes)


@dataclasses.dataclass(frozen=True)
class _State:
    """What the history knows of a layer; JSON keeps float64 exactly."""

    rounds: int = 0
    count: int = 0  # norms that went into the moments
    mean: float = 0.0
    m2: float = 0.0
    recent: list[float] = dataclasses.field(default_factory=list)  # the last z of norms that went in
    refused: int = 0  # rounds up to now of which no contribution was kept

    def decides(self, options: Edit) -> bool:
        return self.rounds >= options.warmup and self.count >= FEW

    def z(self, norm: float) -> float:
        return (norm - self.mean) / self.m2**0.5 if self.m2 > 0 else 0.0


def _layers(offered: Offered) -> dict[str, list[int]]:
    found = {}
    for q, tensor in enumerate(offered.tensors):
        found.setdefault(tensor.layer, []).append(q)
    return found


def _outliers(offered: Offered, norm_M: np.ndarray, kept_M: np.ndarray, state: _State, options: Edit) -> np.ndarray:
    if state.decides(options):
        deviation = statistics.stdev(state.recent) if len(state.recent) > 1 else 0.0
        limit = options.threshold * max(1.0, deviation)
        return np.array([state.z(float(norm)) > limit for norm in norm_M])
    absurd_M, moved_M = np.ones(len(norm_M), bool), kept_M & (norm_M > 0)
    for size_M in (norm_M, norm_M / np.maximum(offered.steps_M, 1)):
        absurd_M &= size_M > options.absurd * (statistics.median_low(size_M[moved_M]) if moved_M.any() else 0)
    return absurd_M


def _average(offered: Offered, gram_MM: np.ndarray, usual_M: np.ndarray, options: Edit) -> np.ndarray:
    """Coefficients [M] of a layer: 0 where no contribution is kept, which leaves the outer parameters as they are."""
    if not usual_M.any():
        return np.zeros(len(usual_M))
    norm_M = norms(gram_MM)
    soft_M = np.exp(-(norm_M - norm_M[usual_M].min()) / options.temperature, where=usual_M, out=np.zeros(len(usual_M)))
    weight_M = weights(offered, options, soft_M)
    length = np.sqrt(max(weight_M @ gram_MM @ weight_M, 0.0))
    return weight_M * min(1.0, options.clip / (length + 1e-6))


def _next(
    offered: Offered, norm_M: np.ndarray, kept_M: np.ndarray, usual_M: np.ndarray, state: _State, options: Edit
) -> _State:
    if kept_M.any() and not usual_M.any():
        refused = state.refused + 1
        return _State() if refused == RESTART else dataclasses.replace(state, refused=refused)
    after = dataclasses.replace(state, rounds=state.rounds + 1, refused=0)
    for m in sorted(np.flatnonzero(usual_M), key=lambda m: offered.islands[m]):
        norm = float(norm_M[m])
        d = norm - after.mean
        mean = after.mean + options.alpha * d
        m2 = (1 - options.alpha) * (after.m2 + options.alpha * d * (norm - mean))
        after = dataclasses.replace(after, count=after.count + 1, mean=mean, m2=m2)
        z = after.z(norm) if after.decides(options) else 0.0
        after = dataclasses.replace(after, recent=[*after.recent, z][-RECENT:])
    return after


def _empty(offered: Offered) -> dict[str, str]:
    """Contributions of zeros alone, unless all are."""
    norm_M = norms(offered.gram_QMM.sum(0))
    if not norm_M.any():
        return {}
    return {name: "it changes nothing" for name, norm in zip(offered.islands, norm_M) if norm == 0}


def _opposed(offered: Offered, margin: float, left_out: Mapping[str, str]) -> dict[str, str]:
    """Contributions, over all tensors, that point against the others while those agree.

    With the median a of the others' cosines with each other: where a > margin, and the median of the contribution's
    own cosines with them is below -max(margin, a / 2). A flipped sign gives about -a. Cosines of honest contributions
    that are noise for the most part are near 0, with a deviation of 1 / sqrt(values): the margin is at least four of
    these.
    """
    present = [m for m, name in enumerate(offered.islands) if name not in left_out]
    gram_MM = offered.gram_QMM.sum(0)[np.ix_(present, present)]
    norm_M = norms(gram_MM)
    if len(present) < 3 or not norm_M.all():
        return {}
    cosine_MM = gram_MM / norm_M[:, None] / norm_M[None, :]
    margin = max(margin, 4 / sum(tensor.size for tensor in offered.tensors) ** 0.5)
    found = {}
    for i, m in enumerate(present):
        others = [j for j in range(len(present)) if j != i]
        agree = statistics.median(cosine_MM[j, k] for j in others for k in others if j < k)
        own = statistics.median(cosine_MM[i, j] for j in others)
        if agree > margin and own < -max(margin, agree / 2):
            found[offered.islands[m]] = (
                f"it points against the others: their cosine is {agree:.2f}, its own with them {own:.2f}"
            )
    return found


MERGE = Merge(
    about="outliers left out, softmax(-norm), clip (EDiT, arXiv 2412.07210)",
    rule=merge,
    options=Edit,
    check=_check,
    scales=False,
)
