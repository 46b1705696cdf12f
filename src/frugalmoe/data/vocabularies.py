"""Published vocabularies of every kind, written as a Hugging Face `tokenizer.json`.

| file | of | how |
|---|---|---|
| tokenizer.json | Hugging Face | as it is |
| tekken.json | Mistral | ranks of byte strings, with the pattern that splits a text |
| *.tiktoken, tokenizer.model in text | OpenAI, Qwen, Llama 3 | ranks; the pattern is known by the name or size |
| vocab.json + merges.txt, encoder.json + vocab.bpe | GPT-2, RoBERTa | byte-level merges |
| *.model | SentencePiece | `sentencepiece.py` |
"""

import base64
import binascii
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from frugalmoe.data import sentencepiece
from frugalmoe.data.end_of_text import END_OF_TEXT, read_object
from frugalmoe.errors import UserError

NAMES = ("tokenizer.json", "tekken.json", "vocab.json", "encoder.json")  # in a directory, the first that is there
SUFFIXES = (".tiktoken", ".model")
MERGES = ("merges.txt", "vocab.bpe")

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CL100K, QWEN = rf"{_WORD}|\p{{N}}{{1,3}}|{_REST}", rf"{_WORD}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A .tiktoken file holds ranks alone: a part of its name -> pattern, special tokens. From github.com/openai/tiktoken,
# tiktoken_ext/openai_public.py; Qwen-7B, tokenization_qwen.py; meta-llama/llama3, llama/tokenizer.py.
TIKTOKEN = {
    "r50k": (GPT2, {END_OF_TEXT: 50256}),
    "p50k": (GPT2, {END_OF_TEXT: 50256}),
    "cl100k": (CL100K, {END_OF_TEXT: 100257, "<|endofprompt|>": 100276}),
    "o200k": (O200K, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
    "qwen": (QWEN, {END_OF_TEXT: 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}),
}
LLAMA3 = (CL100K, {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|eot_id|>": 128009})
LLAMA3_RANKS = 128_000


def find(directory: Path, where: str) -> Path:
    """Returns the vocabulary's file in a directory. Raises `UserError` where there is none, or more than one."""
    there = sorted(file for file in directory.iterdir() if file.is_file()) if directory.is_dir() else []
    names = {file.name: file for file in there}
    for name in NAMES:
        if name in names and (name in NAMES[:2] or any(merges in names for merges in MERGES)):
            return names[name]
    found = [file for file in there if file.suffix in SUFFIXES]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{where}: holds several vocabularies; name one: {', '.join(file.name for file in found)}")
    kinds = f"{', '.join(NAMES[:2])}, *{', *'.join(SUFFIXES)} or vocab.json with merges.txt"
    state = f"holds {', '.join(sorted(names)[:10])}" if names else "holds no file"
    raise UserError(f"{where}: no vocabulary there ({kinds}); it {state}{_hint(names)}")


def _hint(names: Iterable[str]) -> str:
    if "vocab.txt" not in names:
        return ""
    code = "from tokenizers import BertWordPieceTokenizer as T; T('vocab.txt', lowercase=True).save('tokenizer.json')"
    return f'; to convert a lower-cased WordPiece: python -c "{code}"'


def read(path: Path, where: str) -> str:
    """Returns the content of a tokenizer.json for any of the kinds above."""
    try:
        if ".model" in path.suffixes and sentencepiece.is_model(content := path.read_bytes()):
            return sentencepiece.tokenizer_json(content, where, path.parent)
        if not {*SUFFIXES}.isdisjoint(path.suffixes):
            return json.dumps(_tiktoken(path, where))
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot read {str(path)!r} ({error})") from error
    merges = next((file for name in MERGES if (file := path.with_name(name)).is_file()), None)
    if path.name == "tokenizer.json" or '"merges"' in text:  # the library says what is wrong with it
        return text
    content = read_object(path)
    if isinstance(content.get("config"), Mapping) and isinstance(content.get("vocab"), list):
        return json.dumps(_tekken(content, where))
    if content and merges and all(type(i) is int for i in content.values()):
        return json.dumps(_gpt2(content, merges, where))
    return text


def is_byte(token: str) -> bool:
    """Returns whether a token is written as <0x0A>, a byte that stands for itself."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">") and _is_hex(token[3:5])


def _is_hex(digits: str) -> bool:
    return all(digit in "0123456789abcdefABCDEF" for digit in digits)


@functools.cache
def byte_alphabet() -> dict[str, bytes]:
    """Returns the character that stands for each byte in a byte-level vocabulary (openai/gpt-2, src/encoder.py)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    characters = [(chr(byte), byte) for byte in shown] + [(chr(256 + n), byte) for n, byte in enumerate(hidden)]
    return {character: bytes([byte]) for character, byte in characters}


def _tekken(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a tekken.json as a tokenizer.json. Special tokens have the first ids; ranks fill the declared size."""
    try:
        config = content["config"]
        specials, size = int(config["default_num_special_tokens"]), int(config["default_vocab_size"])
        tokens = [base64.b64decode(entry["token_bytes"]) for entry in content["vocab"][: size - specials]]
        named = {token["token_str"]: int(token["rank"]) for token in content.get("special_tokens") or ()}
        pattern = str(config["pattern"])
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not a tekken.json ({type(error).__name__}: {error})") from error
    named = named or {"<unk>": 0, "<s>": 1, "</s>": 2}  # what files without a list mean
    taken = set(named.values())
    named |= {f"<SPECIAL_{i}>": i for i in range(specials) if i not in taken}
    return _of_ranks({token: specials + n for n, token in enumerate(tokens)}, pattern, named, where)


def _tiktoken(path: Path, where: str) -> dict[str, Any]:
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                rule = "a line must be a token in base64 and its rank"
                raise UserError(f"{path}:{number}: not a .tiktoken or a SentencePiece file ({rule})") from error
    known = next((known for name, known in TIKTOKEN.items() if name in path.name.lower()), None)
    if known is None and ".model" in path.suffixes and len(ranks) == LLAMA3_RANKS:
        known = LLAMA3
    if known is None:
        code = (
            f"from transformers.convert_slow_tokenizer import TikTokenConverter as T; T({str(path)!r}, pattern=r'...', "
            f"extra_special_tokens=['{END_OF_TEXT}']).converted().save('tokenizer.json')"
        )
        rule = f"holds ranks but not how a text is split, known for names with {', '.join(TIKTOKEN)}"
        hint = f'else put its pattern into: pip install transformers tiktoken; python -c "{code}"'
        raise UserError(f"{where}: {path.name} {rule}; rename it if it is one, {hint}")
    pattern, specials = known
    return _of_ranks(ranks, pattern, specials, where)


def _of_ranks(ranks: Mapping[bytes, int], pattern: str, specials: Mapping[str, int], where: str) -> dict[str, Any]:
    """Returns the tokenizer.json of ranked byte strings. Neighbours that join to the lowest rank are joined first, so
    every way to cut a byte string in two is a merge.
    """
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"{where}: {len(missing)} of the 256 bytes are no token, the first is 0x{missing[0]:02x}")
    if taken := [token for token, i in specials.items() if i in set(ranks.values())]:
        raise UserError(f"{where}: the id {specials[taken[0]]} of the special token {taken[0]!r} is that of a rank too")
    letters = {raw[0]: character for character, raw in byte_alphabet().items()}
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    written = {token: "".join(map(letters.__getitem__, token)) for token in ranks}
    vocabulary = {written[token]: i for token, i in ranks.items()}
    pairs = [[written[left], written[right]] for left, right in merges]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return _byte_level(vocabulary, pairs, split, specials)


def _gpt2(vocabulary: Mapping[str, int], file: Path, where: str) -> dict[str, Any]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot read {str(file)!r} ({error})") from error
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if missing := [character for character in byte_alphabet() if character not in vocabulary]:
        raise UserError(
            f"{where}: not byte-level: {len(missing)} of the 256 bytes are no token; convert it by its maker"
        )
    if wrong := [pair for pair in pairs if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys()]:
        raise UserError(f"{file}: {' '.join(wrong[0])!r} is no merge of two tokens into one of {where}")
    made = {"".join(pair) for pair in pairs} | byte_alphabet().keys()
    return _byte_level(vocabulary, pairs, None, {token: i for token, i in vocabulary.items() if token not in made})


def _byte_level(
    vocabulary: Mapping[str, int], pairs: list[list[str]], split: dict | None, specials: Mapping[str, int]
) -> dict[str, Any]:
    """Returns a byte-level tokenizer.json. `split` cuts the text first; a piece that is a token stays whole. Without it
    the text is cut as GPT-2 does.
    """
    by_byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": split is None}
    # Special tokens are in the model too: the library gives the others the next free id, whatever theirs is.
    vocabulary = {**vocabulary, **specials}
    model = {"type": "BPE", "vocab": vocabulary, "merges": pairs, "ignore_merges": split is not None}
    return {
        "version": "1.0",
        "added_tokens": sentencepiece.added_tokens(specials),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, by_byte]} if split else by_byte,
        "decoder": by_byte,
        "model": model,
    }
