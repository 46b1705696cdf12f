"""The optimizers: one row of `OPTIMIZERS` for each name that `optim.name` may have.

An optimizer is made from the fields of `optim`, a schedule of the learning rate and what the parameters say they are.
It goes by their letters and roles: names and numbers of axes tell nothing of layers that are stacked, of which a norm's
scales are [L, D] and an expert's weights [L, E, D, 2, F].
"""

import fnmatch
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import PartitionSpec as P

from frugalmoe import sharding
from frugalmoe.errors import UserError
from frugalmoe.schema import Optim
from frugalmoe.sharding import Declaration, Declarations

MATRIX_RMS = 0.2  # of Muon's update before the learning rate: about that of AdamW's (arXiv 2502.16982, section 2.2)
_MANY = "LE2"  # axes over which a parameter is many matrices: layers, experts, gate and up


EVERYTHING = "*"  # as `optim.train`


def trained(o: Optim, declarations: Declarations) -> frozenset[tuple[str, ...]] | None:
    """Returns the names that lead to each parameter that `optim.train` chooses; None where it is everything.

    Raises `UserError` for a pattern that matches neither a role nor a path.
    """
    if o.train == EVERYTHING:
        return None
    chosen: set[tuple[str, ...]] = set()
    patterns = [pattern.strip() for pattern in o.train.split(",") if pattern.strip()]
    for pattern in patterns:
        names = lambda path: ("/".join(path), declarations[path].role)
        found = {path for path in declarations if fnmatch.filter(names(path), pattern)}
        if not found:
            raise UserError(f"optim.train={o.train!r}: {pattern!r} matches no parameter; {_choices(declarations)}")
        chosen |= found
    if not chosen:
        raise UserError(f"optim.train={o.train!r}: names no parameter; {_choices(declarations)}")
    return frozenset(chosen)


def _choices(declarations: Declarations) -> str:
    roles, first = {d.role for d in declarations.values()}, {path[0] for path in declarations}
    return f"valid: {', '.join(sorted(roles))}; or what begins with {', '.join(sorted(first))}, as {min(first)}*"


def decay_mask(params: dict, declarations: Declarations) -> dict:
    """True for what multiplies activations; False for norms, biases and other vectors."""
    is_matrix = lambda path, leaf: sharding.declared(path, declarations).is_matrix
    return jax.tree_util.tree_map_with_path(is_matrix, params)


def adamw(o: Optim, rate: optax.Schedule, declarations: Declarations) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101)."""
    mask = functools.partial(decay_mask, declarations=declarations)
    return optax.adamw(rate, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, mask=mask)


def muon(o: Optim, rate: optax.Schedule, declarations: Declarations) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for what is declared a matrix, AdamW for vectors, embedding, head and routers.

    Muon's update is the momentum M = U S V^T of a matrix with all singular values brought near 1, by five steps of a
    Newton-Schulz iteration, times 0.2 sqrt(max(inputs, outputs)): its RMS is then that of AdamW's updates, for which
    learning rate and weight decay are tuned (Liu et al., Moonlight, arXiv 2502.16982, section 2.2).

    A matrix is what stands on the two sides of the declaration's arrow: the projection to queries, "D->Hd", is one
    matrix [D, H d] and not one for each head, as in Moonlight. Each layer, each expert, and gate and up are matrices
    of their own.
    """
    label = lambda path, leaf: "matrices" if _is_muons(sharding.declared(path, declarations)) else "rest"
    orthogonal = optax.contrib.muon(
        -1.0,  # the sign is turned below, with the learning rate
        beta=o.momentum,
        muon_weight_dimension_numbers=functools.partial(dimension_numbers, declarations=declarations),
        consistent_rms=MATRIX_RMS,
    )
    matrices = optax.chain(
        _on_whole_matrices(orthogonal, declarations),
        optax.add_decayed_weights(o.weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    return optax.partition(
        {"matrices": matrices, "rest": adamw(o, rate, declarations)},
        functools.partial(jax.tree_util.tree_map_with_path, label),
    )


def sgd(o: Optim, rate: optax.Schedule, declarations: Declarations) -> optax.GradientTransformation:
    """Gradient descent without momentum and without state: the parameters minus rate * (gradient + decay).

    The mean of what islands make of one step each is then the step of all their sequences.
    """
    mask = functools.partial(decay_mask, declarations=declarations)
    return optax.chain(optax.add_decayed_weights(o.weight_decay, mask), optax.sgd(rate))


Make = Callable[[Optim, optax.Schedule, Declarations], optax.GradientTransformation]
OPTIMIZERS: Mapping[str, Make] = {"adamw": adamw, "muon": muon, "sgd": sgd}


def with_rates(
    transformation: optax.GradientTransformation, rates: Mapping[str, float], declarations: Declarations
) -> optax.GradientTransformation:
    """The transformation with its updates, weight decay included, times the factor of each parameter's role.

    Its state is the transformation's own.
    """
    if not rates:
        return transformation

    def scaled(path: tuple, update: jax.Array) -> jax.Array:
        role = sharding.declared(path, declarations).role
        return update * rates[role] if role in rates else update

    def update(updates: dict, state: optax.OptState, params: dict | None = None) -> tuple[dict, optax.OptState]:
        updates, state = transformation.update(updates, state, params)
        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(transformation.init, update)


def _is_muons(declared: Declaration) -> bool:
    return declared.role == "matrix"


def dimension_numbers(params: Any, declarations: Declarations) -> Any:
    """Which axes of each matrix are inputs and which are outputs, as `optax.contrib.muon` wants it; None for the rest.

    Axes before the declared letters are layers. `params` may lack parameters, as optax's masked trees do.
    """

    def numbers(path: tuple, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        declared = sharding.declared(path, declarations)
        if not _is_muons(declared):
            return None
        inputs, outputs = declared.letters.split("->")
        letters = "L" * (leaf.ndim - len(declared.axes)) + declared.axes
        axes = lambda side: tuple(i for i, letter in enumerate(letters) if letter in side and letter not in _MANY)
        return optax.contrib.MuonDimensionNumbers(axes(inputs), axes(outputs))

    return jax.tree_util.tree_map_with_path(numbers, params)


def _on_whole_matrices(
    transformation: optax.GradientTransformation, declarations: Declarations
) -> optax.GradientTransformation:
    """The transformation, which looks at no parameters, on matrices that no mesh axis cuts.

    For the time of the update a device holds the gradient and the momentum of all layers' matrices whole, of experts
    those that are its own; devices that hold the same matrices all do the same work. Between updates both are spread as
    parameters are.
    """

    def whole(path: tuple, a: jax.Array) -> P:
        declared = sharding.declared(path, declarations)
        axes = declared.axes if declared else ""
        letters = "".join(letter if letter == "E" else "." for letter in axes)
        return sharding.spec("." * (a.ndim - len(letters)) + letters)

    def update(updates: dict, state: optax.OptState, params: dict | None = None) -> tuple[dict, optax.OptState]:
        both = updates, state
        specs = jax.tree_util.tree_map_with_path(whole, both)
        # The updates stand for parameters, which optax wants even where their decay is 0.
        apply = lambda updates, state: transformation.update(updates, state, updates)
        apply = jax.shard_map(apply, in_specs=specs, out_specs=specs, check_vma=False)
        return sharding.store(apply(*jax.sharding.reshard(both, specs)), declarations)

    return optax.GradientTransformation(transformation.init, update)
