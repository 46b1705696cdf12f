"""Reading documents: every format gives the same text, every fault names its place on one line."""

import bz2
import gzip
import json
import lzma
import os
import random
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from frugalmoe.data import readers
from frugalmoe.data.sources import Notes, documents, open_inputs
from frugalmoe.data.text import cut
from frugalmoe.errors import UserError
from frugalmoe.schema import Data, Source

TEXTS = ["first text\nwith two lines", "zweiter Text: äöü 🙂", "third"]
LINES = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS).encode()


def read(data: Data):
    return [document for source in open_inputs(data, progress=False) for document in documents(source)]


def write_zst_in_two_frames(path):
    half = LINES.index(b"\n") + 1
    path.write_bytes(zstandard.compress(LINES[:half]) + zstandard.compress(LINES[half:]))


def write_parquet(path):
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3], "text": TEXTS}), path)


def write_with_a_wide_window(path):
    wide = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)  # `zstd --long=31`
    path.write_bytes(zstandard.ZstdCompressor(compression_params=wide).compress(LINES))


COMPRESSORS = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
TABLE = "n,text\r\n" + "".join(f'{n},"{text}"\r\n' for n, text in enumerate(TEXTS))
FORMATS = {
    "d.jsonl": lambda path: path.write_bytes(LINES),
    "d.JSONL": lambda path: path.write_bytes(LINES),
    "d.ndjson": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES),
    "d.json": lambda path: path.write_text(json.dumps([json.loads(line) for line in LINES.splitlines()], indent=1)),
    "lines.json": lambda path: path.write_bytes(LINES),
    "d.csv": lambda path: path.write_text("\ufeff" + TABLE, encoding="utf-8", newline=""),
    "d.tsv": lambda path: path.write_text(TABLE.replace(",", "\t"), encoding="utf-8", newline=""),
    "two.jsonl.zst": write_zst_in_two_frames,
    "wide.jsonl.zst": write_with_a_wide_window,
    "d.parquet": write_parquet,
    **{f"d.jsonl{codec}": lambda path, c=c: path.write_bytes(c(LINES)) for codec, c in COMPRESSORS.items()},
    "d.csv.gz": lambda path: path.write_bytes(gzip.compress(TABLE.encode())),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_record_format_gives_the_texts(name, tmp_path):
    FORMATS[name](tmp_path / name)
    found = read(Data(path=str(tmp_path / name)))
    assert [document.text for document in found] == TEXTS
    assert {document.domain for document in found} == {"d"} or not name.startswith("d.p")
    assert len({document.id for document in found}) == 3 and all(name in document.id for document in found)


def test_directory_and_glob(tmp_path):
    (tmp_path / "deep" / ".git").mkdir(parents=True)
    (tmp_path / "b.txt").write_text(TEXTS[0])
    (tmp_path / "deep" / "a.md").write_text(TEXTS[1])
    (tmp_path / "deep" / "skipped.rst").write_text("not read")
    (tmp_path / "deep" / ".git" / "hidden.txt").write_text("not read")
    (tmp_path / "empty.txt").write_text(" \n")
    assert [(d.text, d.id) for d in read(Data(path=str(tmp_path)))] == [(TEXTS[0], "b.txt"), (TEXTS[1], "deep/a.md")]
    assert [d.text for d in read(Data(path=str(tmp_path / "**" / "*.md")))] == [TEXTS[1]]


def test_a_single_text_file_is_cut_into_documents_that_join_to_it(tmp_path):
    text = "\ufeff" + "".join(f"Paragraph {n} of the text.\nIt has two lines.\n\n" for n in range(200))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    pieces = [document.text for document in read(Data(path=str(tmp_path / "book.txt")))]
    assert "".join(pieces) == text[1:] and len(pieces) >= 10
    assert all(piece.endswith("\n\n") for piece in pieces)


@pytest.mark.parametrize("text", ["", "x", "a" * 1000, "a\n" * 500, "a\n\n" * 300, "\n" * 100])
@pytest.mark.parametrize("size", [1, 7, 100])
def test_cut_loses_nothing(text, size):
    pieces = list(cut(text, size))
    assert "".join(pieces) == text
    assert all(size <= len(piece) <= 2 * size + 2 for piece in pieces[:-1])


