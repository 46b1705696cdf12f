"""Inputs made from good ones by a few changes each: of bytes, of a value inside JSON, of an array, of a header.

Every function is given `Choices`: those of hypothesis, which makes what fails small, or of a seed, which are
faster.
"""

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st


class Choices:
    """Where a change lies and what it is."""

    def __init__(self, draw: Callable[[st.SearchStrategy], Any]):
        self._draw = draw

    def number(self, most: int) -> int:
        """From 0 to `most`."""
        return self._draw(st.integers(0, max(most, 0)))

    def one(self, of: Sequence[Any]) -> Any:
        return of[self.number(len(of) - 1)]

    def raw(self, most: int) -> bytes:
        return self._draw(st.binary(max_size=most))

    def text(self, most: int) -> str:
        return self._draw(st.text(max_size=most))


class Seeded(Choices):
    """Those of a seed."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def number(self, most: int) -> int:
        return self._random.randint(0, max(most, 0))

    def raw(self, most: int) -> bytes:
        return self._random.randbytes(self.number(most))

    def text(self, most: int) -> str:
        ranges = ((32, 126), (0, 31), (0x80, 0xD7FF), (0xE000, 0x10FFFF), (32, 126))
        return "".join(chr(self._random.randint(*self.one(ranges))) for _ in range(self.number(most)))


# What breaks readers, put in the place of a value of JSON.
VALUES = [
    None, True, [], {}, "", "x", 0, -1, 1.5, 3, 2**31, 2**63, 2**64, 10**400, -(10**30), 1e308, 1e-320, float("nan"),
    float("inf"), "../x", "/etc/passwd", "a/../../x", "\ud800", "\x1b]0;x\x07", "[red]", "a" * 5000, [0] * 2000, "\0",
    "{seed}", "%s%n", "nan", "\u202e", [[[[1]]]], {"a": {"b": {}}}, {"__class__": "os.system"}, "é" * 300, -0.0, "1e9",
]  # fmt: skip
# And in the middle of a text.
TOKENS = [
    b"[" * 100_000, b'{"a":' * 50_000, b"\xff", b"\0", b"NaN", b"1e999", b"9" * 5000, b"../", b"\xef\xbb\xbf",
    b"\r", b"\xed\xa0\x80", b'"', b"}", b"]", b",", b":", b"-", b"\\u0000", b"\\ud800", b"{{", b"{%", b"%}",
    b"\n" * 99, b"a" * 70_000, b"null", b"true", b"Infinity", b"\xfe\xff", b"\x1f\x8b", b"PK\x03\x04", b"\x80\x04.",
    b"cos\nsystem\n(S'true'\ntR.",
]  # fmt: skip
NUMBERS = [0, 1, 7, 8, 127, 255, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]


def of_bytes(pick: Choices, content: bytes) -> bytes:
    """Flips, cuts, doubles, takes out, puts in."""
    at, how = pick.number(len(content)), pick.number(9)
    length = pick.number(64)
    if how == 0:
        return content[:at]
    if how == 1:
        return content[:at] + content[at + length :]
    if how == 2:
        return content[:at] + content[at : at + length] * 2 + content[at + length :]
    if how == 3 and content:
        return content[: at - 1] + bytes([content[at - 1] ^ 1 << pick.number(7)]) + content[at:] if at else content
    if how == 4:
        return content[:at] + bytes(length) + content[at + length :]
    if how == 5:
        number = pick.one(NUMBERS)
        packed = struct.pack("<Q", number)[: pick.one([1, 2, 4, 8])]
        return content[:at] + packed + content[at + len(packed) :]
    if how == 6:
        return pick.raw(40)
    if how == 7:
        return content[at:]
    token = pick.one(TOKENS)
    return content[:at] + token + content[at + (length if how == 8 else 0) :]


def of_value(pick: Choices, value: Any) -> Any:
    """A JSON value in which one place, a name or a whole part is another; it is a copy."""
    places = list(_places(value, ()))
    path = places[pick.number(len(places) - 1)]
    how = pick.number(4)
    new = pick.one(VALUES) if how < 3 else value if how == 3 else None
    if not path:
        return new if pick.number(3) == 0 else _with(value, places[-1], pick.one(VALUES))
    return _without(value, path) if how == 4 else _with(value, path, new)


def _places(value: Any, path: tuple) -> Any:
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from _places(each, (*path, key))


def _with(value: Any, path: tuple, new: Any) -> Any:
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = _with(copy[path[0]], path[1:], new)
    return copy


def _without(value: Any, path: tuple) -> Any:
    copy = value.copy()
    if len(path) > 1:
        copy[path[0]] = _without(copy[path[0]], path[1:])
    else:
        del copy[path[0]]
    return copy


def of_json(pick: Choices, content: bytes) -> bytes:
    if pick.number(3) == 0:
        return of_bytes(pick, content)
    return _dumped(of_value(pick, json.loads(content)))


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def of_rows(pick: Choices, content: bytes) -> bytes:
    """Of JSON lines, one."""
    if pick.number(3) == 0:
        return of_bytes(pick, content)
    lines = content.splitlines()
    number = pick.number(len(lines) - 1)
    lines[number] = of_json(pick, lines[number])
    return b"\n".join(lines) + b"\n"


def of_columns(pick: Choices, content: bytes) -> bytes:
    """Of an .npz: one array of another kind, gone, a pickle, or one whose header says more than there is."""
    if pick.number(2) == 0:
        return of_bytes(pick, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    name = sorted(files)[pick.number(len(files) - 1)]
    files[name] = _array(pick, files[name])
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", pick.one([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        for each, raw in files.items():
            if raw:
                archive.writestr(each, raw)
    return made.getvalue()


def _array(pick: Choices, raw: bytes) -> bytes:
    how = pick.number(6)
    array = np.load(io.BytesIO(raw), allow_pickle=False)
    if how == 0:
        return b""
    if how == 1:
        return of_bytes(pick, raw)
    if how == 2:  # as `np.savez` would pickle it
        header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
        return _npy(header, b"\x80\x04\x95\x00cos\nsystem\n\x8c\x04true\x85R.")
    if how == 3:
        shape = pick.one([(10**12,), (2**40, 2**40), (-1,), (0,), (1,) * 33])
        return _npy(repr({"descr": array.dtype.str, "fortran_order": False, "shape": shape}).encode(), b"")
    changed = {
        4: lambda: array.reshape(-1)[: pick.number(3)],
        5: lambda: np.full_like(array, 1) * -1 if array.dtype.kind in "if" else array.astype(str),
        6: lambda: array.astype(pick.one(["f8", "i1", "U3", "?", "c16", "S1"])) if array.size else array,
    }[how]()
    made = io.BytesIO()
    np.save(made, changed, allow_pickle=False)
    return made.getvalue()


def _npy(header: bytes, body: bytes) -> bytes:
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


def of_tensors(pick: Choices, content: bytes) -> bytes:
    """Of a safetensors file or a blob: its header, or its bytes."""
    if pick.number(2) == 0:
        return of_bytes(pick, content)
    length = int.from_bytes(content[:8], "little")
    header = _dumped(of_value(pick, json.loads(content[8 : 8 + length])))
    stated = pick.one([len(header), len(header), len(header), *NUMBERS])
    return struct.pack("<Q", stated) + header + content[8 + length :]
