"""A batch is a pure function of (config, seed, step), by random access.

Letters: B rows of a batch, T tokens of a row, P stored pieces of documents.

Documents, each ending with the end-of-text token, are put in an order fixed by the seed and cut into rows of T tokens.
Rows are drawn in a fresh shuffled order in each epoch; where sources have weights, each is its own such stream and the
streams are mixed. Every token is an input once per epoch, except the `remainder`, the last partial row of a stream.
"""

import copy
import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from frugalmoe.config.schema import Data
from frugalmoe.data.cache import digest
from frugalmoe.data.prepare import prepare, say
from frugalmoe.data.shards import Sizes, Store, is_prepared
from frugalmoe.data.tokenizer import ByteTokenizer, Tokenizer, load_json, parse
from frugalmoe.errors import UserError

EVAL_SEED = "validation"  # of the order of validation rows: the same for every run, so that runs compare


class Batch(NamedTuple):
    """Rows of tokens. int32, the mask bool; [T] for one row, [B, T] for a batch."""

    tokens_BT: np.ndarray
    targets_BT: np.ndarray  # the next token of the same document; 0 where the mask is False
    segment_ids_BT: np.ndarray  # 1, 2, ... for the documents of a row; 0 = padding
    positions_BT: np.ndarray  # inside the document; a document that goes on in another row restarts at 0 there
    loss_mask_BT: np.ndarray
    domain_ids_BT: np.ndarray  # number in `Dataset.domains`; 0 for padding


class Rows:
    """Chosen documents of a store in an order fixed by the seed, cut into rows. A grain random-access source."""

    def __init__(self, store: Store, chosen_P: np.ndarray, seed: int | str, length: int, pad: bool = False) -> None:
        columns = store.columns
        pieces = np.flatnonzero(chosen_P)
        # The order depends on the texts alone, not on files, shards or workers. The document's number breaks ties of
        # duplicates, and keeps the pieces of a document together and in order.
        order = np.lexsort(
            (pieces, columns["document"][pieces], _mix(columns["hash"][pieces], _seed(seed, "documents")))
        )
        self._store, self._length, self._pieces = store, length, pieces[order]
        self._document = columns["document"][self._pieces]
        self._domain = columns["domain"][self._pieces]
        self._lengths = columns["length"][self._pieces]
        self._ends = np.cumsum(self._lengths, dtype=np.int64)
        self.tokens = int(self._ends[-1]) if len(self._ends) else 0
        self.remainder = 0 if pad else self.tokens % length
        self._num_rows = -(-self.tokens // length) if pad else self.tokens // length

    def __len__(self) -> int:
        return self._num_rows

    def sizes(self) -> "Rows":
        """The same rows with UTF-8 bytes of text in the place of tokens: of what each stands for."""
        rows = copy.copy(self)
        rows._store = Sizes(self._store)
        return rows

    def __getitem__(self, row: int) -> Batch:
        """One row; its last target is the first token of the row that follows."""
        span, inside = self._place(row)
        tokens = np.concatenate([self._store.read(piece).tokens for piece in self._pieces[span]])[inside]
        document = np.repeat(self._document[span], self._lengths[span])[inside]
        domain = np.repeat(self._domain[span], self._lengths[span])[inside]
        return _row(tokens, document, domain, self._length)

    def documents(self, row: int) -> np.ndarray:
        """The number, in the store, of the document of each token of a row; -1 for padding. Reads no text."""
        span, inside = self._place(row)
        numbers = np.repeat(self._document[span], self._lengths[span])[inside][: self._length]
        return np.pad(numbers, (0, self._length - len(numbers)), constant_values=-1)

    def _place(self, row: int) -> tuple[slice, slice]:
        """(pieces that hold a row and its look-ahead, where it lies in their tokens)."""
        start = row * self._length
        stop = min(start + self._length + 1, self.tokens)
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop, side="left"))
        skipped = start - (self._ends[first] - self._lengths[first])
        return slice(first, last + 1), slice(skipped, skipped + stop - start)


def _row(tokens: np.ndarray, document: np.ndarray, domain: np.ndarray, length: int) -> Batch:
    """A row of up to T+1 tokens of a stream: T inputs and the look-ahead."""
    inputs = min(len(tokens), length)
    begins = np.append(True, document[1:inputs] != document[: inputs - 1])
    t = np.arange(inputs)
    mask = np.zeros(inputs, bool)
    mask[: len(tokens) - 1] = document[1:] == document[:-1]
    targets = np.zeros(inputs, np.int32)
    targets[: len(tokens) - 1] = tokens[1:]
    positions = t - np.maximum.accumulate(np.where(begins, t, 0))
    row = Batch(tokens[:inputs], targets * mask, np.cumsum(begins), positions, mask, domain[:inputs])
    return Batch(*(np.pad(x.astype(bool if x.dtype == bool else np.int32), (0, length - inputs)) for x in row))


