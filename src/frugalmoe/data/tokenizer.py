"""Text to token ids and back: raw bytes, byte-level BPE trained on the data, or any `tokenizer.json`.

A tokenizer is saved as the two files that Hugging Face uses, `tokenizer.json` and `tokenizer_config.json` (bytes need
only the second), so that a run directory and a published model directory are read by the same function.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.files import write_atomically, write_json

# The library's own thread pool makes batches slower than one thread (measured: 4.5 MB in 3.7 s against 1.2 s on two
# cores); `prepare` runs one document per thread instead, which scales.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

END_OF_TEXT = "<|endoftext|>"
KNOWN_EOS = (
    END_OF_TEXT,
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<｜end▁of▁sentence｜>",
    "[EOS]",
)
SMALLEST_BPE = 257  # 256 bytes and the end of a document


class Tokenizer(Protocol):
    """What the rest of the code knows of a tokenizer."""

    size: int  # ids are 0 .. size-1
    eos: int  # ends each document; never the result of encoding text
    silent: tuple[int, ...]  # ids below `size` that show no text: specials, and gaps between ids
    token_bytes: np.ndarray  # int32[size]: UTF-8 bytes that a token stands for, 0 for specials
    fingerprint: str  # equal for equal tokenizers, on every machine

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of the text, without specials."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; specials are left out, bytes that are not UTF-8 become U+FFFD."""
        ...

    def save_into(self, directory: str | Path) -> None: ...


class ByteTokenizer:
    """Token i is the byte i; 256 ends a document."""

    size = 257
    eos = 256
    silent = (eos,)

    def __init__(self) -> None:
        self.token_bytes = np.array([1] * 256 + [0], np.int32)
        self.fingerprint = "bytes-257"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")

    def save_into(self, directory: str | Path) -> None:
        write_json(Path(directory) / "tokenizer_config.json", {"kind": "bytes"})


class JsonTokenizer:
    """A Hugging Face `tokenizer.json`. The text `<|endoftext|>` in a document is text, not the special token."""

    def __init__(self, content: str, eos_token: str, where: str) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises a bare Exception
            raise UserError(f"{where}: not a tokenizer.json ({str(error).partition(chr(10))[0]})") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if eos_token not in vocabulary:
            raise UserError(f"{where}: end-of-text token {eos_token!r} is not in its vocabulary")
        self._content = json.loads(content)
        self._eos_token = eos_token
        self.size = max(vocabulary.values()) + 1
        self.eos = vocabulary[eos_token]
        specials = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self.silent = tuple(sorted(specials | {self.eos} | (set(range(self.size)) - set(vocabulary.values()))))
        self.token_bytes = _token_bytes(self._content, vocabulary, self.size)
        self.token_bytes[self.eos] = 0
        canonical = json.dumps([self._content, eos_token], sort_keys=True, ensure_ascii=False)
        self.fingerprint = "json-" + hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def save_into(self, directory: str | Path) -> None:
        content = json.dumps(self._content, ensure_ascii=False).encode()
        write_atomically(Path(directory) / "tokenizer.json", content)
        write_json(Path(directory) / "tokenizer_config.json", {"kind": "json", "eos_token": self._eos_token})


def load_from(directory: str | Path) -> Tokenizer:
    """The tokenizer that `save_into` wrote, or that of a published model's directory."""
    config = Path(directory) / "tokenizer_config.json"
    if config.is_file() and json.loads(config.read_text()).get("kind") == "bytes":
        return ByteTokenizer()
    return load_json(Path(directory) / "tokenizer.json", f"tokenizer of {directory}")


def load_json(path: Path, where: str) -> JsonTokenizer:
    """Read a tokenizer.json; its end-of-text token is named by a tokenizer_config.json beside it or is a known name."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot read {str(path)!r} ({error})") from error
    config = path.with_name("tokenizer_config.json")
    named = json.loads(config.read_text(encoding="utf-8")).get("eos_token") if config.is_file() else None
    if isinstance(named, dict):  # Hugging Face writes an added token as a record
        named = named["content"]
    eos_token = named or next((token for token in KNOWN_EOS if json.dumps(token, ensure_ascii=False) in content), None)
    if eos_token is None:
        known = ", ".join(KNOWN_EOS)
        raise UserError(f"{where}: no end-of-text token; name it in a tokenizer_config.json beside it; known: {known}")
    return JsonTokenizer(content, eos_token, where)


def parse(spec: str) -> int | Path | None:
    """`data.tokenizer` as None (bytes), a vocabulary size (bpe:SIZE) or the path of a tokenizer.json."""
    if spec == "bytes":
        return None
    if spec.startswith("bpe:"):
        size = spec.removeprefix("bpe:")
        if not size.isdecimal() or int(size) < SMALLEST_BPE:
            raise UserError(f"data.tokenizer={spec!r}: SIZE of bpe:SIZE must be a whole number >= {SMALLEST_BPE}")
        return int(size)
    path = Path(spec).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        hint = did_you_mean(spec, ["bytes", "bpe:SIZE", "the path of a tokenizer.json"])
        raise UserError(f"data.tokenizer={spec!r}: no such kind or file; {hint}")
    return path


def expected_size(spec: str) -> int:
    """The vocabulary of `data.tokenizer` before its text is read; a trained one may turn out smaller."""
    found = parse(spec)
    if isinstance(found, int):
        return found
    return load_json(found, f"data.tokenizer={spec!r}").size if found else ByteTokenizer.size


def train_bpe(texts: Iterable[str], size: int) -> JsonTokenizer:
    """Byte-level BPE (Sennrich et al., arXiv 1508.07909; on bytes as in GPT-2); the order of the texts does not matter.

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


def _token_bytes(content: dict, vocabulary: dict[str, int], size: int) -> np.ndarray:
    """UTF-8 bytes of each token. In a byte-level vocabulary one character stands for one byte."""
    byte_level = '"type": "ByteLevel"' in json.dumps([content.get("decoder"), content.get("pre_tokenizer")])
    added = {token["content"]: token["special"] for token in content.get("added_tokens", ())}
    counts = np.zeros(size, np.int32)
    for token, i in vocabulary.items():
        if token in added:
            counts[i] = 0 if added[token] else len(token.encode())
        elif byte_level or (token.startswith("<0x") and len(token) == 6):  # <0x0A>: a byte-fallback token
            counts[i] = len(token) if byte_level else 1
        else:
            counts[i] = len(token.replace("▁", " ").encode())  # SentencePiece writes a space as ▁
    return counts
