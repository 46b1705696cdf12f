"""Documents -> a prepared directory (`shards.py`): survey, split, tokenizer, then one shard after another.

A preparation that was interrupted goes on after its last complete shard.
"""

import collections
import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from frugalmoe.console import Console
from frugalmoe.data.cache import cache_root, digest
from frugalmoe.data.shards import FORMAT, Item, is_prepared, read_index, read_manifest, write_manifest, write_shard
from frugalmoe.data.sources import Document, Input, Notes, documents, open_inputs
from frugalmoe.data.split import ALL, Sample, Split, Survey, text_hash
from frugalmoe.data.tokenizer import ByteTokenizer, Tokenizer, load_from, load_json, parse, train_bpe
from frugalmoe.errors import UserError, of_disk
from frugalmoe.files import locked
from frugalmoe.schema import Data

SAMPLE_CHARACTERS = 8_000_000  # of training text that BPE is trained on
SHARD_BYTES = (4 << 20, 256 << 20)  # least and most text in a shard; between them, 64 shards


def prepare(data: Data, output: Path | None = None, workers: int = 0, progress: bool = True) -> Path:
    """Returns the prepared directory of a config: `output`, or one in the cache named by what it is made from.

    Workers are threads (0: one per core), for the tokenizer releases the interpreter's lock; the result does not
    depend on their number. Raises `UserError` for data that cannot be read.
    """
    inputs = open_inputs(data, progress)
    if progress:
        say(source.left_out for source in inputs)
    key = _key(data, inputs)
    final = Path(output) if output else _in_cache(data, key)
    with locked(final):
        if final.exists():
            if not is_prepared(final) or read_manifest(final)["key"] != key:
                raise UserError(f"--output={str(final)!r}: exists and is not this data; name another or delete it")
            if progress:
                say(read_manifest(final)["notes"])
            return final
        partial = final.with_name(final.name + ".partial")
        partial.mkdir(exist_ok=True)
        console = Console(stderr=True)
        with Progress(console=console, disable=not (progress and console.is_terminal), transient=True) as bar:
            _prepare_into(partial, data, inputs, key, workers or os.cpu_count() or 1, bar)
        partial.rename(final)
    if progress:
        say(read_manifest(final)["notes"])
    return final


def say(lines: Iterable[str]) -> None:
    """Prints what a user should know of the data, each line once in a process."""
    for line in filter(None, lines):
        _say(line)


@functools.cache
def _say(line: str) -> None:
    Console(stderr=True).print(line, soft_wrap=True)


def prepared_in_cache(data: Data, inputs: list[Input]) -> bool:
    """Whether `prepare` has nothing to do."""
    return _in_cache(data, _key(data, inputs)).exists()


def _in_cache(data: Data, key: str) -> Path:
    return cache_root(data) / "prepared" / key


def _key(data: Data, inputs: list[Input]) -> str:
    """Names prepared data before any document is read, so that a second start is fast."""
    spec = parse(data.tokenizer)
    tokenizer = load_json(spec, "data.tokenizer").fingerprint if isinstance(spec, Path) else spec or "bytes"
    return digest([FORMAT, tokenizer, data.validation_fraction, [source.identity() for source in inputs]])


def _prepare_into(directory: Path, data: Data, inputs: list[Input], key: str, workers: int, bar: Progress) -> None:
    survey, sample, notes = Survey(), Sample(SAMPLE_CHARACTERS), [Notes() for _ in inputs]
    task = bar.add_task("reading documents", total=None)
    for source, document in _documents(inputs, notes):
        h = text_hash(document.text)
        survey.add(inputs[source].name, document, h)
        sample.add(h, document.text)
        bar.advance(task)
    bar.update(task, description="training the tokenizer" if data.tokenizer.startswith("bpe:") else "tokenising")
    split = survey.split(data.validation_fraction)
    tokenizer = _tokenizer(data, survey, sample, split)
    del sample
    domains = sorted(survey.lowest)
    bar.update(task, description="tokenising", total=survey.bytes, completed=0)
    shards = _shards(inputs, split, domains, survey.bytes)
    with _space(directory, survey.bytes):
        paths = _write(directory, shards, tokenizer, workers, lambda size: bar.advance(task, size))
    files = {file.name for path in paths for file in (path, path.with_suffix(".npz"))}
    for file in directory.iterdir():
        if file.name not in files:  # left by an interrupted preparation: a part of a file, or shards of other data
            file.unlink()
    tokenizer.save_into(directory)
    counts, of_tokenizer = _counts(paths, domains, data)
    manifest = {
        "key": key,
        "data": f"{survey.digest:032x}",
        "tokenizer": {"spec": data.tokenizer, "fingerprint": tokenizer.fingerprint, "size": tokenizer.size},
        "validation_fraction": data.validation_fraction,
        "sources": [
            {"name": i.name, "path": i.source.path, "weight": i.source.weight, "kind": i.source.kind} for i in inputs
        ],
        "domains": domains,
        "counts": counts,
        "notes": [line for i, of_input in zip(inputs, notes) for line in of_input.lines(i)] + of_tokenizer,
    }
    write_manifest(directory, manifest, paths)


