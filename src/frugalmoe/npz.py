"""Arrays from an .npz file that is not believed: sizes are bounded before memory is taken, and nothing is unpickled."""

import io
import math
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

LARGEST = 1 << 30  # bytes that may be unpacked from a file, or
EXPANSION = 100  # so many times its size


def read(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a file. Raises ValueError for one that is damaged, OSError for no file."""
    with path.open("rb") as file:
        return read_from(file, path.stat().st_size)


def read_from(file: BinaryIO, size: int) -> dict[str, np.ndarray]:
    """As `read`; `size`: the bytes of the file."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            unpacked = sum(member.file_size for member in members)
            if unpacked > max(LARGEST, EXPANSION * size):
                raise ValueError(f"{size:,} bytes would unpack to {unpacked:,}")
            return {member.filename.removesuffix(".npy"): _array(archive, member) for member in members}
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the readers of archives and headers raise what Python's parser and zlib do
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from error


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    content = archive.read(member)
    head = io.BytesIO(content)
    version = np.lib.format.read_magic(head)
    if version != (1, 0):
        raise ValueError(f"{member.filename}: of version {version}")
    shape, _, dtype = np.lib.format.read_array_header_1_0(head)
    if dtype.hasobject:
        raise ValueError(f"{member.filename}: holds Python objects, which could run any program as they are read")
    if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize != len(content) - head.tell():
        raise ValueError(f"{member.filename}: {dtype} of shape {shape} does not fit its {len(content):,} bytes")
    return np.load(io.BytesIO(content), allow_pickle=False)
