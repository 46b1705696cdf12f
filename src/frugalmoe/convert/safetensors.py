"""Safetensors files, one tensor at a time: read without trust in what they say, written as their sizes are known.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, the first byte and
the byte after the last, counted from the header's end) and the numbers, row-major and little-endian.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from frugalmoe.errors import UserError
from frugalmoe.files import to_json, without_repeats

# What float32 holds exactly; a model is converted in these and in no other.
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
LARGEST_HEADER = 100_000_000  # bytes; the bound of the format's own library
_ALIGNMENT = 8  # of the numbers in a file
_PIECE = 1 << 24  # numbers that are in memory at one time where a whole tensor is only looked through


class Info(NamedTuple):
    """Where a tensor lies."""

    path: Path
    dtype: str  # as the format calls it
    shape: tuple[int, ...]
    start: int  # of its numbers, in the file

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def read_header(path: Path) -> dict[str, Info]:
    """Returns the tensors of a file by name. Raises `UserError` for one that is cut off, damaged or of another kind."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, LARGEST_HEADER):
                rule = f"its header would have {length:,} bytes; the file has {size:,}"
                raise UserError(f"{path}: not a whole safetensors file ({rule})")
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=without_repeats)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{path}: not a safetensors file (its header is no JSON: {e})") from e
    if not isinstance(header, dict):
        raise UserError(f"{path}: not a safetensors file (its header is a {type(header).__name__}, no object)")
    header.pop("__metadata__", None)
    infos = {name: _info(path, name, row, 8 + length, size) for name, row in header.items()}
    _check_places(path, infos, 8 + length, size)
    return infos


def _info(path: Path, name: str, row: Any, begin: int, size: int) -> Info:
    try:
        dtype, shape, (first, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
        sound = all(type(n) is int and n >= 0 for n in (*shape, first, end)) and isinstance(dtype, str)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise UserError(f"{path}: tensor {name!r}: damaged; needs dtype, shape and two data_offsets")
    if dtype not in DTYPES:
        rule = f"is not converted; valid: {', '.join(DTYPES)} (quantised weights must be written out before)"
        raise UserError(f"{path}: tensor {name!r}: dtype {dtype} {rule}")
    info = Info(path, dtype, shape, begin + first)
    if end - first != info.size or begin + end > size:
        where = f"bytes {first:,} to {end:,} of {size - begin:,}"
        raise UserError(
            f"{path}: tensor {name!r}: {dtype} of shape {shape} does not lie in {where}: cut off or damaged"
        )
    return info


def _check_places(path: Path, infos: Mapping[str, Info], begin: int, size: int) -> None:
    """No two tensors share bytes, and no byte is of none: as the format has it, so that nothing can hide in a file."""
    end = begin
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].size)):
        if info.start < end:
            raise UserError(f"{path}: tensor {name!r}: shares bytes with another")
        if info.start > end:
            raise UserError(f"{path}: damaged: {info.start - end:,} bytes before tensor {name!r} are of no tensor")
        end = info.start + info.size
    if end < size:
        raise UserError(f"{path}: damaged: the last {size - end:,} bytes are of no tensor")


def read(name: str, info: Info) -> np.ndarray:
    """Returns a tensor in the file's dtype, its numbers on disk until they are used.

    Raises `UserError` for a number that is not finite.
    """
    if not info.size:
        return np.zeros(info.shape, DTYPES[info.dtype])
    found = np.memmap(info.path, DTYPES[info.dtype], "r", info.start, info.shape)
    check_finite(found, f"{info.path}: tensor {name!r}")
    return found


def check_finite(numbers: np.ndarray, what: str) -> None:
    """Raises `UserError` that begins with `what` where a number is infinite or none."""
    flat = numbers.reshape(-1)
    for first in range(0, flat.size, _PIECE):
        if not np.isfinite(flat[first : first + _PIECE]).all():
            raise UserError(f"{what}: holds numbers that are not finite")


class Entry(NamedTuple):
    """A tensor that will be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write(path: Path, entries: Iterable[Entry], tensors: Iterable[np.ndarray]) -> None:
    """Writes tensors, which may be made one after the other, in the order of their entries."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    entries = list(entries)
    for entry in entries:
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (end, end + entry.size)}
        end += entry.size
    text = to_json(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry, numbers in zip(entries, tensors, strict=True):
            assert (numbers.dtype, numbers.shape) == (DTYPES[entry.dtype], entry.shape), entry
            file.write(np.ascontiguousarray(numbers).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
