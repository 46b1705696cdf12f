"""Published vocabularies of other kinds give the ids that their own rules give."""

import base64
import itertools
import json
import re
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalmoe.data import vocabularies
from frugalmoe.data.tokenizer import load_from, load_json, parse, train_bpe
from frugalmoe.errors import UserError

# Tokens by rank, with periodic ones, for which the order of equal joins matters.
WORDS = [
    b"aa",
    b"aaa",
    b"aaaa",
    b"ab",
    b"ba",
    b"aba",
    b"bab",
    b" a",
    b" ab",
    b"\xc3\xa9",
    b" the",
    b"th",
    b"he",
    b"the",
]
RANKS = {token: rank for rank, token in enumerate([bytes([byte]) for byte in range(256)] + WORDS)}
TEXT = st.text(st.sampled_from("ab the\né東1"), max_size=40)


def joined(parts, rank):
    """Neighbours whose join has the lowest rank are joined, the leftmost first, until none can be: by the book."""
    parts = list(parts)
    while len(parts) > 1:
        pairs = [(rank.get(left + right, float("inf")), n) for n, (left, right) in enumerate(itertools.pairwise(parts))]
        lowest, n = min(pairs)
        if lowest == float("inf"):
            break
        parts[n : n + 2] = [parts[n] + parts[n + 1]]
    return parts


def by_ranks(text):
    """Ids of a text that is split as GPT-2 does: letters, digits or others with a space in front; runs of spaces."""
    pieces = re.findall(r" ?[^\W\d_]+| ?\d+|\s+(?!\S)|\s+", text)
    assert "".join(pieces) == text
    raw = [piece.encode() for piece in pieces]
    parts = [[piece] if piece in RANKS else joined([bytes([b]) for b in piece], RANKS) for piece in raw]
    return [RANKS[token] for piece in parts for token in piece]


def write_tiktoken(path):
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in RANKS.items()))
    return path


def write_tekken(path):
    vocab = [{"rank": rank, "token_bytes": base64.b64encode(token).decode()} for token, rank in RANKS.items()]
    config = {"pattern": vocabularies.GPT2, "default_num_special_tokens": 10, "default_vocab_size": 10 + len(RANKS)}
    specials = [{"rank": 2, "token_str": "</s>", "is_control": True}]
    path.write_text(json.dumps({"config": config, "vocab": [*vocab, vocab[0]], "special_tokens": specials}))
    return path


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    tiktoken = load_json(write_tiktoken(root / "r50k_base.tiktoken"), "test")
    return tiktoken, load_json(write_tekken(root / "tekken.json"), "test")


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_ranks_give_the_ids_that_tiktoken_gives(of_ranks, text):
    tiktoken, tekken = of_ranks
    assert tiktoken.encode(text).tolist() == by_ranks(text) == (tekken.encode(text) - 10).tolist()
    for tokenizer in of_ranks:
        tokens, sizes, same = tokenizer.document(text)
        assert same and sizes.sum() == len(text.encode()) and tokenizer.decode(tokens) == text


def test_special_tokens_have_the_ids_that_they_have_elsewhere(of_ranks):
    tiktoken, tekken = of_ranks
    assert (tiktoken.eos, tiktoken.size) == (50256, 50257)
    assert (tekken.eos, tekken.size) == (2, 10 + len(RANKS))
    for tokenizer in of_ranks:
        assert tokenizer.eos not in tokenizer.encode("<|endoftext|></s><SPECIAL_3>")


def test_a_tekken_without_a_list_of_special_tokens_ends_texts_with_its_third(tmp_path):
    content = json.loads(write_tekken(tmp_path / "tekken.json").read_text())
    del content["special_tokens"]
    (tmp_path / "tekken.json").write_text(json.dumps(content))
    assert load_from(tmp_path).eos == 2


def test_vocab_and_merges_give_the_ids_of_their_tokenizer(tmp_path):
    trained = train_bpe(["the cat sat on the mat. " * 20, "naïve café, 東京 " * 20], 320)
    trained.save_into(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    for file in tmp_path.iterdir():
        file.unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "".join(" ".join(pair) + "\n" for pair in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges)
    loaded = load_from(tmp_path)
    assert (loaded.size, loaded.eos) == (trained.size, trained.eos)
    for text in ("the café", "  a\n\nb 東京 <|endoftext|>", ""):
        np.testing.assert_array_equal(loaded.encode(text), trained.encode(text))
    (tmp_path / "merges.txt").write_text("the zz\n")
    with pytest.raises(UserError, match=r"merges\.txt: 'the zz' is no merge"):
        load_from(tmp_path)


def message(number, *fields):
    """Fields of a protocol buffer as one field `number`: (number, value) of int, float or bytes."""
    raw = b"".join(field(*item) for item in fields)
    return field(number, raw)


def field(number, value):
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value):
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + varint(value >> 7)


