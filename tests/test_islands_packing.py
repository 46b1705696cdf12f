"""Tensors of islands, their packing in few bits and the outer step, against optax, ml_dtypes and exact sums."""

import collections

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from frugalmoe.config import default, load, override, resolve
from frugalmoe.errors import UserError
from frugalmoe.islands import outer, packing, tensors
from frugalmoe.model.transformer import declarations, structure
from frugalmoe.shipped import CONFIGS

MIXED = {
    "model.vocab_size": 64, "model.dim": 16, "model.num_heads": 2, "model.num_kv_heads": 2, "model.head_dim": 8,
    "model.num_layers": 5, "model.num_dense_layers": 2, "model.dense_dim": 8, "model.attention": "grouped,window",
    "model.mixture_of_depths.capacity": 0.5, "model.multi_token_prediction.depth": 2, "model.moe.num_experts": 4,
    "model.moe.expert_dim": 8,
}  # fmt: skip
LARGEST = np.finfo(np.float32).max
FEW = [bits for bits in packing.BITS if bits != "float32"]


def model_of(spec: str):
    if spec == "mixed kinds":
        return resolve(override(default(), MIXED)).model
    return load(f"{spec}:laptop", {"model.vocab_size": 320}).model


@pytest.fixture(params=[*CONFIGS.choices(), "mixed kinds"])
def model(request):
    return model_of(request.param)


def drawn(model) -> dict:
    _, shapes, _ = structure(model)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), shapes)


def test_every_model_becomes_tensors_and_comes_back(model):
    params = drawn(model)
    flat = tensors.flatten(params)
    back = tensors.unflatten(flat, params)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert all(type(a) is np.ndarray and a.dtype == np.float32 for a in flat.values())
    described = tensors.describe(model)
    assert [(t.name, t.shape, t.size) for t in described] == [(k, a.shape, a.size) for k, a in flat.items()]


def test_what_is_stacked_is_what_has_an_axis_before_its_letters(model):
    """Names of stacks are the model's; this holds them to what parameters declare."""
    declared, (_, params, _) = declarations(model), structure(model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = tuple(str(key.key) for key in path)
        assert (names[0] in tensors.STACKS) == (leaf.ndim > len(declared[names].axes)), names


def test_layers_hold_what_belongs_together():
    described = tensors.describe(model_of("mixed kinds"))
    of = collections.defaultdict(set)
    for t in described:
        of[t.layer].add("/".join(t.name.split("/")[:3]))
    assert set(of) == {"embedding", "head", "final_norm", "dense_blocks/00", "dense_blocks/01", "moe_blocks/00",
                       "moe_blocks/01", "moe_blocks/02", "multi_token/00", "multi_token/01"}  # fmt: skip
    # Layers alternate between two kinds of attention, and every second one of each kind of block is wrapped.
    assert "dense_blocks/attention/grouped" in of["dense_blocks/00"]
    assert {"dense_blocks/attention/window", "dense_depths/up_DP/00"} <= of["dense_blocks/01"]
    assert "moe_blocks/attention/grouped" in of["moe_blocks/00"] & of["moe_blocks/02"]
    assert {"moe_blocks/attention/window", "moe_depths/bias/00"} <= of["moe_blocks/01"]
    assert not any("depths" in name for name in of["moe_blocks/00"] | of["moe_blocks/02"] | of["dense_blocks/00"])
    roles = {t.name: t.role for t in described}
    assert (roles["embed_VD"], roles["head_DV"], roles["moe_blocks/moe/router/kernel_DE/02"]) == (
        "embedding", "head", "router")  # fmt: skip


def test_what_does_not_fit_is_named():
    params = drawn(model_of("mixed kinds"))
    flat = tensors.flatten(params)
    with pytest.raises(UserError, match=r"tensor 'moe_blocks/ffn_norm/scale/02': missing among"):
        tensors.unflatten({k: v for k, v in flat.items() if k != "moe_blocks/ffn_norm/scale/02"}, params)
    with pytest.raises(UserError, match=r"'final_norm/scale': has shape \(3,\), must have \(16,\)"):
        tensors.unflatten(flat | {"final_norm/scale": np.ones(3)}, params)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 24])
def test_fragments_hold_every_name_once_and_are_balanced(count):
    described = tensors.describe(model_of("mixed kinds"))
    found = tensors.fragments(described, count)
    assert sorted(name for names in found for name in names) == sorted(t.name for t in described)
    assert tensors.fragments(described, count) == found
    size = {t.name: t.size for t in described}
    sums = [sum(size[name] for name in names) for names in found]
    best = max(sum(sums) / count, max(size.values()))  # none can do better
    assert max(sums) <= 4 / 3 * best and all(found)


