"""Corpora: those that are built in, and those that a user's Python file defines (`Corpus`).

A built-in one is a directory of the cache that is made once from texts that packages ship. It holds a DOMAIN.jsonl.zst
per domain, with records of text, domain and id, and a `manifest.json` that says where each domain comes from, its
licence, its size and hash, and what is missing.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import zstandard

from frugalmoe.console import Console
from frugalmoe.data import readers
from frugalmoe.data.end_of_text import read_object
from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.files import locked

SUFFIX = ".jsonl.zst"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """A source of text in Python: `data.path` or `data.sources.NAME.path` names a file with CORPUS = Corpus(...).

    `documents` gives the same documents in the same order at every call, for they are read twice. Each is a text, or a
    mapping with the source's `text_field` and optionally a `domain`. `fingerprint` changes when the documents do;
    prepared data are used again while it and the file are as they were.
    """

    documents: Callable[[], Iterable[str | Mapping[str, Any]]]
    fingerprint: Callable[[], str] = lambda: ""


def build(cache: Path, name: str, fill: Callable[[Path, Path, Console], None], progress: bool) -> Path:
    """Returns the directory `name` under `cache`, which the first call makes by `fill(directory, downloads, console)`.

    It is there whole or not at all. The next build finds what an interrupted one left in `downloads`.
    """
    final, partial = cache / name, cache / f"{name}.partial"
    with locked(final):
        if not final.exists():
            shutil.rmtree(partial / "corpus", ignore_errors=True)
            for directory in (partial / "corpus", partial / "downloads"):
                directory.mkdir(parents=True, exist_ok=True)
            fill(partial / "corpus", partial / "downloads", Console(stderr=True, quiet=not progress))
            (partial / "corpus").rename(final)
            shutil.rmtree(partial)
    return final


def files(root: Path, domain: str, where: str) -> tuple[Path, ...]:
    """Returns the files of one domain, or of all for ""."""
    found = {name: root / f"{name}{SUFFIX}" for name in sorted(_entries(root))}
    if domain and domain not in found:
        raise UserError(f"{where}: unknown domain; {did_you_mean(domain, found)}")
    chosen = (found[domain],) if domain else tuple(found.values())
    for file in chosen:
        if not file.is_file():
            raise UserError(f"{file}: is missing; delete {root} to build it again")
    return chosen


def check(root: Path, file: Path) -> None:
    """Raises `UserError` where a file of a corpus is not as it was built. Costs about a second for 300 MB of text."""
    entry = _entries(root).get(file.name.removesuffix(SUFFIX), {})
    content = hashlib.sha256()
    try:
        for block in readers.blocks(file):
            content.update(block)
    except (UserError, *readers.ERRORS):
        content = hashlib.sha256(b"unreadable")
    if content.hexdigest() != entry.get("sha256"):
        raise UserError(f"{file}: is not as it was built (its hash differs); delete {root} to build it again")


def _entries(root: Path) -> dict[str, dict[str, Any]]:
    """Returns the manifest's entry of each domain."""
    domains = read_object(root / "manifest.json").get("domains")
    if not isinstance(domains, dict) or not all(isinstance(entry, dict) for entry in domains.values()):
        raise UserError(f"{root / 'manifest.json'}: damaged; delete {root} to build it again")
    return domains


def write_domain(directory: Path, domain: str, texts: Mapping[str, str], source: str, licence: str) -> dict[str, Any]:
    """Writes the texts {id: text} as the domain's file; returns its entry in the manifest."""
    lines = [json.dumps({"text": text, "domain": domain, "id": name}) for name, text in texts.items()]
    content = "".join(line + "\n" for line in lines).encode()
    (directory / f"{domain}{SUFFIX}").write_bytes(zstandard.ZstdCompressor(level=10).compress(content))
    return {
        "source": source,
        "licence": licence,
        "documents": len(texts),
        "bytes": sum(len(text.encode()) for text in texts.values()),
        "sha256": hashlib.sha256(content).hexdigest(),  # of the uncompressed lines
    }


def up_to(limit: int, texts: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Returns texts by id, sorted, of up to `limit` bytes in all: drawn in an order that a hash of the id fixes."""
    chosen, size = {}, 0
    for name, text in sorted(texts, key=lambda item: hashlib.sha256(item[0].encode()).digest()):
        if size + len(text.encode()) <= limit:
            chosen[name] = text
            size += len(text.encode())
    return dict(sorted(chosen.items()))
