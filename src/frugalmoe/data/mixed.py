"""The larger built-in corpus: about 200 MB in fifteen domains, from Debian packages (about 150 MB to fetch).

| domain | what of it |
|---|---|
| math_formal, math_prose | Metamath proofs; the manual of a computer algebra system |
| code_go, code_rust | libraries and compilers of the two languages |
| dictionary | of English, of computing |
| politics | An Anarchist FAQ |
| techdoc | of Linux and Python, in reStructuredText |
| lang_de, en, es, fr, ja, pl, ru, zh | manual pages; translators left some passages in English |

A domain holds at most DOMAIN_BYTES, documents drawn by a hash. A package that the machine's sources do not have is left
out, with a note. Debian's versions move, so the manifest records them with their hashes; the packages' copyright files
are beside it. The texts are of many licences: build the corpus, do not pass it on.
"""

import gzip
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import Progress

from frugalmoe.console import Console
from frugalmoe.data import corpus
from frugalmoe.data.debian import Apt, Deb, complaint, members
from frugalmoe.data.text import cut, html_words, roff_words
from frugalmoe.errors import UserError
from frugalmoe.files import write_json

FORMAT = 1
NAME = f"mixed-{FORMAT}"  # of the corpus's directory
DOMAIN_BYTES = 30_000_000
PIECE = 8192  # characters of a document cut from a book-length file
LEAST, MOST = 200, 200_000  # characters of a document: shorter ones are stubs, longer ones tables by programs
WHERE = "data.path='mixed'"


def pieces(text: str) -> list[str]:
    return list(cut(text, PIECE))


def whole(text: str) -> list[str]:
    return [text]


def web_page(text: str) -> list[str]:
    return [html_words(text)]


def manual(text: str) -> list[str]:
    return [roff_words(text)]


class Origin(NamedTuple):
    domain: str
    package: str  # a glob
    files: str  # a regular expression that is searched for in their paths
    documents: Callable[[str], list[str]]  # the text of a file -> its documents
    licence: str


class Found(NamedTuple):
    origin: Origin
    deb: Deb


MANUALS = "licences of the pages, in copyright/"
ORIGINS = (
    Origin("math_formal", "metamath-databases", r"/databases/.*\.mm$", pieces, "CC0-1.0, some databases GPL-2+"),
    Origin("math_prose", "maxima-doc", r"/html/maxima_\d+\.html$", web_page, "GPL-2"),
    Origin("code_go", "golang-1.*-src", r"/src/.*\.go$", whole, "BSD-3-Clause"),
    Origin("code_rust", "rust-src", r"/(compiler|library)/.*\.rs$", whole, "MIT or Apache-2.0"),
    Origin("dictionary", "dict-gcide", r"\.dict\.dz$", pieces, "GPL-2+"),
    Origin("dictionary", "dict-foldoc", r"\.dict\.dz$", pieces, "GFDL-1.1+"),
    Origin("politics", "anarchism", r"/markdown/.*\.md(\.gz)?$", pieces, "GPL-2+"),
    Origin("techdoc", "linux-doc-*", r"/Documentation/(?!translations/).*\.rst(\.gz)?$", whole, "GPL-2"),
    Origin("techdoc", "python3.*-doc", r"/html/_sources/.*\.rst\.txt(\.gz)?$", whole, "PSF-2.0"),
    Origin("lang_en", "manpages", r"/man/man\d/", manual, MANUALS),
    Origin("lang_en", "manpages-dev", r"/man/man\d/", manual, MANUALS),
    *(
        Origin(f"lang_{x}", f"manpages-{x}", rf"/man/{x}/", manual, MANUALS)
        for x in ("de", "es", "fr", "ja", "pl", "ru")
    ),
    Origin("lang_zh", "manpages-zh", r"/man/zh_CN/", manual, MANUALS),  # zh_TW says the same
)


def build(cache: Path, progress: bool) -> Path:
    """Returns the corpus's directory under `cache`, built at the first call; later calls use no network."""
    return corpus.build(cache, NAME, _fill, progress)


