"""A batch is a pure function of (config, seed, position), by random access.

Letters: B rows of a batch, T tokens of a row, I places of stored pieces of documents.

Documents, each ending with the end-of-text token, are put in an order fixed by the seed and cut into rows of T tokens.
A conversation, of which answers alone are targets, is kept whole: what does not fit into the rest of a row begins the
next one, and of one that is longer than a row the first T tokens are taken.
Rows are drawn in a fresh shuffled order in each epoch; where sources have weights, each is its own such stream and the
streams are mixed. The last partial row of a stream, the `remainder`, is left out of an epoch.

What a document begins with is `data.document_start`. With end_of_text it is the token that ended the document before
it, the input whose target is the first token; it belongs to the document that it begins, and the first document of a
stream gets one too. So every token of the rows is a target once per epoch. A model learns how documents begin, and
generation begins with what training showed. With none, as in runs from before there was a choice, nothing stands in
front of the first token of a document: it is an input but no target, and the end of a document is an input without a
target.
"""

import copy
import dataclasses
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from frugalmoe.data.cache import digest
from frugalmoe.data.prepare import prepare, say
from frugalmoe.data.quarantine import Quarantine
from frugalmoe.data.ramp import Ramp
from frugalmoe.data.shards import AGAIN, Sizes, Store, is_prepared, read_manifest
from frugalmoe.data.sources import check_apart, of_validation, open_inputs
from frugalmoe.data.split import ALL, check_domain
from frugalmoe.data.tokenizer import ByteTokenizer, Tokenizer, load_json, parse
from frugalmoe.errors import UserError
from frugalmoe.schema import Data, FrozenDict, Source

EVAL_SEED = "validation"  # of the order of validation rows; the same in every run, so that runs can be compared


class Batch(NamedTuple):
    """Rows of tokens. int32, the mask bool; [T] for one row, [B, T] for a batch."""

    tokens_BT: np.ndarray
    targets_BT: np.ndarray  # the next token of the document; 0 where the mask is False
    segment_ids_BT: np.ndarray  # 1, 2, ... for the documents of a row; 0 = padding
    positions_BT: np.ndarray  # inside the document; a document that goes on in another row restarts at 0 there
    loss_mask_BT: np.ndarray
    domain_ids_BT: np.ndarray  # number in `Dataset.domains`; 0 for padding


