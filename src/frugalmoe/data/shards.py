"""Tokens on disk. A prepared directory holds

    manifest.json                           what it was made from, counts per domain, the shards with sizes and hashes
    tokenizer.json, tokenizer_config.json
    shard-00000.array_record                one record per piece of a document: `encode_record`
    shard-00000.npz                         one row per record: the columns `COLUMNS`

A shard's .npz is written last and atomically: a shard that has one is complete. Opening checks a chain of hashes that
costs a hundredth of the data to read: the manifest holds its own hash, those of the .npz files and the fingerprint of
the tokenizer; a .npz holds the hash of every record, looked at when the record is read. Nothing is pickled.
"""

import hashlib
import io
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from frugalmoe import npz
from frugalmoe.data.cache import digest
from frugalmoe.data.chat import Rendered
from frugalmoe.data.end_of_text import read_object
from frugalmoe.data.quarantine import Quarantine
from frugalmoe.data.tokenizer import Tokenizer, load_from
from frugalmoe.errors import UserError
from frugalmoe.files import write_atomically, write_json
from frugalmoe.shapes import NAMES, misshapen

FORMAT = 2
PIECE_TOKENS = 2048  # documents are stored in pieces, so that a row of a long one does not read all of it
AGAIN = "delete the directory and prepare it again"
COLUMNS = {
    "document": np.int64,  # number of the piece's document in the shard
    "hash": np.uint64,  # of the document's text
    "length": np.int32,  # tokens
    "bytes": np.int64,  # UTF-8 bytes of the text that the tokens stand for
    "domain": np.int32,  # number in the manifest's `domains`
    "source": np.int32,  # number in the manifest's `sources`
    "validation": np.bool_,
    "same": np.bool_,  # decoding the document's tokens gives its text back
    "check": np.uint64,  # hash of the stored record
}
_NUMBERS = {"documents": int, "tokens": int, "bytes": int}
_MANIFEST = {  # what must be in one
    "key": str,
    "data": str,
    "tokenizer": {"spec": str, "fingerprint": str},
    "validation_fraction": float,
    "sources": [{"name": str, "weight": float}],
    "domains": [str],
    "counts": {NAMES: {"train": _NUMBERS, "validation": _NUMBERS}},
    "notes": [str],
    "shards": {NAMES: {"bytes": int, "index": str}},
}
HEADER = struct.Struct("<IIHH")  # domain, offset of the first token in the document, bytes of the id, odd sizes
GIVEN = 1 << 31  # added to the size of a token that is not to be predicted
ODD = np.dtype([("at", "<u2"), ("size", "<u4")])  # a token that stands for another number of bytes than it has


class Item(NamedTuple):
    """A document on its way into a shard."""

    text: str
    id: str
    hash: int
    domain: int
    source: int
    validation: bool
    answers: tuple[tuple[int, int], ...] | None = None  # as `sources.Document` has them


class Record(NamedTuple):
    """A piece of a document."""

    domain: int
    offset: int
    id: str
    tokens: np.ndarray  # int32[n]
    sizes: np.ndarray  # int32[n]: UTF-8 bytes of the document's text that each token stands for
    targets: np.ndarray  # bool[n]: whether the token is to be predicted; of a text every one is


def token_dtype(tokenizer: Tokenizer) -> str:
    return "<u2" if tokenizer.size <= 1 << 16 else "<i4"


def encode_record(record: Record, tokenizer: Tokenizer) -> bytes:
    name = record.id.encode(errors="replace")[:1000]
    (at,) = np.nonzero((record.sizes != tokenizer.token_bytes[record.tokens]) | ~record.targets)
    odd = np.empty(len(at), ODD)
    odd["at"], odd["size"] = at, record.sizes[at] + np.where(record.targets[at], 0, GIVEN)
    header = HEADER.pack(record.domain, record.offset, len(name), len(odd))
    return header + name + odd.tobytes() + record.tokens.astype(token_dtype(tokenizer)).tobytes()


def decode_record(raw: bytes, tokenizer: Tokenizer) -> Record:
    domain, offset, length, count = HEADER.unpack_from(raw)
    start = HEADER.size + length
    name = raw[HEADER.size : start].decode(errors="replace")
    odd = np.frombuffer(raw, ODD, count, start)
    tokens = np.frombuffer(raw, token_dtype(tokenizer), offset=start + odd.nbytes).astype(np.int32)
    sizes, targets = tokenizer.token_bytes[tokens], np.ones(len(tokens), bool)
    sizes[odd["at"]] = odd["size"] % GIVEN
    targets[odd["at"]] = odd["size"] < GIVEN
    return Record(domain, offset, name, tokens, sizes, targets)


