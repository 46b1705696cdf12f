"""Documents of a `config.data`: files, directories and globs, Hugging Face datasets, the built-in corpora."""

import dataclasses
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow
import pyarrow.parquet
import zstandard

from frugalmoe.config.schema import Data, Source
from frugalmoe.data import corpus, mixed, quickstart
from frugalmoe.data.cache import cache_root
from frugalmoe.data.text import cut
from frugalmoe.errors import UserError, needs_package

BUILT_IN = {"quickstart": quickstart.build, "mixed": mixed.build}
SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
PIECE_CHARACTERS = (256, 16_384)  # least and most in a document cut from a single text file; between them, 20 documents


class Document(NamedTuple):
    text: str
    domain: str
    id: str  # where it comes from: FILE, FILE:LINE, FILE#ROW


@dataclasses.dataclass(frozen=True)
class Input:
    """A `Source` with its name and with a built-in corpus replaced by the directory it was built into."""

    field: str  # what an error message calls it
    name: str
    source: Source
    hf: tuple[str, str] | None = None  # (name, split)
    root: Path | None = None
    files: tuple[Path, ...] = ()

    def identity(self) -> list[Any]:
        """What must be equal for prepared data to be used again: for files their names, sizes and times.

        A Hugging Face data set is its name and split: the hub is not asked again.
        """
        stats = [(file.relative_to(self.root).as_posix(), file.stat()) for file in self.files]
        files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        place = Path(self.hf[0] if self.hf else self.root)
        place = str(place.resolve() if place.exists() else place)
        return [self.name, self.source.text_field, self.source.domain, self.hf, place, files]


def open_inputs(data: Data, progress: bool) -> list[Input]:
    """The inputs of a config, sorted by name; every path is checked, nothing is read yet."""
    if not data.sources:
        return [_open_input("data.path", "", Source(path=data.path), data, progress)]
    named = sorted(data.sources.items())
    weights = [source.weight for _, source in named]
    if any(weights):
        for name, source in named:
            if not 0 < source.weight < float("inf"):
                rule = "must be positive for every source, or 0 for all (in proportion to their tokens)"
                raise UserError(f"data.sources.{name}.weight={source.weight}: {rule}")
    return [_open_input(f"data.sources.{name}.path", name, source, data, progress) for name, source in named]


def _open_input(field: str, name: str, source: Source, data: Data, progress: bool) -> Input:
    kind, _, rest = source.path.partition(":")
    if kind == "hf":
        dataset, _, split = rest.partition(":")
        if not dataset:
            raise UserError(f"{field}={source.path!r}: must be hf:NAME or hf:NAME:SPLIT")
        return Input(field, name or Path(dataset).name, source, hf=(dataset, split or "train"))
    if kind in BUILT_IN:
        root = BUILT_IN[kind](cache_root(data), progress)
        files = corpus.files(root, rest, f"{field}={source.path!r}")
        return Input(field, name or kind, source, root=root, files=files)
    root, files = _find(source.path, field)
    return Input(field, name or root.resolve().stem, source, root=root.parent if root.is_file() else root, files=files)


def _find(path: str, field: str) -> tuple[Path, tuple[Path, ...]]:
    """The root of a path (file, directory, or a glob's fixed part) and its files, sorted."""
    accepted = ", ".join(SUFFIXES)
    root = Path(path).expanduser()
    if path and root.is_file():
        if not root.name.endswith(SUFFIXES):
            raise UserError(f"{field}={path!r}: a file must end in one of {accepted}")
        return root, (root,)
    if path and root.is_dir():
        found = [file for file in root.rglob("*") if not any(p.startswith(".") for p in file.relative_to(root).parts)]
    elif glob.has_magic(path):
        found = [Path(file) for file in glob.glob(str(root), recursive=True)]
        root = next(parent for parent in root.parents if not glob.has_magic(str(parent)))
    else:
        valid = ", ".join(("a glob", "hf:NAME[:SPLIT]", *BUILT_IN))
        raise UserError(f"{field}={path!r}: no such file or directory; also valid: {valid}")
    files = tuple(sorted(file for file in found if file.name.endswith(SUFFIXES) and file.is_file()))
    if not files:
        raise UserError(f"{field}={path!r}: no file ends in one of {accepted}")
    return root, files


