"""Reading documents: every format gives the same text, every fault names its place on one line."""

import gzip
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from frugalmoe.config.schema import Data, Source
from frugalmoe.data.sources import documents, open_inputs
from frugalmoe.data.text import cut
from frugalmoe.errors import UserError

TEXTS = ["first text\nwith two lines", "zweiter Text: äöü 🙂", "third"]
LINES = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS).encode()


def read(data: Data):
    return [document for source in open_inputs(data, progress=False) for document in documents(source)]


def write_zst_in_two_frames(path):
    half = LINES.index(b"\n") + 1
    path.write_bytes(zstandard.compress(LINES[:half]) + zstandard.compress(LINES[half:]))


def write_parquet(path):
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3], "text": TEXTS}), path)


FORMATS = {
    "d.jsonl": lambda path: path.write_bytes(LINES),
    "d.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "d.jsonl.zst": write_zst_in_two_frames,
    "d.parquet": write_parquet,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_record_format_gives_the_texts(name, tmp_path):
    FORMATS[name](tmp_path / name)
    found = read(Data(path=str(tmp_path / name)))
    assert [document.text for document in found] == TEXTS
    assert {document.domain for document in found} == {"d"} or name != "d.parquet"
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
    "wrong.csv": (b"a,b", ["data.path=", "wrong.csv", ".jsonl.zst", ".parquet"]),
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
    with pytest.raises(UserError, match=r"d\.parquet#1: field 'text'.*NoneType"):
        read(Data(path=str(tmp_path / "d.parquet")))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("no/such/dir", "no such file or directory"),
        ("", "no such file or directory"),
        ("{tmp}", "no file ends in one of .txt, .md"),
        ("{tmp}/*.txt", "no file ends in one of .txt, .md"),
        ("hf:", "hf:NAME:SPLIT"),
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
        "from frugalmoe.config.schema import Data\nfrom frugalmoe.data.sources import documents, open_inputs\n"
        "from frugalmoe.errors import UserError\n"
        "try:\n    list(documents(open_inputs(Data(path='hf:some/set:test'), False)[0]))\n"
        "except UserError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        done.stdout.strip()
        == "data.path='hf:some/set:test': needs a package that is not installed: pip install 'datasets>=4'"
    )
