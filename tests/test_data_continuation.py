"""Laws of continuations: with any tokenizer, pieces join to the text of all tokens less that of the prompt's."""

import functools
import time

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from frugalmoe.data.continuation import Continuation, Until
from frugalmoe.data.tokenizer import ByteTokenizer, JsonTokenizer, train_bpe

TEXT = "the cat sat, the cat's hat isn't 日本語 and 😀 café.\n\n"


def llama(pieces=("▁the", "▁cat", "▁sat", "▁", "s", "at", "'", "é", ".")) -> JsonTokenizer:
    """A space in front of words, which decoding strips from the first; other characters are bytes, as in Llama 2."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    model = models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    replace = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence(
        [replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return JsonTokenizer(tokenizer.to_str(), "</s>", "test")


def metaspace() -> JsonTokenizer:
    names = ["</s>", "▁the", "▁cat", "▁sat", "▁", *"abcdehist.,'\n"]
    tokenizer = Tokenizer(models.Unigram([(name, -float(i)) for i, name in enumerate(names)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["</s>"])
    return JsonTokenizer(tokenizer.to_str(), "</s>", "test")


def wordpiece() -> JsonTokenizer:
    """As BERT: ## goes on with a word, and decoding joins punctuation to it."""
    names = ["[UNK]", "[SEP]", "the", "cat", "sat", "do", "not", "##s", "##ting", "'", "s", "t", ".", ",", "!"]
    tokenizer = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.add_special_tokens(["[UNK]", "[SEP]"])
    return JsonTokenizer(tokenizer.to_str(), "[SEP]", "test")


TOKENIZERS = {
    "bytes": ByteTokenizer,
    "llama": llama,
    "metaspace": metaspace,
    "wordpiece": wordpiece,
    "byte_level": lambda: train_bpe([TEXT], 300),
}
EACH = pytest.mark.parametrize("name", TOKENIZERS)


@functools.cache
def tokenizer(name: str):
    return TOKENIZERS[name]()


def pieces_of(tokenizer, prompt, new) -> list[str]:
    continuation = Continuation(tokenizer, prompt)
    return [*(continuation.add(token) for token in new), continuation.rest()]


def ids_of(name: str, rng, length: int) -> list[int]:
    """Ids as texts have them, and in a quarter of the cases any: characters that never end, words that no text has.

    Not of Llama 2, whose decoder takes back a whole run of bytes for one that is wrong, also long after.
    """
    one = tokenizer(name)
    shown = sorted(set(range(one.size)) - set(one.silent))
    if rng.random() < 0.25 and name != "llama":
        return rng.choice(shown, length).tolist()
    words = ["the", " cat", " sat", "日本", "😀", "é", "'s", ".", " ", "\n"]
    ids = one.encode("".join(rng.choice(words, length))).tolist()
    return [i for i in ids if i in set(shown)]


@EACH
def test_pieces_join_to_the_text_of_all_tokens_less_the_prompt(name):
    """Whatever the prompt: none, a part of a character, or longer than the window that is decoded."""
    one, rng, exact = tokenizer(name), np.random.default_rng(0), 0
    for trial in range(100):
        ids = ids_of(name, rng, int(rng.integers(0, 150)))
        cut = int(rng.integers(0, len(ids) + 1)) if trial % 4 else 0
        prompt = [one.eos, *ids[:cut]]
        before, whole = one.decode(prompt), one.decode([one.eos, *ids])
        if whole.startswith(before):
            exact += 1
            assert "".join(pieces_of(one, prompt, ids[cut:])) == whole[len(before) :]
    assert exact > 50


def test_the_space_before_the_first_new_word_is_kept():
    for name in ("llama", "metaspace", "wordpiece"):
        one = tokenizer(name)
        whole = one.encode("the cat sat").tolist()
        prompt = one.encode("the cat").tolist()
        assert "".join(pieces_of(one, prompt, whole[len(prompt) :])) == " sat", name
        assert "".join(pieces_of(one, [one.eos], whole)) == "the cat sat", name


def test_a_character_is_given_out_whole():
    """Bytes that are joined to characters, and to those of the prompt, one by one."""
    prompt, new = "日".encode(), "本語".encode()
    for one, first in ((tokenizer("llama"), 3), (tokenizer("bytes"), 0)):
        of = lambda bytes_, first=first: [byte + first for byte in bytes_]
        found = pieces_of(one, of(prompt), of(new))
        assert "".join(found) == "本語" and not any("\ufffd" in piece for piece in found)
        assert "".join(pieces_of(one, of(prompt), of(new[:1]))) == "\ufffd", "a byte that stays alone is one character"
        assert "".join(pieces_of(one, of(prompt[:1]), of(prompt[1:]))).endswith("日")


def test_text_comes_while_tokens_do():
    """Within a few tokens, and at a cost per token that does not grow."""
    one, seconds = tokenizer("llama"), {}
    new = one.encode(" cat 日本" * 1000).tolist()
    for count in (500, 4000):
        began, late, continuation, out = time.process_time(), 0, Continuation(one, [one.eos]), ""
        for n in range(count):
            out += continuation.add(new[n])
            late = max(late, n + 1 - len(one.encode(out))) if n % 500 == 499 else late
        seconds[count] = (time.process_time() - began) / count
        assert late <= 12
    assert seconds[4000] < 4 * seconds[500]


def until(stops: list[str], pieces: list[str], prompt: str = "") -> str:
    one = Until(stops, prompt)
    return "".join([*map(one.add, pieces), one.rest()])


def expected(text: str, border: int, stops: list[str]) -> str:
    ends = [(at + len(s), at) for s in stops for at in range(len(text)) if text.startswith(s, at)]
    ends = [found for found in ends if found[0] > border]
    return text[border : max(min(ends)[1], border)] if ends else text[border:]


def test_a_stop_text_ends_it_however_the_text_is_cut():
    """The one that ends first, wherever it begins: in the prompt too."""
    rng = np.random.default_rng(0)
    for _ in range(1500):
        letters = lambda most: "".join(rng.choice(list("ab。"), int(rng.integers(1, most))))
        text, stops = letters(15), [letters(5) for _ in range(int(rng.integers(0, 4)))]
        border = int(rng.integers(0, len(text) + 1))
        cuts = sorted(rng.integers(border, len(text) + 1, int(rng.integers(0, 6))).tolist())
        pieces = [text[a:b] for a, b in zip([border, *cuts], [*cuts, len(text)])]
        assert until(stops, pieces, text[:border]) == expected(text, border, stops)


def test_what_may_begin_a_stop_text_is_held_back():
    """And nothing comes behind one."""
    one = Until(["END.", "ENDED"])
    assert [one.add(piece) for piece in ("so E", "N", "D", "s, EN")] == ["so ", "", "", "ENDs, "]
    assert not one.ended and one.add("D. never") == "" and one.ended
    assert one.add("never") == one.rest() == ""
