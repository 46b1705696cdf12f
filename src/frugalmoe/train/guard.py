"""What is done about a batch whose loss or gradient is not finite, or far above what they were: decided in the step.

As Ling does (arXiv 2503.05139, 3.4.4 and 6.1; its thresholds are not published): the update is skipped and the batch
comes again later; where that does not end it, the learning rate is lowered for a while; where that does not end it
either, the run goes back to a checkpoint. Skipping is a choice between two values inside the compiled step, so that the
device never waits for the host: parameters, the optimizer's state and the routers' stay what they were. The host, one
step late, keeps the batch and goes back: see `train.troubles`.

A batch is a spike if its loss, or the logarithm of its gradient norm, is so many standard deviations above its mean;
for a while after a skip a part of them suffices, so that a trouble is not over before it is over. Means and deviations
are of the updates that were made, the newest weighing most, without spikes.

docs/guard.md has what was measured.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Literal

from frugalmoe.errors import UserError
from frugalmoe.schema import Guard as Section

ROOM = 64  # batches that can wait at one time
EMPTY = -1
NEVER = -(2**30)
# A deviation counts as at least this: in nats, and of the logarithm of the norm. What a model has learned by heart has
# next to none.
LEAST_LOSS, LEAST_GRADIENT = 0.02, 0.25
_MEAN_FASTER = 10  # than the variance: else the fall of a loss counts as its noise
_MOST_LOSS = 1e6  # so that its square is finite
_LEAST_NORM = 1e-30


class NotFinite(UserError):
    """A loss, a gradient or the state after a step is not finite; nothing of it is saved."""


class Limits(NamedTuple):
    """The section `guard` of a config, as numbers that a step is given."""

    skips: Array  # bool []: False: nothing is skipped
    loss_deviations: Array  # float32 []; 0: not looked at
    gradient_deviations: Array  # float32 []; 0: not looked at
    watchful: Array  # float32 []
    window: Array  # float32 []
    after: Array  # int32 []
    patience: Array  # int32 []
    last_patience: Array  # int32 []
    lower: Array  # float32 []
    lowered_steps: Array  # int32 []


class Guard(NamedTuple):
    """What a run remembers of its losses and its troubles; a part of its state."""

    updates: Array  # int32 []: of which means and variances are
    loss_mean: Array  # float32 []
    loss_variance: Array  # float32 []
    gradient_mean: Array  # float32 [], of the logarithm of the norm
    gradient_variance: Array  # float32 []
    skips: Array  # int32 []: of the present trouble, less the updates between them
    broken: Array  # int32 []: batches that followed on each other and were not finite
    since: Array  # int32 []: the step at which the present trouble began; -1: there is none
    watched_until: Array  # int32 []: the step from which on limits are the usual ones again
    lowered_until: Array  # int32 []: the step at which the rate is the schedule's again
    rollbacks: Array  # int32 []: how often the run went back
    waiting: Array  # int32 [ROOM]: positions of batches that come again, in order, then -1; the host's, at a save


class Verdict(NamedTuple):
    """What was decided about a step's batch."""

    skipped: Array  # bool []
    is_finite: Array  # bool []: loss and gradient norm
    lowered: Array  # bool []: from the next step on, the rate is lowered
    roll_back: Array  # bool []: the run is to go back, or else to take the losses as they now are
    loss_limit: Array  # float32 []; infinite where there is none
    gradient_limit: Array  # float32 [], of the norm
    since: Array  # int32 []
    rate: Array  # float32 []: factor on the learning rate


def limits(section: Section) -> Limits:
    """Returns the limits of a config, on the host."""
    return Limits(
        skips=np.bool_(section.policy == "skip"),
        loss_deviations=np.float32(section.loss_deviations),
        gradient_deviations=np.float32(section.gradient_deviations),
        watchful=np.float32(section.watchful),
        window=np.float32(section.window),
        after=np.int32(section.after),
        patience=np.int32(section.patience),
        last_patience=np.int32(section.last_patience),
        lower=np.float32(section.lower),
        lowered_steps=np.int32(section.lowered_steps),
    )


def fresh() -> Guard:
    """Returns what a run remembers before its first step."""
    zero, none, never = jnp.float32(0), jnp.int32(0), jnp.int32(NEVER)
    waiting = jnp.full(ROOM, EMPTY, jnp.int32)
    return Guard(none, zero, zero, zero, zero, none, none, jnp.int32(-1), never, never, none, waiting)


