"""Contributions in few bits, with error feedback: what rounding loses of one round is sent in a later one.

| bits | each value | stored as |
|---|---|---|
| float32 | as it is | NAME, float32 |
| bfloat16 | to the nearest, ties to even | NAME, uint16: the upper half of the float32 |
| int8, int4, int2 | code * step of its block; codes to 127, 7, 1 | NAME.codes, uint8; NAME.steps, float32 |

A block is 128 values along the flattened tensor, and its step is its largest magnitude over the largest code, so that
nothing is clipped. Of codes that are rounded to the nearest and include 0 the error of a value is never larger than the
value: error feedback then loses nothing however coarse the codes are (Karimireddy et al., arXiv 1901.09847), which
codes without a 0, as -3, -1, 1, 3, would not give.

That is not the step of least error. Of normal values with deviation 1 the best step is 0.353 for 15 codes and 1.224 for
3, with a mean square error of 0.013 and 0.190 (Max 1960, "Quantizing for minimum distortion", of equal steps). The
largest of 128 such values is 2.8 on average, which makes the steps 0.40 and 2.8, and the errors 0.014 and 0.59: near
the best with 4 bits, three times the best with 2. It is kept for its bound, whatever the values' distribution.

Packing is the sender's alone. Unpacking is elementwise: one product of a whole number and a float32 for each value,
neither of them subnormal, so that every machine finds the same bits.
"""

import math
from collections.abc import Mapping

import numpy as np

from frugalmoe.errors import UserError

BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4, "int2": 2}  # of a value; steps come on top
BLOCK = 128  # values with one step
CODES, STEPS = ".codes", ".steps"
_LARGEST = {"int8": 127, "int4": 7, "int2": 1}  # code
_NORMAL = np.finfo(np.float32).tiny  # below it some machines know only 0

Arrays = Mapping[str, np.ndarray]


class NotFinite(UserError):
    """What an island would hand in holds a value that is not finite."""


