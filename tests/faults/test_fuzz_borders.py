"""The borders that fuzzing asked for: shapes of JSON, and arrays of files that are not believed."""

import io
import re
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from frugalmoe import npz
from frugalmoe.shapes import NAMES, NUMBER, misshapen

SHAPE = {"a": int, "b?": [float], "c?": {re.compile(r"x\d"): NUMBER}, "d?": (str, None), "e?": {NAMES: {"f": bool}}}


@pytest.mark.parametrize(
    ("value", "places"),
    [
        ({"a": 1}, []),
        ({"a": 1, "b": [1, 2.5], "c": {"x1": None, "x2": 3}, "d": None, "e": {"": {"f": True}}, "z": object}, []),
        ({}, ["a"]),
        ([], [""]),
        ({"a": True}, ["a"]),
        ({"a": 2**63}, ["a"]),
        ({"a": -(2**63) + 1}, []),
        ({"a": 1.0}, ["a"]),
        ({"a": 1, "b": [1, "x", None]}, ["b[1]", "b[2]"]),
        ({"a": 1, "b": {}}, ["b"]),
        ({"a": 1, "b": [10**400]}, ["b[0]"]),
        ({"a": 1, "c": {"x1": 1, "y": 1}}, ["c.y"]),
        ({"a": 1, "d": 3}, ["d"]),
        ({"a": 1, "e": {"k": {}}}, ["e.k.f"]),
        ({"a": 1, "e": {"k": []}}, ["e.k"]),
    ],
)
def test_a_shape_names_the_places_that_are_not_as_it_says(value, places):
    assert list(misshapen(value, SHAPE)) == places


NUMBERS = arrays_of.arrays(
    arrays_of.scalar_dtypes().filter(lambda dtype: dtype.kind not in "mM"),
    arrays_of.array_shapes(min_dims=0, min_side=0),
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z]{1,6}", fullmatch=True), NUMBERS, max_size=3), st.booleans())
def test_the_arrays_of_a_file_come_back_as_numpy_reads_them(arrays, packed):
    file = io.BytesIO()
    (np.savez_compressed if packed else np.savez)(file, **arrays)
    found = npz.read_from(io.BytesIO(file.getvalue()), len(file.getvalue()))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def _archive(header: bytes, body: bytes, version: bytes = b"\x01\x00") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + body)
    return file.getvalue()


def _header(descr: str, shape: tuple) -> bytes:
    return repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (_archive(_header("<f4", (10**12,)), b""), "does not fit its"),
        (_archive(_header("<f4", (2**40, 2**40)), b"1234"), "does not fit its"),
        (_archive(_header("<f4", (-1,)), b""), "does not fit its"),
        (_archive(_header("<f4", (1,)), b"12345"), "does not fit its"),
        (_archive(_header("|O", (1,)), b"cos\nsystem\n(S'true'\ntR."), "holds Python objects"),
        (_archive(b"__import__('os').system('true')\n", b""), "."),
        (_archive(b"{'descr':\n", b""), "."),
        (_archive(_header("<f4", (1,)), b"1234", b"\x03\x00"), "of version"),
        (b"PK\x03\x04" + bytes(50), "not a zip file"),
        (b"", "not a zip file"),
    ],
)
def test_a_file_that_lies_is_one_line(content, said):
    with pytest.raises(ValueError, match=said) as error:
        npz.read_from(io.BytesIO(content), len(content))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_what_unpacks_to_more_than_memory_should_hold_is_not_unpacked(monkeypatch):
    monkeypatch.setattr(npz, "LARGEST", 1 << 20)
    content = _archive(_header("|u1", (1 << 22,)), bytes(1 << 22))
    assert len(content) < 1 << 13
    with pytest.raises(ValueError, match="would unpack to 4,194,"):
        npz.read_from(io.BytesIO(content), len(content))
