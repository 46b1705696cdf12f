"""Tokenizers: every text survives, every byte is counted, a saved one is the same one."""

import functools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from frugalmoe.data import tokenizer as tokenizer_module
from frugalmoe.data.tokenizer import (
    END_OF_TEXT,
    LARGEST,
    ByteTokenizer,
    JsonTokenizer,
    load_from,
    load_json,
    parse,
    train_bpe,
)
from frugalmoe.errors import UserError

TEXTS = ["the cat sat on the mat. " * 20, "def f(x):\n\treturn x ** 2\n" * 20, "naïve café, 東京, 🙂 " * 20]
BPE = train_bpe(TEXTS, 300)
TOKENIZERS = {"bytes": ByteTokenizer(), "bpe": BPE}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_text_survives_and_bytes_are_counted(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert (ids < tokenizer.size).all() and tokenizer.eos not in ids


@pytest.mark.parametrize("name", TOKENIZERS)
def test_specials_are_not_text(name):
    tokenizer = TOKENIZERS[name]
    assert tokenizer.token_bytes[tokenizer.eos] == 0 and tokenizer.token_bytes.shape == (tokenizer.size,)
    assert tokenizer.decode([tokenizer.eos]) == ""
    text = f"a document may quote {END_OF_TEXT} as text"
    assert tokenizer.eos not in tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text


def test_half_a_character_decodes_to_the_replacement_character():
    for tokenizer in TOKENIZERS.values():
        half = train_bpe([], 257).encode("é")[:1] if tokenizer is BPE else tokenizer.encode("é")[:1]
        decoder = train_bpe([], 257) if tokenizer is BPE else tokenizer
        assert decoder.decode(half) == "\ufffd"


def test_batch_equals_one_by_one():
    for tokenizer in TOKENIZERS.values():
        for ids, text in zip(tokenizer.encode_batch(TEXTS), TEXTS, strict=True):
            np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_bpe_merges_and_does_not_depend_on_the_order_of_texts():
    assert BPE.size == 300 and len(BPE.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert train_bpe(TEXTS[::-1], 300).fingerprint == BPE.fingerprint
    assert train_bpe(TEXTS, 290).fingerprint != BPE.fingerprint


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_saved_tokenizer_is_the_same(name, tmp_path):
    tokenizer = TOKENIZERS[name]
    tokenizer.save_into(tmp_path)
    loaded = load_from(tmp_path)
    assert (loaded.fingerprint, loaded.size, loaded.eos) == (tokenizer.fingerprint, tokenizer.size, tokenizer.eos)
    np.testing.assert_array_equal(loaded.token_bytes, tokenizer.token_bytes)
    np.testing.assert_array_equal(loaded.encode(TEXTS[2]), tokenizer.encode(TEXTS[2]))
    again = tmp_path / "again"
    again.mkdir()
    loaded.save_into(again)
    assert load_from(again).fingerprint == tokenizer.fingerprint


def of_model(model, normalizer=None, pre_tokenizer=None, decoder=None, added=("</s>",), trainer=None):
    tokenizer = Tokenizer(model)
    if trainer:
        tokenizer.train_from_iterator([part for text in TEXTS for part in text.split(". ")], trainer)
    for name, value in (("normalizer", normalizer), ("pre_tokenizer", pre_tokenizer), ("decoder", decoder)):
        if value:
            setattr(tokenizer, name, value)
    tokenizer.add_special_tokens([token for token in added if isinstance(token, str)])
    tokenizer.add_tokens([token for token in added if not isinstance(token, str)])
    return tokenizer


def with_spaces_as_pieces():
    """As Gemma's: runs of spaces are pieces and added tokens, what is no piece is bytes, nothing stands in front."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["</s>", "▁", "▁▁", "▁▁▁▁", "a", "▁a", "\n"]
    merges = [("▁", "▁"), ("▁▁", "▁▁"), ("▁", "a")]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, byte_fallback=True, fuse_unk=True)
    spaces = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    added = ("</s>", AddedToken("▁▁▁▁", normalized=False), AddedToken("\n\n", normalized=False))
    return of_model(model, normalizers.Replace(" ", "▁"), None, spaces, added)


def with_a_space_in_front():
    """As Llama 2's."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["</s>", "▁", "a", "▁a", "b"]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "a")], byte_fallback=True)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    space = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return of_model(model, space, None, decoders.Sequence(parts))


def word_pieces():
    """As BERT's: lower case, no accents, no spaces, what is unknown is one token."""
    words = ["[UNK]", "[SEP]", "the", "cat", "##s", "caf", "##e", ",", "."]
    model = models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    lower, split = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    return of_model(model, lower, split, decoders.WordPiece(), ("[SEP]",))


def unigrams(byte_fallback):
    """As T5's: NFKC, spaces in front of words."""
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    space = pre_tokenizers.Metaspace()
    tokenizer = of_model(models.Unigram(), normalizers.NFKC(), space, decoders.Metaspace(), trainer=trainer)
    content = json.loads(tokenizer.to_str())
    if byte_fallback:
        content["model"]["byte_fallback"] = True
        content["model"]["vocab"] += [[f"<0x{byte:02X}>", -9.0] for byte in range(256)]
    return Tokenizer.from_str(json.dumps(content))


def byte_level(normalizer):
    """As GPT-2's, perhaps of normalized text, with an added run of spaces."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=level.alphabet(), show_progress=False)
    added = ("<|endoftext|>", AddedToken("    ", normalized=False))
    tokenizer = of_model(models.BPE(), normalizer, level, decoders.ByteLevel(), added, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


PUBLISHED = {  # maker, whether decoding gives every text back
    "spaces as pieces": (with_spaces_as_pieces, True),
    "a space in front": (with_a_space_in_front, True),
    "word pieces": (word_pieces, False),
    "unigrams": (lambda: unigrams(False), False),
    "unigrams and bytes": (lambda: unigrams(True), False),
    "byte level": (lambda: byte_level(None), True),
    "byte level, NFKC": (lambda: byte_level(normalizers.NFKC()), False),
    "byte level, lower case": (lambda: byte_level(normalizers.Lowercase()), False),
    "words": (lambda: of_model(models.WordLevel({"?": 0, "a": 1}, "?"), None, pre_tokenizers.Whitespace()), False),
}


@functools.cache
def published(name):
    tokenizer = PUBLISHED[name][0]()
    end = next(t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special and t.content != "<unk>")
    return JsonTokenizer(tokenizer.to_str(), end, "test")


ODD = ["    ", "\n\n", "  ", "▁", "▁▁▁▁", "ﬁ", "①", "e\u0301", "Ⅷ", "<0x0A>", "##s", "The cats", "İ", "\r\n", "\0"]
PARTS = st.sampled_from(ODD) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@pytest.mark.parametrize("name", PUBLISHED)
@settings(max_examples=100, deadline=None)
@given(text=st.lists(PARTS, max_size=12).map("".join))
def test_the_bytes_of_a_document_are_those_of_its_text(name, text):
    tokenizer = published(name)
    tokens, sizes, same = tokenizer.document(text)
    np.testing.assert_array_equal(tokens, np.append(tokenizer.encode(text), tokenizer.eos))
    assert tokens.dtype == np.int32 and sizes.shape == tokens.shape and (sizes >= 0).all()
    assert sizes.sum() == len(text.encode())
    assert same == (tokenizer.decode(tokens) == text)
    if PUBLISHED[name][1] and "▁" not in text:
        assert same and sizes[-1] == 0


def test_bytes_are_counted_where_they_stand():
    def sizes(name, text):
        return published(name).document(text).sizes.tolist()

    assert sizes("spaces as pieces", "    a\n\n é") == [4, 1, 2, 1, 1, 1, 0]
    assert sizes("a space in front", "a é a") == [1, 1, 1, 1, 2, 0]  # ▁a ▁ <0xC3> <0xA9> ▁a </s>
    # the cat ##s , [UNK] . and what follows: "The", " cat", "s", ",", " dogs", "." and two line ends that no token is
    assert sizes("word pieces", "The cats, dogs.\n\n") == [3, 4, 1, 1, 5, 1, 2]
    assert sizes("word pieces", "CAFÉ") == [3, 2, 0]
    assert sizes("words", "") == [0] and sizes("words", " \n") == [2]


def test_sentencepiece_style_vocabulary_counts_spaces_and_byte_tokens(tmp_path):
    vocabulary = {"<unk>": 0, "</s>": 1, "▁the": 2, "<0x0A>": 3, "é": 4}
    of_model(models.WordLevel(vocabulary, "<unk>")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_json(tmp_path / "tokenizer.json", "test")
    # "</s>" is 0; " the" is 4 bytes; the byte token 1; "é" is 2 in UTF-8
    assert tokenizer.eos == 1 and tokenizer.token_bytes[1:].tolist() == [0, 4, 1, 2]


def write_words(directory, specials=("</s>",)):
    """<stop> and </s> are pieces of the vocabulary; special are those that are named."""
    vocabulary = {"a": 0, "<stop>": 1, "</s>": 2, "?": 3, "<eos>": 4, "<|im_end|>": 5}
    of_model(models.WordLevel(vocabulary, "?"), None, pre_tokenizers.Whitespace(), None, specials).save(
        str(directory / "tokenizer.json")
    )


@pytest.mark.parametrize(
    ("file", "field", "value", "eos"),
    [
        ("tokenizer_config.json", "eos_token", "<stop>", 1),
        ("tokenizer_config.json", "eos_token", {"content": "<stop>", "lstrip": False}, 1),
        ("tokenizer_config.json", "eos_token", None, 2),
        ("tokenizer_config.json", "bos_token", "<stop>", 2),
        ("special_tokens_map.json", "eos_token", {"content": "<stop>"}, 1),
        ("generation_config.json", "eos_token_id", [1, 2], 1),
        ("generation_config.json", "eos_token_id", [], None),
        ("config.json", "eos_token_id", 1, 1),
        ("config.json", "eos_token_id", 0, 0),
        ("config.json", "eos_token_id", 6, None),
        ("config.json", "eos_token_id", True, None),
        ("config.json", "eos_token_id", 1.0, None),
        ("tokenizer_config.json", "eos_token", "<absent>", None),
        ("tokenizer_config.json", "eos_token", {"id": 1}, None),
    ],
)
def test_the_end_of_text_token_is_named_by_a_file_beside_it(file, field, value, eos, tmp_path):
    write_words(tmp_path)
    plain = load_from(tmp_path)
    assert plain.eos == 2  # a special token of a known name
    (tmp_path / file).write_text(json.dumps({field: value}))
    if eos is None:
        with pytest.raises(UserError) as error:
            load_from(tmp_path)
        message = str(error.value)
        assert message.startswith(f"{tmp_path / file}: {field}={value!r}: ") and "\n" not in message
    else:
        assert load_from(tmp_path).eos == eos
        assert (load_from(tmp_path).fingerprint == plain.fingerprint) == (eos == 2)


def test_only_special_tokens_count_where_no_file_names_one(tmp_path):
    write_words(tmp_path, ["<eos>"])
    assert load_from(tmp_path).eos == 4  # though </s> is a piece
    write_words(tmp_path, ["<|im_end|>", "<eos>"])
    assert load_from(tmp_path).eos == 4  # of several the one that ends a text, not a turn
    write_words(tmp_path, ["<stop>"])
    with pytest.raises(UserError, match=r"no end-of-text token is named or known \(its special tokens are <stop>\)"):
        load_from(tmp_path)


def test_a_text_never_holds_the_end_of_text(tmp_path):
    write_words(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "a"}')  # an ordinary piece
    with pytest.raises(UserError, match=r"a text encodes to the end-of-text token 'a'"):
        load_from(tmp_path).document("a ? a")


@pytest.mark.parametrize("content", [b"{", b"[]", b"3", b"\xff", b"", b"null", b'{"a":' * 100_000])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_broken_file_beside_it_is_one_line(file, content, tmp_path):
    write_words(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_from(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / file}: ") and "\n" not in str(error.value)


def test_a_saved_tokenizer_that_was_changed_is_refused(tmp_path):
    BPE.save_into(tmp_path)
    content = (tmp_path / "tokenizer.json").read_text()
    changed = json.loads(content)
    vocabulary = changed["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"tokenizer\.json: has the fingerprint .* changed after it was saved"):
        load_from(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text('{"kind": "bytes"}')
    with pytest.raises(UserError, match=r"says kind 'bytes', but a tokenizer\.json is beside it"):
        load_from(tmp_path)


@pytest.mark.parametrize(
    "spec", ["bpe:", "bpe:x", "bpe:256", "bpe:-5", "bpe:99999999999", "byts", "no/such.json", "./" + "x" * 300]
)
def test_bad_specs_name_the_field_the_value_and_the_rule(spec):
    with pytest.raises(UserError) as error:
        parse(spec)
    message = str(error.value)
    assert message.startswith(f"data.tokenizer={spec!r}: ") and "\n" not in message
    assert "257" in message if spec.startswith("bpe") else "bpe:SIZE" in message


def test_unusable_files_are_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    for content in ("{}", '["</s>"]', "", "\0"):
        path.write_text(content)
        with pytest.raises(UserError, match=r"data\.tokenizer: not a tokenizer\.json"):
            load_json(path, "data.tokenizer")
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"data\.tokenizer: cannot read"):
        load_json(path, "data.tokenizer")
    of_model(models.WordLevel({"?": 0, "</s>": 2 * LARGEST}, "?")).save(str(path))
    with pytest.raises(UserError, match=rf"data\.tokenizer: has token ids up to .* below {LARGEST}"):
        load_json(path, "data.tokenizer")


def test_one_vocabulary_is_read_once_in_a_process_wherever_it_lies(tmp_path):
    """Source, prepared data and run each have a copy, with other files beside it, and may name another end of text."""
    BPE.save_into(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"] += [{**content["added_tokens"][0], "id": BPE.size, "content": "<|stop|>"}]
    text = json.dumps(content)
    (other / "tokenizer.json").write_text(text)
    (other / "tokenizer_config.json").write_text('{"eos_token": "<|stop|>"}')
    before = tokenizer_module._read.cache_info()
    stop = load_from(other)
    end = JsonTokenizer(text, END_OF_TEXT, "in memory")
    stop.save_into(tmp_path)
    assert load_from(tmp_path).fingerprint == stop.fingerprint != end.fingerprint
    after = tokenizer_module._read.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 2)
    assert (stop.eos, end.eos) == (BPE.size, BPE.eos)
    for tokenizer in (stop, end):
        assert tokenizer.token_bytes[tokenizer.eos] == 0 and tokenizer.silent == (BPE.eos, BPE.size)