class Rows:
    """Chosen documents of a store in an order fixed by the seed, cut into rows. A grain random-access source.

    `data` says how long rows are and what documents begin with.
    """

    def __init__(self, store: Store, chosen_I: np.ndarray, seed: int | str, data: Data, pad: bool = False) -> None:
        columns = store.columns
        pieces = np.flatnonzero(chosen_I)
        # The order depends on the texts alone, not on files, shards or workers. The document's number breaks ties of
        # duplicates, and keeps the pieces of a document together and in order.
        order = np.lexsort(
            (pieces, columns["document"][pieces], _mix(columns["hash"][pieces], _seed(seed, "documents")))
        )
        self._store, self._length, self._pieces = store, data.sequence_length, pieces[order]
        self._front = store.tokenizer.eos if data.document_start == "end_of_text" else None
        self._document = columns["document"][self._pieces]
        self._domain = columns["domain"][self._pieces]
        self._lengths = columns["length"][self._pieces]
        self._ends = np.cumsum(self._lengths, dtype=np.int64)
        self.tokens = int(self._ends[-1]) if len(self._ends) else 0
        self.remainder = 0 if pad else self.tokens % self._length
        self._num_rows = -(-self.tokens // self._length) if pad else self.tokens // self._length
        self._bounds_R2 = None  # of rows that do not follow one another without a gap
        is_chat_I = store.is_chat_I[self._pieces]
        if is_chat_I.any():
            self._bounds_R2 = _whole(self._document, self._ends, is_chat_I, self._length)
            self._num_rows = len(self._bounds_R2)
            self.remainder = self.tokens - int(np.diff(self._bounds_R2).sum())

    def __len__(self) -> int:
        return self._num_rows

    def sizes(self) -> "Rows":
        """Returns the same rows with the UTF-8 bytes of text that each token stands for in place of the token."""
        rows = copy.copy(self)
        rows._store = Sizes(self._store)
        return rows

    def __getitem__(self, row: int) -> Batch:
        """Returns one row. It takes one token more to read: the one before its first, or the one after its last."""
        start, stop = self._bounds(row)
        if self._front is None:
            tokens, wanted, document, domain = self._read(start, min(stop + 1, self.tokens))
            mask = (document[1:] == document[:-1]) & wanted[1:]
            return _row(tokens[: stop - start], tokens[1:] * mask, mask, document, domain, self._length)
        tokens, wanted, document, domain = self._read(max(start - 1, 0), stop)
        tokens = tokens if start else np.append(self._front, tokens)
        n = stop - start
        mask = wanted[-n:]
        return _row(tokens[:n], tokens[1:] * mask, mask, document[-n:], domain[-n:], self._length)

    def documents(self, row: int) -> np.ndarray:
        """Returns the number in the store of the document of each token of a row; -1 for padding. Reads no text."""
        span, inside = self._place(*self._bounds(row))
        numbers = np.repeat(self._document[span], self._lengths[span])[inside]
        return np.pad(numbers, (0, self._length - len(numbers)), constant_values=-1)

    def _bounds(self, row: int) -> tuple[int, int]:
        """Returns the part of the stream that is a row's targets, or its inputs if documents begin with nothing."""
        if self._bounds_R2 is not None:
            start, stop = self._bounds_R2[row]
            return int(start), int(stop)
        start = row * self._length
        return start, min(start + self._length, self.tokens)

    def _read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Returns tokens of the stream, whether each is to be predicted, and its document and domain."""
        span, inside = self._place(start, stop)
        records = [self._store.read(piece) for piece in self._pieces[span]]
        of_token = (np.concatenate(column) for column in zip(*((r.tokens, r.targets) for r in records)))
        of_piece = (np.repeat(column[span], self._lengths[span]) for column in (self._document, self._domain))
        return tuple(column[inside] for column in (*of_token, *of_piece))

    def _place(self, start: int, stop: int) -> tuple[slice, slice]:
        """Returns (pieces that hold a part of the stream, where it lies in their tokens)."""
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop, side="left"))
        skipped = start - (self._ends[first] - self._lengths[first])
        return slice(first, last + 1), slice(skipped, skipped + stop - start)


def _whole(document_I: np.ndarray, ends_I: np.ndarray, is_chat_I: np.ndarray, length: int) -> np.ndarray:
    """Returns [R, 2], where each row begins and ends in a stream in which no conversation is cut into two rows.

    ends_I: of the pieces, in tokens of the stream. Texts go on in the next row.
    """
    last_of_document = np.flatnonzero(np.append(document_I[1:] != document_I[:-1], True))
    rows, start, begin = [], 0, 0
    for end, is_chat in zip(ends_I[last_of_document].tolist(), is_chat_I[last_of_document].tolist()):
        if is_chat and end - start > length:
            if begin > start:
                rows.append((start, begin))
            start = begin
            if end - begin > length:
                rows.append((begin, begin + length))
                start = end
        while end - start >= length:
            rows.append((start, start + length))
            start += length
        begin = end
    if begin > start:
        rows.append((start, begin))
    return np.array(rows, np.int64).reshape(-1, 2)


def _row(
    inputs: np.ndarray, targets: np.ndarray, mask: np.ndarray, document: np.ndarray, domain: np.ndarray, length: int
) -> Batch:
    """Returns a row of up to T inputs, each with its document and domain. There may be one target fewer than inputs."""
    t = np.arange(len(inputs))
    document, domain = document[: len(t)], domain[: len(t)]
    begins = np.append(True, document[1:] != document[:-1])
    positions = t - np.maximum.accumulate(np.where(begins, t, 0))
    row = Batch(inputs, targets, np.cumsum(begins), positions, mask, domain)
    return Batch(*(np.pad(x.astype(bool if x.dtype == bool else np.int32), (0, length - len(x))) for x in row))


class Dataset:
    """The prepared data of a config: batches for training and evaluation, by random access.

    Of data whose documents are all validation, `split.ALL`, there are batches for evaluation only. `validation` is
    such a set, where the config has one.
    """

    validation: "Dataset | None" = None
    notes: tuple[str, ...] = ()  # beside those of the manifest
    quarantine = Quarantine(0)  # what is left out of it and of its validation set

    def __init__(self, store: Store, data: Data, weights: Sequence[float], batch_size: int, seed: int) -> None:
        self._store, self._data, self._batch_size = store, data, batch_size
        self.manifest: dict[str, Any] = store.manifest
        self.tokenizer: Tokenizer = store.tokenizer
        self.domains: tuple[str, ...] = tuple(self.manifest["domains"])  # sorted; position = domain id
        for domain in self.domains:
            check_domain(domain)
            if domain not in self.manifest["counts"]:
                raise UserError(f"domain {domain!r}: prepared without its counts; {AGAIN}")
        made_from = [self.manifest["data"], self.tokenizer.fingerprint, self.manifest["validation_fraction"]]
        made_from += [list(weights), data.sequence_length]
        if data.document_start != "none":  # data from before there was a choice has the fingerprint that it had
            made_from.append(data.document_start)
        self.fingerprint: str = digest(made_from)
        counts = self.manifest["counts"]
        self.train_tokens: int = sum(counts[domain]["train"]["tokens"] for domain in self.domains)
        self.notes = tuple(_too_long(store, data.sequence_length))
        self.validation_tokens: dict[str, int] = {d: counts[d]["validation"]["tokens"] for d in self.domains}
        streams = self._streams(weights, seed) if self.manifest["validation_fraction"] != ALL else []
        self.remainder: int = sum(rows.remainder for rows in streams)  # tokens of an epoch that are in no row
        shuffled = [
            grain.MapDataset.source(rows).shuffle(seed=_seed(seed, f"rows {n}")).repeat()
            for n, rows in enumerate(streams)
        ]
        single, several = next(iter(shuffled), ()), len(shuffled) > 1
        self._rows = grain.MapDataset.mix(shuffled, weights=list(weights)) if several else single

    def _streams(self, weights: Sequence[float], seed: int) -> list[Rows]:
        train, source = ~self._store.columns["validation"], self._store.columns["source"]
        names = [source["name"] for source in self.manifest["sources"]]
        chosen = {name: train & (source == n) for n, name in enumerate(names)} if any(weights) else {"all": train}
        streams = {name: Rows(self._store, pieces, f"{seed} {name}", self._data) for name, pieces in chosen.items()}
        for name, rows in streams.items():
            if not len(rows):
                rule = f"must not be longer than the {rows.tokens} training tokens of source {name!r}"
                raise UserError(f"data.sequence_length={self._data.sequence_length}: {rule}")
        return list(streams.values())

    def batch(self, position: int, rows: Sequence[int] | None = None, ramp: Ramp | None = None) -> Batch:
        """Returns the batch at a position 0, 1, ..., or some of its rows in any order. Only these are read.

        ramp: how batches grow; of rows that a smaller one does not have, none is returned.
        """
        ramp = ramp or Ramp(self._batch_size, self._batch_size, 0, self._batch_size)
        first, size = ramp.before(position), ramp.size(position)
        chosen = range(size) if rows is None else (row for row in rows if row < size)
        return self.rows([first + int(row) for row in chosen])

    def rows(self, numbers: Sequence[int]) -> Batch:
        """Returns rows of the shuffled data, by their numbers 0, 1, ..., as one batch."""
        return Batch(*map(np.stack, zip(*(self._rows[number] for number in numbers))))

    def train_batches(
        self, start: int = 0, rows: Sequence[int] | None = None, ramp: Ramp | None = None
    ) -> Iterator[Batch]:
        """Returns an endless iterator: batch(start, ...), batch(start + 1, ...), ... Two threads read ahead."""
        return _ahead(grain.MapDataset.range(start, sys.maxsize).map(lambda position: self.batch(position, rows, ramp)))

    def batches_of(self, numbers: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """Returns an iterator over batches of the rows with these numbers. Two threads read ahead."""
        return _ahead(grain.MapDataset.range(len(numbers)).map(lambda position: self.rows(numbers[position])))

    def eval_bytes(self, domain: str, max_rows: int | None = None) -> int:
        """Returns how many UTF-8 bytes of text the targets of `eval_batches` stand for in all."""
        rows, batches = self._eval_rows(domain, 1, max_rows)
        sizes = rows.sizes()
        return sum(int(sizes[n].targets_BT.sum(dtype=np.int64)) for numbers in batches for n in numbers)

    def eval_rows(self, domain: str, max_rows: int | None = None) -> int:
        """Returns how many rows `eval_batches` yields in all, without those that only fill a batch."""
        return sum(map(len, self._eval_rows(domain, 1, max_rows)[1]))

    def eval_batches(self, domain: str, batch_size: int, max_rows: int | None = None) -> Iterator[Batch]:
        """Yields the first `max_rows` validation rows of one domain, or all, in an order that no seed changes.

        The last batch is padded with segment 0.
        """
        rows, batches = self._eval_rows(domain, batch_size, max_rows)
        for numbers in batches:
            stacked = [np.stack(columns) for columns in zip(*(rows[n] for n in numbers))]
            missing = ((0, batch_size - len(numbers)), (0, 0))
            yield Batch(*(np.pad(column, missing) for column in stacked))

    def eval_documents(self, domain: str, batch_size: int, max_rows: int | None = None) -> Iterator[np.ndarray]:
        """Yields the number [B, T] of each token's document in `eval_batches`, the same in every run; -1: padding."""
        rows, batches = self._eval_rows(domain, batch_size, max_rows)
        for numbers in batches:
            missing = ((0, batch_size - len(numbers)), (0, 0))
            yield np.pad(np.stack([rows.documents(n) for n in numbers]), missing, constant_values=-1)

    def _eval_rows(self, domain: str, batch_size: int, max_rows: int | None) -> tuple[Rows, list[list[int]]]:
        """Returns the validation rows of a domain, and the numbers of those in each batch."""
        if domain not in self.domains:
            raise UserError(f"domain {domain!r}: unknown; valid: {', '.join(self.domains)}")
        columns = self._store.columns
        chosen = columns["validation"] & (columns["domain"] == self.domains.index(domain))
        rows = Rows(self._store, chosen, EVAL_SEED, self._data, pad=True)
        order = np.argsort(_mix(np.arange(len(rows), dtype=np.uint64), _seed(EVAL_SEED, "rows")), kind="stable")
        chosen = order[:max_rows]
        return rows, [chosen[i : i + batch_size].tolist() for i in range(0, len(chosen), batch_size)]


def _ahead(batches: grain.MapDataset) -> Iterator[Batch]:
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def open_data(data: Data, *, batch_size: int, seed: int, progress: bool = True) -> Dataset:
    """Returns the data of a config, prepared in the cache at the first call. `data.path` may be prepared already.

    Where the config has a validation set, that is opened too, as `Dataset.validation`.
    """
    if batch_size < 1 or seed < 0:
        raise UserError(f"batch_size={batch_size}, seed={seed}: must be at least 1 and at least 0")
    own = bool(data.validation.path) and data.validation_fraction != ALL
    if own:
        check_validation(data, progress)
    quarantine = Quarantine(data.quarantine)
    store = _store(data, progress, quarantine)
    weights = [source["weight"] for source in store.manifest["sources"]]
    if data.sources:
        weights = [data.sources[source["name"]].weight for source in store.manifest["sources"]]
    found = Dataset(store, data, weights, batch_size, seed)
    found.quarantine = quarantine
    if own:
        held_out = _store(held_out_data(data, str(store.directory)), progress, quarantine)
        found.validation = Dataset(held_out, data, [0.0] * len(held_out.manifest["sources"]), batch_size, seed)
        found.notes += tuple(_repeated(store, held_out))
        found.notes += tuple(f"data.validation: {line}" for line in found.validation.notes)
    if progress:
        say(found.notes)
    return found


def _store(data: Data, progress: bool, quarantine: Quarantine) -> Store:
    path = prepared_path(data)
    if path is None:
        return Store(prepare(data, progress=progress), quarantine)
    store = Store(path, quarantine)
    _check_prepared(data, store)
    if progress:
        say(store.manifest["notes"])
    return store


def prepared_path(data: Data) -> Path | None:
    """Returns the prepared directory that a config's `path` names."""
    path = Path(os.path.expanduser(data.path))
    return path if not data.sources and data.path and is_prepared(path) else None


def held_out_data(data: Data, tokenizer: str) -> Data:
    """Returns a config's own validation set as data by themselves, tokenized by the tokenizer at a path.

    Of a prepared directory they are its held-out documents.
    """
    there = dataclasses.replace(data, path=data.validation.path, sources=FrozenDict(), validation=Source())
    if (path := prepared_path(there)) is None:
        return of_validation(data, tokenizer)
    fraction = read_manifest(path)["validation_fraction"]
    return dataclasses.replace(there, tokenizer=tokenizer, validation_fraction=fraction)


def check_validation(data: Data, progress: bool = False) -> None:
    """Raises `UserError` where a config's own validation set cannot be found, or names what is trained on."""
    other = held_out_data(data, data.tokenizer)
    paths = prepared_path(data), prepared_path(other)
    if paths[0] and paths[1] and paths[0].resolve() == paths[1].resolve():
        rule = "is data.path too, whose held-out documents are scored anyway"
        raise UserError(f"data.validation.path={data.validation.path!r}: {rule}")
    inputs = [[] if path else open_inputs(each, progress) for path, each in zip(paths, (data, other))]
    check_apart(*inputs)


def _too_long(store: Store, length: int) -> list[str]:
    """A line on conversations that are longer than a row."""
    _, number = np.unique(store.columns["document"][store.is_chat_I], return_inverse=True)
    tokens = np.bincount(number, store.columns["length"][store.is_chat_I])
    count = int((tokens > length).sum())
    rule = f"{count:,} of {len(tokens):,} conversations are longer than a row; their first {length} tokens are taken"
    return [f"data.sequence_length={length}: {rule}"] if count else []


def _repeated(training: Store, validation: Store) -> list[str]:
    """A line on validation documents whose text is trained on."""
    chosen = validation.columns["validation"]
    hashes = np.unique(validation.columns["hash"][chosen])
    count = int(np.isin(hashes, training.columns["hash"][~training.columns["validation"]]).sum())
    rule = f"{count:,} of its {len(hashes):,} documents repeat the text of a training document"
    return [f"data.validation.path: {rule}"] if count else []


def _check_prepared(data: Data, store: Store) -> None:
    made = store.manifest["tokenizer"]
    spec = parse(data.tokenizer)
    same = data.tokenizer == made["spec"]
    if spec is None:
        same = made["fingerprint"] == ByteTokenizer().fingerprint
    elif isinstance(spec, Path):
        same = load_json(spec, f"data.tokenizer={data.tokenizer!r}").fingerprint == made["fingerprint"]
    if not same:
        rule = f"{data.path!r} was prepared with {made['spec']!r} (fingerprint {made['fingerprint']}); both must agree"
        raise UserError(f"data.tokenizer={data.tokenizer!r}: {rule}")
    fraction = store.manifest["validation_fraction"]
    if data.validation_fraction != fraction:
        raise UserError(
            f"data.validation_fraction={data.validation_fraction}: {data.path!r} was prepared with {fraction}"
        )


def _seed(seed: int | str, purpose: str) -> int:
    """Returns 32 hashed bits for one purpose. grain adds the epoch to a seed, so close seeds would share epochs."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=4).digest(), "big")


def _mix(x: np.ndarray, seed: int) -> np.ndarray:
    """Returns x after a seeded bijection of uint64, the finaliser of SplitMix64 (Steele et al., 2014)."""
    x = x ^ np.uint64(seed * 0x9E3779B97F4A7C15 % (1 << 64))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