def record_hash(raw: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")


def write_shard(path: Path, items: Sequence[Item], tokenizer: Tokenizer) -> None:
    """Writes `path` and its index, unless both are there, made from the same documents."""
    made_from = hashlib.sha256(
        repr([FORMAT, tokenizer.fingerprint, *(item._replace(text="") for item in items)]).encode()
    )
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
        records, same = _pieces(item, tokenizer)
        for record in records:
            raw = encode_record(record, tokenizer)
            writer.write(raw)
            of_piece = (number, item.hash, len(record.tokens), int(record.sizes.sum(dtype=np.int64)))
            rows.append((*of_piece, item.domain, item.source, item.validation, same, record_hash(raw)))
    writer.close()
    os.replace(temporary, path)
    columns = {name: np.array(values, dtype) for (name, dtype), values in zip(COLUMNS.items(), zip(*rows))}
    buffer = io.BytesIO()
    np.savez(buffer, made_from=made_from, **columns)
    write_atomically(index, buffer.getvalue())


def _pieces(item: Item, tokenizer: Tokenizer) -> tuple[list[Record], bool]:
    """Returns the document in pieces, and whether decoding gives it back."""
    if item.answers is None:
        tokens, sizes, same = tokenizer.document(item.text)
        targets = np.ones(len(tokens), bool)
    else:
        tokens, sizes, targets = _conversation(Rendered(item.text, item.answers), tokenizer)
        same = True
    cuts = [slice(offset, offset + PIECE_TOKENS) for offset in range(0, len(tokens), PIECE_TOKENS)]
    of_item = lambda cut: Record(item.domain, cut.start, item.id, tokens[cut], sizes[cut], targets[cut])
    return [of_item(cut) for cut in cuts], same


def _conversation(rendered: Rendered, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns tokens, sizes and targets of a conversation, which ends with the end-of-text token as all documents do.

    A template that ends answers with a token of its own says all that a model has to learn of ends. Where it does not,
    and an answer is the last of the text, the end-of-text token is a target too.
    """
    tokens, sizes, targets = tokenizer.encode_chat(rendered)
    if tokens[-1] == tokenizer.eos:
        return tokens, sizes, targets
    has_end = np.isin(tokens[targets], tokenizer.silent).any()
    ends = bool(targets[-1]) and not has_end
    return np.append(tokens, np.int32(tokenizer.eos)), np.append(sizes, np.int32(0)), np.append(targets, ends)


def read_index(path: Path, sha256: str = "") -> dict[str, np.ndarray]:
    """Returns the columns of a shard. Raises `UserError` for a file that is damaged or has not the given hash."""
    try:
        content = path.read_bytes()
        if sha256 and hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError("its hash is not the manifest's")
        index = npz.read_from(io.BytesIO(content), len(content))
        return {name: index[name] for name in COLUMNS}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged ({error}); {AGAIN}") from error


def is_prepared(directory: Path) -> bool:
    return os.path.isfile(directory / "manifest.json") and any(directory.glob("shard-*.array_record"))


def write_manifest(directory: Path, manifest: dict[str, Any], shards: Sequence[Path]) -> None:
    """Adds each shard's size and the hash of its index, then a hash of it all."""
    described = {
        path.stem: {
            "bytes": path.stat().st_size,
            "index": hashlib.sha256(path.with_suffix(".npz").read_bytes()).hexdigest(),
        }
        for path in shards
    }
    manifest = {"format": FORMAT, **manifest, "shards": described}
    write_json(directory / "manifest.json", {**manifest, "digest": digest(manifest)})


def read_manifest(directory: Path, with_shards: bool = True) -> dict[str, Any]:
    """Returns the manifest, once it is known to be as it was written and every shard to be there in its full size; or,
    without `with_shards`, the index of every shard.
    """
    path = directory / "manifest.json"
    manifest = read_object(path)
    if manifest.get("format") != FORMAT:
        found = f"format {manifest['format']!r}" if "format" in manifest else "an unknown format"
        raise UserError(f"{path}: prepared in {found}, need {FORMAT}; {AGAIN}")
    if digest({name: value for name, value in manifest.items() if name != "digest"}) != manifest.get("digest"):
        raise UserError(f"{path}: changed after it was written; {AGAIN}")
    if wrong := next(misshapen(manifest, _MANIFEST), None):
        raise UserError(f"{path}: damaged at {wrong}; {AGAIN}")
    if not manifest["shards"]:
        raise UserError(f"{path}: damaged: names no shard; {AGAIN}")
    for name, shard in manifest["shards"].items():
        if not re.fullmatch(r"shard-\d{5,}", name):
            raise UserError(f"{path}: {name!r} is no name of a shard, as in shard-00000; {AGAIN}")
        records = ((f"{name}.array_record", shard["bytes"]),) if with_shards else ()
        for file, size in (*records, (f"{name}.npz", None)):
            file = directory / file
            if not file.is_file() or file.stat().st_size != (size or file.stat().st_size):
                state = f"has {file.stat().st_size} bytes, not {size}" if file.is_file() else "is missing"
                raise UserError(f"{file}: {state}; {AGAIN}")
    return manifest


def _reader(path: Path) -> ArrayRecordReader:
    try:
        return ArrayRecordReader(
            str(path), "readahead_buffer_size:0,max_parallelism:0"
        )  # rows are read in random order
    except Exception as error:  # the library raises what its C++ status maps to
        raise UserError(f"{path}: damaged; {AGAIN}") from error


class Store:
    """Random access to the pieces of a prepared directory, numbered over all shards. Safe to use from many threads."""

    def __init__(self, directory: Path, quarantine: Quarantine | None = None) -> None:
        """quarantine: what may be left out where it cannot be read; nothing without it."""
        self.directory = directory
        self._quarantine = Quarantine(0) if quarantine is None else quarantine
        self.manifest = read_manifest(directory, with_shards=not self._quarantine.is_on)
        self.tokenizer = load_from(directory)
        made = self.manifest["tokenizer"]
        if self.tokenizer.fingerprint != made["fingerprint"]:
            was = f"prepared with {made['spec']!r} (fingerprint {made['fingerprint']})"
            other = f"the tokenizer there now has {self.tokenizer.fingerprint}; put the old one back, or {AGAIN}"
            raise UserError(f"{directory}: {was}, but {other}")
        shards = self.manifest["shards"]
        self._paths = [directory / f"{name}.array_record" for name in shards]
        indexes = [read_index(path.with_suffix(".npz"), shards[path.stem]["index"]) for path in self._paths]
        self._first = np.cumsum([0] + [len(index["length"]) for index in indexes])  # piece that each shard starts with
        documents = np.cumsum([0] + [index["document"][-1] + 1 for index in indexes])
        for index, start in zip(indexes, documents):
            index["document"] = index["document"] + start
        self.columns = {name: np.concatenate([index[name] for index in indexes]) for name in COLUMNS}
        kinds = [source.get("kind", "text") for source in self.manifest["sources"]]  # texts had none before
        self.is_chat_I = np.isin(self.columns["source"], [n for n, kind in enumerate(kinds) if kind == "chat"])
        self._readers = [None if self._quarantine.is_on else _reader(path) for path in self._paths]

    def read(self, piece: int) -> Record:
        shard = int(np.searchsorted(self._first, piece, side="right")) - 1
        number = int(piece - self._first[shard])
        name = f"{self.directory.name}/{self._paths[shard].name}:{number}"
        if name in self._quarantine:
            return self._left_out(piece)
        try:
            return self._read(piece, shard, number)
        except UserError as error:
            self._quarantine.add(name, error)
            return self._left_out(piece)

    def _left_out(self, piece: int) -> Record:
        """A record of the length of one that is left out, nothing of which is to be predicted."""
        length = int(self.columns["length"][piece])
        none = np.zeros(length, np.int32)
        domain = int(self.columns["domain"][piece])
        return Record(domain, 0, "", np.full(length, self.tokenizer.eos, np.int32), none, none.astype(bool))

    def _read(self, piece: int, shard: int, number: int) -> Record:
        if self._readers[shard] is None:
            self._readers[shard] = _reader(self._paths[shard])
        try:
            (raw,) = self._readers[shard].read([number])
        except Exception as error:  # the library raises what its C++ status maps to
            raise UserError(f"{self._paths[shard]}: record {number} is damaged; {AGAIN}") from error
        if record_hash(raw) != int(self.columns["check"][piece]):
            raise UserError(f"{self._paths[shard]}: record {number} is not the one that was written; {AGAIN}")
        return decode_record(raw, self.tokenizer)


class Sizes:
    """A store that gives the bytes of text that a token stands for in the place of the token."""

    def __init__(self, store: Store) -> None:
        self._store, self.tokenizer = store, store.tokenizer

    def read(self, piece: int) -> Record:
        record = self._store.read(piece)
        return record._replace(tokens=record.sizes)
