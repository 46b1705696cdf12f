"""Text to token ids and back: raw bytes, byte-level BPE trained on the data, or a published vocabulary.

A tokenizer is saved as the two files that Hugging Face uses, `tokenizer.json` and `tokenizer_config.json` (bytes need
only the second), so that a run directory and a published model directory are read by the same function. What it knows
of conversations is in two more, its chat template and where else than at the end of a text sampling ends.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from frugalmoe.data import chat, end_of_text, vocabularies
from frugalmoe.data.chat import ChatTemplate, Rendered
from frugalmoe.data.end_of_text import END_OF_TEXT, read_object
from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.files import write_atomically, write_json

# The library's own thread pool makes batches slower than one thread (measured: 4.5 MB in 3.7 s against 1.2 s on two
# cores); `prepare` runs one document per thread instead, which scales.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SMALLEST_BPE = 257  # 256 bytes and the end of a document
LARGEST = 1 << 22  # tokens in a vocabulary: more are taken for damage


class Encoded(NamedTuple):
    """A whole document."""

    tokens: np.ndarray  # int32[n]; the last is the end-of-text token
    sizes: np.ndarray  # int32[n]: UTF-8 bytes of the text that each token stands for; their sum is the text's
    same: bool  # decoding gives the text back


class Chat(NamedTuple):
    """A conversation."""

    tokens: np.ndarray  # int32[n]
    sizes: np.ndarray  # int32[n]: UTF-8 bytes of the text that each token stands for, 0 for special tokens
    answers: np.ndarray  # bool[n]: whether a character of the token is the assistant's, where the template marks that


class Tokenizer(Protocol):
    """What the rest of the code knows of a tokenizer."""

    size: int  # ids are 0 .. size-1
    eos: int  # ends each document; never the result of encoding text
    silent: tuple[int, ...]  # ids below `size` that show no text: specials, and gaps between ids
    token_bytes: np.ndarray  # int32[size]: bytes of a token by itself, 0 for specials: `document` counts
    fingerprint: str  # equal for equal tokenizers, on every machine
    chat: ChatTemplate | None  # how it writes conversations
    ends: tuple[int, ...]  # ids at which a sampled text ends: `eos`, and where a turn of a conversation does

    def encode(self, text: str) -> np.ndarray:
        """Returns int32 ids of the text, without specials."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def document(self, text: str) -> Encoded:
        """Returns the text with its end-of-text token, and how many bytes of it each token stands for."""
        ...

    def encode_chat(self, rendered: Rendered) -> Chat:
        """Returns the tokens of a conversation as its template wrote it, special tokens as such, nothing added."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids, without specials; bytes that are not UTF-8 become U+FFFD."""
        ...

    def save_into(self, directory: str | Path) -> None: ...


class ByteTokenizer:
    """Token i is the byte i; 256 ends a document."""

    size = 257
    eos = 256
    silent = (eos,)
    chat = None
    ends = (eos,)

    def __init__(self) -> None:
        self.token_bytes = np.array([1] * 256 + [0], np.int32)
        self.fingerprint = "bytes-257"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def document(self, text: str) -> Encoded:
        tokens = np.append(self.encode(text), np.int32(self.eos))
        return Encoded(tokens, self.token_bytes[tokens], True)

    def encode_chat(self, rendered: Rendered) -> Chat:
        raise UserError("data.tokenizer='bytes': has no chat template")

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")

    def save_into(self, directory: str | Path) -> None:
        write_json(Path(directory) / "tokenizer_config.json", {"kind": "bytes"})


