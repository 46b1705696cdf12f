"""Tokens on disk. A prepared directory holds

    manifest.json                           what it was made from, counts per domain, the shards and their sizes
    tokenizer.json, tokenizer_config.json
    shard-00000.array_record                one record per piece of a document: `encode_record`
    shard-00000.npz                         one row per record: the columns `COLUMNS`

A shard's .npz is written last and atomically: a shard that has one is complete. ArrayRecord checks a hash of every
record that it reads. Nothing is pickled.
"""

import hashlib
import io
import json
import os
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from frugalmoe.data.tokenizer import Tokenizer, load_from
from frugalmoe.errors import UserError
from frugalmoe.files import write_atomically

FORMAT = 1
PIECE_TOKENS = 2048  # documents are stored in pieces, so that a row of a long one does not read all of it
COLUMNS = {
    "document": np.int64,  # number of the piece's document in the shard
    "hash": np.uint64,  # of the document's text
    "length": np.int32,  # tokens
    "bytes": np.int32,  # UTF-8 bytes that the tokens stand for
    "domain": np.int32,  # number in the manifest's `domains`
    "source": np.int32,  # number in the manifest's `sources`
    "validation": np.bool_,
}
HEADER = struct.Struct("<IIH")  # domain, offset of the first token in the document, bytes of the id


class Item(NamedTuple):
    """A document on its way into a shard."""

    text: str
    id: str
    hash: int
    domain: int
    source: int
    validation: bool


class Record(NamedTuple):
    """A piece of a document, as stored."""

    domain: int
    offset: int
    id: str
    tokens: np.ndarray


def token_dtype(tokenizer: Tokenizer) -> str:
    return "<u2" if tokenizer.size <= 1 << 16 else "<i4"


def encode_record(record: Record, dtype: str) -> bytes:
    name = record.id.encode(errors="replace")[:1000]
    return HEADER.pack(record.domain, record.offset, len(name)) + name + record.tokens.astype(dtype).tobytes()


def decode_record(raw: bytes, dtype: str) -> Record:
    domain, offset, length = HEADER.unpack_from(raw)
    start = HEADER.size + length
    name = raw[HEADER.size : start].decode(errors="replace")
    return Record(domain, offset, name, np.frombuffer(raw, dtype, offset=start).astype(np.int32))


def write_shard(path: Path, items: Sequence[Item], tokenizer: Tokenizer) -> None:
    """Writes `path` and its index, unless both are there, made from the same documents."""
    made_from = hashlib.sha256(repr([tokenizer.fingerprint, *(item._replace(text="") for item in items)]).encode())
    made_from = np.frombuffer(made_from.digest(), np.uint8)
    index = path.with_suffix(".npz")
    if path.is_file() and index.is_file():
        with np.load(index) as done:
            if np.array_equal(done["made_from"], made_from):
                return
    temporary = path.with_name(path.name + ".tmp")
    writer = ArrayRecordWriter(str(temporary), "group_size:1,zstd:1")
    rows = []
    for number, item in enumerate(items):
        for record in _pieces(item, tokenizer):
            writer.write(encode_record(record, token_dtype(tokenizer)))
            size = tokenizer.token_bytes[record.tokens].sum()
            rows.append((number, item.hash, len(record.tokens), size, item.domain, item.source, item.validation))
    writer.close()
    os.replace(temporary, path)
    columns = {name: np.array(values, dtype) for (name, dtype), values in zip(COLUMNS.items(), zip(*rows))}
    buffer = io.BytesIO()
    np.savez(buffer, made_from=made_from, **columns)
    write_atomically(index, buffer.getvalue())


def _pieces(item: Item, tokenizer: Tokenizer) -> Iterator[Record]:
    tokens = np.append(tokenizer.encode(item.text), np.int32(tokenizer.eos))
    for offset in range(0, len(tokens), PIECE_TOKENS):
        yield Record(item.domain, offset, item.id, tokens[offset : offset + PIECE_TOKENS])


def read_index(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as index:
            return {name: index[name] for name in COLUMNS}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged ({error}); delete the directory and prepare it again") from error


def is_prepared(directory: Path) -> bool:
    return (directory / "manifest.json").is_file() and any(directory.glob("shard-*.array_record"))


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, after a look that every shard is there in its full size."""
    manifest = json.loads((directory / "manifest.json").read_text())
    if manifest["format"] != FORMAT:
        raise UserError(f"{directory}: prepared in format {manifest['format']}, need {FORMAT}; prepare it again")
    for file, size in manifest["shards"].items():
        path = directory / file
        if not path.is_file() or path.stat().st_size != size:
            state = f"has {path.stat().st_size} bytes, not {size}" if path.is_file() else "is missing"
            raise UserError(f"{path}: {state}; delete the directory and prepare it again")
    return manifest


def _reader(path: Path) -> ArrayRecordReader:
    try:
        return ArrayRecordReader(
            str(path), "readahead_buffer_size:0,max_parallelism:0"
        )  # rows are read in random order
    except Exception as error:  # the library raises what its C++ status maps to
        raise UserError(f"{path}: damaged; delete the directory and prepare it again") from error


class Store:
    """Random access to the pieces of a prepared directory, numbered over all shards. Safe to use from many threads."""

    def __init__(self, directory: Path) -> None:
        self.manifest = read_manifest(directory)
        self.tokenizer = load_from(directory)
        self._dtype = token_dtype(self.tokenizer)
        self._paths = [directory / file for file in self.manifest["shards"] if file.endswith(".array_record")]
        indexes = [read_index(path.with_suffix(".npz")) for path in self._paths]
        self._first = np.cumsum([0] + [len(index["length"]) for index in indexes])  # piece that each shard starts with
        documents = np.cumsum([0] + [index["document"][-1] + 1 for index in indexes])
        for index, start in zip(indexes, documents):
            index["document"] = index["document"] + start
        self.columns = {name: np.concatenate([index[name] for index in indexes]) for name in COLUMNS}
        self._readers = [_reader(path) for path in self._paths]

    def read(self, piece: int) -> Record:
        shard = int(np.searchsorted(self._first, piece, side="right")) - 1
        number = int(piece - self._first[shard])
        try:
            (raw,) = self._readers[shard].read([number])
        except Exception as error:
            path = self._paths[shard]
            raise UserError(f"{path}: record {number} is damaged; delete the directory and prepare it again") from error
        return decode_record(raw, self._dtype)
