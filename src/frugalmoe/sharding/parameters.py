"""Parameters say what they are, once, where they are made: their letters and their role. So do their gradients and the
optimizer's state, which have their names and shapes.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from frugalmoe.errors import UserError
from frugalmoe.sharding.letters import LETTERS, STORED, spec
from frugalmoe.sharding.mesh import AXES, GPUS, TOKEN_AXES, axis_size, platform

GATHERED = "gathered"  # name of gathered parameters: a backward pass gathers them again

# What a parameter is. Sharding, weight decay and the optimizer go by it; nothing is inferred from a name.
ROLES = {
    "matrix": "a linear map, declared as INPUTS->OUTPUTS; one for each expert (E), for gate and up (2)",
    "vector": "a scale or a bias: no weight decay, whole on every device but for heads and hidden channels",
    "embedding": "rows that token ids look up",
    "head": "the linear map to logits",
    "router": "float32 and whole when used, whatever its letters: of a routing strategy, of mixture of depths",
}


class Declaration(NamedTuple):
    """What a parameter says of itself: the letters of one layer's array, as "ED->2F", and its role."""

    letters: str
    role: str

    @property
    def axes(self) -> str:
        """One letter per axis."""
        return self.letters.replace("->", "")

    @property
    def is_matrix(self) -> bool:
        """Whether weight decay is for it: what multiplies activations, not scales and biases."""
        return self.role in ("matrix", "embedding", "head") or (self.role == "router" and len(self.axes) > 1)


def parameter(value: Array, letters: str, role: str) -> nnx.Param:
    """A parameter of one layer with its declaration; raises `UserError` for a letter or a role that nobody knows.

    letters: one per axis of `value`, of `letters.LETTERS`; those of a matrix as "D->Hd", from inputs to outputs.
    """
    made = nnx.Param(value, letters=letters, role=role)
    if rule := broken_rule(made):
        raise UserError(f"parameter {letters!r}: {rule}")
    return made


def broken_rule(value: Any, name: str = "") -> str | None:
    """The rule that a new parameter's declaration breaks, or None; its name too, whose last part are its letters."""
    if not _is_parameter(value) or "letters" not in value.get_metadata():
        return "an array that does not say what it is; it must be declared with its letters and its role"
    declared, known = declaration(value), " ".join(LETTERS)
    axes = declared.axes
    if unknown := [letter for letter in axes if letter not in LETTERS]:
        return f"unknown letter {unknown[0]!r} in {declared.letters!r}; known: {known}"
    if len(axes) != jnp.ndim(value[...]):
        return f"{len(axes)} letters, {declared.letters!r}, for an array of {jnp.ndim(value[...])} axes"
    if declared.role not in ROLES:
        return f"unknown role {declared.role!r}; known: {', '.join(ROLES)}"
    if ("->" in declared.letters) != (declared.role == "matrix"):
        return f"declared as {declared.letters!r}: a matrix, and nothing else, is declared as INPUTS->OUTPUTS"
    of_name = name.rpartition("_")[2]
    if name and of_name != of_name.lower() and of_name != axes:
        return f"its name says {of_name!r}, its declaration {axes!r}"
    return None


def declaration(variable: nnx.Variable) -> Declaration:
    """What a parameter that `parameter` made says of itself."""
    declared = variable.get_metadata()
    if "letters" not in declared:
        raise UserError(f"a parameter of shape {variable.shape} without letters: make it with sharding.parameter")
    return Declaration(declared["letters"], declared["role"])


Declarations = Mapping[tuple[str, ...], Declaration]  # of every parameter, by the names that lead to it


