"""A SentencePiece model as a Hugging Face `tokenizer.json`, read without the library.

The file is a protocol buffer (google/sentencepiece, src/sentencepiece_model.proto); the fields that matter here:
ModelProto: pieces = 1, trainer_spec = 2, normalizer_spec = 3. SentencePiece: piece = 1, score = 2, type = 3.
TrainerSpec: model_type = 3, byte_fallback = 35. NormalizerSpec: precompiled_charsmap = 2, add_dummy_prefix = 3,
remove_extra_whitespaces = 4, escape_whitespaces = 5.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from frugalmoe.errors import UserError

UNIGRAM, BPE = 1, 2  # model_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # type of a piece
SPACE = "▁"


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


def is_model(content: bytes) -> bool:
    """Whether a file begins with a piece, field 1 as bytes; the .model files of tiktoken are text."""
    return content[:1] == b"\x0a"


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Yields (number, value) of a message's fields: int, float or bytes. Raises IndexError or ValueError for a damaged
    one.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = content[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(content):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire) or (varint() if wire == 2 else -1)
        if size < 0 or at + size > len(content):
            raise ValueError(f"a damaged field at byte {at}")
        raw = content[at : at + size]
        at += size
        yield number, struct.unpack("<f", raw)[0] if wire == 5 else raw


def _piece(content: bytes) -> Piece:
    fields = dict(_fields(content))
    return Piece(fields[1].decode(), fields.get(2, 0.0), fields.get(3, NORMAL))


def tokenizer_json(content: bytes, where: str, directory: Path) -> str:
    """Returns a SentencePiece model as the text of a tokenizer.json.

    Raises `UserError` for a damaged file, and for a model that a tokenizer.json cannot imitate on every text.
    """
    try:
        fields = list(_fields(content))
        pieces = [_piece(raw) for number, raw in fields if number == 1]
        trainer = dict(_fields(next(raw for number, raw in fields if number == 2)))
        normalizer = dict(_fields(next((raw for number, raw in fields if number == 3), b"")))
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, StopIteration, struct.error) as error:
        raise UserError(f"{where}: not a SentencePiece model ({str(error) or type(error).__name__})") from error
    kinds = [piece.kind for piece in pieces]
    if reason := _obstacle(trainer.get(3, UNIGRAM), kinds, normalizer):
        code = (
            f"from transformers import AutoTokenizer as T; T.from_pretrained({str(directory)!r}).save_pretrained('OUT')"
        )
        hint = f'pip install transformers sentencepiece protobuf; python -c "{code}"'
        raise UserError(f"{where}: {reason}; convert it and use OUT: {hint}")
    specials = {piece.text: i for i, piece in enumerate(pieces) if piece.kind in (CONTROL, UNKNOWN)}
    prefix = bool(normalizer.get(3, 1))
    steps = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": added_tokens(specials),
            "normalizer": {"type": "Sequence", "normalizers": [*steps, _replace(" ", SPACE)]},
            "decoder": _decoder(prefix),
            "model": _bpe(pieces, kinds.index(UNKNOWN), bool(trainer.get(35))),
        }
    )


def _obstacle(kind: int, kinds: list[int], normalizer: dict[int, Any]) -> str:
    """Returns why a tokenizer.json would give other ids than the library on some texts; empty where it would not."""
    if kind != BPE:
        return "a SentencePiece model of another kind than BPE, whose ties the two libraries break in other ways"
    if normalizer.get(2) or normalizer.get(4, 1):
        return "a SentencePiece model that normalizes its text"
    if USER_DEFINED in kinds or UNKNOWN not in kinds or not normalizer.get(5, 1):
        return "a SentencePiece model with pieces of its user's, or without an unknown piece or a mark for spaces"
    return ""


def _bpe(pieces: list[Piece], unknown: int, byte_fallback: bool) -> dict[str, Any]:
    """Returns the BPE model. Neighbours that join to the piece of the highest score are joined first, so every way to
    cut a piece in two is a merge.
    """
    vocabulary = {piece.text: i for i, piece in enumerate(pieces)}
    normal = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
    merges = [
        [text[:cut], text[cut:]]
        for text in sorted(normal, key=lambda text: (-normal[text], vocabulary[text]))
        for cut in range(len(text) - 1, 0, -1)
        if text[:cut] in normal and text[cut:] in normal
    ]
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges, "unk_token": pieces[unknown].text}
    return {**model, "fuse_unk": True, "byte_fallback": byte_fallback}


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _decoder(prefix: bool) -> dict[str, Any]:
    steps = [_replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {"type": "Sequence", "decoders": steps + strip}


def added_tokens(specials: Mapping[str, int]) -> list[dict[str, Any]]:
    """Returns special tokens as a tokenizer.json lists them."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": i, "content": token, **flags} for token, i in sorted(specials.items(), key=lambda item: item[1])]
