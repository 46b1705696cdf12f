"""Reads files by the end of their names: texts or records (JSON lines, JSON, tables, Parquet), compressed or not.

A compressed or columnar file must be whole: one that ends inside a frame, a member or a footer is refused, and so is
what follows the last. A file of several frames that was cut exactly between two of them cannot be told from a whole
one. Nothing is unpacked without bounds: see LARGEST and EXPANSION.
"""

import bz2
import codecs
import csv
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import zstandard

from frugalmoe.data.text import cut
from frugalmoe.errors import UserError

LARGEST = 128 << 20  # characters of one document, record, or line of a file
EXPANSION = 500  # what unpacks to more than LARGEST bytes must not be more than this times its size: text never is
TEXT = (".txt", ".md")
LINES = (".jsonl", ".ndjson")
JSON = (".json",)
TABLES = {".csv": ",", ".tsv": "\t"}  # with a header; separator
COLUMNS = (".parquet",)
SUFFIXES = (*TEXT, *LINES, *JSON, *TABLES, *COLUMNS)
CODECS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(31),
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
}
ERRORS = (
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zstandard.ZstdError,
    pyarrow.ArrowException,
    csv.Error,
    UnicodeDecodeError,
)
CHUNK = 2048  # compressed bytes at a time: what they unpack to is bounded by the formats (zstd: 128 KB for 4 bytes)
PIECE_CHARACTERS = (256, 16_384)  # least and most in a document cut from a single text file; between them, 20 documents


class Kind(NamedTuple):
    """What a name says."""

    suffix: str  # one of SUFFIXES, or what the name ends in
    codec: str  # one of CODECS, or ""

    @property
    def is_known(self) -> bool:
        return self.suffix in SUFFIXES and not (self.codec and self.suffix in COLUMNS)

    def __str__(self) -> str:
        return (self.suffix + self.codec) or "without suffix"


def kind(file: Path) -> Kind:
    name = file.name.lower()
    codec = next((codec for codec in CODECS if name.endswith(codec)), "")
    return Kind(Path(name.removesuffix(codec)).suffix, codec)


def accepted() -> str:
    return f"{' '.join(SUFFIXES)}, all but .parquet also with {' '.join(CODECS)}"


def blocks(file: Path) -> Iterator[bytes]:
    """Yields the file's bytes, unpacked, in blocks of any size. Raises one of ERRORS for a file that is not whole."""
    codec, size = kind(file).codec, file.stat().st_size
    unpacked = 0
    with open(file, "rb") as raw:
        if not codec:
            while block := raw.read(1 << 20):
                yield block
            return
        for block in _unpacked(raw, CODECS[codec]):
            unpacked += len(block)
            _check_expansion(file, size, unpacked)
            yield block


def _check_expansion(where: Any, packed: int, unpacked: int) -> None:
    if unpacked > (most := max(LARGEST, EXPANSION * packed)):
        rule = f"the limit is {most:,}, {EXPANSION} times their number and at least {LARGEST:,}"
        raise UserError(f"{where}: {packed:,} bytes unpack to {unpacked:,} or more, as no text does; {rule}")


def _unpacked(raw: Any, new: Callable[[], Any]) -> Iterator[bytes]:
    codec = new()
    while chunk := raw.read(CHUNK):
        while chunk:
            if codec.eof:
                if not (chunk := chunk.lstrip(b"\0")):  # padding, as on tapes
                    break
                codec = new()
            if block := codec.decompress(chunk):
                yield block
            chunk = codec.unused_data if codec.eof else b""
    if not codec.eof:
        raise EOFError("it ends in the middle: cut off, or still being written")


def characters(file: Path, encoding: str) -> Iterator[str]:
    """Yields the file's text in blocks, without a byte order mark in front."""
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    read, started = 0, False
    for block in _and_last(blocks(file)):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block or b"", final=block is None)
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: {_undecodable(error, read - pending, encoding)}") from error
        except UnicodeError as error:
            raise UserError(f"{file}: not {encoding} ({error})") from error
        read += len(block or b"")
        if text and not started:
            started, text = True, text.removeprefix("\ufeff")
        if text:
            yield text


def _and_last(values: Iterable[bytes]) -> Iterator[bytes | None]:
    yield from values
    yield None


def _undecodable(error: UnicodeDecodeError, before: int, encoding: str) -> str:
    """Returns a message: which byte cannot be decoded and what may help. `before`: the bytes before its block."""
    byte = error.object[error.start]
    place = f"not {_shown(encoding)} at byte {before + error.start} (0x{byte:02x})"
    hint = "UTF-16" if before + error.start == 0 and byte in (0xFE, 0xFF) else "another encoding"
    return f"{place}; if it is in {hint}, name that as `encoding` of its source in data.sources"