def test_domain_is_the_sources_label_else_the_records_else_the_name(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "one", "domain": "labelled"}\n{"text": "two"}\n')
    path = str(tmp_path / "d.jsonl")
    named = Data(sources={"plain": Source(path=path), "set": Source(path=path, domain="mine")})
    assert [d.domain for d in read(named)] == ["labelled", "plain", "mine", "mine"]


def test_the_text_field_is_configurable(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"body": "one"}\n')
    data = Data(sources={"s": Source(path=str(tmp_path / "d.jsonl"), text_field="body")})
    assert [d.text for d in read(data)] == ["one"]


BAD_FILES = {  # file -> (content, what the message must say)
    "latin.txt": (b"caf\xe9", ["latin.txt", "byte 3", "0xe9"]),
    "latin.jsonl": (b'{"text": "ok"}\n{"text": "caf\xe9"}\n', ["latin.jsonl", "byte 28", "0xe9"]),
    "broken.jsonl": (b'{"text": "ok"}\n\n{"text": \n', ["broken.jsonl:3", "not JSON"]),
    "list.jsonl": (b"[1]\n", ["list.jsonl:1", "'text'", "list"]),
    "absent.jsonl": (b'{"text": "ok"}\n{"body": "x", "id": 1}\n', ["absent.jsonl:2", "'text'", "absent", "body, id"]),
    "number.jsonl": (b'{"text": 5}\n', ["number.jsonl:1", "'text'", "int"]),
    "surrogate.jsonl": (b'{"text": "ab\\ud800"}\n', ["surrogate.jsonl:1", "surrogate", "character 2"]),
    "empty.txt": (b"", ["holds no text"]),
    "blank.jsonl": (b'\n{"text": "  "}\n', ["holds no text"]),
    "short.jsonl.gz": (gzip.compress(LINES * 50)[:-20], ["short.jsonl.gz"]),
    "junk.jsonl.gz": (b"junk", ["junk.jsonl.gz"]),
    "junk.jsonl.zst": (b"junk", ["junk.jsonl.zst"]),
    "junk.parquet": (b"junk", ["junk.parquet"]),
    "wrong.csv": (b"a,b\n1,2\n", ["wrong.csv:2", "'text'", "fields: a, b"]),
    "ragged.csv": (b"text,n\na,1\nb\n", ["ragged.csv:3", "1 cells", "text, n"]),
    "open.csv": (b'text\n"a quote that is never closed\n', ["open.csv:2", "not a table"]),
    "cut.json": (b'[{"text": "a"}, {"te', ["cut.json#1", "cut off"]),
    "more.json": (b'[{"text": "a"}] {"text": "b"}', ["more.json", "follows the array"]),
    "comma.json": (b'[{"text": "a"} {"text": "b"}]', ["comma.json#1", "not JSON"]),
    "deep.jsonl": (b'{"text": "ok", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", ["deep.jsonl:1", "too deep"]),
    "deep.json": (b'[{"text": "ok", "a": ' + b"[" * 100_000, ["deep.json#0", "too deep"]),
    "domain.jsonl": (b'{"text": "ok", "domain": "\\ud800"}\n', ["domain.jsonl:1", "'domain'", "surrogate"]),
    "strings.json": (b'["ok", "\\ud800"]', ["strings.json#1", "surrogate"]),
    "null.jsonl": (b'{"text": "ok"}\n{"text": null}\n', ["null.jsonl:2", "null", "null_text='skip'"]),
    "wide.jsonl": ("\ufeff{}".encode("utf-16"), ["wide.jsonl", "byte 0 (0xff)", "UTF-16", "`encoding`"]),
    "nul.txt": ("wide".encode("utf-16-le"), ["nul.txt", "NUL", "`encoding`"]),
    "picture.png": (b"\x89PNG\r\n\x1a\n\0", ["picture.png", "not UTF-8 at byte 0"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named_on_one_line(name, tmp_path):
    content, expected = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(Data(path=str(tmp_path / name)))
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in expected), message


def test_parquet_without_the_column_names_its_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"d\.parquet: no column 'text'.*columns: body, n$"):
        read(Data(path=str(tmp_path / "d.parquet")))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"d\.parquet#1: field 'text'.*null"):
        read(Data(path=str(tmp_path / "d.parquet")))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("no/such/dir", "no such file or directory"),
        ("", "no such file or directory"),
        ("{tmp}", "no file to read, nothing is there; read are .txt .md"),
        ("{tmp}/*.txt", "no file to read, nothing is there; read are .txt .md"),
        ("hf:", "hf:NAME:SPLIT"),
        ("x" * 300, "no such file or directory"),
        ("~nobody_of_that_name/x", "no such file or directory"),
        ("a\0b", "no such file or directory"),
    ],
)
def test_bad_paths_name_the_field_and_the_rule(path, expected, tmp_path):
    path = path.format(tmp=tmp_path)
    with pytest.raises(UserError) as error:
        read(Data(path=path))
    assert str(error.value).startswith(f"data.path={path!r}: ") and expected in str(error.value)
    with pytest.raises(UserError, match=r"^data\.sources\.web\.path="):
        read(Data(sources={"web": Source(path=path)}))


