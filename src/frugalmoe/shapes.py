"""What the values in a JSON file must be: a shape is written as a value with types in the place of values.

int, float, str, bool, None     a value of that type, int of 64 bits; float takes integers; no bool is a number
Any                             anything
[shape]                         a list of such values
(shape, shape)                  one of these
{"name": shape, "more?": shape} an object; what has a ? may be absent, and names that are not listed may be there
{re.compile(rule): shape}       an object whose names all match the rule
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

NAMES = re.compile(".*", re.DOTALL)
NUMBER = (float, None)  # a number that is not finite is null in JSON


def is_integer(value: Any) -> bool:
    """Whether a value is an integer that 64 bits with a sign hold."""
    return type(value) is int and value.bit_length() < 64


def is_number(value: Any) -> bool:
    """Whether a value is a number that a float64 holds: JSON knows integers of any size."""
    return type(value) is float or (type(value) is int and value.bit_length() < 1024)


def misshapen(value: Any, shape: Any, at: str = "") -> Iterator[str]:
    """Yields the places where a value from JSON is not as a shape says."""
    if shape is Any:
        return
    if isinstance(shape, tuple):
        if all(any(misshapen(value, one)) or _unlike(value, one) for one in shape):
            yield at
    elif _unlike(value, shape):
        yield at
    elif isinstance(shape, list):
        for number, item in enumerate(value):
            yield from misshapen(item, shape[0], f"{at}[{number}]")
    elif isinstance(shape, Mapping):
        yield from _misshapen_object(value, shape, at)


def _unlike(value: Any, shape: Any) -> bool:
    """Whether a value is of another kind; what is inside is not looked at."""
    if shape is None:
        return value is not None
    if shape is float:
        return not is_number(value)
    if shape is int:
        return not is_integer(value)
    wanted = dict if isinstance(shape, Mapping) else list if isinstance(shape, list) else shape
    return type(value) is not wanted and wanted is not Any


def _misshapen_object(value: dict[str, Any], shape: Mapping[Any, Any], at: str) -> Iterator[str]:
    for name, inner in shape.items():
        if isinstance(name, re.Pattern):
            for each in value:
                place = f"{at}.{each[:80]}".lstrip(".")
                yield from misshapen(value[each], inner, place) if name.fullmatch(each) else [place]
        elif (key := name.removesuffix("?")) in value:
            yield from misshapen(value[key], inner, f"{at}.{key}".lstrip("."))
        elif key == name:
            yield f"{at}.{key}".lstrip(".")
