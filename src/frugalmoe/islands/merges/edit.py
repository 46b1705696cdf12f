"""The penalty of pseudo-gradients of EDiT (arXiv 2412.07210; as its released code computes it), layer by layer.

1. Elimination. Of each layer's contribution the norm n goes into a moving mean and variance (alpha 0.02):
   d = n - mean; mean += alpha d; m2 = (1 - alpha) (m2 + alpha d d'), with d' = n - mean after its change; both begin
   at 0. It is left out where z = (n - mean) / sqrt(m2) is above 3 max(1, deviation of the recent z). Small norms never
   are. Norms of what is left out do not go into the history.
2. Average, with weights softmax(-n / T); or, as A-EDiT may, (1 - r) softmax(-n / T) + r steps / (sum of steps).
3. Clip: the average times min(1, clip / (|average| + 1e-6)).

Where the released code has each worker test its own norm while it trains, here one committer tests all of a round
against the history before the round, whose moments hold the norms of all islands in the order of their names. Three
deviations are passed by honest norms too, by about one of a thousand where they are normal: that layer of that island
does not count in that round. And softmax(-n) is for islands that are alike: one that makes more steps has a longer n
and a smaller weight, and among many slow ones it is an outlier: `step_ratio`, r above, is for unlike speeds.

What is ours, since these islands meet rarely, join late, and may be wrong in more ways than one:

- In the first rounds, in which the history decides nothing (EDiT: 120 updates), and whenever it holds few norms, what
  is above 10 times the median of the round is left out, as a norm and also as a norm per step: an island that made few
  steps shall not make the others look absurd. Of an even number the median is the lower of the two.
- A contribution of nothing but zeros is left out while others are not: softmax(-n) would give it the most weight.
- A contribution that points against the others, or nowhere while the others agree, is left out, where there are three
  at least: a flipped sign and noise may have a norm like any other. See `_astray`.
- Where a layer of all contributions was left out in several rounds that follow on each other, its history begins anew:
  norms that have changed for good would otherwise be outliers for ever.
"""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from frugalmoe.islands.contract import Merge, Merged, Offered, Options, norms, weights
from frugalmoe.schema import Islands

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
    step_ratio: float = 0.0  # r, from 0 to 1; 0.5 where islands make unlike numbers of steps (A-EDiT)
    clip: float = 10.0  # largest norm of a layer's average
    direction: bool = True  # leave out what points against the others, or nowhere
    margin: float = 0.05  # cosines that are smaller say nothing; see `_astray`
    agreement: float = 0.3  # the others' cosine from which noise is told from a contribution that is honest


def _check(o: Edit) -> str | None:
    if not 0 < o.alpha < 1:
        return f"alpha={o.alpha!r}: must be in (0, 1)"
    if not 0 <= o.step_ratio <= 1:
        return f"step_ratio={o.step_ratio!r}: must be in [0, 1]"
    if o.absurd < 1:
        return f"absurd={o.absurd!r}: must be at least 1"
    if o.warmup < 0:
        return f"warmup={o.warmup!r}: must not be negative"
    for name in ("threshold", "temperature", "clip", "margin", "agreement"):
        if not getattr(o, name) > 0:
            return f"{name}={getattr(o, name)!r}: must be positive"
    return None


def _advice(o: Edit, section: Islands) -> str:
    if not section.round_seconds or o.step_ratio:
        return ""
    rule = "islands of more steps have longer contributions, which weigh less; 0.5 weighs by steps too, as A-EDiT does"
    return f"islands.merge_options.step_ratio={o.step_ratio} with islands.round_seconds={section.round_seconds}: {rule}"


