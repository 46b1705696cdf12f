"""Laws of the kinds of attention: what an output depends on, that a cache changes nothing, what a kind declares.

A law takes a `Case`, one layer of a kind on two short sequences and one device, and asserts. Row 0 packs two documents
and ends in padding, row 1 is one document.

Letters: B batch, T time, t tokens of one chunk of T, C slots of a cache, D model.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from frugalmoe import sharding
from frugalmoe.errors import UserError
from frugalmoe.model.attention import kinds
from frugalmoe.model.attention.contract import PIECE, Attention, Cache
from frugalmoe.schema import Model

B, T, D = 2, 12, 16
HEADS = ((4, 2), (4, 4), (4, 1))  # (query heads, heads of keys and values): the first that a kind's own check allows
DOCUMENTS = ((0, 0, 5), (0, 5, 9), (1, 0, T))  # (row, first token, the one after its last)


class Case(NamedTuple):
    """A kind, the model around it and its options; hashable, so that its compiled functions are shared by all laws."""

    kind: Attention
    model: Model
    options: Any

    def __str__(self) -> str:
        default = self.kind.options()
        changed = {k: v for k, v in vars(self.options).items() if v != getattr(default, k)}
        return self.kind.name + "".join(f"-{k}={v}" for k, v in changed.items())


class Tokens(NamedTuple):
    """What a layer is called with."""

    x_BTD: Array
    segment_ids_BT: Array
    positions_BT: Array


class Gradients(NamedTuple):
    """Of sum(weight * y) of a layer."""

    params: Any
    x_BTD: Array


def cases_of(kind: str | Attention) -> list[Case]:
    """The default options and those that the kind names itself, each at the first of `HEADS` that its check allows.

    Raises `UserError` where it allows none, and where options cannot be compared.
    """
    kind = kinds.get(kind)
    if kind.options.__hash__ is None:
        raise UserError(f"{kind.name}: options={kind.options.__name__}: must be a frozen dataclass")
    return [_case(kind, kind.options(**options)) for options in ({}, *kind.cases)]


def _case(kind: Attention, options: Any) -> Case:
    sizes = {"dim": D, "head_dim": 8, "init_std": 0.3, "vocab_size": 64, "attention": kind.name}
    for heads, kv_heads in HEADS:
        case = Case(kind, Model(num_heads=heads, num_kv_heads=kv_heads, **sizes), options)
        if (rule := kind.check(case.model, options)) is None:
            return case
    raise UserError(f"{kind.name}: its check refuses the laws' model with {options}: {rule}")


def on_one_device(law: Callable) -> Callable:
    """The function with a mesh of one device in context, and products of float32 that no accelerator rounds."""

    @functools.wraps(law)
    def run(*args: Any) -> Any:
        mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1))
        with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
            return law(*args)

    return run


class Parts(NamedTuple):
    """A layer in pieces."""

    graphdef: nnx.GraphDef
    made: list[tuple[tuple, Any]]  # its arrays as they are made, each with the names that lead to it
    params: Any  # of numpy, as they are made and some noise, so that none is zero


@functools.cache
@on_one_device
def parts(case: Case) -> Parts:
    """Those of the layer of a case."""
    layer = case.kind.layer(jax.random.key(0), case.model, case.options, case.model.init_std)
    graphdef, state = nnx.split(layer)
    made = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    leaves, tree = jax.tree.flatten(jax.device_get(nnx.to_pure_dict(state)))
    noisy = lambda leaf, seed: leaf + 0.3 * _random(leaf.shape, seed)
    leaves = [noisy(a, i) if jnp.issubdtype(a.dtype, jnp.floating) else a for i, a in enumerate(leaves)]
    return Parts(graphdef, made, jax.tree.unflatten(tree, leaves))


def make_tokens(seed: int = 0, packed: bool = True) -> Tokens:
    """Random tokens, of `DOCUMENTS` and padding; with one document in each row where they are not packed."""
    segment_ids, positions = np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    if packed:
        segment_ids[0] = [1] * 5 + [2] * 4 + [0] * 3
        positions[0] = [*range(5), *range(4), *[0] * 3]
    return Tokens(_random((B, T, D), seed), segment_ids, positions)


def _random(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def apply(
    case: Case, params: Any, tokens: Tokens, cache: Cache | None = None, start: Array | None = None
) -> tuple[Array, Cache | None]:
    """The layer as the contract calls it."""
    tokens = Tokens(*map(sharding.reshard, tokens, ("BTD", "BT", "BT")))
    prepared = case.kind.prepare(tokens.positions_BT, case.model, case.options)
    layer = nnx.merge(parts(case).graphdef, params)
    return layer(tokens.x_BTD, prepared, tokens.segment_ids_BT, cache, start)


compiled_apply = jax.jit(apply, static_argnums=0)


def outputs(case: Case, tokens: Tokens, params: Any = None) -> np.ndarray:
    """y [B, T, D], by default with the parameters of `parts`."""
    return np.asarray(compiled_apply(case, parts(case).params if params is None else params, tokens)[0])


@functools.partial(jax.jit, static_argnums=0)
def _gradients(case: Case, params: Any, tokens: Tokens, weight_BTD: Array) -> Gradients:
    def value(params: Any, x_BTD: Array) -> Array:
        return jnp.sum(apply(case, params, tokens._replace(x_BTD=x_BTD))[0] * weight_BTD)

    return Gradients(*jax.grad(value, (0, 1))(params, tokens.x_BTD))


def gradients(case: Case, tokens: Tokens, weight_BTD: np.ndarray | None = None) -> Gradients:
    """With the parameters of `parts`, by default with random weights."""
    weight_BTD = _random((B, T, D), 9) if weight_BTD is None else weight_BTD
    return jax.device_get(_gradients(case, parts(case).params, tokens, weight_BTD))


def reach(case: Case, tokens: Tokens) -> np.ndarray:
    """bool [B, T, B, T]: whether a gradient that is not exactly zero flows from an output to the input of a token."""
    found = np.zeros((B, T, B, T), bool)
    for row, t in np.ndindex(B, T):
        weight_BTD = np.zeros((B, T, D), np.float32)
        weight_BTD[row, t] = _random((D,), 9)
        found[row, t] = np.any(gradients(case, tokens, weight_BTD).x_BTD != 0, axis=-1)
    return found


def assert_near(got: np.ndarray, expected: np.ndarray, what: str, tolerance: float = 1e-4) -> None:
    """The largest difference is a small share of the largest value."""
    got, expected = (np.asarray(a, np.float32) for a in (got, expected))
    apart, size = np.abs(got - expected).max(), np.abs(expected).max()
    assert apart <= tolerance * size, f"{what}: outputs are {apart:.3g} apart, the largest is {size:.3g}"


@on_one_device
def law_causal_by_perturbation(case: Case) -> None:
    """Other later tokens change no earlier output, bit for bit."""
    here, there = make_tokens(packed=False), make_tokens(1, packed=False)
    before = outputs(case, here)
    for cut in (1, 4, T - 1):
        later = np.arange(T)[:, None] >= cut
        after = outputs(case, here._replace(x_BTD=np.where(later, 100 * there.x_BTD, here.x_BTD)))
        changed = np.sum(before[:, :cut] != after[:, :cut])
        assert changed == 0, f"other tokens from {cut} on change {changed} earlier values"
        assert np.any(before[:, cut] != after[:, cut]), f"token {cut} does not depend on itself"


@on_one_device
def law_causal_by_gradient(case: Case) -> None:
    """Gradient flows from an output to its own token, and to no later one: there it is exactly zero."""
    reached = reach(case, make_tokens(packed=False))
    for row in range(B):
        within = reached[row, :, row]
        later = [(int(t), int(s)) for t, s in np.argwhere(np.triu(within, 1))]
        assert not later, f"gradient flows from token {later[0][0]} to the later token {later[0][1]}"
        assert within.diagonal().all(), "an output has no gradient for its own token"


@on_one_device
def law_documents(case: Case) -> None:
    """A document's outputs depend, bit for bit, on no other document of the row, padding or row; alone they are near.

    Alone: at the front of a row, with the positions that it has in every row.
    """
    here, there = make_tokens(), make_tokens(1)
    before, reached = outputs(case, here), reach(case, here)
    for row, begin, end in DOCUMENTS:
        what, own = f"tokens {begin} to {end - 1} of row {row}", (row, slice(begin, end))
        others = np.ones((B, T, 1), bool)
        others[own] = False
        after = outputs(case, here._replace(x_BTD=np.where(others, 100 * there.x_BTD, here.x_BTD)))
        assert np.array_equal(before[own], after[own]), f"{what} depend on tokens outside of their document"
        assert not np.any(reached[own] & others[..., 0]), f"gradient flows from {what} out of their document"
        alone = Tokens(there.x_BTD, np.zeros((B, T), np.int32), np.zeros((B, T), np.int32))
        for array, value in zip(alone, (here.x_BTD[own], 1, here.positions_BT[own]), strict=True):
            array[1, : end - begin] = value
        assert_near(outputs(case, alone)[1, : end - begin], before[own], f"{what}, alone in a row")


@on_one_device
def law_shift(case: Case) -> None:
    """Positions that begin elsewhere change no output of a kind that is `relative`, and some of one that is not."""
    tokens = make_tokens()
    moved = tokens._replace(positions_BT=tokens.positions_BT + np.array([[40], [7]], np.int32))
    before, after = (outputs(case, each) for each in (tokens, moved))
    if case.kind.relative(case.model, case.options):
        assert_near(after, before, "positions that begin at 40 and at 7")
    else:
        same = np.allclose(after, before, rtol=1e-4, atol=1e-5)
        assert not same, "positions that begin elsewhere change nothing; its `relative` claims that they do"


@on_one_device
def law_learned(case: Case) -> None:
    """The output gives every parameter a gradient."""
    found = jax.tree_util.tree_leaves_with_path(gradients(case, make_tokens()).params)
    norms = {jax.tree_util.keystr(path, simple=True, separator="."): np.linalg.norm(g) for path, g in found}
    for name, norm in norms.items():
        assert norm > 1e-4 * max(norms.values()), f"{name}: its gradient has length {norm:.3g}"


@on_one_device
def law_finite_differences(case: Case) -> None:
    """The gradient of each parameter and of the input is the slope of the output."""
    tokens, params, step = make_tokens(), parts(case).params, 1e-2
    variables, slopes = (params, tokens.x_BTD), gradients(case, tokens)
    leaves, tree = jax.tree.flatten(variables)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    length = np.linalg.norm([np.linalg.norm(g) for g in jax.tree.leaves(slopes)])
    for i, (path, gradient) in enumerate(zip(paths, jax.tree.leaves(slopes), strict=True)):
        direction, values = _direction(gradient, i), []
        for sign in (-1, 1):
            moved = [leaf + sign * step * direction if j == i else leaf for j, leaf in enumerate(leaves)]
            params, x_BTD = jax.tree.unflatten(tree, moved)
            y_BTD = outputs(case, tokens._replace(x_BTD=x_BTD), params)
            values.append(np.sum(y_BTD.astype(np.float64) * _random((B, T, D), 9)))
        slope, expected = (values[1] - values[0]) / (2 * step), np.vdot(gradient, direction)
        name = "the input" if path[0].idx else jax.tree_util.keystr(path[1:], simple=True, separator=".")
        near = abs(slope - expected) <= 1e-2 * abs(expected) + 1e-4 * length
        assert near, f"{name}: the slope is {slope:.5g}, its gradient says {expected:.5g}"


def _direction(gradient: np.ndarray, seed: int) -> np.ndarray:
    """Of length 1, half along the gradient, so that its size shows, and half not, so that what it lacks shows too."""
    noise = _random(gradient.shape, seed + 20)
    direction = noise / np.linalg.norm(noise) + gradient / max(np.linalg.norm(gradient), 1e-20)
    return (direction / np.linalg.norm(direction)).astype(np.float32)


@on_one_device
def law_extremes(case: Case) -> None:
    """Outputs and gradients are finite where the input is far out, of one value, or zero."""
    tokens = make_tokens()
    one = np.zeros((B, T, 1), np.float32)
    one[:, 2] = 1e4
    inputs = {f"level {level:g}": tokens.x_BTD + np.float32(level) for level in (-1e4, -100, 100, 1e4)}
    inputs |= {f"times {f:g}": tokens.x_BTD * np.float32(f) for f in (100, 1e4)}
    inputs |= {"one token far out": tokens.x_BTD + one, "zeros": np.zeros_like(tokens.x_BTD)}
    for name, x_BTD in inputs.items():
        moved = tokens._replace(x_BTD=x_BTD)
        for what, tree in (("outputs", outputs(case, moved)), ("gradients", gradients(case, moved))):
            assert all(np.isfinite(a).all() for a in jax.tree.leaves(tree)), f"{name}: {what} are not finite"


@on_one_device
def law_bfloat16(case: Case) -> None:
    """In bfloat16 the output is within rounding of that in float32, and of that type."""
    tokens = make_tokens()
    low = case._replace(model=dataclasses.replace(case.model, compute_dtype="bfloat16"))
    y_BTD, _ = compiled_apply(low, parts(low).params, tokens._replace(x_BTD=jnp.asarray(tokens.x_BTD, jnp.bfloat16)))
    assert y_BTD.dtype == jnp.bfloat16, f"outputs are of type {y_BTD.dtype} where inputs are bfloat16"
    full_BTD = outputs(case, tokens)
    apart, length = np.linalg.norm(np.asarray(y_BTD, np.float32) - full_BTD), np.linalg.norm(full_BTD)
    assert apart <= 5e-2 * length, f"{apart:.3g} apart, the outputs' length in float32 is {length:.3g}"


LONG, REAL, SLOTS = PIECE + 64, (40, 37), (2 * PIECE, 2 * PIECE + 64)


@on_one_device
def law_cache(case: Case) -> None:
    """Decoding in pieces, then token by token, gives the outputs of the whole text, and so does a widened cache.

    The first piece is a whole one, the second ends in padding, of which each row has an amount of its own.
    """
    x_BTD, params = _random((B, LONG, D), 3), parts(case).params
    index_BT = np.tile(np.arange(LONG, dtype=np.int32), (B, 1))
    whole_BTD, rows = outputs(case, Tokens(x_BTD, np.ones_like(index_BT), index_BT)), np.arange(B)[:, None]

    def feed(cache: Cache, size: int, start: np.ndarray) -> Cache:
        at_Bt = np.broadcast_to(start, B)[:, None] + np.arange(size, dtype=np.int32)
        real_Bt = at_Bt < length_B[:, None]
        x_BtD = np.where(real_Bt[..., None], x_BTD[rows, np.minimum(at_Bt, LONG - 1)], _random((B, size, D), 4))
        y_BtD, after = compiled_apply(case, params, Tokens(x_BtD, real_Bt.astype(np.int32), at_Bt), cache, start)
        row, t = np.nonzero(real_Bt)
        assert_near(np.asarray(y_BtD)[row, t], whole_BTD[row, at_Bt[row, t]], f"{size} tokens from {start} on")
        return after

    cache, length_B = empty_cache(case, SLOTS[0]), PIECE + np.array(REAL, np.int32)
    for start in (0, PIECE):
        cache = feed(cache, PIECE, np.int32(start))
    cache = widened(case, cache)
    for _ in range(4):
        start_B, length_B = length_B, length_B + 1
        cache = feed(cache, 1, start_B)


def empty_cache(case: Case, slots: int) -> Cache:
    return case.kind.empty_cache(case.model, case.options, B, slots)


def widened(case: Case, cache: Cache) -> Cache:
    """The cache with more slots, as the contract says: padded at the end of C."""
    wide = jax.eval_shape(lambda: empty_cache(case, SLOTS[1]))
    pad = lambda a, shape: jnp.pad(a, [(0, new - old) for old, new in zip(a.shape, shape, strict=True)])
    return jax.tree.map(lambda a, wide: pad(a, wide.shape), cache, wide)


@on_one_device
def law_empty_cache(case: Case) -> None:
    """A cache is arrays [B, ...] of the sizes asked for; more slots change one axis alone, and no use the types."""
    few, many = (jax.eval_shape(lambda slots=slots: empty_cache(case, slots)) for slots in SLOTS)
    assert jax.tree.structure(few) == jax.tree.structure(many) and jax.tree.leaves(few), "no cache, or not of one form"
    for a, wide in zip(jax.tree.leaves(few), jax.tree.leaves(many), strict=True):
        assert a.ndim >= 2 and a.shape[0] == B, f"an array {a.shape} is not [B, ...] of {B} sequences"
        assert a.ndim == wide.ndim and a.dtype == wide.dtype, f"with more slots an array {a} is one {wide}"
        grown = [(few, many) for few, many in zip(a.shape, wide.shape) if few != many]
        assert len(grown) <= 1, f"with more slots an array {a.shape} is one {wide.shape}: more than one axis changes"
        for slots, more in grown:
            assert slots <= more, f"an array {a.shape} has fewer slots, {more}, where more are asked"
            assert 0 < slots <= SLOTS[0], f"an array {a.shape} has more than the {SLOTS[0]} slots that are asked for"
    low = case._replace(model=dataclasses.replace(case.model, compute_dtype="bfloat16"))
    for each in (case, low):
        tokens = Tokens(jnp.zeros((B, 1, D), each.model.compute_dtype), *(np.zeros((B, 1), np.int32) for _ in "sp"))
        before = jax.eval_shape(lambda each=each: empty_cache(each, SLOTS[0]))
        _, after = compiled_apply.eval_shape(each, parts(each).params, tokens, before, np.int32(0))
        shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (before, after)]
        assert shapes[0] == shapes[1], f"a token of {each.model.compute_dtype} makes {shapes[1]} of {shapes[0]}"


@on_one_device
def law_parameters(case: Case) -> None:
    """Every array of a layer says what it is, and what devices divide of it is what `mesh` names."""
    shared = case.kind.mesh(case.model, case.options)
    numbers = {"H": [shared.heads[1]], "h": [shared.kv_heads[1]], "D": [D], "P": list(shared.stored.values())}
    for path, made in parts(case).made:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        rule = sharding.broken_rule(made, name.rpartition(".")[2])
        assert rule is None, f"{name}: {rule}"
        assert made[...].dtype == jnp.float32, f"{name}: is {made[...].dtype}; parameters are float32"
        declared = sharding.declaration(made)
        for letter, size in zip(declared.axes, made.shape, strict=True):
            if letter == "P" and ("D" in declared.axes or not declared.is_matrix):
                continue  # devices divide D alone, or nothing
            some = any(number > 0 and size % number == 0 for number in numbers.get(letter, [1]))
            assert some, f"{name}: an axis {letter} of {size}; of that letter mesh() names {numbers[letter]}"


@on_one_device
def law_flops(case: Case) -> None:
    """Projections are two FLOPs for each weight of a matrix; `seen` is how many tokens an output depends on, mean."""
    flops = case.kind.flops(case.model, case.options)
    weights = sum(
        int(np.prod(made.shape)) for _, made in parts(case).made if sharding.declaration(made).role == "matrix"
    )
    assert flops.projections == 2 * weights, f"projections={flops.projections:g}: matrices hold {weights} weights"
    assert np.isfinite(flops.products) and flops.products > 0, f"products={flops.products:g}"
    seen = lambda length: case.kind.seen(case.model, case.options, length)
    reached = reach(case, make_tokens(packed=False))
    mean = np.mean([reached[row, :, row].sum(axis=-1) for row in range(B)])
    assert np.isclose(seen(T), mean), f"seen={seen(T):g} of {T} tokens; outputs depend on {mean:g} in the mean"
    lengths = [2**n for n in range(18)]
    for shorter, longer in itertools.pairwise(lengths):
        grows = 1 <= seen(shorter) <= seen(longer) <= longer
        assert grows, f"seen={seen(shorter):g} of {shorter} tokens and {seen(longer):g} of {longer}"


LAWS = {name.removeprefix("law_"): law for name, law in list(globals().items()) if name.startswith("law_")}