def pack(delta: Arrays, bits: str, residual: Arrays) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns (arrays to store, new residual) of float32 arrays by name.

    What is packed is `delta` plus the residual of the same names (0 where there is none); the new residual is that
    minus what `unpack` will make of the arrays. So what was sent since the beginning, plus the residual, is the sum of
    all deltas, but for float32's rounding. The residual of other names stays.

    Raises `NotFinite` that names a tensor with a value that is not finite.
    """
    arrays, left = {}, dict(residual)
    for name, values in delta.items():
        wanted = np.asarray(values, np.float32)
        if name in residual:
            wanted = _sum(wanted, np.asarray(residual[name], np.float32))
        if not np.isfinite(wanted).all():
            raise NotFinite(f"tensor {name!r}: holds a value that is not finite")
        packed = _packed(name, wanted, bits)
        arrays |= packed
        left.pop(name, None)
        if bits != "float32":
            left[name] = wanted - _unpacked(name, packed, wanted.shape, bits)
    return arrays, left


def unpack(arrays: Arrays, shapes: Mapping[str, tuple[int, ...]], bits: str) -> dict[str, np.ndarray]:
    """Returns float32 arrays of these shapes, the same bits on every machine.

    Raises `UserError` that names the tensor and says what is wrong: one that is missing or that nobody asked for, of
    another type or size, with a code that is none, or with a value that is not finite.
    """
    stored = {key for name in shapes for key in _keys(name, bits)}
    if unknown := sorted(arrays.keys() - stored):
        raise UserError(f"contribution in {bits}: holds {unknown[0]!r}, which is no tensor of this model")
    return {name: _checked(name, arrays, tuple(shape), bits) for name, shape in shapes.items()}


def bytes_of(size: int, bits: str) -> int:
    """Returns the bytes that a tensor of `size` values takes."""
    if bits not in _LARGEST:
        return size * BITS[bits] // 8
    return -(-size * BITS[bits] // 8) + 4 * -(-size // BLOCK)


def _sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is told
        return a + b


def _keys(name: str, bits: str) -> tuple[str, ...]:
    return (f"{name}{CODES}", f"{name}{STEPS}") if bits in _LARGEST else (name,)


def _packed(name: str, values: np.ndarray, bits: str) -> dict[str, np.ndarray]:
    if bits == "float32":
        return {name: values}
    if bits == "bfloat16":
        return {name: _bfloat16(values)}
    codes, steps = _codes(values, _LARGEST[bits])
    return dict(zip(_keys(name, bits), (_in_bytes(codes, BITS[bits]), steps)))


def _unpacked(name: str, arrays: Arrays, shape: tuple[int, ...], bits: str) -> np.ndarray:
    if bits == "float32":
        return np.asarray(arrays[name], np.float32)
    if bits == "bfloat16":
        return (arrays[name].astype(np.uint32) << 16).view(np.float32)
    codes, steps = (arrays[key] for key in _keys(name, bits))
    size = math.prod(shape)
    whole = _from_bytes(codes, BITS[bits], size).astype(np.float32) - np.float32(_LARGEST[bits])
    return (whole * np.repeat(steps, BLOCK)[:size]).reshape(shape)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """Upper halves of the nearest float32 with a lower half of 0, ties to even; what would be infinite is the largest
    finite number.
    """
    whole = values.view(np.uint32)
    up = whole + (np.uint32(0x7FFF) + ((whole >> 16) & 1))
    infinite = (up & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    return (np.where(infinite, whole, up) >> 16).astype(np.uint16)


def _codes(values: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes from 0 to 2 `largest`, uint8; the step of each block, float32)."""
    flat = values.ravel()
    blocks = np.zeros((-(-flat.size // BLOCK), BLOCK), np.float32)
    blocks.ravel()[: flat.size] = flat
    steps = (np.abs(blocks).max(axis=1, initial=0).astype(np.float64) / largest).astype(np.float32)
    steps[steps.astype(np.float64) * largest > np.finfo(np.float32).max] = np.nextafter(
        np.float32(np.finfo(np.float32).max / largest), np.float32(0)
    )
    steps[steps < _NORMAL] = 0
    ratio = np.divide(blocks, steps[:, None], out=np.zeros_like(blocks), where=steps[:, None] > 0)
    codes = np.clip(np.rint(ratio), -largest, largest) + largest
    return codes.astype(np.uint8).ravel()[: flat.size], steps


def _in_bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Several codes in a byte, the first in its lowest bits; the last byte is filled with codes of 0."""
    per_byte = 8 // bits
    padded = np.zeros(-(-codes.size // per_byte) * per_byte, np.uint8)
    padded[: codes.size] = codes
    parts = padded.reshape(-1, per_byte) << np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(parts, axis=1)


def _from_bytes(packed: np.ndarray, bits: int, size: int) -> np.ndarray:
    parts = packed[:, None] >> np.arange(0, 8, bits, dtype=np.uint8)
    return (parts & np.uint8(2**bits - 1)).ravel()[:size]


def _checked(name: str, arrays: Arrays, shape: tuple[int, ...], bits: str) -> np.ndarray:
    """One tensor of a contribution that may hold anything."""
    what, size = f"tensor {name!r} in {bits}", math.prod(shape)
    if missing := [key for key in _keys(name, bits) if key not in arrays]:
        raise UserError(f"{what}: {missing[0]!r} is missing")
    if bits in _LARGEST:
        expected = {CODES: ("uint8", (-(-size * BITS[bits] // 8),)), STEPS: ("float32", (-(-size // BLOCK),))}
    else:
        expected = {"": ("float32" if bits == "float32" else "uint16", shape)}
    for suffix, (dtype, wanted) in expected.items():
        held = arrays[name + suffix]
        if (held.dtype, held.shape) != (np.dtype(dtype), wanted):
            raise UserError(f"{what}: is {held.dtype} {held.shape}, must be {dtype} {wanted}")
    if bits in _LARGEST:
        steps, codes = arrays[name + STEPS], _from_bytes(arrays[name + CODES], BITS[bits], size)
        if not np.all((steps == 0) | ((steps >= _NORMAL) & (steps <= np.finfo(np.float32).max / _LARGEST[bits]))):
            raise UserError(f"{what}: a step of a block is negative, too large or not finite")
        if codes.max(initial=0) > 2 * _LARGEST[bits]:
            raise UserError(f"{what}: holds a code that is none")
    values = _unpacked(name, arrays, shape, bits)
    if not np.isfinite(values).all():
        raise UserError(f"{what}: holds a value that is not finite")
    return values