def merge(offered: Offered, history: Mapping[str, Any], options: Edit) -> Merged:
    """A layer is the tensors with one `layer` that are offered; history is kept by the name of the first of them, so
    that parts of a layer in different fragments have histories of their own.
    """
    left_out, layers = _empty(offered), _layers(offered)
    key = lambda layer: offered.tensors[layers[layer][0]].name
    state = {layer: _State(**history[key(layer)]) if key(layer) in history else _State() for layer in layers}
    gram_MM = {layer: offered.gram_QMM[indices].sum(0) for layer, indices in layers.items()}
    kept_M = _kept(offered, left_out)
    usual_M = {layer: ~_outliers(offered, norms(gram_MM[layer]), kept_M, state[layer], options) for layer in layers}
    if options.direction:
        left_out |= _astray(offered, sum(gram_MM[layer] * np.outer(u, u) for layer, u in usual_M.items()), options)
    kept_M = _kept(offered, left_out)
    coefficients_MQ, out_of = np.zeros((len(kept_M), len(offered.tensors))), {name: [] for name in offered.islands}
    after = dict(history)
    for layer, indices in layers.items():
        merged_M = kept_M & usual_M[layer]
        coefficients_MQ[:, indices] = _average(offered, gram_MM[layer], merged_M, options)[:, None]
        new = _next(offered, norms(gram_MM[layer]), kept_M, merged_M, state[layer], options)
        after[key(layer)] = dataclasses.asdict(new)
        for m in np.flatnonzero(kept_M & ~merged_M):
            out_of[offered.islands[m]].append(layer)
    whole, notes = _told(out_of, len(layers))
    return Merged(coefficients_MQ, left_out | whole, after, notes)


def _told(out_of: Mapping[str, list[str]], layers: int) -> tuple[dict[str, str], dict[str, str]]:
    """(island -> why none of it is merged, island -> which layers of it are not), from the layers of each."""
    whole = {
        name: f"its norms are outliers in all of {layers} layers" for name in out_of if len(out_of[name]) == layers
    }
    some = {name: names for name, names in out_of.items() if names and name not in whole}
    told = lambda names: f"its norms are outliers in {len(names)} of {layers} layers: {', '.join(names)}"
    return whole, {name: told(names) for name, names in some.items()}


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


def _kept(offered: Offered, left_out: Mapping[str, str]) -> np.ndarray:
    return np.array([name not in left_out for name in offered.islands])


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
    steps_M = np.where(usual_M, np.maximum(offered.steps_M, 0), 0)
    ratio = options.step_ratio if steps_M.any() else 0.0
    mixed_M = (1 - ratio) * soft_M / soft_M.sum() + ratio * steps_M / max(steps_M.sum(), 1)
    weight_M = weights(offered, options, mixed_M)
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


def _astray(offered: Offered, gram_MM: np.ndarray, options: Edit) -> dict[str, str]:
    """Contributions that point elsewhere than the others, over all tensors that are offered but those of layers where
    a contribution is an outlier; `gram_MM` is of the rest.

    With the median a of the others' cosines with each other, and the median c of the contribution's own with them:

    - against them: a > margin and c < -max(margin, a / 2). A flipped sign has c = -a, about.
    - nowhere: a > agreement and c < 4 / sqrt(values). Noise has cosines of 0 with a deviation of 1 / sqrt(values).

    Honest contributions that are noise for the most part have small cosines with all, so that a is below the margin,
    which is never less than 4 / sqrt(values).
    """
    present = np.flatnonzero(norms(gram_MM))
    if len(present) < 3:
        return {}
    gram_MM = gram_MM[np.ix_(present, present)]
    norm_M = norms(gram_MM)
    cosine_MM = gram_MM / norm_M[:, None] / norm_M[None, :]
    noise = 4 / sum(tensor.size for tensor in offered.tensors) ** 0.5
    margin, found = max(options.margin, noise), {}
    for i, m in enumerate(present):
        others = [j for j in range(len(present)) if j != i]
        agree = statistics.median(cosine_MM[j, k] for j in others for k in others if j < k)
        own = statistics.median(cosine_MM[i, j] for j in others)
        against = agree > margin and own < -max(margin, agree / 2)
        nowhere = agree > max(options.agreement, margin) and own < noise
        if against or nowhere:
            where = "against the others" if own < -margin else "nowhere"
            cosines = f"their cosine with each other is {agree:.2f}, its own with them {own:.2f}"
            found[offered.islands[m]] = f"it points {where}: {cosines}"
    return found


MERGE = Merge(
    about="outliers left out, softmax(-norm), clip (EDiT, arXiv 2412.07210)",
    rule=merge,
    options=Edit,
    check=_check,
    advice=_advice,
    scales=False,
)