def test_as_many_fragments_as_tensors_and_not_one_more():
    described = tensors.describe(model_of("quickstart"))
    found = tensors.fragments(described, len(described))
    assert all(len(names) == 1 for names in found)
    for count in (0, -1, len(described) + 1):
        with pytest.raises(UserError, match=rf"islands.fragments={count}: must be from 1 to {len(described)}"):
            tensors.fragments(described, count)


# ---------------------------------------------------------------- packing


def sent(delta: dict, bits: str, residual: dict) -> tuple[dict, dict]:
    """(what arrives, the new residual)."""
    stored, left = packing.pack(delta, bits, residual)
    return packing.unpack(stored, {name: np.shape(a) for name, a in delta.items()}, bits), left


FINITE = st.floats(-LARGEST.item() / 4, LARGEST.item() / 4, width=32)  # four of them have a sum
SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=17)


@settings(max_examples=60, deadline=None)
@given(values=arrays.arrays(np.float32, SHAPES, elements=FINITE), bits=st.sampled_from(list(packing.BITS)))
def test_what_arrives_plus_what_is_left_is_what_was_given(values, bits):
    """In float32: where a value arrives at all, it is within a factor of two, so that the difference is exact."""
    arrived, left = sent({"a": values}, bits, {})
    total = arrived["a"] + left.get("a", np.float32(0))
    np.testing.assert_array_equal(total, values)
    assert arrived["a"].dtype == np.float32 and arrived["a"].shape == values.shape
    if bits != "float32":
        assert np.all(np.abs(left["a"]) <= np.abs(values)), "an error that is larger than the value"


@pytest.mark.parametrize("bits", packing.BITS)
def test_the_sum_of_what_was_sent_and_the_residual_is_the_sum_of_the_deltas(bits):
    """Deltas are whole numbers, and so are all steps but those of 8 and 4 bits: sums are compared in float64."""
    rng, residual, total = np.random.default_rng(0), {}, np.zeros((5, 77))
    arrived = np.zeros_like(total)
    for _ in range(40):
        delta = {"a": np.float32(np.round(rng.standard_normal(total.shape) * 100))}
        got, residual = sent(delta, bits, residual)
        arrived += got["a"]
        total += delta["a"]
    exact = bits in ("float32", "int2", "bfloat16")
    np.testing.assert_allclose(arrived + residual.get("a", 0), total, rtol=0, atol=0 if exact else 0.01)
    assert np.abs(residual.get("a", np.zeros(1))).max() < {"bfloat16": 2, "int8": 4, "int4": 60}.get(bits, 4000)


def test_residuals_of_other_tensors_stay_and_a_change_to_float32_sends_all():
    first = {name: np.float32([1, 0.4, 0.4]) for name in "ab"}
    _, left = sent(first, "int2", {})
    np.testing.assert_array_equal(left["a"], np.float32([0, 0.4, 0.4]))
    got, after = sent({"a": np.zeros(3, np.float32)}, "float32", left)
    np.testing.assert_array_equal(got["a"], left["a"])
    assert set(after) == {"b"} and after["b"] is left["b"]


def test_rounding_is_half_to_even():
    steps = np.float32([7, 0.5, 1.5, 2.5, -0.5, -1.5, 6.5])
    got, _ = sent({"a": steps}, "int4", {})
    np.testing.assert_array_equal(got["a"], [7, 0, 2, 2, 0, -2, 6])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_bfloat16_is_that_of_ml_dtypes(bits):
    value = np.uint32(bits).view(np.float32)
    if np.isfinite(value):
        (got, _), wanted = sent({"a": value[None]}, "bfloat16", {}), value.astype(ml_dtypes.bfloat16)
        if np.isinf(wanted):  # ours stays finite
            wanted = np.copysign(np.float32(ml_dtypes.finfo(ml_dtypes.bfloat16).max), value)
        assert got["a"].view(np.uint32) == np.float32(wanted).view(np.uint32)


@pytest.mark.parametrize("bits, best", [("int8", 0.0), ("int4", 0.0129), ("int2", 0.1902)])
def test_errors_of_normal_values_are_those_that_are_documented(bits, best):
    """best: the least that equal steps can have, of Max (1960); that of 8 bits is below what is written there."""
    values = np.random.default_rng(0).standard_normal(2000 * packing.BLOCK).astype(np.float32)
    _, left = sent({"a": values}, bits, {})
    error = float(np.mean(np.square(left["a"])))
    assert best < error and error == pytest.approx({"int8": 4.2e-5, "int4": 0.0138, "int2": 0.587}[bits], rel=0.03)