def judge(
    guard: Guard, limits: Limits, step: Array, loss: Array, norm: Array, first: Array | bool = True
) -> tuple[Verdict, Guard]:
    """Returns what is to be done about a batch of update `step`, by its loss and gradient norm, and what is remembered.

    first: whether the batch comes for the first time; one that comes again tells nothing new of the run. `patience`
    skips, less the updates between them, begin a phase of a lowered rate, in which spikes are let through. In as many
    steps after it `last_patience` skips ask to go back, as so many batches in a row do that are not finite. Then the
    statistics begin anew: a run that cannot go back goes on with what its losses are now.
    """
    log_norm = jnp.log(jnp.maximum(norm, _LEAST_NORM))
    watched = jnp.where(step < guard.watched_until, limits.watchful, jnp.float32(1))
    of_loss, of_gradient = watched * limits.loss_deviations, watched * limits.gradient_deviations
    loss_limit = _limit(limits, of_loss, guard, guard.loss_mean, guard.loss_variance, LEAST_LOSS)
    log_limit = _limit(limits, of_gradient, guard, guard.gradient_mean, guard.gradient_variance, LEAST_GRADIENT)
    is_finite, high = jnp.isfinite(loss) & jnp.isfinite(norm), (loss > loss_limit) | (log_norm > log_limit)
    in_phase = step < guard.lowered_until
    skipped = limits.skips & (~is_finite | (high & ~in_phase))
    skips = jnp.where(skipped, guard.skips + first, jnp.maximum(guard.skips - 1, 0))
    broken = jnp.where(is_finite | ~skipped, 0, guard.broken + first)
    lately = step < guard.lowered_until + limits.lowered_steps
    roll_back = skipped & ((broken >= limits.last_patience) | (lately & (skips >= limits.last_patience)))
    lowered = skipped & (skips >= limits.patience) & ~lately & ~roll_back
    watched_until = jnp.where(skipped, step + limits.lowered_steps, guard.watched_until)
    calm = (step >= watched_until) & ~lately & ~(limits.skips & high)
    since = jnp.where(skipped & (guard.since < 0), step, jnp.where(calm, -1, guard.since))

    counts = is_finite & ~high & ~skipped
    newest = 1 / (guard.updates + 1).astype(jnp.float32)
    shares = jnp.maximum(_MEAN_FASTER / limits.window, newest), jnp.maximum(1 / limits.window, newest)
    moved = lambda mean, variance, value: _moved(counts, *shares, mean, variance, value)
    loss_mean, loss_variance = moved(guard.loss_mean, guard.loss_variance, jnp.minimum(loss, _MOST_LOSS))
    gradient_mean, gradient_variance = moved(guard.gradient_mean, guard.gradient_variance, log_norm)
    after = guard._replace(
        updates=jnp.where(roll_back, 0, guard.updates + counts),
        loss_mean=loss_mean,
        loss_variance=loss_variance,
        gradient_mean=gradient_mean,
        gradient_variance=gradient_variance,
        skips=jnp.where(roll_back | lowered, 0, skips),
        broken=jnp.where(roll_back, 0, broken),
        since=jnp.where(roll_back, -1, since),
        watched_until=jnp.where(roll_back, NEVER, watched_until),
        lowered_until=jnp.where(roll_back, NEVER, jnp.where(lowered, step + limits.lowered_steps, guard.lowered_until)),
    )
    rate = jnp.where(in_phase, limits.lower, jnp.float32(1))
    return Verdict(skipped, is_finite, lowered, roll_back, loss_limit, jnp.exp(log_limit), since, rate), after


def _limit(limits: Limits, deviations: Array, guard: Guard, mean: Array, variance: Array, least: float) -> Array:
    holds = (deviations > 0) & (guard.updates >= limits.after)
    return jnp.where(holds, mean + deviations * jnp.maximum(jnp.sqrt(variance), least), jnp.inf)


def _moved(
    counts: Array, of_mean: Array, of_variance: Array, mean: Array, variance: Array, value: Array
) -> tuple[Array, Array]:
    """The mean, and the variance around it, with one more value, which has these shares in them."""
    apart = jnp.where(counts, value - mean, 0)
    moved = (1 - of_variance) * (variance + of_variance * apart * apart)
    return mean + of_mean * apart, jnp.where(counts, moved, variance)


def chosen(skipped: Array, after: Any, before: Any) -> Any:
    """Returns a tree of arrays after an update, or as it was before where that is skipped; no copy of it is made."""
    return jax.tree.map(lambda new, old: jnp.where(skipped, old, new), after, before)


def unless(skipped: Array, update: Callable[..., Any], before: Any, *given: Any) -> Any:
    """Returns `update(before, *given)`, a tree like `before`, or `before` where that is skipped.

    It is `chosen`, but each array is chosen as soon as it is made, and what else the update makes of it, as parameters
    of an optimizer's moments, it makes of what was chosen. So nothing needs an array from before its own update was
    made, which takes its memory: XLA for CPUs would copy all moments, and make them twice. The bits are the same.
    """
    program, shape = jax.make_jaxpr(update, return_shape=True)(before, *given)
    jaxpr, old = program.jaxpr, jax.tree.leaves(before)
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *jax.tree.leaves((before, *given))]))
    read = lambda atom: atom.val if isinstance(atom, Literal) else values[atom]
    made = [id(atom) for atom in jaxpr.outvars if not isinstance(atom, Literal) and atom not in values]
    at_once = {id(atom): array for atom, array in zip(jaxpr.outvars, old, strict=True) if made.count(id(atom)) == 1}
    for equation in jaxpr.eqns:
        with equation.ctx.manager:
            parameters = equation.primitive.get_bind_params(equation.params)
            found = equation.primitive.bind(*map(read, equation.invars), **parameters)
        for var, value in zip(equation.outvars, found if equation.primitive.multiple_results else [found]):
            values[var] = jnp.where(skipped, at_once[id(var)], value) if id(var) in at_once else value
    last = lambda atom, array: read(atom) if id(atom) in at_once else jnp.where(skipped, array, read(atom))
    return jax.tree.unflatten(jax.tree.structure(shape), map(last, jaxpr.outvars, old))


def why(verdict: Verdict, metrics: Mapping[str, Any]) -> str:
    """Returns what was wrong with a batch, from the host's copies."""
    values = (("loss/total", verdict.loss_limit), ("optim/gradient_norm", verdict.gradient_limit))
    found = []
    for name, limit in values:
        value = float(metrics[name])
        if not np.isfinite(value):
            found.append(f"{name}={value}")
        elif value > limit:
            found.append(f"{name}={value:.4g} above {limit:.4g}")
    return ", ".join(found)