def _shown(encoding: str) -> str:
    return "UTF-8" if codecs.lookup(encoding).name == "utf-8" else encoding


def lines(file: Path, encoding: str, blank: bool) -> Iterator[tuple[int, str]]:
    """Yields (number, line with its end, of which only \\n counts); without `blank`, blocks of blank lines are left
    out.
    """
    rest: list[str] = []
    size, number = 0, 1
    for block in characters(file, encoding):
        if not (blank or size) and not block.strip("\n"):
            number += len(block)
            continue
        *whole, last = block.split("\n")
        for line in whole:
            _check_size(size + len(line), f"{file}:{number}", "line")
            yield number, "".join([*rest, line, "\n"])
            rest, size, number = [], 0, number + 1
        rest.append(last)
        size += len(last)
        _check_size(size, f"{file}:{number}", "line")
    if last := "".join(rest):
        yield number, last


def _check_size(size: int, where: str, what: str) -> None:
    if size > LARGEST:
        raise UserError(f"{where}: a {what} of {size:,} characters or more; the limit is {LARGEST:,}")


class Found(NamedTuple):
    """A record, or a text alone."""

    value: Any
    where: str  # FILE:LINE or FILE#ROW, for messages
    id: str  # the same for ids, from the source's root


def texts(file: Path, name: str, encoding: str, alone: bool) -> Iterator[Found]:
    """Yields a text file as one document; one that is `alone` in its source in pieces, for a validation split needs
    several documents.
    """
    if not alone:
        size, parts = 0, []
        for part in characters(file, encoding):
            size += len(part)
            _check_size(size, str(file), "document")
            parts.append(part)
        yield Found(_text("".join(parts), file), str(file), name)
        return
    for n, piece in enumerate(_cut(characters(file, encoding))):
        yield Found(_text(piece, file), str(file), f"{name}#{n}")


