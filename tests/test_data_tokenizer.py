"""Tokenizers: every text survives, every byte is counted, a saved one is the same one."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from frugalmoe.data.tokenizer import END_OF_TEXT, ByteTokenizer, load_from, load_json, parse, train_bpe
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


def test_sentencepiece_style_vocabulary_counts_spaces_and_byte_tokens(tmp_path):
    vocabulary = {"<unk>": 0, "</s>": 1, "▁the": 2, "<0x0A>": 3, "é": 4}
    Tokenizer(models.WordLevel(vocabulary, "<unk>")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_json(tmp_path / "tokenizer.json", "test")
    # "</s>" is 0; " the" is 4 bytes; the byte token 1; "é" is 2 in UTF-8
    assert tokenizer.eos == 1 and tokenizer.token_bytes[1:].tolist() == [0, 4, 1, 2]


def test_the_end_of_text_token_is_named_by_the_config_beside_it(tmp_path):
    word_level = Tokenizer(models.WordLevel({"a": 0, "<stop>": 1, "</s>": 2, "?": 3}, "?"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    word_level.save(str(tmp_path / "tokenizer.json"))
    assert load_from(tmp_path).eos == 2  # a known name
    plain = load_from(tmp_path).fingerprint
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    assert load_from(tmp_path).eos == 1 and load_from(tmp_path).fingerprint != plain


@pytest.mark.parametrize("spec", ["bpe:", "bpe:x", "bpe:256", "bpe:-5", "byts", "no/such.json"])
def test_bad_specs_name_the_field_the_value_and_the_rule(spec):
    with pytest.raises(UserError) as error:
        parse(spec)
    message = str(error.value)
    assert message.startswith(f"data.tokenizer={spec!r}: ") and "\n" not in message
    assert "257" in message if spec.startswith("bpe") else "bpe:SIZE" in message


def test_unusable_files_are_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(UserError, match="end-of-text"):
        load_json(path, "data.tokenizer")
    path.write_text('["</s>"]')
    with pytest.raises(UserError, match=r"data\.tokenizer: not a tokenizer\.json"):
        load_json(path, "data.tokenizer")