PIECES = ["▁", "a", "b", "t", "h", "e", "aa", "aaa", "▁a", "ab", "th", "the", "▁the", "▁▁", "1", "\n"]


def write_model(path, kind=2, prefix=1, tidy=0, charsmap=b"", user=False):
    """A SentencePiece model: byte pieces, then PIECES with falling scores."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(piece, -float(n), 1) for n, piece in enumerate(PIECES)] + [("<mine>", 0.0, 4)] * user
    content = b"".join(message(1, (1, text.encode()), (2, score), (3, kind)) for text, score, kind in pieces)
    content += message(2, (3, kind), (35, 1)) + message(3, (2, charsmap), (3, prefix), (4, tidy))
    path.write_bytes(content)
    return path


def by_pieces(text, prefix):
    """Ids by SentencePiece's rule for BPE: the best score first, the leftmost of equals; what is no piece is bytes."""
    ids = {piece: 259 + n for n, piece in enumerate(PIECES)}
    written = text.replace(" ", "▁")
    written = "▁" + written if prefix and written else written
    parts = joined(written, {piece: n for n, piece in enumerate(PIECES)})
    return [i for part in parts for i in ([ids[part]] if part in ids else [3 + byte for byte in part.encode()])]


@pytest.fixture(scope="module", params=[0, 1])
def of_pieces(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    return load_json(write_model(root / "tokenizer.model", prefix=request.param), "test"), request.param


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_a_sentencepiece_model_gives_its_ids(of_pieces, text):
    tokenizer, prefix = of_pieces
    assert tokenizer.encode(text).tolist() == by_pieces(text, prefix)
    tokens, sizes, same = tokenizer.document(text)
    assert same and tokens[-1] == 2 and sizes.sum() == len(text.encode()) and tokenizer.decode(tokens) == text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": 1}, "of another kind than BPE"),
        ({"tidy": 1}, "normalizes"),
        ({"charsmap": b"x"}, "normalizes"),
        ({"user": True}, "pieces of its user's"),
    ],
)
def test_what_is_not_read_says_how_to_convert_it(change, reason, tmp_path):
    write_model(tmp_path / "tokenizer.model", **change)
    with pytest.raises(UserError) as error:
        load_from(tmp_path)
    line = str(error.value)
    assert reason in line and f"from_pretrained({str(tmp_path)!r}).save_pretrained('OUT')" in line and "\n" not in line


@pytest.mark.parametrize("content", [b"", b"\n", b"\n\x05abc", b"not base64 at all\n", b"YQ== 0\n", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["tokenizer.model", "cl100k_base.tiktoken"])
def test_damaged_files_are_one_line(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_from(tmp_path)
    assert "\n" not in str(error.value)


def test_ranks_whose_pattern_is_not_known_say_how_to_convert_them(tmp_path):
    path = write_tiktoken(tmp_path / "mine.tiktoken")
    with pytest.raises(UserError, match=r"known for names with r50k, .* rename it .* TikTokenConverter"):
        load_json(path, "test")


def test_a_directory_gives_its_vocabulary_or_says_what_is_there(tmp_path):
    with pytest.raises(UserError, match=r"^data\.tokenizer='.*': no vocabulary there .*; it holds no file$"):
        parse(str(tmp_path))
    (tmp_path / "vocab.txt").write_text("[UNK]\n")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=r"it holds vocab\.json, vocab\.txt; to convert a lower-cased WordPiece"):
        parse(str(tmp_path))
    write_tiktoken(tmp_path / "cl100k_base.tiktoken")
    assert parse(str(tmp_path)) == tmp_path / "cl100k_base.tiktoken"
    write_model(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match=r"several vocabularies; name one: cl100k_base\.tiktoken, tokenizer\.model"):
        parse(str(tmp_path))
    train_bpe(["text"], 257).save_into(tmp_path)
    assert parse(str(tmp_path)) == tmp_path / "tokenizer.json"