class JsonTokenizer:
    """A Hugging Face `tokenizer.json`. The text `<|endoftext|>` in a document is text, not the special token.

    Its end-of-text token is `eos_token`, or None: what a file of `directory` names, or a special token of a known name.
    Its chat template, and where else a sampled text ends, are those of `directory`.
    """

    def __init__(self, content: str, eos_token: str | None, where: str, directory: Path | None = None) -> None:
        try:
            read = _read(content)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        self._text, self._content, self._tokenizer, self.size = content, read.content, read.tokenizer, read.size
        if eos_token is None:
            eos_token = end_of_text.find(directory, read.vocabulary, read.specials.values(), where)
        if eos_token not in read.vocabulary:
            raise UserError(f"{where}: end-of-text token {eos_token!r} is not in its vocabulary")
        self._where, self._eos_token = where, eos_token
        self.eos = read.vocabulary[eos_token]
        self.chat = directory and chat.find(directory)
        self.ends = (self.eos,)
        if directory:
            self.ends += tuple(i for i in end_of_text.ids_of_generation(directory, read.vocabulary) if i != self.eos)
        self.silent = tuple(sorted({*read.specials, self.eos, *read.gaps}))
        self._pieces = [*read.pieces[: self.eos], b"", *read.pieces[self.eos + 1 :]]
        self.token_bytes = np.array([len(piece) for piece in self._pieces], np.int32)
        canonical = read.canonical.copy()
        canonical.update(f", {json.dumps(eos_token, ensure_ascii=False)}]".encode())
        self.fingerprint = "json-" + canonical.hexdigest()[:16]

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(encoding.ids, np.int32) for encoding in self._encoded(texts)]

    def document(self, text: str) -> Encoded:
        """Returns the tokens of a text, the bytes of it that each stands for, and whether decoding gives it back.

        If the tokens' own bytes join to the text, these are counted. Otherwise a token stands for the text from the end
        of the token before it to its own end, and end-of-text for what no token stands for.
        """
        ids = self._encoded([text])[0].ids
        if self.eos in ids:
            rule = "it must be no piece that a text can hold; name another"
            raise UserError(f"{self._where}: a text encodes to the end-of-text token {self._eos_token!r}; {rule}")
        tokens = np.array([*ids, self.eos], np.int32)
        raw, joined = text.encode(), b"".join([self._pieces[i] for i in ids])
        sizes = self.token_bytes[tokens]
        if joined == raw and (self._content.get("decoder") or {}).get("type") == "ByteLevel":
            return Encoded(tokens, sizes, True)  # this decoder only joins bytes; what others do is tried below
        if joined == b" " + raw:  # SentencePiece's dummy prefix
            sizes[0] -= 1
        elif joined != raw:
            sizes = _sizes(text, len(raw), self._ends(text))
        return Encoded(tokens, sizes, self.decode(ids) == text)

    def _encoded(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """Without the places of tokens in the text, which take a quarter of the time of the rest."""
        with _of_library(f"{self._where}: a text cannot be encoded"):
            return self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)

    def _ends(self, text: str) -> list[int]:
        """The number of characters of a text up to the end of each token."""
        with _of_library(f"{self._where}: a text cannot be encoded"):
            return [end for _, end in self._tokenizer.encode(text, add_special_tokens=False).offsets]

    def encode_chat(self, rendered: Rendered) -> Chat:
        with _of_library(f"{self._where}: a conversation cannot be encoded"):
            encoding = self._with_specials.encode(rendered.text, add_special_tokens=False)
        answers = np.zeros(len(encoding.ids), bool)
        first_last = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        for begin, end in rendered.answers:
            answers |= (first_last[:, 0] < end) & (first_last[:, 1] > begin)
        tokens, text = np.array(encoding.ids, np.int32), rendered.text
        sizes = _sizes(text, len(text.encode()), [end for _, end in encoding.offsets])[:-1]
        return Chat(tokens, np.where(np.isin(tokens, self.silent), 0, sizes), answers)

    @functools.cached_property
    def _with_specials(self) -> tokenizers.Tokenizer:
        """The same, but the text of a special token is that token: for texts that a chat template wrote."""
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = False
        return copy

    def decode(self, ids: Iterable[int]) -> str:
        with _of_library(f"{self._where}: tokens cannot be decoded"):
            return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def save_into(self, directory: str | Path) -> None:
        write_atomically(Path(directory) / "tokenizer.json", self._text.encode())
        config = {"kind": "json", "eos_token": self._eos_token, "fingerprint": self.fingerprint}
        if self.chat:
            write_atomically(Path(directory) / chat.FILE, self.chat.source.encode())
            config = {**self.chat.tokens, **config}
        if len(self.ends) > 1:
            write_json(Path(directory) / end_of_text.GENERATION, {"eos_token_id": list(self.ends)})
        write_json(Path(directory) / chat.CONFIG, config)


class _Read(NamedTuple):
    """What the text of a tokenizer.json says by itself."""

    tokenizer: tokenizers.Tokenizer  # not changed by those who share it
    content: dict
    vocabulary: dict[str, int]
    size: int
    specials: dict[int, str]
    gaps: list[int]  # ids that are no token
    pieces: list[bytes]
    canonical: Any  # SHA-256 of "[" and the content with sorted keys


@functools.lru_cache(maxsize=2)
def _read(text: str) -> _Read:
    """Reads a tokenizer.json. Of a large vocabulary that takes seconds, and it is read from its own folder, from that
    of prepared data and from that of a run: one text is read once. Raises ValueError with what is wrong.
    """
    with _of_library("not a tokenizer.json", ValueError):
        tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    content, of_model = json.loads(text), tokenizer.get_vocab(with_added_tokens=False)
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = of_model | {token.content: i for i, token in added.items()}
    size = max(vocabulary.values(), default=-1) + 1
    if not 0 < size <= LARGEST:
        raise ValueError(f"has token ids up to {size - 1}; they must be below {LARGEST}")
    specials = {i: token.content for i, token in added.items() if token.special}
    gaps = sorted(set(range(size)) - set(vocabulary.values()))
    pieces = _pieces(content, of_model, added, size)
    canonical = hashlib.sha256(f"[{json.dumps(content, sort_keys=True, ensure_ascii=False)}".encode())
    return _Read(tokenizer, content, vocabulary, size, specials, gaps, pieces, canonical)


@contextmanager
def _of_library(what: str, raised: type[Exception] = UserError) -> Iterator[None]:
    """One line for what the library has against a vocabulary, which often only a text shows."""
    try:
        yield
    except BaseException as error:  # it raises a bare Exception, and its panics are not even that
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise raised(f"{what} ({str(error).partition(chr(10))[0]})") from error


