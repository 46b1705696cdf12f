"""The larger built-in corpus, from packages of a small repository that apt reads from disk."""

import gzip
import hashlib
import json
import subprocess

import numpy as np
import pytest
import zstandard

from frugalmoe.data import mixed, open_data
from frugalmoe.data.corpus import up_to
from frugalmoe.data.debian import members
from frugalmoe.data.text import html_words, roff_words
from frugalmoe.errors import UserError
from frugalmoe.schema import Data, Source

RUST = {f"library/core/m{n}.rs": f"// module {n}\n" + f"pub fn f{n}() {{}}\n" * 30 for n in range(40)}
PAGE = (
    '.\\" licence\n.TH MV 1\n.SH BEZEICHNUNG\nmv \\- Dateien umbenennen\n.TP 4\n.BR mv (1)\n' + "Text der Seite.\n" * 20
)
ENTRY = "Adversary\n   one who is placed in a hostile position, number {}\n\n"


def as_gzip(text):
    return gzip.compress(text.encode(), mtime=0)


PACKAGES = {  # name -> version, path -> content
    "rust-src": (
        "1.63.0+dfsg1-2",
        {f"usr/src/rustc/{path}": text.encode() for path, text in RUST.items()}
        | {
            "usr/src/rustc/library/copy.rs": RUST["library/core/m0.rs"].encode(),  # no text twice
            "usr/src/rustc/library/stub.rs": b"mod a;\n",  # too short
            "usr/src/rustc/library/latin.rs": b"// caf\xe9\n" * 50,
            "usr/src/rustc/tests/ui.rs": b"fn main() {}\n" * 50,  # not asked for
        },
    ),
    "golang-1.9-src": ("1.9-1", {"usr/share/go-1.9/src/old.go": b"package old\n" * 50}),
    "golang-1.19-src": (
        "1.19.8-2",
        {f"usr/share/go-1.19/src/{n}.go": f"package p{n}\n".encode() * 50 for n in range(9)},
    ),
    "manpages-de": ("4.18-1", {"usr/share/man/de/man1/mv.1.gz": as_gzip(PAGE)}),
    "dict-foldoc": (
        "20230119-1",
        {"usr/share/dictd/foldoc.dict.dz": as_gzip("".join(ENTRY.format(n) for n in range(1000)))},
    ),
    "maxima-doc": ("5.46.0-11", {"usr/share/doc/maxima-doc/html/other.html": b"<p>no page of the manual</p>"}),
}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of `PACKAGES`, and an apt that knows no other."""
    folder = tmp_path / "repository"
    stanzas = [stanza(folder, tmp_path / name, name, *content) for name, content in PACKAGES.items()]
    (folder / "Packages").write_text("\n".join(stanzas))
    (tmp_path / "status").touch()
    (tmp_path / "sources.list").write_text(f"deb [trusted=yes] file:{folder} ./\n")
    places = {"Etc::sourcelist": "sources.list", "Etc::sourceparts": "none", "State::status": "status"}
    (tmp_path / "apt.conf").write_text("".join(f'Dir::{k} "{tmp_path / v}";\n' for k, v in places.items()))
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    return folder


def stanza(folder, tree, name, version, files):
    """Builds a package; returns its entry in the repository's index."""
    fields = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: nobody <nobody@localhost>\n"
    control = {"DEBIAN/control": f"{fields}Description: a test\n".encode()}
    for path, content in (files | control | {f"usr/share/doc/{name}/copyright": b"Licence: test\n"}).items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(content)
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}_{version}_all.deb"
    subprocess.run(["dpkg-deb", "-Znone", "--root-owner-group", "--build", tree, file], check=True, capture_output=True)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return f"{fields}Filename: ./{file.name}\nSize: {file.stat().st_size}\nSHA256: {digest}\n"


def records(root, domain):
    with zstandard.open(root / f"{domain}.jsonl.zst", "rt", encoding="utf-8") as file:
        return {record["id"]: record["text"] for record in map(json.loads, file)}


