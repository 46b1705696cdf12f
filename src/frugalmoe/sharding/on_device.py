"""Functions as one device of the mesh sees them: local shards, and collectives.

Letters: B batch, T time.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from frugalmoe.sharding.letters import spec
from frugalmoe.sharding.mesh import AXES, axis_size


def local(fn: Callable, in_letters: tuple, out_letters: Any) -> Callable:
    """`fn` as seen by one device: its arguments are local shards, and collectives are allowed in it.

    in_letters: an entry per argument. An argument may be a structure of arrays (a NamedTuple, a dict), and its letters
    the same structure of strings; one string may stand for many arrays. out_letters: likewise, or a spec, for results.
    Kernels (sorting, loops, Pallas) run inside this, where every shape is static and local. An output must be equal on
    all devices of the axes that its letters do not name.
    """
    out = jax.tree.map(lambda letters: letters if isinstance(letters, P) else spec(letters), out_letters)

    def apply(*args):
        args = jax.tree.map(_with_value_gradient, args)
        entries = jax.tree.map(lambda letters, part: _each(_typed, letters, part), in_letters, args)
        return jax.shard_map(fn, in_specs=entries, out_specs=out, check_vma=False)(*args)

    return apply


def _each(function: Callable[[str, Array], Any], letters: str, part: Any) -> Any:
    """The arrays that one string of letters stands for, each through a function of letters and array."""
    return jax.tree.map(functools.partial(function, letters), part)


@jax.custom_vjp
def _identity(a: Array) -> Array:
    return a


_identity.defvjp(lambda a: (a, None), lambda _, gradient: (gradient,))


def _with_value_gradient(a: Array) -> Array:
    """`a` itself, in no other program. Its gradient is a value when it leaves `shard_map`.

    Where gradients are summed in place, it is added to its sum outside. Newer JAX would hand the sum to `shard_map` and
    add there, which it refuses with `check_vma=False`: what devices have of a gradient must be summed before.
    """
    return _identity(a) if jnp.issubdtype(jnp.result_type(a), jnp.inexact) else a


def _typed(letters: str, array: Array) -> P:
    """The spec of an argument of `local`: gathered parameters keep that their gradients are sums yet to be formed, and
    what `parameters.alone` made of some that all axes spread them.
    """
    own = jax.typeof(array).sharding.spec
    return own if AXES in own.partitions else P(*spec(letters), reduced=own.reduced)


def whole_sequences(tree: Any, letters: Any = "BT") -> Any:
    """Inside `local`: arrays of this device's tokens -> of all tokens of their sequences.

    letters: as `local` takes them; arrays without a T have no tokens and stay.
    """
    if axis_size("context") == 1:
        return tree
    gather = lambda letters, a: jax.lax.all_gather(a, "context", axis=letters.index("T"), tiled=True)
    return jax.tree.map(lambda letters, part: _each(gather, letters, part) if "T" in letters else part, letters, tree)


def own_tokens(tree: Any) -> Any:
    """Inside `local`: the inverse, this device's tokens of arrays [B, T, ...]."""
    return jax.tree.map(lambda a: own_part(a, "context", 1), tree)


def own_part(array: Array, name: str, dim: int) -> Array:
    """Inside `local`: this device's share of a dimension that all devices of a mesh axis hold whole."""
    size = axis_size(name)
    if size == 1:
        return array
    length = array.shape[dim] // size
    return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(name) * length, length, dim)