class Dataset:
    """What `open_data` returns."""

    def __init__(self, store: Store, data: Data, weights: Sequence[float], batch_size: int, seed: int) -> None:
        self._store, self._length, self._batch_size = store, data.sequence_length, batch_size
        self.manifest: dict[str, Any] = store.manifest
        self.tokenizer: Tokenizer = store.tokenizer
        self.domains: tuple[str, ...] = tuple(self.manifest["domains"])  # sorted; position = domain id
        made_from = [self.manifest["data"], self.tokenizer.fingerprint, self.manifest["validation_fraction"]]
        self.fingerprint: str = digest([*made_from, list(weights), data.sequence_length])
        counts = self.manifest["counts"]
        self.train_tokens: int = sum(counts[domain]["train"]["tokens"] for domain in self.domains)
        self.validation_tokens: dict[str, int] = {d: counts[d]["validation"]["tokens"] for d in self.domains}
        streams = self._streams(weights, seed)
        self.remainder: int = sum(rows.remainder for rows in streams)  # tokens of an epoch that are in no row
        shuffled = [
            grain.MapDataset.source(rows).shuffle(seed=_seed(seed, f"rows {n}")).repeat()
            for n, rows in enumerate(streams)
        ]
        self._rows = shuffled[0] if len(shuffled) == 1 else grain.MapDataset.mix(shuffled, weights=list(weights))

    def _streams(self, weights: Sequence[float], seed: int) -> list[Rows]:
        train, source = ~self._store.columns["validation"], self._store.columns["source"]
        names = [source["name"] for source in self.manifest["sources"]]
        chosen = {name: train & (source == n) for n, name in enumerate(names)} if any(weights) else {"all": train}
        streams = {name: Rows(self._store, pieces, f"{seed} {name}", self._length) for name, pieces in chosen.items()}
        for name, rows in streams.items():
            if not len(rows):
                rule = f"must not be longer than the {rows.tokens} training tokens of source {name!r}"
                raise UserError(f"data.sequence_length={self._length}: {rule}")
        return list(streams.values())

    def batch(self, step: int, rows: Sequence[int] | None = None) -> Batch:
        """The batch of a step, or some of its rows, in any order, at the cost of reading them."""
        first = step * self._batch_size
        chosen = range(self._batch_size) if rows is None else rows
        return Batch(*map(np.stack, zip(*(self._rows[first + int(row)] for row in chosen))))

    def train_batches(self, start_step: int = 0, rows: Sequence[int] | None = None) -> Iterator[Batch]:
        """batch(start_step, rows), batch(start_step + 1, rows), ... without end, read ahead by two threads."""
        ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        steps = grain.MapDataset.range(start_step, sys.maxsize)
        return iter(steps.map(lambda step: self.batch(step, rows)).to_iter_dataset(ahead))

    def eval_bytes(self, domain: str, batch_size: int, max_batches: int | None = None) -> int:
        """UTF-8 bytes of text that the targets of `eval_batches` stand for, all together."""
        rows, batches = self._eval_rows(domain, batch_size, max_batches)
        sizes = rows.sizes()
        return sum(int(sizes[n].targets_BT.sum(dtype=np.int64)) for numbers in batches for n in numbers)

    def eval_batches(self, domain: str, batch_size: int, max_batches: int | None = None) -> Iterator[Batch]:
        """Validation rows of one domain in an order that no seed changes; the last batch is padded with segment 0."""
        rows, batches = self._eval_rows(domain, batch_size, max_batches)
        for numbers in batches:
            stacked = [np.stack(columns) for columns in zip(*(rows[n] for n in numbers))]
            missing = ((0, batch_size - len(numbers)), (0, 0))
            yield Batch(*(np.pad(column, missing) for column in stacked))

    def eval_documents(self, domain: str, batch_size: int, max_batches: int | None = None) -> Iterator[np.ndarray]:
        """The document [B, T] of each token of `eval_batches`, a number that no run changes; -1 for padding."""
        rows, batches = self._eval_rows(domain, batch_size, max_batches)
        for numbers in batches:
            missing = ((0, batch_size - len(numbers)), (0, 0))
            yield np.pad(np.stack([rows.documents(n) for n in numbers]), missing, constant_values=-1)

    def _eval_rows(self, domain: str, batch_size: int, max_batches: int | None) -> tuple[Rows, list[list[int]]]:
        """The validation rows of a domain, and the numbers of those in each batch."""
        if domain not in self.domains:
            raise UserError(f"domain {domain!r}: unknown; valid: {', '.join(self.domains)}")
        columns = self._store.columns
        chosen = columns["validation"] & (columns["domain"] == self.domains.index(domain))
        rows = Rows(self._store, chosen, EVAL_SEED, self._length, pad=True)
        order = np.argsort(_mix(np.arange(len(rows), dtype=np.uint64), _seed(EVAL_SEED, "rows")), kind="stable")
        batches = [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
        return rows, batches[:max_batches]


def open_data(data: Data, *, batch_size: int, seed: int, progress: bool = True) -> Dataset:
    """The data of a config, prepared into the cache at the first call; `data.path` may be a prepared directory."""
    if batch_size < 1 or seed < 0:
        raise UserError(f"batch_size={batch_size}, seed={seed}: must be at least 1 and at least 0")
    path = Path(data.path).expanduser()
    if not data.sources and data.path and is_prepared(path):
        store = Store(path)
        _check_prepared(data, store)
        if progress:
            say(store.manifest["notes"])
        weights = [source["weight"] for source in store.manifest["sources"]]
    else:
        store = Store(prepare(data, progress=progress))
        weights = [data.sources[source["name"]].weight if data.sources else 0.0 for source in store.manifest["sources"]]
    return Dataset(store, data, weights, batch_size, seed)


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
    """32 bits for one purpose. grain adds the epoch to a seed, so that neighbouring seeds would share epochs."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=4).digest(), "big")


def _mix(x: np.ndarray, seed: int) -> np.ndarray:
    """A seeded bijection of uint64, the same in every numpy: the finaliser of SplitMix64 (Steele et al., 2014)."""
    x = x ^ np.uint64(seed * 0x9E3779B97F4A7C15 % (1 << 64))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
