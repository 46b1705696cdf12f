"""What stands in the directory in which islands meet: a few kinds of small JSON files, and blobs of arrays.

    agreement.json                       what all islands share; created once
    islands/NAME.json                    what an island says of itself; rewritten as its sign of life
    rounds/000007/from/NAME.json         a contribution: created once by its island, after its blob
    rounds/000007/maker.json             who writes the record and the whole outer state of some rounds: created once
    rounds/000007/commit.json            what the round gave: created once, by whichever island is first
    blobs/SHA256                         arrays, named by content

A commit record is what makes a round a fact. All else is a proposal: it may be missing, late, damaged or wrong.
"""

import dataclasses
import json
import re
import typing
from collections.abc import Mapping
from typing import Any

from frugalmoe.errors import UserError, printable
from frugalmoe.files import check_name
from frugalmoe.schema import FrozenDict
from frugalmoe.shapes import is_number

FORMAT = 1  # of the files; islands of another one are refused
AGREEMENT = "agreement.json"
LIVE = ("joining", "training", "waiting")  # of an island's status; others: left, complete
Record = dataclasses.dataclass(frozen=True, kw_only=True)


class Damaged(ValueError):
    """A file of the directory that is none of ours: the message is one line."""

    def __init__(self, message: str):
        super().__init__(printable(message)[:1000])


@Record
class Agreement:
    """What the islands of one directory have in common; what they need not share, as devices or dtypes, is not here."""

    format: int
    model: Mapping[str, Any]  # fields of the model that its parameters and its loss depend on
    data: str  # fingerprint
    tokenizer: str  # fingerprint
    seed: int
    steps: int  # of the schedule
    islands: Mapping[str, Any]  # the section of the config


@Record
class Presence:
    """What an island says of itself."""

    island: str
    run: str  # random, of its run directory: tells two islands of one name apart
    beat: int  # grows with every sign of life
    round: int  # the newest commit that it has seen
    status: str  # joining | training | waiting | leaving | left | complete
    step: int
    tokens_per_second: float
    about: Mapping[str, Any]  # device, number of devices, versions, dtype


@Record
class Contribution:
    """What an island found in a round."""

    island: str
    run: str
    round: int
    base: str  # sha256 of the outer parameters that it started from
    blob: str  # sha256 of the blob: packed deltas of the round's fragment, and the state of routers
    bytes: int  # of the blob
    tokens: int
    steps: int  # updates
    rows: Mapping[str, tuple[int, int]]  # of each stream that was read: the first row, and the first that was not read
    seconds: float  # that it trained
    leaving: bool = False  # the island returns its streams
    loads: tuple[tuple[int, ...], ...] = ()  # of each MoE layer: the slots of tokens that named each expert


@Record
class Maker:
    """Who makes the record of a round that names the whole outer state, so that one island writes that, and not all."""

    island: str
    run: str


@Record
class Commit:
    """What a round gave, and how the next one begins."""

    format: int
    round: int  # 0: the beginning
    by: str  # the island that was first
    merged: tuple[Contribution, ...]  # sorted by island, then by round
    coefficients: tuple[tuple[float, ...], ...]  # of each that is merged: of each tensor of the round's fragment
    left_out: Mapping[str, str]  # island -> why
    notes: Mapping[str, str]  # island -> what it should know
    history: Mapping[str, Any]  # of the merge rule
    outer: str  # sha256 of the outer parameters after the round
    routers: str  # sha256 of the blob with the state of routers after the round
    snapshot: str  # sha256 of a blob with the whole outer state; empty: this round has none
    rows: tuple[int, ...]  # of each stream: the first row that nobody has read
    members: Mapping[str, tuple[int, ...]]  # island -> the streams that it reads in the next round
    tokens: int  # that are in the outer parameters, of all rounds
    tokens_of: Mapping[str, int]  # of each island


def path_of_commit(round: int) -> str:
    return f"rounds/{round:06d}/commit.json"


def path_of_maker(round: int) -> str:
    return f"rounds/{round:06d}/maker.json"


def path_of_contribution(round: int, island: str) -> str:
    return f"rounds/{round:06d}/from/{island}.json"


def path_of_presence(island: str) -> str:
    return f"islands/{island}.json"


def path_of_blob(sha256: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise Damaged(f"{sha256[:80]!r} is no sha256 of a blob")
    return f"blobs/{sha256}"


def round_of(key: str) -> int | None:
    """The round whose file a key names, or None."""
    found = re.match(r"rounds/(\d{6,9})/", key)
    return int(found[1]) if found else None


def to_bytes(record: Any) -> bytes:
    return (json.dumps(_plain(record), indent=1, allow_nan=False) + "\n").encode()


def from_bytes(cls: type, data: bytes, key: str) -> Any:
    """Returns a record; raises `Damaged`, with the key, for bytes that are none of this class, or of another format."""
    try:
        made = _made(cls, json.loads(data.decode("utf-8")), "")
    except (ValueError, RecursionError, TypeError) as e:
        raise Damaged(f"{key}: {' '.join(str(e).split())[:300]}") from e
    for name in (n for n in ("island",) if hasattr(made, n)):
        try:
            check_name(key, getattr(made, name))
        except UserError as e:
            raise Damaged(str(e)) from e
    return made


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple | list) else value


def _made(kind: Any, value: Any, path: str) -> Any:
    """A value of JSON as a value of a type: a record, a mapping, a tuple, or a plain one."""
    wrong = ValueError(f"{path or 'the file'}: {str(value)[:100]} is no {getattr(kind, '__name__', kind)}")
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        needed = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
        if not isinstance(value, dict) or not needed <= value.keys() <= hints.keys():
            raise wrong
        return kind(**{name: _made(hints[name], inner, f"{path}.{name}") for name, inner in value.items()})
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _frozen(value)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise wrong
        return FrozenDict({key: _made(inside[1], inner, f"{path}.{key}") for key, inner in value.items()})
    if origin is tuple:
        if not isinstance(value, list) or (inside[-1] is not Ellipsis and len(value) != len(inside)):
            raise wrong
        kinds = [inside[0]] * len(value) if inside[-1] is Ellipsis else inside
        return tuple(_made(each, inner, f"{path}[{i}]") for i, (each, inner) in enumerate(zip(kinds, value)))
    if kind is float and type(value) is int and is_number(value):
        value = float(value)
    if type(value) is not kind or (kind is int and not 0 <= value < 2**63) or value != value:
        raise wrong
    return value


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return FrozenDict({key: _frozen(inner) for key, inner in value.items()})
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