def documents(source: Input) -> Iterator[Document]:
    """Every document that holds more than white space, in a fixed order. The text is as in the file."""
    empty = True
    for text, domain, where in _records(source):
        if text.strip():
            empty = False
            yield Document(text, source.source.domain or domain or source.name, where)
    if empty:
        raise UserError(f"{source.field}={source.source.path!r}: holds no text")


def _records(source: Input) -> Iterator[tuple[str, str, str]]:
    """(text, domain or "", id) of each record."""
    if source.hf:
        yield from _hf_records(source)
    for file in source.files:
        where = file.relative_to(source.root).as_posix()
        try:
            if file.name.endswith((".txt", ".md")):
                yield from _text_records(file, where, alone=len(source.files) == 1)
            elif file.name.endswith(".parquet"):
                yield from _parquet_records(file, where, source.source.text_field)
            else:
                yield from _jsonl_records(file, where, source.source.text_field)
        except (OSError, EOFError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException) as error:
            raise UserError(f"{file}: cannot be read ({str(error).partition(chr(10))[0]})") from error


def _text_records(file: Path, where: str, alone: bool) -> Iterator[tuple[str, str, str]]:
    """A text file is one document; a source that is one text file is cut, for a validation split needs several."""
    text = _decode(file.read_bytes(), file, 0).removeprefix("\ufeff")
    if not alone:
        yield text, "", where
        return
    least, most = PIECE_CHARACTERS
    for n, piece in enumerate(cut(text, min(max(len(text) // 20, least), most))):
        yield piece, "", f"{where}#{n}"


def _jsonl_records(file: Path, where: str, field: str) -> Iterator[tuple[str, str, str]]:
    offset = 0
    with _open_lines(file) as lines:
        for number, line in enumerate(lines, 1):
            text = _decode(line, file, offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                raise UserError(f"{file}:{number}: not JSON ({error.msg} at column {error.colno})") from error
            yield *_fields(record, field, f"{file}:{number}"), f"{where}:{number}"


def _open_lines(file: Path) -> BinaryIO:
    if file.name.endswith(".gz"):
        return gzip.open(file, "rb")
    if file.name.endswith(".zst"):
        raw = open(file, "rb")  # noqa: SIM115  closed with the reader
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    return open(file, "rb")


def _parquet_records(file: Path, where: str, field: str) -> Iterator[tuple[str, str, str]]:
    with pyarrow.parquet.ParquetFile(file) as table:
        names = table.schema_arrow.names
        columns = [name for name in dict.fromkeys((field, "domain")) if name in names]
        if field not in columns:
            raise UserError(f"{file}: no column {field!r} (data text_field); columns: {', '.join(names)}")
        row = 0
        for batch in table.iter_batches(columns=columns, batch_size=1024):
            for record in batch.to_pylist():
                yield *_fields(record, field, f"{file}#{row}"), f"{where}#{row}"
                row += 1


def _hf_records(source: Input) -> Iterator[tuple[str, str, str]]:
    name, split = source.hf
    where = f"{source.field}={source.source.path!r}"
    try:
        import datasets
    except ImportError as error:
        raise needs_package(where, "datasets>=4") from error
    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub, the builder scripts and the file readers raise many kinds
        raise UserError(f"{where}: cannot be loaded ({(str(error) or repr(error)).partition(chr(10))[0]})") from error
    for row, record in enumerate(dataset):
        yield *_fields(record, source.source.text_field, f"{where} row {row}"), f"{name}:{split}#{row}"


def _fields(record: Any, field: str, where: str) -> tuple[str, str]:
    """(text, domain or "") of a record."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be a JSON object with the field {field!r}, is {type(record).__name__}")
    if not isinstance(record.get(field), str):
        state = f"is {type(record[field]).__name__}, must be a string" if field in record else "is absent"
        raise UserError(f"{where}: field {field!r} (text_field) {state}; fields: {', '.join(record) or 'none'}")
    try:
        record[field].encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field {field!r} has a lone surrogate at character {error.start}") from error
    domain = record.get("domain")
    return record[field], domain if isinstance(domain, str) else ""


def _decode(raw: bytes, file: Path, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {offset + error.start} (0x{raw[error.start]:02x})") from error
