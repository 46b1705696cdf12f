"""Which token of a published vocabulary ends a text."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from frugalmoe.errors import UserError

END_OF_TEXT = "<|endoftext|>"
# Looked for among the special tokens, in this order, where no file beside the vocabulary names one. A name alone says
# little: in Gemma's vocabulary `</s>` is an HTML tag.
KNOWN = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
    "[EOS]",
    "<|eot_id|>",
    "<|im_end|>",
    "[SEP]",
)
GENERATION = "generation_config.json"
NAMED_BY = (  # file beside the vocabulary, its field: a token, or its id
    ("tokenizer_config.json", "eos_token"),
    ("special_tokens_map.json", "eos_token"),
    (GENERATION, "eos_token_id"),
    ("config.json", "eos_token_id"),
)


def find(directory: Path, vocabulary: Mapping[str, int], specials: Collection[str], where: str) -> str:
    """Returns the token that a file of the directory names, else the first known name among the special tokens."""
    for file, field in NAMED_BY:
        if (directory / file).is_file():
            named = read_object(directory / file).get(field)
            token = _token(named, vocabulary, f"{directory / file}: {field}={named!r}"[:500])
            if token is not None:
                return token
    token = next((token for token in KNOWN if token in specials), None)
    if token is None:
        there = f"its special tokens are {', '.join(sorted(specials)[:20])}" if specials else "it has no special token"
        rule = 'name it in a tokenizer_config.json beside it: {"eos_token": "..."}'
        raise UserError(f"{where}: no end-of-text token is named or known ({there}); {rule}")
    return token


def ids_of_generation(directory: Path, vocabulary: Mapping[str, int]) -> tuple[int, ...]:
    """Returns the tokens of the vocabulary at which a published model ends a text or its turn in a conversation: those
    of its settings of generation, if they are there.
    """
    path = directory / GENERATION
    named = read_object(path).get("eos_token_id") if path.is_file() else None
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if wrong := [i for i in ids if type(i) is not int]:
        raise UserError(f"{path}: eos_token_id={wrong[0]!r}: must be an id, a list of ids, or null")
    known = set(vocabulary.values())
    return tuple(sorted(i for i in set(ids) if i in known))


def _token(named: Any, vocabulary: Mapping[str, int], where: str) -> str | None:
    """Returns the token that a field names by a text, a record with `content`, an id or a list of ids, of which the
    first counts; None for null.
    """
    if isinstance(named, Mapping):  # Hugging Face writes an added token as a record
        named = named.get("content", named)
    elif isinstance(named, list) and named:
        named = named[0]
    if named is None:
        return None
    if isinstance(named, str):
        if named not in vocabulary:
            raise UserError(f"{where}: is not in the vocabulary, so no text can end with it; correct it or remove it")
        return named
    if type(named) is not int:
        rule = "must be a token, a record whose `content` is one, an id, a list of ids (the first counts), or null"
        raise UserError(f"{where}: {rule}")
    token = next((token for token, number in vocabulary.items() if number == named), None)
    if token is None:
        raise UserError(f"{where}: is no id of the vocabulary, which has {len(vocabulary)} tokens")
    return token


def read_object(path: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds. Raises `UserError` where it holds none."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({str(error).partition(chr(10))[0]})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, holds {type(value).__name__}")
    return value
