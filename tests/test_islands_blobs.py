"""A blob gives back what was put in, and is the same bytes everywhere; all else is `BadBlob`, before it is believed."""

import hashlib
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from frugalmoe.islands.blobs import DTYPES, BadBlob, from_bytes, sha256, to_bytes

ARRAYS = {
    "moe/experts/03": np.arange(12, dtype=np.float32).reshape(3, 4),
    "embedding": np.linspace(-1, 1, 5).astype(ml_dtypes.bfloat16),
    "odd": np.array([1, 2, 3], np.int8),
    "scalar": np.array(np.nan, np.float64),
    "nothing": np.zeros((0, 7), np.uint8),
    "île": np.array([[True, False]]),
}
BLOB = to_bytes(ARRAYS)
HEADER = 8 + int.from_bytes(BLOB[:8], "little")
WILD = (-1, 0, 1, 7, 2**31, 2**63, 2**64, 10**30, 0.5, 1e308, True, None, "1", [], [1], {}, "F32", "F8")

many = settings(max_examples=100, deadline=None)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def blob(header: object, numbers: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


def row(**changed) -> dict:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changed}


def load(data: bytes) -> dict[str, np.ndarray]:
    """With the right checksum, so that all that follows is looked at."""
    return from_bytes(data, sha256(data))


def test_what_goes_in_comes_out():
    found = load(BLOB)
    assert list(found) == sorted(ARRAYS) and all(same(found[name], ARRAYS[name]) for name in ARRAYS)
    assert not any(array.flags.writeable for array in found.values()) and load(to_bytes({})) == {}


NUMPYS = [dtype for name, dtype in DTYPES.items() if name != "BF16"]  # which hypothesis knows
SOME = arrays_of.arrays(st.sampled_from(NUMPYS), arrays_of.array_shapes(min_dims=0, min_side=0, max_side=4))


@many
@given(st.dictionaries(st.text(max_size=9), SOME, max_size=4))
def test_any_arrays_come_back(arrays):
    found = load(to_bytes(arrays))
    assert found.keys() == arrays.keys() and all(same(found[name], arrays[name]) for name in arrays)


def test_the_bytes_are_those_of_the_arrays_alone():
    """Not of their order, their place in memory or their byte order; that they never change is the checksum."""
    strided = {name: np.array(array, order="F") for name, array in reversed(ARRAYS.items())}
    strided["odd"] = np.array([1, 9, 2, 9, 3], np.int8)[::2]
    strided["moe/experts/03"] = strided["moe/experts/03"].astype(">f4")
    assert to_bytes(strided) == BLOB
    assert sha256(BLOB)[:16] == "9fec716d5f1a1169"


def test_the_library_of_the_format_reads_it_and_is_read():
    known = {name: array for name, array in ARRAYS.items() if array.dtype != ml_dtypes.bfloat16}
    theirs = safetensors.numpy.load(to_bytes(known))
    assert theirs.keys() == known.keys() and all(same(theirs[name], known[name]) for name in known)
    found = load(safetensors.numpy.save(known, metadata={"format": "np"}))
    assert found.keys() == known.keys() and all(same(found[name], known[name]) for name in known)


def test_what_no_blob_holds_is_refused():
    for array in (np.array([1j]), np.array(["text"]), np.array([None]), np.zeros(1, "datetime64[s]")):
        with pytest.raises(ValueError, match="is no dtype of a blob"):
            to_bytes({"a": array})


@many
@given(st.integers(0, len(BLOB) - 1), st.integers(1, 255))
def test_a_byte_that_changed_or_is_missing_is_noticed(place, flip):
    changed = bytearray(BLOB)
    changed[place] ^= flip
    for data in (bytes(changed), BLOB[:place], BLOB + b"\0"):
        with pytest.raises(BadBlob, match=f"^{len(data):,} bytes with the sha256 .* cut off or changed$"):
            from_bytes(data, sha256(BLOB))


@many
@given(st.integers(0, len(BLOB) - 1))
def test_a_cut_file_with_the_right_checksum_is_refused_too(length):
    with pytest.raises(BadBlob):
        load(BLOB[:length])
    with pytest.raises(BadBlob):
        load(BLOB + bytes(length + 1))


@many
@given(st.lists(st.tuples(st.integers(0, HEADER - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_header_is_refused_or_harmless(changes):
    """A name may have changed; then what is found lies in the bytes that are there."""
    changed = bytearray(BLOB)
    for place, value in changes:
        changed[place] = value
    try:
        assert sum(array.nbytes for array in load(bytes(changed)).values()) == len(BLOB) - HEADER
    except BadBlob as e:
        assert "\n" not in str(e)


@many
@given(st.binary(max_size=200))
def test_noise_is_no_blob(noise):
    for data in (noise, blob(noise)):
        try:
            assert load(data) == {}
        except BadBlob as e:
            assert "\n" not in str(e) and len(str(e)) <= 1000


VALUES = st.sampled_from(WILD) | st.lists(st.sampled_from(WILD), max_size=3) | st.text(max_size=3)


@many
@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), VALUES, VALUES, VALUES)
def test_an_absurd_header_is_refused_or_harmless(header, dtype, shape, offsets):
    both = row(shape=shape, data_offsets=offsets)
    for wild in (header, {"a": header}, row(dtype=dtype), row(shape=shape), row(data_offsets=offsets), both):
        for numbers in (b"", bytes(8)):
            try:
                assert sum(array.nbytes for array in load(blob(wild, numbers)).values()) == len(numbers)
            except BadBlob as e:
                assert "\n" not in str(e)


@pytest.mark.parametrize(
    ("header", "numbers", "words"),
    [
        (b"[]", b"", "its header is a list"),
        (b'{"a": 1', b"", "its header is damaged"),
        (b"[" * 100_000, b"", "its header is damaged"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {}}', bytes(4), "stands in it twice"),
        (row(shape=[2**62, 2, 2], data_offsets=[0, 0]), b"", "does not fit"),
        (row(shape=[-1, -2]), bytes(8), "does not fit"),
        (row(data_offsets=[4, 12]), bytes(12), "does not fit"),
        (row(data_offsets=[8, 0]), bytes(8), "does not fit"),
        (row(), bytes(7), "does not fit"),
        (row(), bytes(9), "the last 1 bytes are of no array"),
        (row() | {"b": row()["a"]}, bytes(8), "does not fit"),
        ({"__metadata__": {}}, bytes(1), "the last 1 bytes"),
    ],
)
def test_what_does_not_add_up_is_said(header, numbers, words):
    with pytest.raises(BadBlob, match=words):
        load(blob(header, numbers))


def test_a_header_longer_than_the_file_is_not_looked_for():
    for length in (0, 1, len(BLOB) - 7, 2**40, 2**64 - 1):
        with pytest.raises(BadBlob, match="its header would have"):
            load(length.to_bytes(8, "little") + BLOB[8:])


def test_the_checksum_is_that_of_the_bytes():
    assert sha256(BLOB) == hashlib.sha256(BLOB).hexdigest()
    with pytest.raises(BadBlob):
        from_bytes(BLOB, "")
