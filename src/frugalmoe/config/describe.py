"""What each field of a config means: the comment beside it where its dataclass is written, and nowhere else."""

import ast
import dataclasses
import functools
import inspect
import io
import textwrap
import tokenize
from collections.abc import Mapping
from typing import Any, NamedTuple

from frugalmoe.fields import to_dict
from frugalmoe.schema import Config, Model, MoE


class Field(NamedTuple):
    """A row of `frugalmoe config`."""

    name: str  # dotted
    value: Any
    default: Any
    meaning: str


def describe(config: Config) -> list[Field]:
    """Every field of a config with types, those of its router's options and of its named sources too."""
    options = type(config.model.moe.options)()
    return _rows(config, Config(model=Model(moe=MoE(options=options))), "")


def field_meanings() -> dict[str, str]:
    """Returns {dotted name: meaning} of every field that a config has whatever its router; imports no router."""
    return {row.name: row.meaning for row in _rows(Config(), Config(), "")}


def _rows(section: Any, default: Any, prefix: str) -> list[Field]:
    rows = []
    for name, meaning in meanings(type(section)).items():
        value, usual, path = getattr(section, name), getattr(default, name), prefix + name
        if dataclasses.is_dataclass(value):
            rows += _rows(value, usual, f"{path}.")
        elif isinstance(value, Mapping) and (value or usual):
            for key in sorted({*value, *usual}):
                inner, old = value.get(key), usual.get(key)
                if dataclasses.is_dataclass(inner):
                    rows += _rows(inner, old or type(inner)(), f"{path}.{key}.")
                else:
                    rows.append(Field(f"{path}.{key}", inner, old, meaning))
        else:
            rows.append(Field(path, to_dict(value), to_dict(usual), meaning))
    return rows


@functools.cache
def meanings(cls: type) -> dict[str, str]:
    """Returns {field: comment}: the one on its lines, or else on the lines before it; empty where there is none."""
    lines = textwrap.dedent(inspect.getsource(cls))
    comments = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(lines).readline)
        if token.type == tokenize.COMMENT
    }
    found = {field.name: "" for field in dataclasses.fields(cls)}
    for base in cls.__mro__[1:]:
        if dataclasses.is_dataclass(base):
            found |= meanings(base)
    body, end = ast.parse(lines).body[0].body, 0
    for node in body:
        if isinstance(node, ast.AnnAssign):
            beside = [comments[n] for n in range(node.lineno, node.end_lineno + 1) if n in comments]
            before = [comments[n] for n in range(end + 1, node.lineno) if n in comments]
            found[node.target.id] = " ".join(beside or before)
        end = node.end_lineno
    return found
