"""Files outside the package that a config names: a router, an executor, attention, a corpus of one's own.

config.json says what the config says. Beside it a run keeps what these files held, so that it can be read, sampled and
traced wherever they are gone or have changed:

    outside.json           field -> {"spec": as in the config, "sha256": of the text, "file": the copy}; of a field that
                           names several, as model.attention, FIELD.NAME for each
    outside/FIELD/NAME.py  the copy

So whoever reads such a run runs its Python files, as with a config: look at them before you read a stranger's.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from frugalmoe import found
from frugalmoe.errors import UserError
from frugalmoe.files import read_json, write_atomically, write_json
from frugalmoe.model import pattern
from frugalmoe.schema import OUTSIDE, Config
from frugalmoe.shapes import NAMES, misshapen

RECORD = "outside.json"
FOLDER = "outside"
CORPUS = "CORPUS"  # what a file that is a source of text defines
ATTENTION = "model.attention"


def specs(config: Config) -> dict[str, str]:
    """Dotted field -> the path or dotted module that it names, of those that lie outside the package.

    A kind of attention, of which a config may name several, is `model.attention.NAME`.
    """
    named = dict(_of_section(config, ""))
    kinds = pattern.attention_names(config.model.attention)
    named |= {f"{ATTENTION}.{pattern.short(kind)}": kind for kind in kinds if found.is_outside(kind)}
    sources = {f"data.sources.{name}.path": source.path for name, source in config.data.sources.items()}
    corpora = (sources or {"data.path": config.data.path}) | {"data.validation.path": config.data.validation.path}
    return named | {field: spec for field, spec in corpora.items() if found.defines(spec, CORPUS)}


def _of_section(section: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _of_section(value, f"{prefix}{field.name}.")
        elif OUTSIDE in field.metadata and found.is_outside(value):
            yield prefix + field.name, value


def hashes(config: Config) -> dict[str, str]:
    """Dotted field -> the SHA-256 of the text of the file that it names, as this process read it."""
    return {field: found.outside(spec, f"{field}={spec!r}").sha256 for field, spec in specs(config).items()}


def keep(workdir: Path, config: Config) -> None:
    """Writes the copies and their record into a run's directory; nothing where the config names no such file."""
    kept = {}
    for field, spec in specs(config).items():
        read = found.outside(spec, f"{field}={spec!r}")
        copy = Path(FOLDER, field, read.path.name)
        (workdir / copy).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(workdir / copy, read.text)
        kept[field] = {"spec": spec, "sha256": read.sha256, "file": copy.as_posix()}
    if kept or (workdir / RECORD).is_file():
        write_json(workdir / RECORD, kept)


def kept(workdir: Path) -> dict[str, dict[str, str]]:
    """What `keep` wrote: field -> spec, sha256 and file. Empty where it wrote nothing."""
    path = workdir / RECORD
    record = read_json(path) if path.is_file() else {}
    rows = {NAMES: {"spec": str, "sha256": str, "file": str}}
    inside = lambda file: file.parts[:1] == (FOLDER,) and ".." not in file.parts
    sound = not any(misshapen(record, rows)) and all(inside(Path(row["file"])) for row in record.values())
    if not sound:
        raise UserError(f"{path}: damaged; it holds no record of the files that the run's config names")
    return record


def compared(workdir: Path, saved: dict[str, Any], config: Config) -> list[str]:
    """What differs between the files that a run was begun with and those that a config names now, a line for each.

    In `saved`, the plain config of the run, a field gets the new name of a file that holds the same text, or that is
    among the lines: so that a comparison of configs says nothing of it.
    """
    now, named, lines = hashes(config), specs(config), []
    for field, row in kept(workdir).items():
        if field not in now:
            continue
        if now[field] == row["sha256"] or named[field] == row["spec"]:
            _put(saved, field, named[field])
        if now[field] != row["sha256"] and named[field] == row["spec"]:
            then = f"sha256 {row['sha256'][:12]} there, {now[field][:12]} now"
            what = f"the file has changed since ({then}; its text of then is {workdir / row['file']})"
            lines.append(f"{field}={row['spec']!r}: {what}")
    return lines


def with_copies(workdir: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """The plain config of a run, in which the kept copy stands for each file that is gone or has changed."""
    for field, row in kept(workdir).items():
        copy = workdir / row["file"]
        if _sha256(row["spec"]) != row["sha256"] and copy.is_file():
            if not copy.resolve().is_relative_to(workdir.resolve()):
                raise UserError(f"{copy}: leads out of the run's directory, and is not run")
            _put(saved, field, str(copy.resolve()))
    return saved


def _sha256(spec: str) -> str | None:
    try:
        return hashlib.sha256(found.find(spec, spec).read_bytes()).hexdigest()
    except (UserError, OSError):
        return None


def _put(config: dict[str, Any], field: str, value: str) -> None:
    """Sets a dotted field of a plain config, or one of its kinds of attention; the name of a source may hold dots."""
    source = field.removeprefix("data.sources.").removesuffix(".path")
    path = ["data", "sources", source, "path"] if field.startswith("data.sources.") else field.split(".")
    kind = path.pop() if field.startswith(f"{ATTENTION}.") else None
    section: Mapping[str, Any] = config
    for name in path[:-1]:
        section = section.get(name) if isinstance(section, Mapping) else None
    if isinstance(section, dict):
        section[path[-1]] = value if kind is None else _with_kind(str(section.get(path[-1])), kind, value)


def _with_kind(attention: str, kind: str, value: str) -> str:
    """A `model.attention` in which another path stands for one of its kinds, and all else is as it was."""
    same = lambda name: pattern.short(name.strip()) == kind
    return ",".join(name.replace(name.strip(), value) if same(name) else name for name in attention.split(","))
