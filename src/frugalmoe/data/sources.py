"""Documents of a `config.data`: files, directories and globs, Hugging Face datasets, the built-in corpora.

A directory gives the files whose names say what they hold (`readers.SUFFIXES`), tables and .json only if they have the
text field; hidden files and links to directories are left out, links to files are followed. A glob, or a file's own
name, takes any text. What was left out is told.
"""

import collections
import dataclasses
import glob
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from frugalmoe import found
from frugalmoe.data import conversations, corpus, mixed, quickstart, readers
from frugalmoe.data.cache import cache_root
from frugalmoe.data.chat import ChatTemplate
from frugalmoe.data.tokenizer import known
from frugalmoe.errors import UserError, needs_package
from frugalmoe.schema import Data, FrozenDict, Source

ALL = 1.0  # as the fraction: all documents are validation, and none is trained on
BUILT_IN = {"quickstart": quickstart.build, "mixed": mixed.build}


class Document(NamedTuple):
    text: str
    domain: str
    id: str  # where it comes from: FILE, FILE:LINE, FILE#ROW
    # Of a conversation: characters begin .. end - 1 of its answers, which alone are trained on. None: of a text.
    answers: tuple[tuple[int, int], ...] | None = None


@dataclasses.dataclass(frozen=True)
class Input:
    """A `Source` with its name and with a built-in corpus replaced by the directory it was built into."""

    field: str  # what an error message calls it
    name: str
    source: Source
    hf: tuple[str, str] | None = None  # (name, split)
    root: Path | None = None
    files: tuple[Path, ...] = ()
    left_out: str = ""  # what was found but is not read
    built_in: bool = False
    outside: found.Outside | None = None  # the Python file that defines CORPUS
    template: ChatTemplate | None = None  # of conversations
    # Hashes of what it gave, one for each reading; more than one means that it changes.
    digests: set[str] = dataclasses.field(default_factory=set, compare=False)

    @property
    def where(self) -> str:
        return f"{self.field}={self.source.path!r}"

    def identity(self) -> list[Any]:
        """Returns what must be equal for prepared data to be used again: for files their names, sizes and times.

        A Hugging Face data set is its name and split: the hub is not asked again.
        """
        stats = [(file.relative_to(self.root).as_posix(), file.stat()) for file in self.files]
        files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        place = Path(self.hf[0] if self.hf else self.root)
        place = str(place.resolve() if place.exists() else place)
        options = dataclasses.asdict(dataclasses.replace(self.source, path="", weight=0.0))
        if self.template:
            options["template"] = [self.template.source, dict(self.template.tokens)]
        else:  # texts that are prepared already have no such options
            options = {name: value for name, value in options.items() if name not in ("kind", "chat_fields")}
        if self.outside:
            return [self.name, options, self.outside.sha256, self.fingerprint()]
        return [self.name, options, self.hf, place, files]

    def places(self) -> dict[Any, str]:
        """What its texts are -> how it is called: files, by whatever name they are reached, a Python file, or a Hugging
        Face data set with its split.
        """
        if self.hf:
            name = "hf:" + ":".join(self.hf)
            return {name: name}
        return {_identity(file): str(file.resolve()) for file in ([self.outside.path] if self.outside else self.files)}

    @property
    def corpus(self) -> corpus.Corpus:
        return self.outside.module.CORPUS

    def fingerprint(self) -> str:
        """Returns the fingerprint that the user's corpus gives. Raises `UserError` where it gives no text."""
        with found.one_line_errors(self.where, str(self.outside.path)):
            value = self.corpus.fingerprint()
        if not isinstance(value, str):
            raise UserError(f"{self.where}: fingerprint() gives {type(value).__name__}, must be a string")
        return value


class Notes:
    """What a user should know of the documents of an input, counted while they are read."""

    def __init__(self) -> None:
        self.empty: list[str] = []  # files that gave no document
        self.skipped = self.blank = self.carriage_returns = self.documents = 0
        self.chat = conversations.Count()

    def lines(self, source: Input) -> list[str]:
        told = []
        if self.empty:
            more = f" and {len(self.empty) - 5} more" if len(self.empty) > 5 else ""
            told.append(f"no document in {', '.join(self.empty[:5])}{more}")
        if self.skipped:
            told.append(f"skipped {self.skipped:,} records without {' or '.join(map(repr, columns(source.source)))}")
        if self.blank:
            told.append(f"left out {self.blank:,} records or files of white space alone")
        if self.carriage_returns:
            told.append(
                f"{self.carriage_returns:,} of {self.documents:,} documents have line ends \\r\\n, which are kept"
            )
        return [f"{source.where}: {line}" for line in (*told, *self.chat.lines())]