EXTREMES = {
    "zeros": np.zeros(300, np.float32),
    "minus zeros": -np.zeros(300, np.float32),
    "subnormal": np.full(130, 1e-44, np.float32),
    "barely normal": np.full(130, np.finfo(np.float32).tiny, np.float32),
    "huge": np.float32([1e38, -1e38, 3e38, 1]),
    "largest": np.full(129, LARGEST, np.float32),
    "one outlier": np.float32([1e30] + [1e-30] * 400),
    "one value": np.float32([-2.5]),
    "nothing": np.zeros((0, 3), np.float32),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_arrive_finite(name, bits):
    values = EXTREMES[name]
    arrived, left = sent({"a": values}, bits, {})
    assert np.isfinite(arrived["a"]).all()
    np.testing.assert_array_equal(arrived["a"] + left.get("a", 0), values)
    if bits in ("int8", "int4", "int2"):  # a machine without subnormal numbers finds the same
        tiny = np.finfo(np.float32).tiny
        assert np.all((arrived["a"] == 0) | (np.abs(arrived["a"]) >= tiny))


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bits, bad):
    with pytest.raises(UserError, match="tensor 'b': holds a value that is not finite"):
        packing.pack({"a": np.ones(3, np.float32), "b": np.float32([1, bad])}, bits, {})
    with pytest.raises(UserError, match="tensor 'a': holds a value that is not finite"):
        packing.pack({"a": np.full(2, LARGEST)}, bits, {"a": np.full(2, LARGEST)})


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize("size", [0, 1, 3, 127, 128, 129, 1000])
def test_bytes_are_those_of_the_formula(bits, size):
    stored, _ = packing.pack({"a": np.ones(size, np.float32)}, bits, {})
    assert sum(a.nbytes for a in stored.values()) == packing.bytes_of(size, bits)


def broken(change) -> dict:
    stored, _ = packing.pack({"a": np.linspace(-1, 1, 200, dtype=np.float32)}, "int4", {})
    return {name: array for name, array in (stored | change(stored)).items() if array is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"a.codes": None}, "'a.codes' is missing"),
        (lambda s: {"b": s["a.codes"]}, "holds 'b', which is no tensor of this model"),
        (lambda s: {"a.codes": s["a.codes"][:-1]}, r"is uint8 \(99,\), must be uint8 \(100,\)"),
        (lambda s: {"a.codes": s["a.codes"].astype(np.int8)}, "is int8"),
        (lambda s: {"a.codes": s["a.codes"] | 0xF0}, "holds a code that is none"),
        (lambda s: {"a.steps": -s["a.steps"]}, "a step of a block is negative"),
        (lambda s: {"a.steps": s["a.steps"] * np.float32(np.nan)}, "not finite"),
        (lambda s: {"a.steps": np.full(2, LARGEST)}, "too large"),
    ],
)
def test_a_contribution_that_is_none_is_one_line(change, message):
    with pytest.raises(UserError, match=message) as error:
        packing.unpack(broken(change), {"a": (200,)}, "int4")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bits", ["float32", "bfloat16"])
def test_a_contribution_in_floats_of_another_shape_or_not_finite_is_refused(bits):
    stored, _ = packing.pack({"a": np.ones((2, 3), np.float32)}, bits, {})
    with pytest.raises(UserError, match=r"must be \w+ \(3, 2\)"):
        packing.unpack(stored, {"a": (3, 2)}, bits)
    stored["a"] = np.full_like(stored["a"], np.nan if bits == "float32" else 0x7FC0)
    with pytest.raises(UserError, match="not finite"):
        packing.unpack(stored, {"a": (2, 3)}, bits)


# ---------------------------------------------------------------- the outer step


def rounds(count: int, shape: tuple[int, ...] = (7, 300)) -> tuple[dict, list, np.ndarray]:
    """Parameters, the deltas of three islands in each round, and coefficients for them."""
    rng = np.random.default_rng(1)
    draw = lambda: {name: rng.standard_normal(shape).astype(np.float32) for name in ("a", "b")}
    return draw(), [[draw() for _ in range(3)] for _ in range(count)], np.float32(rng.random((3, 2)))


