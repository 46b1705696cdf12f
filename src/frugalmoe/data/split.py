"""Which documents are validation: decided by a hash of the text, so neither order nor sharding nor seed matters."""

import dataclasses
import hashlib
import heapq
from collections.abc import Iterable

from frugalmoe.data.sources import ALL, Document
from frugalmoe.errors import UserError

HASHES = 1 << 64
TAKEN = ("mean", "all")  # names beside the domains' own: of their mean, and of all tokens


def check_domain(name: str) -> None:
    """Raises `UserError` for a label that metrics and tables cannot name: taken, blank, or not printable."""
    if name in TAKEN or not name.strip() or not name.isprintable():
        rule = f"a label must be printable text, and not {' or '.join(TAKEN)}, which name results over all domains"
        raise UserError(f"data: domain {name!r}: {rule}; give another by `domain` of its source")


def text_hash(text: str) -> int:
    """Returns 64 bits that are the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


@dataclasses.dataclass(frozen=True)
class Split:
    """Hashes below the threshold are validation, but for the few that give each domain both sides."""

    threshold: int
    validation: frozenset[int]
    train: frozenset[int]

    def is_validation(self, text_hash: int) -> bool:
        return (text_hash < self.threshold or text_hash in self.validation) and text_hash not in self.train


@dataclasses.dataclass
class Survey:
    """One pass over all documents: what must be known before the first is tokenised. Memory does not grow with them."""

    documents: int = 0
    bytes: int = 0
    digest: int = 0  # sum of the documents' hashes: the order does not matter, their number does
    lowest: dict[str, int] = dataclasses.field(default_factory=dict)  # hash by domain
    highest: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, source: str, document: Document, text_hash: int) -> None:
        size = len(document.text.encode())
        key = f"{source}\0{document.domain}\0{text_hash}\0{size}".encode()
        key += repr(document.answers).encode() if document.answers is not None else b""
        self.documents += 1
        self.bytes += size
        self.digest += int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "big")
        self.digest %= 1 << 128
        self.lowest[document.domain] = min(text_hash, self.lowest.get(document.domain, text_hash))
        self.highest[document.domain] = max(text_hash, self.highest.get(document.domain, text_hash))

    def split(self, fraction: float) -> Split:
        """Each domain has its lowest hash in validation and its highest in training, unless `ALL` are validation."""
        threshold = int(fraction * HASHES)
        for domain, low in self.lowest.items():
            check_domain(domain)
            if fraction != ALL and low == self.highest[domain]:
                rule = "a domain needs 2 (one for validation); put it into another by `domain` of its source"
                raise UserError(f"data: domain {domain!r} has only 1 distinct document; {rule}")
        return Split(
            threshold=threshold,
            validation=frozenset(h for h in self.lowest.values() if h >= threshold),
            train=frozenset(h for h in self.highest.values() if h < threshold and fraction != ALL),
        )


class Sample:
    """The documents with the highest hashes, up to `limit` characters: the same whatever order they come in."""

    LONGEST = 1 << 16  # characters of one document that are kept

    def __init__(self, limit: int) -> None:
        self._limit, self._size, self._floor = limit, 0, -1
        self._heap: list[tuple[int, str]] = []
        self._seen: set[int] = set()

    def add(self, text_hash: int, text: str) -> None:
        if text_hash <= self._floor or text_hash in self._seen:
            return
        text = text[: self.LONGEST]
        heapq.heappush(self._heap, (text_hash, text))
        self._seen.add(text_hash)
        self._size += len(text)
        while self._size > self._limit:
            self._floor, text = heapq.heappop(self._heap)
            self._size -= len(text)
            self._seen.remove(self._floor)

    def texts(self, split: Split) -> Iterable[str]:
        """Returns the training documents of the sample, sorted by hash."""
        return [text for text_hash, text in sorted(self._heap) if not split.is_validation(text_hash)]
