"""Which tensor of a published model is which part of which of our arrays, from a family's rows and a model's config.

Letters: D model, E experts.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from frugalmoe.convert.contract import Family, Form, Row
from frugalmoe.model import pattern
from frugalmoe.model.transformer import declarations, structure
from frugalmoe.schema import Model

Path = tuple[str, ...]  # the names that lead to one of our arrays
SHOWN = 10  # of a list of faults
_STATE = "router_state"
_FURTHER = "multi_token"


class Part(NamedTuple):
    """A part of one of our arrays, and how the tensor that fills it is turned."""

    path: Path
    index: tuple[int | slice, ...]
    form: "_Turn"

    def ours(self, piece: np.ndarray) -> np.ndarray:
        """A piece of theirs as this part."""
        return (np.swapaxes(piece, -1, -2) if self.form.turned else piece).reshape(self.form.ours)

    def theirs(self, array: np.ndarray) -> np.ndarray:
        """This part of our array as a piece of theirs."""
        part, shape = array[self.index], self.form.theirs
        if not self.form.turned:
            return part.reshape(shape)
        return np.swapaxes(part.reshape(*shape[:-2], shape[-1], shape[-2]), -1, -2)


class _Turn(NamedTuple):
    """Shapes of a part of ours and of theirs, which is [outputs, inputs] where it is a matrix that we keep turned."""

    ours: tuple[int, ...]
    theirs: tuple[int, ...]
    turned: bool


class Tensor(NamedTuple):
    """One tensor of theirs."""

    name: str
    parts: tuple[Part, ...]
    form: Form
    shape: tuple[int, ...]  # expected


@dataclasses.dataclass(frozen=True)
class Plan:
    """All tensors of a model, and all our arrays."""

    tensors: tuple[Tensor, ...]
    arrays: Mapping[Path, jax.ShapeDtypeStruct]  # parameters and router state, float32
    missing: tuple[str, ...]  # parts of our arrays that no row fills

    @functools.cached_property
    def by_path(self) -> Mapping[Path, list[tuple[Tensor, int]]]:
        """The tensors that fill each array, each with the number of its part."""
        found: dict[Path, list[tuple[Tensor, int]]] = {path: [] for path in self.arrays}
        for tensor in self.tensors:
            for number, part in enumerate(tensor.parts):
                found[part.path].append((tensor, number))
        return found


def arrays(model: Model) -> dict[Path, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of every parameter, then of every array of router state."""
    _, params, state = structure(model)
    leaves = [*jax.tree_util.tree_leaves_with_path(params), *jax.tree_util.tree_leaves_with_path(state)]
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def tree(arrays: Mapping[Path, Any]) -> dict[str, Any]:
    """Returns arrays as nested dicts."""
    root: dict[str, Any] = {}
    for path, array in arrays.items():
        node = root
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = array
    return root