def declarations(params: Any) -> Declarations:
    """The declaration of each parameter in a state or a module."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_parameter)
    return {_names(path): declaration(leaf) for path, leaf in leaves}


def declared(path: tuple, declarations: Declarations) -> Declaration | None:
    """Of a leaf of anything that has the structure of parameters inside: gradients, optimizer state, a whole state.

    None for what is no parameter: counters, the state of routers.
    """
    names = _names(path)
    return next((declarations[names[i:]] for i in range(len(names)) if names[i:] in declarations), None)


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def _is_parameter(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Param)


def parameter_spec(declared: Declaration | None, ndim: int, stored: bool = True) -> P:
    """Of a parameter as it is stored, or as a layer uses it; axes before its letters are layers. None: whole."""
    if declared is None:
        return spec("." * ndim)
    letters = declared.axes
    if declared.role == "router":
        letters = "".join(letter if letter == "D" and stored else "." for letter in letters)
    if declared.role == "vector":
        letters = letters.replace("D", ".").replace("P", ".")
    return spec("." * (ndim - len(letters)) + letters, stored)


def placed(tree: Any, declarations: Declarations) -> Any:
    """Abstract arrays with the shardings that they have between steps on the mesh in context."""
    mesh = jax.sharding.get_mesh()

    def place(path: tuple, a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        kept = parameter_spec(declared(path, declarations), a.ndim)
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, kept))

    return jax.tree_util.tree_map_with_path(place, tree)


def store(tree: Any, declarations: Declarations) -> Any:
    """Inside jit: arrays as they are kept between steps."""
    keep = lambda path, a: jax.sharding.reshard(a, parameter_spec(declared(path, declarations), a.ndim))
    return jax.tree_util.tree_map_with_path(keep, tree)


def _axes(entries: P) -> set[str]:
    return {axis for entry in entries if entry for axis in ([entry] if isinstance(entry, str) else entry)}


def gathers() -> bool:
    """Whether parameters are spread over devices between their uses."""
    return axis_size(*STORED) > 1


EXPERTS_ALONE = P(None, AXES)  # of stacked parameters of experts on a mesh of one device: see `alone`


def alone(module: Any) -> Any:
    """Inside jit: stacked parameters; on a mesh of one CPU all axes spread those of experts, over their experts.

    Inside `local` the gradient of what an axis does not spread is a sum over the axis. Over one device that is the
    gradient itself, but XLA for CPUs copies it, in every layer.
    """
    if platform() != "cpu" or axis_size(*AXES) > 1:
        return module

    def spread(leaf: Any) -> Any:
        if not _is_parameter(leaf) or not declaration(leaf).axes.startswith("E"):
            return leaf
        return leaf.replace(jax.sharding.reshard(leaf[...], EXPERTS_ALONE))

    return jax.tree.map(spread, module, is_leaf=_is_parameter)


def gather(module: Any, dtype: Any) -> Any:
    """Inside jit: the parameters of a module, or one of them, as a layer uses them. What devices exchange is in
    `dtype`, in the backward pass too, but for routers, which are float32.
    """

    def whole(leaf: Any) -> Any:
        if not _is_parameter(leaf):
            return leaf
        return leaf.replace(gather_array(leaf[...], declaration(leaf), dtype))

    return jax.tree.map(whole, module, is_leaf=_is_parameter)


def gather_array(a: Array, declared: Declaration, dtype: Any) -> Array:
    """As `gather`, of an array that was made from a parameter and is spread as one.

    A gathered parameter has the type "reduced": its gradient is the sum of what each device has of it, not yet formed.
    That sum is scattered as it is formed. Left to XLA it is formed whole on TPUs, which sends twice as much.
    """
    kept, used = (parameter_spec(declared, a.ndim, stored) for stored in (True, False))
    if kept == used:
        return a
    a = a if declared.role == "router" else a.astype(dtype)
    summed = {axis for axis in TOKEN_AXES if axis_size(axis) > 1}
    kept = P(*kept, reduced=summed - _axes(kept))
    used = P(*used, reduced=summed - _axes(used))
    return checkpoint_name(_gathered(kept, used, jax.sharding.reshard(a, kept)), GATHERED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(kept: P, used: P, a: Array) -> Array:
    on_gpu = platform() in GPUS

    def gather(a: Array) -> Array:
        # XLA for GPUs wants the dimension that it gathers to come first. Left to itself it turns the parameters of all
        # layers at once, and keeps that copy, in float32, beside them through a step; so it turns one layer at a time.
        a = with_layout_constraint(a, Layout(tuple(range(a.ndim)))) if on_gpu else a
        for dim, axes in _spread(kept, used):
            a = jax.lax.all_gather(a, axes, axis=dim, tiled=True)
        return a

    return jax.shard_map(gather, in_specs=kept, out_specs=used, check_vma=False)(a)


def _scattered(kept: P, used: P, _: None, gradient: Array) -> tuple[Array]:
    def scatter(a: Array) -> Array:
        for dim, axes in _spread(kept, used):
            a = jax.lax.psum_scatter(a, axes, scatter_dimension=dim, tiled=True)
        # Else XLA may add up whole gradients of a matrix outside the layers, and scatter their sum after the last one.
        return jax.lax.optimization_barrier(a)

    kept_ct, used_ct = (P(*entries.partitions, unreduced=entries.reduced) for entries in (kept, used))
    return (jax.shard_map(scatter, in_specs=used_ct, out_specs=kept_ct, check_vma=False)(gradient),)


def _spread(kept: P, used: P) -> list[tuple[int, str | tuple[str, ...]]]:
    """Dimensions that are spread over devices only as they are kept, and over which axes."""
    return [(dim, axes) for dim, axes in enumerate(kept.partitions) if axes != used.partitions[dim]]


_gathered.defvjp(lambda kept, used, a: (_gathered(kept, used, a), None), _scattered)