@contextlib.contextmanager
def _space(directory: Path, size: int) -> Iterator[None]:
    """Raises `UserError` for a disk that is full while data are written, whose texts have so many bytes."""
    try:
        yield
    except Exception as error:
        if not (why := of_disk(error)):
            raise
        there = sum(path.stat().st_size for path in directory.iterdir()) / 1e6
        free = shutil.disk_usage(directory).free / 1e6
        sizes = f"{size / 1e6:.1f} MB of text are prepared there, {there:.1f} MB are written, {free:.1f} MB are free"
        raise UserError(f"{directory}: {why}: {sizes}; the same command goes on with what is whole") from error


def _documents(inputs: list[Input], notes: list[Notes] | None = None) -> Iterator[tuple[int, Document]]:
    for number, source in enumerate(inputs):
        for document in documents(source, notes[number] if notes else None):
            yield number, document


def _tokenizer(data: Data, survey: Survey, sample: Sample, split: Split) -> Tokenizer:
    spec = parse(data.tokenizer)
    if spec is None:
        return ByteTokenizer()
    if isinstance(spec, Path):
        return load_json(spec, f"data.tokenizer={data.tokenizer!r}")
    name = digest([f"{survey.digest:032x}", data.validation_fraction, SAMPLE_CHARACTERS, spec])
    directory = cache_root(data) / "tokenizers" / name
    with locked(directory):
        if not (directory / "tokenizer_config.json").is_file():  # written last
            directory.mkdir(exist_ok=True)
            train_bpe(sample.texts(split), spec).save_into(directory)
    try:
        return load_from(directory)
    except UserError as error:
        raise UserError(f"{error}; delete {directory} to train it again") from error


def _shards(inputs: list[Input], split: Split, domains: list[str], total: int) -> Iterator[list[Item]]:
    """Yields runs of documents, one for each shard. Where they are cut depends on the data alone."""
    numbers = {domain: number for number, domain in enumerate(domains)}
    least, most = SHARD_BYTES
    full = min(max(total // 64, least), most)
    items, size = [], 0
    for source, document in _documents(inputs):
        h = text_hash(document.text)
        about = (numbers[document.domain], source, split.is_validation(h), document.answers)
        items.append(Item(document.text, document.id, h, *about))
        size += len(document.text)
        if size >= full:
            yield items
            items, size = [], 0
    if items:
        yield items


def _write(
    directory: Path,
    shards: Iterator[list[Item]],
    tokenizer: Tokenizer,
    workers: int,
    advance: Callable[[int], None],
) -> list[Path]:
    """Writes the shards and returns their paths. One thread reads, `workers` tokenise and write; at most workers + 1
    shards are in memory.
    """
    paths: list[Path] = []
    pending: collections.deque[tuple[Future[None], int]] = collections.deque()

    def finish_one() -> None:
        future, size = pending.popleft()
        future.result()
        advance(size)

    with ThreadPoolExecutor(workers) as pool:
        for number, items in enumerate(shards):
            paths.append(directory / f"shard-{number:05}.array_record")
            size = sum(len(item.text.encode()) for item in items)
            pending.append((pool.submit(write_shard, paths[-1], items, tokenizer), size))
            while len(pending) > workers:
                finish_one()
        while pending:
            finish_one()
    return paths


def _counts(paths: list[Path], domains: list[str], data: Data) -> tuple[dict[str, Any], list[str]]:
    """Returns (documents, tokens and bytes of each domain's two sides; what to tell); raises where a side is empty."""
    counts = {domain: {side: np.zeros(3, np.int64) for side in ("train", "validation")} for domain in domains}
    changed, hashes = 0, []
    for path in paths:
        index = read_index(path.with_suffix(".npz"))
        _, first = np.unique(index["document"], return_index=True)
        starts = np.zeros(len(index["document"]), np.int64)
        starts[first] = 1
        changed += int((~index["same"][first]).sum())
        hashes.append(index["hash"][first])
        for number, domain in enumerate(domains):
            for side, chosen in (("train", ~index["validation"]), ("validation", index["validation"])):
                rows = (index["domain"] == number) & chosen
                counts[domain][side] += [column[rows].sum() for column in (starts, index["length"], index["bytes"])]
    for domain, sides in counts.items():
        for side, values in sides.items():
            if not values[0] and not (side == "train" and data.validation_fraction == ALL):
                raise UserError(f"data: domain {domain!r} has no {side} document; its texts all occur in other domains")
    names = ("documents", "tokens", "bytes")
    counts = {d: {s: dict(zip(names, v.tolist())) for s, v in sides.items()} for d, sides in counts.items()}
    hashes = np.concatenate(hashes)
    told = []
    if changed:
        what = f"decoding gives other text than was read for {changed:,} of {len(hashes):,} documents"
        told.append(f"data.tokenizer={data.tokenizer!r}: {what}; bits per byte count the bytes that were read")
    if repeated := len(hashes) - len(np.unique(hashes)):
        told.append(f"data: {repeated:,} of {len(hashes):,} documents repeat the text of another one")
    return counts, told