def test_packages_become_labelled_documents_with_a_manifest(repository, tmp_path, capfd):
    cache = tmp_path / "cache"
    cache.mkdir()
    root = mixed.build(cache, progress=True)
    assert sorted(path.name for path in cache.iterdir()) == [mixed.NAME, mixed.NAME + ".lock"]
    manifest = json.loads((root / "manifest.json").read_text())
    assert set(manifest["domains"]) == {"code_rust", "code_go", "lang_de", "dictionary"}

    rust = records(root, "code_rust")
    assert sorted(rust.values()) == sorted(RUST.values())  # also not the copy, the stub and what is not UTF-8
    assert rust["rust-src/usr/src/rustc/library/core/m1.rs"] == RUST["library/core/m1.rs"]
    assert all("go-1.19" in name for name in records(root, "code_go"))  # 1.19 is newer than 1.9
    (page,) = records(root, "lang_de").values()
    assert page.startswith("BEZEICHNUNG\nmv - Dateien umbenennen\n\nmv(1)\nText der Seite.")
    whole = "".join(ENTRY.format(n) for n in range(1000))
    pieces = records(root, "dictionary")
    assert all(text in whole and text.startswith("Adversary") for text in pieces.values())
    assert sum(map(len, pieces.values())) == len(whole) and len(pieces) == 8  # 66,890 characters by 8192 or a bit more

    entry = manifest["domains"]["code_rust"]
    assert entry["documents"] == 40 and entry["bytes"] == sum(len(text) for text in RUST.values())
    assert entry["source"] == "Debian rust-src=1.63.0+dfsg1-2" and entry["licence"] == "MIT or Apache-2.0"
    with zstandard.open(root / "code_rust.jsonl.zst", "rb") as file:
        assert entry["sha256"] == hashlib.sha256(file.read()).hexdigest()
    package = manifest["packages"]["rust-src"]
    file = repository / "rust-src_1.63.0+dfsg1-2_all.deb"
    assert package["version"] == "1.63.0+dfsg1-2" and package["size"] == file.stat().st_size
    assert package["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (root / "copyright" / "rust-src").read_text() == "Licence: test\n"

    # of 18 packages 5 are there, and one of these holds nothing that is looked for: 18 - 4 are missing
    assert len(manifest["missing"]) == 14 and "no text at" in manifest["missing"]["maxima-doc"]
    (note,) = [line for line in capfd.readouterr().err.splitlines() if "without" in line]
    assert "anarchism (not in the package lists), linux-doc-* (not" in note and note.endswith("to try again")


def test_its_domains_are_sources(repository, tmp_path):
    sources = {"code": Source(path="mixed:code_rust", weight=3.0), "words": Source(path="mixed:dictionary", weight=1.0)}
    data = Data(sources=sources, sequence_length=64, cache_dir=str(tmp_path / "cache"), validation_fraction=0.2)
    dataset = open_data(data, batch_size=8, seed=0, progress=False)
    assert dataset.domains == ("code_rust", "dictionary")
    drawn = np.concatenate([dataset.batch(step).domain_ids_BT[:, 0] for step in range(10)])
    assert abs(np.mean(drawn == 0) - 0.75) < 0.03
    (repository / "Packages").unlink()  # the second use needs no repository
    with pytest.raises(UserError, match=r"^data.path='mixed:code_c': unknown domain; did you mean 'code_"):
        open_data(Data(path="mixed:code_c", cache_dir=str(tmp_path / "cache")), batch_size=8, seed=0, progress=False)


def test_an_interrupted_build_fetches_only_what_it_lacks(repository, tmp_path):
    files = {file.name.partition("_")[0]: file for file in repository.glob("*.deb")}
    content = files["dict-foldoc"].read_bytes()
    files["dict-foldoc"].unlink()
    expected = (
        r"^data\.path='mixed': could not fetch dict-foldoc=20230119-1 \(.+\); what is there is kept, so start again$"
    )
    with pytest.raises(UserError, match=expected):
        mixed.build(tmp_path / "cache", progress=False)
    assert not (tmp_path / "cache" / mixed.NAME).exists()
    files["dict-foldoc"].write_bytes(content)
    files["rust-src"].unlink()  # was fetched before
    root = mixed.build(tmp_path / "cache", progress=False)
    assert len(records(root, "code_rust")) == 40 and records(root, "dictionary")


def test_without_the_mirror_or_apt_one_line_says_so(repository, tmp_path, monkeypatch):
    (repository / "Packages").unlink()
    with pytest.raises(UserError, match=r"^data\.path='mixed': found none of its packages \(.+use data\.path") as error:
        mixed.build(tmp_path / "cache", progress=False)
    assert "\n" not in str(error.value)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"^data\.path='mixed': apt-get is not installed; .* Debian or Ubuntu"):
        mixed.build(tmp_path / "cache", progress=False)
    assert not (tmp_path / "cache" / mixed.NAME).exists()


def test_a_file_that_is_no_package_is_named(tmp_path):
    (tmp_path / "x.deb").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"x\.deb: not a Debian package \(.+\); delete it$"):
        list(members(tmp_path / "x.deb", ""))


def test_documents_are_drawn_by_their_id_up_to_a_number_of_bytes():
    texts = {f"d{n}": "ä" * 5 for n in range(100)}  # of 10 bytes each
    chosen = up_to(305, texts.items())
    assert len(chosen) == 30 and list(chosen) == sorted(chosen)
    assert up_to(305, reversed(texts.items())) == chosen
    assert 8 < len(set(chosen) & {f"d{n}" for n in range(50)}) < 22  # from all of them, not the first


def test_words_of_a_web_page():
    page = (
        "<html><head><title>T</title><style>p {x}</style></head><body><div class='header'><div>Next</div> Up</div>"
        "<h1>Sums &amp; products</h1>\n<p>The <code>sum</code>\nof <b>two</b></p><script>x()</script>"
        "<ul><li>one<li>two</ul></body></html>"
    )
    assert html_words(page) == "Sums & products\n\nThe sum\nof two\n\none\ntwo\n"


def test_words_of_a_manual_page():
    page = (
        '.\\" a comment\n.ig\nleft out\n..\n.de XX\n\\fB\\$1\n..\n.TH LS 1 2022\n.SH NAME\nls \\- list\n.PP\n'
        "Use \\fB\\-\\-all\\fP, \\fI\\,FILE\\/\\fP\\&.\n.IP \\(bu 3\nSee\n.BR stat (2) ,\n"
        '.B "a b" c\nit\\(aqs \\s-1GNU\\s0 \\e \\*(lqx\\[rq] \\" gone\n.nf\n.ft CW\n'
    )
    expected = "NAME\nls - list\n\nUse --all, FILE.\n\n•\nSee\nstat(2),\na b c\nit's GNU \\ x” \n"
    assert roff_words(page).splitlines() == [line.rstrip() for line in expected.splitlines()]
