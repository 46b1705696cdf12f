"""Laws that every kind of attention obeys, over every kind in the folder; and kinds that break them, caught.

Letters: B batch, T time, H query heads, h key-value heads, d channels of a head, D model.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from frugalmoe import sharding
from frugalmoe.errors import UserError
from frugalmoe.laws.attention import LAWS, Case, cases_of
from frugalmoe.model.attention import kinds
from frugalmoe.model.attention.contract import PIECE, Flops, Shared
from frugalmoe.model.attention.kinds import grouped, latent, window
from frugalmoe.model.rotary import rotate

# Of one kind all laws belong to the fast tests, those of the others to the whole suite.
KINDS = [pytest.param(n, marks=() if n == "grouped" else pytest.mark.slow) for n in kinds.names()]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", KINDS)
def test_law(kind, law):
    for case in cases_of(kind):
        LAWS[law](case)


def test_options_that_a_kind_names_are_cases():
    assert [str(case) for case in cases_of("window")] == ["window", "window-sinks=True-window=5"]


def test_a_kind_of_as_many_heads_of_keys_as_of_queries_has_a_case():
    check = lambda config, options: None if config.num_heads == config.num_kv_heads else "model.num_kv_heads=2: rule"
    (case,) = cases_of(dataclasses.replace(grouped.ATTENTION, check=check, cases=()))
    assert case.model.num_kv_heads == case.model.num_heads == 4
    never = dataclasses.replace(grouped.ATTENTION, check=lambda config, options: "model.dim=16: odd", name="mine")
    with pytest.raises(UserError, match=r"^mine: its check refuses the laws' model with .*: model\.dim=16: odd$"):
        cases_of(never)


# Kinds that break a law. Each is `grouped` but for what it breaks.


def broken(*, of=grouped.ATTENTION, name="broken", options=None, **parts) -> Case:
    kind = dataclasses.replace(of, name=name, cases=(options,) if options else (), **parts)
    return cases_of(kind)[-1]


@functools.cache
def calls(function) -> Case:
    """A kind whose layer is called as `function(layer, call, *arguments)`, where `call` is `grouped`'s own."""

    class Layer(grouped.GroupedAttention):
        def __call__(self, *arguments):
            call = lambda *given: grouped.GroupedAttention.__call__(self, *given)
            return function(self, call, *arguments)

    return broken(layer=Layer, name=function.__name__)


def mean_of_the_row(layer, call, x_BTD, angles, segment_ids_BT, cache, start):
    return call(x_BTD - x_BTD.mean(1, keepdims=True), angles, segment_ids_BT, cache, start)


def next_token_without_gradient(layer, call, x_BTD, *rest):
    y_BTD, cache = call(x_BTD, *rest)
    return y_BTD + jax.lax.stop_gradient(jnp.roll(x_BTD, -1, axis=1)), cache


def gradient_of_the_next_token(layer, call, x_BTD, *rest):
    y_BTD, cache = call(x_BTD, *rest)
    next_BTD = jnp.roll(x_BTD, -1, axis=1)
    return y_BTD + (next_BTD - jax.lax.stop_gradient(next_BTD)), cache


def nothing_of_itself(layer, call, x_BTD, *rest):
    y_BTD, cache = call(x_BTD, *rest)
    return 0 * y_BTD, cache


def one_document(layer, call, x_BTD, angles, segment_ids_BT, *rest):
    return call(x_BTD, angles, jnp.ones_like(segment_ids_BT), *rest)


def mean_of_the_batch(layer, call, x_BTD, *rest):
    return call(x_BTD - x_BTD.mean(0, keepdims=True), *rest)


def mean_of_the_batch_in_gradient(layer, call, x_BTD, *rest):
    mean_1TD = x_BTD.mean(0, keepdims=True)
    return call(x_BTD + mean_1TD - jax.lax.stop_gradient(mean_1TD), *rest)


def place_in_the_row(layer, call, x_BTD, *rest):
    y_BTD, cache = call(x_BTD, *rest)
    return y_BTD * (1 + jnp.arange(x_BTD.shape[1])[:, None]), cache


def position_in_the_output(layer, call, x_BTD, angles, *rest):
    y_BTD, cache = call(x_BTD, angles, *rest)
    return y_BTD * (1 + angles.sin_BTd[..., :1]), cache


def position_in_the_input(layer, call, x_BTD, angles, *rest):
    turned_BTD = rotate(x_BTD[:, :, None], angles)[:, :, 0]
    return call(x_BTD + turned_BTD, angles, *rest)


def half_a_gradient(layer, call, x_BTD, *rest):
    y_BTD, cache = call(x_BTD, *rest)
    return 0.5 * y_BTD + 0.5 * jax.lax.stop_gradient(y_BTD), cache


def input_without_gradient(layer, call, x_BTD, *rest):
    return call(0.9 * x_BTD + 0.1 * jax.lax.stop_gradient(x_BTD), *rest)


def exponential_of_the_input(layer, call, x_BTD, *rest):
    return call(jnp.log1p(jnp.exp(x_BTD)), *rest)


def root_at_zero(layer, call, x_BTD, *rest):
    """Outputs are finite everywhere, the gradient of equal tokens is not."""
    y_BTD, cache = call(x_BTD, *rest)
    return y_BTD * (1 + jnp.sqrt(jnp.abs(x_BTD[..., :1]))), cache


def output_in_float32(layer, call, x_BTD, *rest):
    y_BTD, cache = call(x_BTD, *rest)
    return y_BTD.astype(jnp.float32), cache