def _cut(parts: Iterator[str]) -> Iterator[str]:
    """Yields the pieces that `cut` makes of a whole text, without holding the whole."""
    least, most = PIECE_CHARACTERS
    text, is_long = "", False
    for part in parts:
        text += part
        if len(text) >= 64 * most:
            is_long = True
            *pieces, text = cut(text, most)
            while len(text) < 2 * most:  # where a piece ends depends on that much after its start
                text = pieces.pop() + text
            yield from pieces
    yield from cut(text, most if is_long else min(max(len(text) // 20, least), most))


def _text(text: str, file: Path) -> str:
    if "\0" in text:
        rule = "not a text; if it is one in UTF-16, name that as `encoding` of its source in data.sources"
        raise UserError(f"{file}: holds a NUL character, {rule}")
    return text


def is_text(file: Path, encoding: str) -> bool:
    """Whether the first block of a file is text in that encoding."""
    try:
        return "\0" not in next(characters(file, encoding), "")
    except (UserError, *ERRORS):
        return False


def records(file: Path, name: str, encoding: str, fields: Sequence[str]) -> Iterator[Found]:
    """Yields the records of a file that is no plain text; those of Parquet have only their `fields` and `domain`."""
    suffix = kind(file).suffix
    if suffix in LINES:
        yield from _json_lines(file, name, encoding)
    elif suffix in JSON:
        yield from _json(file, name, encoding)
    elif suffix in TABLES:
        yield from _table(file, name, encoding, TABLES[suffix])
    else:
        yield from _parquet(file, name, fields)


# Numbers are never used, and Python refuses to read one of more than 4300 digits.
_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder(parse_int=lambda digits: int(digits[:100]))


def _parse(decode: Callable[[], Any], where: str) -> Any:
    try:
        return decode()
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        depth = sys.getrecursionlimit()
        raise UserError(f"{where}: nested too deep to be read; the limit is about {depth} levels") from error


def _json_lines(file: Path, name: str, encoding: str) -> Iterator[Found]:
    for number, line in lines(file, encoding, blank=False):
        if not line.isspace():
            where = f"{file}:{number}"
            yield Found(_parse(lambda line=line: _DECODER.decode(line), where), where, f"{name}:{number}")


class _Ahead:
    """A text that is read as far ahead as one value needs."""

    def __init__(self, file: Path, encoding: str) -> None:
        self.parts, self.text, self.at = characters(file, encoding), "", 0

    def more(self) -> bool:
        """Reads about as much again as is waiting; False at the end of the file."""
        waiting = self.text[self.at :]
        read, wanted = [], max(len(waiting), 1 << 16)
        while wanted > 0 and (part := next(self.parts, None)) is not None:
            read.append(part)
            wanted -= len(part)
        self.text, self.at = "".join([waiting, *read]), 0
        return bool(read)

    def mark(self) -> str:
        """Returns the next character that is no space; empty at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def value(self, where: str) -> Any:
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                if end == len(self.text) and self.more():  # a number may go on
                    continue
                self.at = min(end, len(self.text))
                return value
            except json.JSONDecodeError as error:
                waiting = len(self.text) - self.at
                _check_size(waiting, where, "record, or what is no JSON,")
                if not self.more():
                    raise UserError(f"{where}: not JSON ({error.msg}), or the file is cut off") from error


def _json(file: Path, name: str, encoding: str) -> Iterator[Found]:
    """Yields the elements of an array, or values that follow each other."""
    ahead = _Ahead(file, encoding)
    if array := ahead.mark() == "[":
        ahead.at += 1
    number, mark = 0, ahead.mark()
    while mark and not (array and mark == "]"):
        where = f"{file}#{number}"
        yield Found(_parse(lambda where=where: ahead.value(where), where), where, f"{name}#{number}")
        number, mark = number + 1, ahead.mark()
        if array and mark == ",":
            ahead.at += 1
            mark = ahead.mark() or "the end"
        elif array and mark != "]":
            raise UserError(f"{file}#{number}: not JSON (an array goes on with , or ends with ]), or cut off")
    ahead.at += array
    if array and (not mark or ahead.mark()):
        raise UserError(f"{file}: not JSON (text follows the array, or its end is cut off)")


def _table(file: Path, name: str, encoding: str, separator: str) -> Iterator[Found]:
    """Yields rows by the names of the header. Quoted cells may hold separators and line ends."""
    csv.field_size_limit(LARGEST)
    rows = csv.reader((line for _, line in lines(file, encoding, blank=True)), delimiter=separator, strict=True)
    header: list[str] | None = None
    try:
        for number, row in enumerate(row for row in rows if row):
            if header is None:
                header = row
                continue
            where = f"{file}:{rows.line_num}"
            if len(row) != len(header):
                raise UserError(f"{where}: has {len(row)} cells, the header {len(header)}: {', '.join(header)[:200]}")
            yield Found(dict(zip(header, row)), where, f"{name}#{number - 1}")
    except csv.Error as error:
        raise UserError(
            f"{file}:{rows.line_num}: not a table ({error}); a quote in a quoted cell is doubled"
        ) from error


def _parquet(file: Path, name: str, fields: Sequence[str]) -> Iterator[Found]:
    packed, unpacked, row = file.stat().st_size, 0, 0
    with pyarrow.parquet.ParquetFile(file) as table:
        names = table.schema_arrow.names
        columns = [column for column in dict.fromkeys((*fields, "domain")) if _has(table.schema_arrow, column)]
        if not set(fields) & set(columns):
            wanted = " or ".join(map(repr, fields))
            option = "text_field" if len(fields) == 1 else "chat_fields"
            raise UserError(f"{file}: no column {wanted} ({option} of the source); columns: {', '.join(names)}")
        for group in range(table.num_row_groups):  # to ask for a column's numbers can end the process, if damaged
            _check_expansion(f"{file}: row group {group}", packed, table.metadata.row_group(group).total_byte_size)
        for batch in table.iter_batches(columns=columns, batch_size=16):  # few: a row may be as large as LARGEST
            for record in _rows(batch, f"{file}#", row):
                _check_expansion(file, packed, unpacked := unpacked + _size(record))  # equal values are stored once
                yield Found(record, f"{file}#{row}", f"{name}#{row}")
                row += 1


def _size(value: Any) -> int:
    """Returns the characters or bytes of the texts in a value."""
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list):
        return sum(map(_size, value))
    return len(value) if isinstance(value, str | bytes) else 0


def _has(schema: pyarrow.Schema, column: str) -> bool:
    """Returns whether there is a column of that name, or of that dotted path through structs."""
    if column in schema.names:
        return True
    name, _, rest = column.partition(".")
    if not rest or name not in schema.names or not pyarrow.types.is_struct(schema.field(name).type):
        return False
    return _has(pyarrow.schema(list(schema.field(name).type)), rest)


def _rows(batch: pyarrow.RecordBatch, where: str, first: int) -> list[dict[str, Any]]:
    """Returns the records of a batch. Raises `UserError` that names the row of a string that is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            try:
                batch.slice(number, 1).to_pylist()
            except UnicodeDecodeError as error:
                place = f"not UTF-8 at byte {error.start} (0x{error.object[error.start]:02x})"
                raise UserError(f"{where}{first + number}: {place}") from error
        raise