def _fill(directory: Path, downloads: Path, console: Console) -> None:
    console.print("mixed corpus: fetching about 150 MB of Debian packages; this happens once", soft_wrap=True)
    apt = Apt(downloads, WHERE)
    debs = {origin: apt.find(origin.package) for origin in ORIGINS}
    missing = {origin.package: "not in the package lists" for origin, deb in debs.items() if deb is None}
    found = [Found(origin, deb) for origin, deb in debs.items() if deb is not None]
    if not found:
        rule = "needs apt sources with Debian's main packages; or use data.path=FILE"
        raise UserError(f"{WHERE}: found none of its packages ({complaint(apt.update)}); {rule}")
    (directory / "copyright").mkdir()
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        files = _fetch(apt, found, bar)
        domains, empty = _write(directory, found, files, bar)
    missing |= empty
    if missing:
        gaps = ", ".join(f"{package} ({why})" for package, why in missing.items())
        again = f"delete {NAME} in the cache to try again"
        console.print(f"mixed corpus: without {gaps}; {again}", soft_wrap=True)
    packages = {item.deb.name: item.deb._asdict() for item in found}
    manifest = {"format": FORMAT, "domains": domains, "packages": packages, "missing": missing}
    write_json(directory / "manifest.json", manifest)


def _fetch(apt: Apt, found: list[Found], bar: Progress) -> dict[str, Path]:
    task = bar.add_task("", total=sum(item.deb.size for item in found))
    files = {}
    for item in found:
        bar.update(task, description=f"fetching {item.deb.name}")
        files[item.deb.name] = apt.fetch(item.deb)
        bar.advance(task, item.deb.size)
    return files


def _write(
    directory: Path, found: list[Found], files: dict[str, Path], bar: Progress
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns (the manifest's entry of each domain, why a package gave none of them a text)."""
    task = bar.add_task("", total=sum(item.deb.size for item in found))
    domains, empty = {}, {}
    for domain in dict.fromkeys(item.origin.domain for item in found):
        texts: dict[str, str] = {}  # text -> id: no text twice
        holding = []
        for item in (item for item in found if item.origin.domain == domain):
            bar.update(task, description=f"reading {item.deb.name}")
            before = len(texts)
            for name, text in _documents(item, files[item.deb.name], directory / "copyright"):
                texts.setdefault(text, name)
            if len(texts) > before:
                holding.append(item)
            else:
                empty[item.deb.name] = f"no text at {item.origin.files}"
            bar.advance(task, item.deb.size)
        if holding:
            chosen = corpus.up_to(DOMAIN_BYTES, [(name, text) for text, name in texts.items()])
            domains[domain] = corpus.write_domain(directory, domain, chosen, *_told(holding))
    return domains, empty


def _told(holding: list[Found]) -> tuple[str, str]:
    """Returns (source, licence) of a domain for the manifest."""
    source = ", ".join(f"{item.deb.name}={item.deb.version}" for item in holding)
    return f"Debian {source}", "; ".join(dict.fromkeys(item.origin.licence for item in holding))


def _documents(item: Found, file: Path, copyrights: Path) -> Iterator[tuple[str, str]]:
    """Yields (id, text) of a package's documents; what is not UTF-8 is left out. Its copyright file is written on the
    way.
    """
    name, origin = item.deb.name, item.origin
    notice = rf"usr/share/doc/{re.escape(name)}/copyright$"
    for path, content in members(file, f"{origin.files}|{notice}"):
        if re.search(notice, path):
            (copyrights / name).write_bytes(content)
            continue
        raw = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
        parts = origin.documents(raw.decode("utf-8-sig", errors="replace").replace("\r\n", "\n"))
        for number, part in enumerate(parts):
            if LEAST <= len(part) <= MOST and "\ufffd" not in part:
                yield f"{name}/{path}" + (f"#{number}" if len(parts) > 1 else ""), part
