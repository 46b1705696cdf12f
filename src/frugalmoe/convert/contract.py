"""The contract between a family of published models and what converts them.

A family is one file in `families/`, named as the `model_type` of its config.json, that ends with
`FAMILY = Family(...)`. It is declarative: `keys` pairs keys of config.json with fields of our config, `rows` pairs
names of tensors with our parameters, and both are read in both directions. What a pair cannot say goes into `more_ours`
and `more_theirs`.

Nothing is ignored: a key that nobody asks for, a tensor that no row names and a parameter that no row fills each stop a
conversion, unless the family lists them with a reason.

Letters: H heads, D model, I any axis, J any other.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from frugalmoe.convert.keys import Keys
from frugalmoe.schema import FrozenDict, Model

REQUIRED = object()  # default of a key that config.json must have


class Key(NamedTuple):
    """A key of config.json that means what a field of our `model` means."""

    theirs: str
    ours: str  # dotted, below `model`
    default: Any = REQUIRED  # where the key is absent or null: a value, or a function of the `Keys`
    also: tuple[str, ...] = ()  # other spellings that are read


class Form(NamedTuple):
    """How a tensor of theirs falls into pieces, each of which is one of our parameters turned their way round."""

    split: Callable[[np.ndarray, Model], tuple[np.ndarray, ...]]
    join: Callable[[tuple[np.ndarray, ...], Model], np.ndarray]  # its inverse


WHOLE = Form(lambda tensor, model: (tensor,), lambda pieces, model: pieces[0])


class Row(NamedTuple):
    """A tensor, or one for each layer and expert, and where it goes.

    `theirs` is a name with {layer} and {expert}. `ours` are paths of parameters: below a block where there is {layer}.
    PATH:0 and PATH:1 are the gate and the up part. A row is left out of models, and of layers, that lack its
    parameters. A matrix of theirs is [outputs, inputs]; ours is turned by its declared letters.
    """

    theirs: str
    ours: str | tuple[str, ...]
    form: Form = WHOLE

    @property
    def paths(self) -> tuple[str, ...]:
        """All of `ours`."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Models that share a `model_type`."""

    about: str  # whose models, in one line
    architecture: str  # the class that reads them, `architectures` of config.json
    keys: tuple[Key, ...]
    rows: tuple[Row, ...]
    settings: Mapping[str, Any] = FrozenDict()  # fields of our `model` that are the same for all
    # Keys at which the one value is implemented that stands first; the others mean the same. None: absent or null.
    fixed: Mapping[str, tuple[Any, ...]] = FrozenDict()
    inert: Mapping[str, str] = FrozenDict()  # keys that change no answer of a trained model, and why
    more_ours: Callable[[Keys], Mapping[str, Any]] = lambda keys: {}  # fields of our `model`, from their keys
    more_theirs: Callable[[Model], Mapping[str, Any]] = lambda model: {}
    same: Mapping[str, str] = FrozenDict()  # tensors that may be there, and must equal another one
    dropped: Mapping[str, str] = FrozenDict()  # patterns (regular expressions) of tensors that are not used, and why
    name: str = ""  # set by `families.get`