def load_from(directory: str | Path) -> Tokenizer:
    """Returns the tokenizer that `save_into` wrote, or that of a published model's directory."""
    directory = Path(directory)
    if _is_bytes(directory):
        return ByteTokenizer()
    return load_json(vocabularies.find(directory, f"tokenizer of {directory}"), f"tokenizer of {directory}")


def _is_bytes(directory: Path) -> bool:
    config = directory / "tokenizer_config.json"
    if not config.is_file() or read_object(config).get("kind") != "bytes":
        return False
    if (directory / "tokenizer.json").is_file():
        raise UserError(f"{config}: says kind 'bytes', but a tokenizer.json is beside it; one of them is not its own")
    return True


def load_json(path: Path, where: str) -> JsonTokenizer:
    """Reads a tokenizer.json, or another vocabulary that can be written as one: see `vocabularies`."""
    tokenizer = JsonTokenizer(vocabularies.read(path, where), None, where, directory=path.parent)
    config = path.with_name("tokenizer_config.json")
    saved = read_object(config).get("fingerprint") if config.is_file() else None
    if saved not in (None, tokenizer.fingerprint):
        rule = "it, or its end-of-text token, changed after it was saved; put the saved one back"
        raise UserError(f"{path}: has the fingerprint {tokenizer.fingerprint}, not {saved}: {rule}")
    return tokenizer


def parse(spec: str) -> int | Path | None:
    """Returns `data.tokenizer` as None (bytes), a vocabulary size (bpe:SIZE) or the file of a vocabulary."""
    if spec == "bytes":
        return None
    if spec.startswith("bpe:"):
        size = spec.removeprefix("bpe:")
        if not (size.isdecimal() and len(size) < 10 and SMALLEST_BPE <= int(size) <= LARGEST):
            rule = f"SIZE of bpe:SIZE must be a whole number from {SMALLEST_BPE} to {LARGEST}"
            raise UserError(f"data.tokenizer={spec!r}: {rule}")
        return int(size)
    path = Path(os.path.expanduser(spec))
    if os.path.isdir(path):
        return None if _is_bytes(path) else vocabularies.find(path, f"data.tokenizer={spec!r}")
    if not os.path.isfile(path):
        hint = did_you_mean(spec, ["bytes", "bpe:SIZE", "the path of a tokenizer.json or of its directory"])
        raise UserError(f"data.tokenizer={spec!r}: no such kind or file; {hint}")
    return path


def expected_size(spec: str) -> int:
    """The vocabulary of `data.tokenizer` before its text is read; a trained one may turn out smaller."""
    found = known(spec)
    return found.size if found else parse(spec)


def known(spec: str) -> Tokenizer | None:
    """The tokenizer of `data.tokenizer` before its text is read; None for one that is trained on it."""
    found = parse(spec)
    if isinstance(found, int):
        return None
    return load_json(found, f"data.tokenizer={spec!r}") if found else ByteTokenizer()


def train_bpe(texts: Iterable[str], size: int) -> JsonTokenizer:
    """Returns byte-level BPE (Sennrich et al., arXiv 1508.07909; on bytes as in GPT-2). It ignores the order of texts.

    The vocabulary is smaller than `size` where the texts have no more pairs to merge.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return JsonTokenizer(tokenizer.to_str(), END_OF_TEXT, "trained BPE")


def _pieces(
    content: dict, of_model: Mapping[str, int], added: Mapping[int, tokenizers.AddedToken], size: int
) -> list[bytes]:
    """Returns the UTF-8 bytes of each token by itself, as its vocabulary writes it. Some tokenizers put out others, so
    `JsonTokenizer.document` compares them with the text.
    """
    model, pieces = content["model"], [b""] * size
    byte_level = '"type": "ByteLevel"' in json.dumps([content.get("decoder"), content.get("pre_tokenizer")])
    # In a byte-level vocabulary one character stands for one byte; SentencePiece writes a space as U+2581.
    table = vocabularies.byte_alphabet() if byte_level else {"▁": b" "}
    for token, i in of_model.items():
        if not byte_level and vocabularies.is_byte(token):
            pieces[i] = bytes([int(token[3:5], 16)])
        elif model.get("type") == "WordPiece":
            pieces[i] = token.removeprefix(model.get("continuing_subword_prefix") or "##").encode()
        else:
            pieces[i] = b"".join([table.get(character) or character.encode() for character in token])
    for i, token in added.items():
        if token.special:
            pieces[i] = b""
        elif token.content not in of_model:
            pieces[i] = token.content.encode()
    return pieces


def _sizes(text: str, total: int, ends: list[int]) -> np.ndarray:
    """Returns the bytes of the text between the ends (in characters) of neighbouring tokens; last, those that remain to
    `total`. Where tokens share a character, its bytes are counted for the first of them.
    """
    characters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    width = 1 + (characters > 0x7F) + (characters > 0x7FF) + (characters > 0xFFFF)
    before = np.append(0, np.cumsum(width))
    reached = np.maximum.accumulate(np.append(before[np.array(ends, np.int64)], total))
    return np.diff(reached, prepend=0).astype(np.int32)