def trees(arrays: Mapping[Path, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (parameters, router state) as nested dicts."""
    params, state = ({p: a for p, a in arrays.items() if is_state(p) is of_state} for of_state in (False, True))
    return tree(params), tree(state)


def is_state(path: Path) -> bool:
    """Whether an array is of a router's state, and no parameter."""
    return _STATE in path


class Place(NamedTuple):
    """Where the blocks of a layer lie: in a stack, at an index, and their attention in a stack of its own."""

    prefix: Path
    index: int
    attention: Path
    attention_index: int

    def within(self, path: Path) -> tuple[Path | None, int]:
        """(names that lead to one of our arrays in the block, index of the layer in it); None where it is elsewhere."""
        size, name = len(self.attention), "attention"
        if path[:size] == self.attention:
            return (name, *path[size:]), self.attention_index
        size = len(self.prefix)
        if path[:size] == self.prefix and path[size] != name:
            return path[size:], self.index
        return None, 0


def places(model: Model) -> list[Place]:
    """Returns where every layer lies, then every module of multi-token prediction."""
    found, kinds = [], pattern.layers(model)
    for layer, kind in enumerate(kinds):
        before = [one for one in kinds[:layer] if one.feed_forward == kind.feed_forward]
        same = {one.attention for one in kinds if one.feed_forward == kind.feed_forward}
        stack = (pattern.NAMES[kind.feed_forward, ""],)
        if len(same) == 1:
            found.append(Place(stack, len(before), (*stack, "attention"), len(before)))
        else:
            number = sum(one.attention == kind.attention for one in before)
            found.append(Place(stack, len(before), (*stack, "attention", pattern.short(kind.attention)), number))
    block = (_FURTHER, "block")
    for module in range(model.multi_token_prediction.depth):
        found.append(Place(block, module, (*block, "attention"), module))
    return found


def make(family: Family, model: Model) -> Plan:
    """Returns the plan of a model; nothing is read and nothing is allocated."""
    known, of_layers = arrays(model), places(model)
    resolve = _Resolver(known, model)
    tensors = tuple(tensor for row in family.rows for tensor in _of_row(row, of_layers, resolve))
    filled: dict[Path, int] = {}
    for part in (part for tensor in tensors for part in tensor.parts):
        filled[part.path] = filled.get(part.path, 0) + math.prod(part.form.ours)
    missing = tuple("/".join(path) for path, leaf in known.items() if filled.get(path, 0) != leaf.size)
    return Plan(tensors, known, missing)


class _Resolver:
    """Parts of our arrays by the paths of rows."""

    def __init__(self, known: Mapping[Path, jax.ShapeDtypeStruct], model: Model):
        self.known, self.model = known, model
        self.declared, self.cache = declarations(model), {}  # of one part of each kind

    def path(self, spec: str, place: Place | None) -> tuple[Path, int | None, str]:
        """(whole path, index of the layer, number of the pair's part) of a row's path."""
        spec, _, pair = spec.partition(":")
        names = tuple(spec.split("/"))
        if place is None:
            return names, None, pair
        if names[0] == "attention":
            return (*place.attention, *names[1:]), place.attention_index, pair
        return (*place.prefix, *names), place.index, pair

    def part(self, path: Path, layer: int | None, expert: int | None, pair: str) -> Part:
        """The part of an array that exists."""
        key = (path, layer is not None, expert is not None, bool(pair))
        if key not in self.cache:
            self.cache[key] = self._form(*key)
        form, axes = self.cache[key]
        given = {"L": layer, "E": expert, "2": int(pair or 0)}
        return Part(path, tuple(given.get(axis, slice(None)) for axis in axes), form)

    def _form(self, path: Path, layered: bool, by_expert: bool, in_pair: bool) -> tuple[_Turn, str]:
        """(shapes of a part, a letter for each axis of the array that a number is given for) by declared letters."""
        shape, declared = self.known[path].shape[layered:], self.declared.get(path)
        letters = declared.axes if declared else "." * len(shape)
        taken = "E" * by_expert + "2" * in_pair
        axes = "L" * layered + "".join(letter if letter in taken else "." for letter in letters)
        rest = [(letter, size) for letter, size in zip(letters, shape) if letter not in taken]
        ours = tuple(size for _, size in rest)
        if declared is None or declared.role == "vector" or len(rest) < 2:
            return _Turn(ours, (math.prod(ours),), False), axes
        if declared.role == "embedding":
            return _Turn(ours, ours, False), axes
        is_matrix = declared.role == "matrix"
        inputs = declared.letters.partition("->")[0] if is_matrix else letters[0]
        batch = tuple(size for letter, size in rest if is_matrix and letter == "E")
        inner = math.prod(size for letter, size in rest if letter in inputs and not (is_matrix and letter == "E"))
        return _Turn(ours, (*batch, math.prod(ours) // inner // math.prod(batch), inner), True), axes


def _of_row(row: Row, places: list[Place], resolve: _Resolver) -> Iterator[Tensor]:
    """The tensors of a row, of the layers that have all of its parameters."""
    further = "{mtp}" in row.theirs
    if further:
        depth, first = resolve.model.multi_token_prediction.depth, resolve.model.num_layers
        numbered = [(first + m, Place((_FURTHER,), m, (), m)) for m in range(depth)]
    elif "{layer}" in row.theirs:
        numbered = list(enumerate(places))
    else:
        numbered = [(0, None)]
    experts = range(resolve.model.moe.num_experts) if "{expert}" in row.theirs else (None,)
    for layer, place in numbered:
        found = [resolve.path(spec, place) for spec in row.paths]
        if not all(path in resolve.known for path, _, _ in found):
            continue
        shape = None
        for expert in experts:
            parts = tuple(resolve.part(path, index, expert, pair) for path, index, pair in found)
            shape = shape or _shape(row.form, parts, resolve.model)
            yield Tensor(row.theirs.format(layer=layer, expert=expert, mtp=layer), parts, row.form, shape)


def _shape(form: Form, parts: tuple[Part, ...], model: Model) -> tuple[int, ...]:
    """Of their tensor, found by joining pieces of a byte each."""
    zeros = tuple(np.broadcast_to(np.int8(0), part.form.theirs) for part in parts)
    return form.join(zeros, model).shape


def compare(plan: Plan, family: Family, shapes: Mapping[str, tuple[int, ...]]) -> tuple[set[str], list[str], str]:
    """Returns (names of tensors that repeat another, lines on what is dropped on purpose, what does not fit).

    The last is empty, or lists the first tensors that are missing, left over, or of another shape.
    """
    expected = {tensor.name: tensor.shape for tensor in plan.tensors}
    missing = [name for name in expected if name not in shapes]
    over = [name for name in shapes if name not in expected]
    repeats = {name for name in over if repeated(family, name) in expected}
    reasons = {name: reason for name in over for rule, reason in family.dropped.items() if re.fullmatch(rule, name)}
    over = [name for name in over if name not in repeats and name not in reasons]
    wrong = [
        f"{name} {list(shapes[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    faults = [("missing", missing), ("no place for", over), ("shape", wrong), ("nothing fills our", plan.missing)]
    told = "; ".join(f"{what}: {listed(names)}" for what, names in faults if names)
    return repeats, [f"{name}: dropped: {reason}" for name, reason in reasons.items()], told


def repeated(family: Family, name: str) -> str | None:
    """The tensor that one must be equal to."""
    for rule, other in family.same.items():
        if re.fullmatch(rule, name):
            return other
    return None


def listed(names: Iterable[str]) -> str:
    """The first of some names, and how many there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
