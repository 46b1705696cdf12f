"""Dataclasses of a config from plain mappings and back, with the types of their fields and the range of numbers.

What a field may mean beyond its type is checked in `frugalmoe.config`.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.schema import BY_NAME, FrozenDict, Named

_SMALLEST, _LARGEST = 2.0**-126, 2.0**128 - 2.0**104  # of the normal numbers of float32


def check_integer(path: str, value: int, least: int = -(2**31)) -> None:
    """Raises `UserError` for an integer that 32 bits with a sign, as in JAX and in tables of results, do not hold."""
    if not least <= value < 2**31:
        shown = repr(value) if value.bit_length() < 128 else f"(an integer of {value.bit_length()} bits)"
        raise UserError(f"{path}={shown}: must be from {least} to {2**31 - 1}")


def check_seed(path: str, seed: int) -> None:
    """Raises `UserError` for what is no seed, wherever one is given."""
    if type(seed) is not int:
        raise UserError(f"{path}={seed!r}: must be an integer")
    check_integer(path, seed, least=0)


def check_float(path: str, value: float) -> None:
    """Raises `UserError` for what is infinite, NaN, or either of these or zero in float32, in which it is used."""
    if value != 0 and not _SMALLEST <= abs(value) <= _LARGEST:
        raise UserError(f"{path}={value!r}: must be 0 or from {_SMALLEST:g} to {_LARGEST:g} in size, as float32 has it")


def to_dict(config: Any) -> Any:
    """Plain nested dicts, ready for JSON, of a config or a part of one; what stands for its name is its name."""
    if isinstance(config, Named):
        return config.name
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {k: to_dict(v) for k, v in config.items()}
    return config


def build(cls: type, values: Any, path: str) -> Any:
    """An instance of dataclass `cls` from a mapping, with the types of its annotations enforced."""
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise UserError(f"{path}={values!r}: expected a section with fields {', '.join(_fields(cls))}")
    prefix = f"{path}." if path else ""
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise UserError(f"{prefix}{name}: unknown config field; {did_you_mean(name, _fields(cls))}")
    by_name = {f.name for f in dataclasses.fields(cls) if BY_NAME in f.metadata}
    whole = {k for k in by_name & set(values) if isinstance(values[k], Named)}
    return cls(**{k: v if k in whole else _coerce(hints[k], v, prefix + k) for k, v in values.items()})


def _fields(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _coerce(kind: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return build(kind, value, path)
    origin = typing.get_origin(kind)
    if kind is Any or origin is not None:
        if isinstance(value, Mapping):
            element = typing.get_args(kind)[1] if origin not in (None, types.UnionType) else Any
            plain = {
                k: v if dataclasses.is_dataclass(element) else _coerce(element, v, f"{path}.{k}")
                for k, v in dict(value).items()
            }
            return FrozenDict(plain)
        if origin is not None and origin is not types.UnionType and not isinstance(value, tuple):
            raise UserError(f"{path}={value!r}: expected a mapping")
        return value
    if kind is int and type(value) is int:
        check_integer(path, value)
        return value
    if kind is float and type(value) is int:
        if value.bit_length() > 128:  # no float holds it
            check_integer(path, value)
        value = float(value)
    if kind is float and type(value) is float:
        check_float(path, value)
    if type(value) is not kind:
        raise UserError(f"{path}={value!r}: expected {kind.__name__}, got {type(value).__name__}")
    return value