def open_inputs(data: Data, progress: bool) -> list[Input]:
    """Returns the inputs of a config, sorted by name. Every path is checked; documents are not read yet."""
    named = named_sources(data)
    weights = [source.weight for _, _, source in named]
    if any(weights):
        for _, name, source in named:
            if not 0 < source.weight < float("inf"):
                rule = "must be positive for every source, or 0 for all (in proportion to their tokens)"
                raise UserError(f"data.sources.{name}.weight={source.weight}: {rule}")
    return [_open_input(field, name, source, data, progress) for field, name, source in named]


def named_sources(data: Data) -> list[tuple[str, str, Source]]:
    """Returns (field of the path, name or "", source) of a config's sources, sorted by name."""
    if data.validation_fraction == ALL and data.validation.path:  # see `of_validation`
        return [("data.validation.path", "", data.validation)]
    if not data.sources:
        return [("data.path", "", Source(path=data.path, text_field=data.text_field, kind=data.kind))]
    return [(f"data.sources.{name}.path", name, source) for name, source in sorted(data.sources.items())]


def of_validation(data: Data, tokenizer: str) -> Data:
    """Returns a config's own validation set as data by themselves, of which nothing is trained on."""
    return dataclasses.replace(data, path="", sources=FrozenDict(), validation_fraction=ALL, tokenizer=tokenizer)


def check_apart(training: Iterable[Input], validation: Iterable[Input]) -> None:
    """Raises `UserError` where a validation set and the training data name the same file, data set or corpus."""
    trained = {place: source.where for source in training for place in source.places()}
    for source in validation:
        for place, name in source.places().items():
            if place in trained:
                rule = f"{name} is training data too ({trained[place]}); a validation set must be none of them"
                raise UserError(f"{source.where}: {rule}")


def _identity(file: Path) -> tuple:
    """The same of all links to a file."""
    stat = file.stat()
    return stat.st_dev, stat.st_ino or str(file.resolve())


def _open_input(field: str, name: str, source: Source, data: Data, progress: bool) -> Input:
    opened = _opened(field, name, source, data, progress)
    return opened if source.kind == "text" else dataclasses.replace(opened, template=_template(opened, data))


def _template(source: Input, data: Data) -> ChatTemplate:
    """The chat template of a config's tokenizer."""
    tokenizer = known(data.tokenizer)
    if tokenizer is None or tokenizer.chat is None:
        rule = "has no chat template, which writes conversations; name the directory of a tokenizer that has one"
        raise UserError(f"{source.where}: kind='chat': data.tokenizer={data.tokenizer!r} {rule}")
    return tokenizer.chat


def _opened(field: str, name: str, source: Source, data: Data, progress: bool) -> Input:
    kind, _, rest = source.path.partition(":")
    if kind == "hf":
        dataset, _, split = rest.partition(":")
        if not dataset:
            raise UserError(f"{field}={source.path!r}: must be hf:NAME or hf:NAME:SPLIT")
        return Input(field, name or Path(dataset).name, source, hf=(dataset, split or "train"))
    if kind in BUILT_IN:
        root = BUILT_IN[kind](cache_root(data), progress)
        files = corpus.files(root, rest, f"{field}={source.path!r}")
        return Input(field, name or kind, source, root=root, files=files, built_in=True)
    if found.defines(source.path, "CORPUS"):
        return _open_corpus(field, name, source)
    root, files, left_out = _find(source, field)
    folder = root.parent if root.is_file() else root
    return Input(field, name or root.resolve().stem, source, root=folder, files=files, left_out=left_out)


def _open_corpus(field: str, name: str, source: Source) -> Input:
    where = f"{field}={source.path!r}"
    outside = found.outside(source.path, where)
    if not isinstance(outside.module.CORPUS, corpus.Corpus):
        raise UserError(f"{where}: {outside.path}: CORPUS must be a frugalmoe.data.corpus.Corpus(...)")
    return Input(field, name or outside.path.stem, source, root=outside.path.parent, outside=outside)