@pytest.mark.parametrize("weights", [(1.0, 0.0), (-1.0, 1.0), (float("inf"), 1.0)])
def test_weights_are_positive_or_all_absent(weights, tmp_path):
    (tmp_path / "d.jsonl").write_bytes(LINES)
    sources = {f"s{n}": Source(path=str(tmp_path / "d.jsonl"), weight=w) for n, w in enumerate(weights)}
    with pytest.raises(UserError, match=r"data\.sources\.s\d\.weight="):
        read(Data(sources=sources))


def test_hugging_face_without_the_package_says_how_to_install_it():
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from frugalmoe.schema import Data\nfrom frugalmoe.data.sources import documents, open_inputs\n"
        "from frugalmoe.errors import UserError\n"
        "try:\n    list(documents(open_inputs(Data(path='hf:some/set:test'), False)[0]))\n"
        "except UserError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    message = "data.path='hf:some/set:test': needs a package that is not installed: pip install 'datasets>=4'"
    assert done.stdout.strip() == message


def one(path, **fields):
    """(texts, input, notes) of a source."""
    (source,) = open_inputs(Data(sources={"s": Source(path=str(path), **fields)}), progress=False)
    notes = Notes()
    return [document.text for document in documents(source, notes)], source, notes.lines(source)


@pytest.mark.parametrize("codec", COMPRESSORS)
@pytest.mark.parametrize("whole", [1, 2])
def test_a_compressed_file_is_read_whole_or_refused(codec, whole, tmp_path):
    """Cut anywhere but between its parts, or with something behind them."""
    part = COMPRESSORS[codec](LINES * 40)
    content, path = part * whole, tmp_path / f"d.jsonl{codec}"
    path.write_bytes(content)
    assert len(one(path)[0]) == 120 * whole
    for end in {0, 1, len(part) // 2, len(part) - 1, len(content) - len(part) // 3, len(content) - 1}:
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match=r"d\.jsonl.*cannot be read \(.*\)$"):
            one(path)
    for junk in (b"junk", b"\0\0junk"):
        path.write_bytes(content + junk)
        with pytest.raises(UserError, match=r"d\.jsonl.*cannot be read"):
            one(path)


def test_a_domain_does_not_vanish_with_its_file(tmp_path):
    (tmp_path / "east.jsonl.zst").write_bytes(zstandard.compress(LINES))
    (tmp_path / "west.jsonl.zst").write_bytes(zstandard.compress(LINES)[:-30])
    with pytest.raises(UserError, match=r"west\.jsonl\.zst: cannot be read \(it ends in the middle"):
        one(tmp_path)
    (tmp_path / "west.jsonl.zst").write_bytes(zstandard.compress(b"\n"))
    texts, _, notes = one(tmp_path)
    assert len(texts) == 3 and [note.partition(": ")[2] for note in notes] == ["no document in west.jsonl.zst"]


