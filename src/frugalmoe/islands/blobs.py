"""Named arrays in one value of bytes: the layout of safetensors, so that any tool reads them; checked by sha256.

The bytes of the same arrays are the same on every machine: names are sorted, the header is plain JSON, numbers are
little-endian. What is read is not believed: the checksum comes first, and a header that says more than there is, or
less, is refused.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from frugalmoe.errors import printable
from frugalmoe.files import without_repeats

_TYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "BOOL": np.bool_,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
}  # fmt: skip
DTYPES = {name: np.dtype(dtype).newbyteorder("<") for name, dtype in _TYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes; the bound of the format's own library
_ALIGNMENT = 8  # bytes, of the numbers


class BadBlob(ValueError):
    """Bytes that are not what was written: the message is one line."""

    def __init__(self, message: str):
        super().__init__(printable(message)[:1000])


def sha256(data: bytes) -> str:
    """Of a blob, in hexadecimal: what names it and what `from_bytes` asks for."""
    return hashlib.sha256(data).hexdigest()


def to_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Returns the arrays as one blob, the same bytes for the same names, dtypes, shapes and numbers.

    Raises ValueError for a dtype that the format does not have.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, pieces, end = {}, [], 0
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        dtype = array.dtype.newbyteorder("<")
        if dtype not in names:
            raise ValueError(f"{name}: {array.dtype} is no dtype of a blob; valid: {', '.join(DTYPES)}")
        pieces.append(array.astype(dtype, copy=False).tobytes())
        header[name] = {"dtype": names[dtype], "shape": array.shape, "data_offsets": (end, end + len(pieces[-1]))}
        end += len(pieces[-1])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return b"".join([len(text).to_bytes(8, "little"), text, *pieces])


def from_bytes(data: bytes, sha256: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a blob, sorted by name; they are read-only and share its memory.

    Raises `BadBlob` where the checksum is another, and where the bytes are no blob although it is right.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise BadBlob(f"{len(data):,} bytes with the sha256 {found[:16]}..., not {sha256[:16]}...: cut off or changed")
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(len(data) - 8, LARGEST_HEADER):
        raise BadBlob(f"its header would have {length:,} bytes; there are {len(data):,} in all")
    numbers, arrays, end = memoryview(data)[8 + length :], {}, 0
    for name, row in _rows(data[8 : 8 + length]):
        array = _array(name, row, numbers, end)
        arrays[name], end = array, end + array.nbytes
    if end != len(numbers):
        raise BadBlob(f"the last {len(numbers) - end:,} bytes are of no array")
    return dict(sorted(arrays.items()))


def _rows(text: bytes) -> list[tuple[str, Any]]:
    """The rows of a header in the order of their numbers."""
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=without_repeats)
        if not isinstance(header, dict):
            raise BadBlob(f"its header is a {type(header).__name__}, no object")
        header.pop("__metadata__", None)
        return sorted(header.items(), key=lambda item: tuple(map(int, item[1]["data_offsets"])))
    except BadBlob:
        raise
    except (ValueError, RecursionError, KeyError, TypeError, OverflowError) as e:
        raise BadBlob(f"its header is damaged: {e}") from e


def _array(name: str, row: Any, numbers: memoryview, begin: int) -> np.ndarray:
    """One array, whose numbers begin where those of the one before end."""
    try:
        dtype, shape, (first, end) = DTYPES[row["dtype"]], tuple(row["shape"]), row["data_offsets"]
        sound = all(type(n) is int and n >= 0 for n in (*shape, first, end))
        sound = sound and first == begin and end <= len(numbers) and end - first == math.prod(shape) * dtype.itemsize
        if sound:
            return np.frombuffer(numbers[first:end], dtype).reshape(shape)
    except (KeyError, TypeError, ValueError, OverflowError):
        pass  # as one that says too much: what it says is in the message
    raise BadBlob(f"array {name!r}: {str(row)[:200]} does not fit the {len(numbers):,} bytes of numbers")