@pytest.mark.parametrize(("rate", "momentum"), [(0.7, 0.9), (1.0, 0.0), (0.3, 0.5)])
def test_outer_steps_are_those_of_optax(rate, momentum):
    """Each operation of optax by itself, as here: the bits are the same."""
    params, given, coefficients = rounds(4)
    state = outer.Outer(params, {})
    tx = optax.sgd(rate, momentum=momentum, nesterov=True)
    theirs, memory = params, tx.init(params)
    with jax.disable_jit():
        for deltas in given:
            state = outer.step(state, deltas, coefficients, ("a", "b"), rate, momentum)
            total = {
                name: sum(coefficients[m, q] * deltas[m][name] for m in range(3)) for q, name in enumerate(("a", "b"))
            }
            updates, memory = tx.update(total, memory, theirs)
            theirs = optax.apply_updates(theirs, updates)
    for name in params:
        np.testing.assert_array_equal(state.params[name], theirs[name])


def test_one_island_with_rate_one_and_no_momentum_is_what_it_trained():
    params, ((delta, *_), *_), _ = rounds(1)
    local = {name: params[name] - delta[name] for name in params}
    got = outer.step(outer.Outer(params, {}), [delta], np.ones((1, 2)), ("a", "b"), 1.0, 0.0)
    for name in params:
        np.testing.assert_array_equal(got.params[name], local[name])


def test_the_outer_step_does_not_depend_on_how_arrays_are_cut():
    params, given, coefficients = rounds(3)
    cut = lambda tree, part: {name: a.reshape(-1)[part] for name, a in tree.items()}
    whole = outer.Outer(params, {})
    halves = [outer.Outer(cut(params, part), {}) for part in (slice(0, 301), slice(301, None))]
    for deltas in given:
        whole = outer.step(whole, deltas, coefficients, ("a", "b"), 0.7, 0.9)
        halves = [
            outer.step(half, [cut(d, part) for d in deltas], coefficients, ("a", "b"), 0.7, 0.9)
            for half, part in zip(halves, (slice(0, 301), slice(301, None)))
        ]
    for name in params:
        joined = np.concatenate([half.params[name] for half in halves])
        np.testing.assert_array_equal(joined, whole.params[name].ravel())


def test_only_the_named_tensors_change_and_a_coefficient_of_zero_is_not_read():
    params, (deltas,), coefficients = rounds(1)
    coefficients[1] = 0
    bad = [deltas[0], {"b": np.full_like(params["b"], np.nan)}, deltas[2]]
    got = outer.step(outer.Outer(params, {}), bad, coefficients[:, 1:], ("b",), 0.7, 0.9)
    good = outer.step(outer.Outer(params, {}), [deltas[0], deltas[2]], coefficients[[0, 2], 1:], ("b",), 0.7, 0.9)
    assert got.params["a"] is params["a"] and set(got.momentum) == {"b"}
    np.testing.assert_array_equal(got.params["b"], good.params["b"])
    assert np.isfinite(got.params["b"]).all()


def test_the_checksum_is_of_names_shapes_and_bits():
    arrays = {"a": np.float32([[1, 2], [3, 4]]), "b": np.float32(5)[...], "c": np.zeros((0, 2), np.float32)}
    first = outer.sha256(arrays)
    assert outer.sha256(dict(reversed(arrays.items()))) == first
    assert outer.sha256(arrays | {"a": np.asfortranarray(arrays["a"])}) == first
    others = ({"a": arrays["a"].T}, {"a": arrays["a"].ravel()}, {"a": arrays["a"] * np.float32(1 + 2**-23)},
              {"b": np.float32(-5)[...]}, {"d": arrays["a"]}, {"c": np.zeros((0, 3), np.float32)})  # fmt: skip
    assert len({first, *(outer.sha256(arrays | other) for other in others)}) == 1 + len(others)


def test_inner_products_are_those_of_whole_arrays_and_do_not_overflow():
    rng = np.random.default_rng(0)
    deltas = [{"a": rng.standard_normal((3, 70_001)).astype(np.float32), "b": np.float32([1e38])} for _ in range(3)]
    got = outer.gram(deltas, ("b", "a"))
    flat = np.stack([np.float64(d["a"]).ravel() for d in deltas])
    np.testing.assert_allclose(got[1], flat @ flat.T, rtol=1e-12)
    np.testing.assert_allclose(got[0], 1e76, rtol=1e-6)
    assert got.dtype == np.float64 and np.array_equal(got, got.transpose(0, 2, 1))