@pytest.mark.parametrize("change", [lambda raw: raw[:-1], lambda raw: raw[: len(raw) // 2], lambda raw: raw + b"x"])
def test_a_parquet_file_is_whole(change, tmp_path):
    write_parquet(tmp_path / "whole.parquet")
    (tmp_path / "d.parquet").write_bytes(change((tmp_path / "whole.parquet").read_bytes()))
    with pytest.raises(UserError, match=r"d\.parquet: cannot be read"):
        one(tmp_path / "d.parquet")


BOMBS = {
    "line.jsonl.zst": lambda: zstandard.compress(b'{"text": "' + b"a" * (4 << 20) + b'"}\n'),
    "newlines.jsonl.zst": lambda: zstandard.compress(b"\n" * (4 << 20)),
    "text.txt.xz": lambda: lzma.compress(b"a" * (4 << 20), preset=0),
    "cells.csv.gz": lambda: gzip.compress(b"text\n" + b"a" * (4 << 20), 1),
    "line.jsonl": lambda: b'{"text": "' + b"a" * (4 << 20),
    "array.json": lambda: b'[{"text": "' + b"a" * (4 << 20),
}


@pytest.mark.parametrize("name", BOMBS)
def test_nothing_is_read_without_bounds(name, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LARGEST", 1 << 20)
    (tmp_path / name).write_bytes(BOMBS[name]())
    with pytest.raises(UserError) as error:
        one(tmp_path / name)
    message = str(error.value)
    assert name in message and "limit is 1,048,576" in message and "\n" not in message


def test_a_parquet_file_does_not_unpack_without_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LARGEST", 1 << 20)
    one_value = pyarrow.table({"text": ["x" * (4 << 20)]})
    pyarrow.parquet.write_table(one_value, tmp_path / "page.parquet", compression="zstd", use_dictionary=False)
    equal = pyarrow.table({"text": pyarrow.array(["x" * 10_000] * 1000).dictionary_encode()})  # stored once
    pyarrow.parquet.write_table(equal, tmp_path / "values.parquet")
    for name in ("page.parquet", "values.parquet"):
        with pytest.raises(UserError, match=rf"{name}.* bytes unpack to .*; the limit is [12],\d+,\d+, 500 times"):
            one(tmp_path / name)


def test_a_long_text_is_cut_as_a_whole_while_it_is_read():
    rng = random.Random(0)
    words = [
        rng.choice(["a", "word ", "\n", "\n\n", "a much longer piece of text, ", "x" * 3000]) for _ in range(60_000)
    ]
    text = "".join(words)
    for length in (0, 10, 100_000, 327_680, 1_048_576, 1_048_577, 5_000_000, len(text)):
        least, most = readers.PIECE_CHARACTERS
        whole = list(cut(text[:length], min(max(length // 20, least), most)))
        blocks = [text[i : i + 70_001] for i in range(0, length, 70_001)]
        blocks = [block[: length - 70_001 * n] for n, block in enumerate(blocks)]
        assert list(readers._cut(iter(blocks))) == whole


def test_what_a_directory_holds_but_does_not_give_is_told(tmp_path):
    for name in ("a.py", "sub/b.py", "sub/c.rs", "Makefile", "package.json", "labels.csv", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"a": 1}\n' if name.endswith(".json") else "a,b\n1,2\n")
    (tmp_path / "linked").symlink_to(tmp_path / "sub")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    everything = "2 .py, 2 special or broken, 1 .csv, 1 .json, 1 .rs, 1 without suffix, 1 hidden, 1 linked directory"
    with pytest.raises(UserError) as error:
        one(tmp_path)
    assert set(counts(str(error.value), "there are ")) == set(everything.split(", "))
    (tmp_path / "README.md").write_text("text")
    texts, source, _ = one(tmp_path)
    assert texts == ["text"] and set(counts(source.left_out, "left out ")) == set(everything.split(", "))
    assert f"'{tmp_path}/**/*.py'" in source.left_out


def counts(message, before):
    return message.partition(before)[2].partition(";")[0].split(", ")


def test_a_glob_and_a_name_take_any_text(tmp_path):
    for name in ("a.py", "sub/b.rs", "Makefile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "package.json").write_text("{}")
    texts, source, _ = one(tmp_path / "**" / "*")
    assert texts == ["Makefile", "a.py", "sub/b.rs"]
    assert set(counts(source.left_out, "left out ")) == {"1 .json", "1 .png", "1 directory"}
    assert one(tmp_path / "*.py")[0] == ["a.py"] and one(tmp_path / "Makefile")[0] == ["Makefile"]
    (tmp_path / "packed.rs.gz").write_bytes(gzip.compress(b"fn main() {}"))
    assert one(tmp_path / "packed.rs.gz")[0] == ["fn main() {}"]


def test_a_table_or_json_of_a_directory_is_read_if_it_has_the_text(tmp_path):
    (tmp_path / "a.csv").write_text("body\none\n")
    (tmp_path / "b.json").write_text('[{"body": "two"}]')
    (tmp_path / "settings.json").write_text('{"text": 5}')
    texts, source, _ = one(tmp_path, text_field="body")
    assert texts == ["one", "two"] and "left out 1 .json" in source.left_out
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress(b"body\nthree\n")[:-9])
    with pytest.raises(UserError, match=r"c\.csv\.gz: cannot be read"):
        one(tmp_path, text_field="body")


def test_text_inside_a_record(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"meta": {"text": "inner"}}\n{"meta": {}, "meta.text": "exact"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"meta": [{"text": "deep", "n": 1}], "n": [2]}), tmp_path / "e.parquet")
    assert one(tmp_path, text_field="meta.text")[0] == ["inner", "exact", "deep"]
    with pytest.raises(UserError, match=r"e\.parquet: no column 'meta\.body'.*columns: meta, n$"):
        one(tmp_path / "e.parquet", text_field="meta.body")


def test_records_without_text_stop_or_are_skipped_and_counted(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": null}\n{"text": "one"}\n{"n": 1}\n{"text": " "}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["two", None]}), tmp_path / "e.parquet")
    texts, _, notes = one(tmp_path, null_text="skip")
    assert texts == ["one", "two"] and any("skipped 3 records without 'text'" in note for note in notes)
    assert any("left out 1 records or files of white space" in note for note in notes)
    with pytest.raises(UserError, match=r"d\.jsonl:1: field 'text' \(text_field\) is null or absent"):
        one(tmp_path)
    (tmp_path / "d.jsonl").write_text('{"text": 5}\n')
    with pytest.raises(UserError, match=r"d\.jsonl:1: .* is int, must be a string"):
        one(tmp_path, null_text="skip")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-8-sig", "utf_8"])
def test_other_encodings_by_name(encoding, tmp_path):
    text = "Straße, café\nzweite Zeile\n"
    table = f'n,text\n1,"{text[:12]}"\n'
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (tmp_path / "b.jsonl").write_bytes((json.dumps({"text": text}, ensure_ascii=False) + "\n").encode(encoding))
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress(table.encode(encoding)))
    assert one(tmp_path, encoding=encoding)[0] == [text, text, text[:12]]


def test_a_parquet_column_of_bytes_has_the_sources_encoding(tmp_path):
    column = pyarrow.array([b"plain", "café".encode("latin-1")], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "d.parquet")
    assert one(tmp_path / "d.parquet", encoding="latin-1")[0] == ["plain", "café"]
    with pytest.raises(UserError, match=r"d\.parquet#1: field 'text' is not utf-8 at byte 3"):
        one(tmp_path / "d.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": column.view(pyarrow.string())}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"d\.parquet#1: not UTF-8 at byte 3 \(0xe9\)"):
        one(tmp_path / "d.parquet")


def test_fields_that_nobody_uses_may_hold_long_numbers(tmp_path):
    (tmp_path / "d.jsonl").write_text(f'{{"text": "one", "n": {"9" * 5000}, "x": -{"1" * 5000}}}\n')
    assert one(tmp_path / "d.jsonl")[0] == ["one"]


def test_line_ends_are_kept_and_told(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    (tmp_path / "b.txt").write_bytes(b"three\n")
    texts, _, notes = one(tmp_path)
    assert texts == ["one\r\ntwo\r\n", "three\n"] and "1 of 2 documents have line ends \\r\\n" in notes[0]


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe': is no regular file"):
        one(tmp_path / "pipe")


@pytest.mark.parametrize(
    "change", [{"text_field": "body"}, {"null_text": "skip"}, {"encoding": "latin-1"}, {"domain": "x"}]
)
def test_prepared_data_is_known_by_how_it_was_read(change, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "one", "body": "two"}\n')
    assert one(tmp_path / "d.jsonl")[1].identity() != one(tmp_path / "d.jsonl", **change)[1].identity()