def eight_levels_in_bfloat16(layer, call, x_BTD, *rest):
    y_BTD, cache = call(x_BTD, *rest)
    return (jnp.round(y_BTD) if x_BTD.dtype == jnp.bfloat16 else y_BTD), cache


def writes_at_the_front(layer, call, x_BTD, angles, segment_ids_BT, cache, start):
    return call(x_BTD, angles, segment_ids_BT, cache, None if start is None else jnp.zeros_like(start))


def starts_of_the_first_row(layer, call, x_BTD, angles, segment_ids_BT, cache, start):
    return call(x_BTD, angles, segment_ids_BT, cache, start if start is None or start.ndim == 0 else start[0])


def forgets_the_piece_before(layer, call, x_BTD, angles, segment_ids_BT, cache, start):
    return call(x_BTD, angles, segment_ids_BT, None, None)[0], cache


def cache_in_float32(layer, call, *arguments):
    y_BTD, cache = call(*arguments)
    return y_BTD, jax.tree.map(lambda a: a.astype(jnp.float32), cache)


def short_ring(config, options, batch, slots):
    return grouped.empty_cache(config, options, batch, min(slots, options.window + PIECE // 2))


def slots_first(config, options, batch, slots):
    return jax.tree.map(lambda a: jnp.moveaxis(a, 2, 0), grouped.empty_cache(config, options, batch, slots))


def channels_by_slots(config, options, batch, slots):
    return jax.tree.map(lambda a: a.repeat(slots, axis=3), grouped.empty_cache(config, options, batch, slots))


def adds(name, make):
    """A kind with one more parameter, which nothing reads."""

    class Layer(grouped.GroupedAttention):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            setattr(self, name, make())

    return broken(layer=Layer, name=f"adds_{name}")


def mesh(heads=4, kv_heads=2, **stored):
    return lambda config, options: Shared(("H", heads), ("h", kv_heads), stored)


def flops(times=1.0, products=16.0):
    return lambda config, options: Flops(times * grouped.flops(config, options).projections, products)


MATRIX = lambda: sharding.parameter(jnp.ones((16, 6)), "D->d", "matrix")
IN_BFLOAT16 = lambda: sharding.parameter(jnp.ones(6, jnp.bfloat16), "d", "vector")
FIVE = {"window": 5}
BROKEN = [
    ("causal_by_perturbation", calls(mean_of_the_row)),
    ("causal_by_perturbation", calls(next_token_without_gradient)),
    ("causal_by_perturbation", calls(nothing_of_itself)),
    ("causal_by_gradient", calls(mean_of_the_row)),
    ("causal_by_gradient", calls(gradient_of_the_next_token)),
    ("causal_by_gradient", calls(nothing_of_itself)),
    ("documents", calls(one_document)),
    ("documents", calls(mean_of_the_batch)),
    ("documents", calls(mean_of_the_batch_in_gradient)),
    ("documents", calls(place_in_the_row)),
    ("shift", calls(position_in_the_output)),
    ("shift", calls(position_in_the_input)),
    ("shift", broken(relative=lambda config, options: False)),
    ("learned", adds("unused_Dd", MATRIX)),
    ("finite_differences", calls(half_a_gradient)),
    ("finite_differences", calls(input_without_gradient)),
    ("extremes", calls(exponential_of_the_input)),
    ("extremes", calls(root_at_zero)),
    ("bfloat16", calls(output_in_float32)),
    ("bfloat16", calls(eight_levels_in_bfloat16)),
    ("cache", calls(writes_at_the_front)),
    ("cache", calls(starts_of_the_first_row)),
    ("cache", calls(forgets_the_piece_before)),
    ("cache", broken(of=window.ATTENTION, options=FIVE, empty_cache=short_ring, name="short_ring")),
    ("empty_cache", calls(cache_in_float32)),
    ("empty_cache", broken(empty_cache=slots_first, name="slots_first")),
    ("empty_cache", broken(empty_cache=channels_by_slots, name="channels_by_slots")),
    ("empty_cache", broken(empty_cache=lambda *sizes: (), name="no_cache")),
    ("parameters", adds("bare_d", lambda: jnp.ones(6))),
    ("parameters", adds("low_d", IN_BFLOAT16)),
    ("parameters", adds("named_Dh", MATRIX)),
    ("parameters", broken(mesh=mesh(heads=8), name="eight_heads")),
    ("parameters", broken(mesh=mesh(heads=0), name="no_heads")),
    ("parameters", broken(mesh=mesh(kv_heads=4), name="four_heads_of_keys")),
    ("parameters", broken(of=latent.ATTENTION, mesh=mesh(rank=7), name="another_rank")),
    ("flops", broken(flops=flops(times=2), name="twice")),
    ("flops", broken(flops=flops(products=0), name="no_products")),
    ("flops", broken(of=window.ATTENTION, options=FIVE, seen=grouped.ATTENTION.seen, name="sees_all")),
    ("flops", broken(seen=lambda config, options, length: min(length, 24 - length) / 2 + 0.5, name="shrinks")),
]


def test_every_law_has_a_kind_that_it_must_catch():
    assert {law for law, _ in BROKEN} == set(LAWS)


@pytest.mark.parametrize(("law", "case"), BROKEN, ids=[f"{law}-{case}" for law, case in BROKEN])
def test_law_catches(law, case):
    with pytest.raises(AssertionError):
        LAWS[law](case)


def test_a_kind_may_declare_that_places_matter():
    kind = dataclasses.replace(calls(position_in_the_output).kind, relative=lambda config, options: False)
    LAWS["shift"](cases_of(kind)[0])