def _find(source: Source, field: str) -> tuple[Path, tuple[Path, ...], str]:
    """Returns the root of a path (file, directory, or a glob's fixed part), its files in order, what was left out."""
    path, root = source.path, Path(os.path.expanduser(source.path))
    if path and os.path.isfile(root):
        return root, (root,), ""
    if path and os.path.isdir(root):
        found, left_out = _walk(root, field)
        chosen = [file for file in found if _is_named(file, source)]
    elif glob.has_magic(path):
        names = [Path(file) for file in glob.glob(str(root), recursive=True)]
        found = [file for file in names if file.is_file()]
        left_out = collections.Counter({"directory": len(names) - len(found)})
        root = next(parent for parent in root.parents if not glob.has_magic(str(parent)))
        chosen = [file for file in found if _is_named(file, source) or _is_other_text(file, source)]
    elif path and os.path.exists(root):
        raise UserError(f"{field}={path!r}: is no regular file, and must be read more than once; write it into one")
    else:
        valid = ", ".join(("a glob", "hf:NAME[:SPLIT]", *BUILT_IN, "a Python file that defines CORPUS"))
        raise UserError(f"{field}={path!r}: no such file or directory; also valid: {valid}")
    others = collections.Counter(str(readers.kind(file)) for file in set(found).difference(chosen))
    told, hint = _told(others + left_out), ""
    if others and os.path.isdir(root) and not glob.has_magic(path):
        hint = f"; a glob takes any text: {os.path.join(path, '**', '*' + _commonest(others))!r}"
    elif others:
        hint = f"; they are no text, or tables and JSON without {source.text_field!r}"
    if not chosen:
        there = f"there are {told}" if told else "nothing is there"
        if source.kind == "chat":
            rule = f"conversations are records, with {', '.join(columns(source))}, and no file of plain text"
            raise UserError(f"{field}={path!r}: no file to read, {there}; {rule}")
        raise UserError(f"{field}={path!r}: no file to read, {there}; read are {readers.accepted()}{hint}")
    return root, tuple(sorted(chosen)), f"{field}={path!r}: left out {told}{hint}" if told else ""


def _walk(root: Path, field: str) -> tuple[list[Path], collections.Counter]:
    """Returns the regular files under a directory, and how many of each other kind there are."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{field}={str(root)!r}: {error.filename}: cannot be listed ({error.strerror})")

    found, others = [], collections.Counter()
    for folder, folders, files in os.walk(root, onerror=refuse):
        hidden = [name for name in (*folders, *files) if name.startswith(".")]
        folders[:] = [name for name in folders if name not in hidden]
        others["hidden"] += len(hidden)
        others["linked directory"] += sum(os.path.islink(os.path.join(folder, name)) for name in folders)
        paths = [Path(folder, name) for name in files if name not in hidden]
        found += [path for path in paths if path.is_file()]
        others["special or broken"] += sum(not path.is_file() for path in paths)
    return found, others


def _is_named(file: Path, source: Source) -> bool:
    """Returns whether a file of a directory is read. A table or a .json is only if its records have the text field."""
    kind = readers.kind(file)
    if source.kind == "chat" and kind.suffix in readers.TEXT:
        return False
    if not kind.is_known or kind.suffix not in (*readers.JSON, *readers.TABLES):
        return kind.is_known
    try:
        first = next(readers.records(file, "", source.encoding, columns(source)), None)
    except UserError:
        return False
    except readers.ERRORS:  # a file that is cut off or damaged: reading it will raise
        return True
    if source.kind == "chat":
        return first is not None and _messages(first.value, source) is not None
    return first is not None and isinstance(_value(first.value, source.text_field), str)


def columns(source: Source) -> tuple[str, ...]:
    """The fields of a record that hold what is read."""
    return tuple(source.chat_fields.split(",")) if source.kind == "chat" else (source.text_field,)


def _messages(record: Any, source: Source) -> Any:
    return conversations.messages_of(record, columns(source), _value) if isinstance(record, dict) else None


def _is_other_text(file: Path, source: Source) -> bool:
    return not readers.kind(file).is_known and readers.is_text(file, source.encoding)


def _commonest(kinds: collections.Counter) -> str:
    suffix = kinds.most_common(1)[0][0]
    return suffix if suffix.startswith(".") else ""


def _told(counts: collections.Counter) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.most_common() if count)


def documents(source: Input, notes: Notes | None = None) -> Iterator[Document]:
    """Yields every document that holds more than white space, in a fixed order. The text is as in the file."""
    notes = notes or Notes()
    if source.hf:
        yield from _documents(_hf_records(source), source, notes)
    if source.outside:
        yield from _documents(_corpus_records(source), source, notes)
    for file in source.files:
        if source.built_in:
            corpus.check(source.root, file)
        before = notes.documents
        try:
            yield from _documents(_records(file, source), source, notes)
        except readers.ERRORS as error:
            raise UserError(f"{file}: cannot be read ({str(error).partition(chr(10))[0]})") from error
        if notes.documents == before:
            notes.empty.append(file.relative_to(source.root).as_posix())
    if not notes.documents:
        told = [line.removeprefix(f"{source.where}: ") for line in notes.lines(source)]
        raise UserError("; ".join([f"{source.where}: holds no text", *told]))


def _records(file: Path, source: Input) -> Iterator[readers.Found]:
    name, encoding = file.relative_to(source.root).as_posix(), source.source.encoding
    kind = readers.kind(file)
    if kind.is_known and kind.suffix not in readers.TEXT:
        return readers.records(file, name, encoding, columns(source.source))
    return readers.texts(file, name, encoding, alone=len(source.files) == 1)


def _documents(found: Iterable[readers.Found], source: Input, notes: Notes) -> Iterator[Document]:
    for record in found:
        if source.template:
            if document := _conversation(record, source, notes):
                notes.documents += 1
                yield document
            continue
        text, domain = _fields(record, source.source)
        if text is None:
            notes.skipped += 1
        elif not text.strip():
            notes.blank += 1
        else:
            notes.documents += 1
            notes.carriage_returns += "\r\n" in text
            yield Document(text, source.source.domain or domain or source.name, record.id)


def _conversation(record: readers.Found, source: Input, notes: Notes) -> Document | None:
    """Returns a conversation as its template writes it, None for a record that is counted and left out."""
    messages = _messages(record.value, source.source)
    if messages is None:
        if source.source.null_text == "skip":
            notes.skipped += 1
            return None
        messages_field, *others = columns(source.source)
        rule = f"no {messages_field!r}, and no {' with '.join(map(repr, others))} (chat_fields)"
        there = ", ".join(record.value)[:200] if isinstance(record.value, dict) else type(record.value).__name__
        raise UserError(f"{record.where}: {rule}; it has {there or 'no field'}; null_text='skip' skips such records")
    rendered = conversations.written(source.template, messages, record.where, notes.chat)
    if rendered is None:
        return None
    domain = source.source.domain or _domain(record.value, record.where) or source.name
    return Document(rendered.text, domain, record.id, rendered.answers)


def _corpus_records(source: Input) -> Iterator[readers.Found]:
    """Yields what the user's corpus gives. Raises `UserError` where it raises, or gives other documents than before."""
    content, number = hashlib.sha256(), 0
    with found.one_line_errors(source.where, str(source.outside.path)):
        documents = iter(source.corpus.documents())
    end = object()
    while True:
        with found.one_line_errors(source.where, str(source.outside.path)):
            record = next(documents, end)
        if record is end:
            break
        number += 1
        if isinstance(record, Mapping):
            record = dict(record)
        content.update(repr(record).encode(errors="surrogatepass"))
        yield readers.Found(record, f"{source.where}: document {number}", f"{source.name}:{number}")
    source.digests.add(content.hexdigest())
    if len(source.digests) > 1:
        rule = "documents() gives others each time that it is called; they are read twice"
        raise UserError(f"{source.where}: {rule}")


def _hf_records(source: Input) -> Iterator[readers.Found]:
    name, split = source.hf
    try:
        import datasets
    except ImportError as error:
        raise needs_package(source.where, "datasets>=4") from error
    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub, the builder scripts and the file readers raise many kinds
        message = (str(error) or repr(error)).partition(chr(10))[0]
        raise UserError(f"{source.where}: cannot be loaded ({message})") from error
    for row, record in enumerate(dataset):
        yield readers.Found(record, f"{source.where} row {row}", f"{name}:{split}#{row}")


def _fields(record: readers.Found, source: Source) -> tuple[str | None, str]:
    """Returns (text, or None for a record to skip; domain or "") of a record."""
    field, where, fields = source.text_field, record.where, record.value
    if isinstance(fields, str):  # a text file; a string among JSON values
        fields = {field: fields}
    if not isinstance(fields, dict):
        raise UserError(f"{where}: must be an object with the field {field!r}, is {type(fields).__name__}")
    text = _value(fields, field)
    if isinstance(text, bytes):  # a binary column of Parquet
        try:
            text = text.decode(source.encoding)
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: field {field!r} is not {source.encoding} at byte {error.start}") from error
    if text is None and source.null_text == "skip":
        return None, ""
    if not isinstance(text, str):
        state = f"is {type(text).__name__}, must be a string"
        if text is None:
            state = "is null or absent; null_text='skip' of its source skips and counts such records"
        raise UserError(f"{where}: field {field!r} (text_field) {state}; fields: {', '.join(fields)[:200] or 'none'}")
    _check_encodes(field, text, where)
    return text, _domain(fields, where)


def _domain(fields: Mapping[str, Any], where: str) -> str:
    """The domain that a record names, empty where it names none."""
    domain = fields.get("domain")
    domain = domain if isinstance(domain, str) else ""
    _check_encodes("domain", domain, where)
    return domain


def _check_encodes(name: str, value: str, where: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field {name!r} has a lone surrogate at character {error.start}") from error


def _value(fields: Any, field: str) -> Any:
    """Returns a field by its name, or by a dotted path through objects; None where it is not there."""
    if not isinstance(fields, dict):
        return None
    if field in fields:
        return fields[field]
    name, _, rest = field.partition(".")
    return _value(fields.get(name), rest) if rest else None
