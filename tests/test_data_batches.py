"""Packing: a tokenizer whose words are all different makes every token name its document and place."""

import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from frugalmoe.data import Batch, open_data
from frugalmoe.errors import UserError
from frugalmoe.schema import Data, Source

T = 64
NUM_WORDS = 70_000  # above 2^16: ids are stored as int32
EOS = NUM_WORDS
DOMAINS = ("east", "north", "west")
BOTH = pytest.mark.parametrize("start", ["end_of_text", "none"])  # data.document_start


@functools.cache
def documents():
    """(domain, first word, number of words): a word occurs once in the corpus; the longest exceed a stored piece."""
    rng = np.random.default_rng(0)
    found, word = [], 0
    for n in range(150):
        length = int(rng.integers(1, 200)) if n % 25 else int(rng.integers(2000, 4500))
        found.append((DOMAINS[n % 3], word, length))
        word += length
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    vocabulary = {str(n): n for n in range(NUM_WORDS)} | {"</s>": EOS}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(root / "tokenizer.json"))
    for domain in DOMAINS:
        texts = [" ".join(str(w) for w in range(a, a + n)) for d, a, n in documents() if d == domain]
        lines = [json.dumps({"text": text, "domain": domain}) + "\n" for text in texts]
        (root / "all").mkdir(exist_ok=True)
        (root / "all" / f"{domain}.jsonl").write_text("".join(lines))
    return root


def config(corpus: Path, **changes) -> Data:
    base = {
        "path": str(corpus / "all"),
        "tokenizer": str(corpus / "tokenizer.json"),
        "sequence_length": T,
        "validation_fraction": 0.2,
        "cache_dir": str(corpus / "cache"),
    }
    return Data(**(base | changes))


def dataset(data: Data, batch_size: int = 4, seed: int = 0):
    return open_data(data, batch_size=batch_size, seed=seed, progress=False)


def rows_of(batches):
    """Batches -> rows, without padding rows."""
    rows = [type(batch)(*columns) for batch in batches for columns in zip(*batch, strict=True)]
    return [row for row in rows if row.segment_ids_BT.any()]


def epoch(data, number=0):
    """All rows of one epoch."""
    one = dataset(data, batch_size=1)
    num_rows = one.train_tokens // T
    return rows_of(one.batch(number * num_rows + n) for n in range(num_rows))


@functools.cache
def owner():
    """word -> (document, domain id)."""
    table = {}
    for n, (domain, first, length) in enumerate(documents()):
        table |= {word: (n, DOMAINS.index(domain)) for word in range(first, first + length)}
    return table


@functools.cache
def last_words():
    """The last word of each document."""
    return {first + length - 1 for _, first, length in documents()}


@functools.cache
def first_words():
    return {first for _, first, _ in documents()}


def check_row(row, start="end_of_text"):
    """The law of a row, from the words alone; returns its targets, or with nothing in front of documents its inputs."""
    tokens, targets, segments, positions, mask, domains = (column.tolist() for column in row)
    valid = sum(segment > 0 for segment in segments)
    assert segments[valid:] == [0] * (T - valid) and not any(mask[valid:])
    in_front = start == "end_of_text"
    for t in range(valid):
        word, target = tokens[t], targets[t]
        begins = t == 0 or (word == EOS if in_front else tokens[t - 1] == EOS)
        assert segments[t] == (1 if t == 0 else segments[t - 1] + begins)
        assert positions[t] == (0 if begins else positions[t - 1] + 1)
        assert mask[t] == (in_front or word != EOS)
        if word != EOS:  # inside a document, whoever may see it: the next word, or the end
            assert target == (EOS if word in last_words() else word + 1)
            assert in_front or begins or word == tokens[t - 1] + 1
        elif in_front:  # the token in front of a document is the document's, and its target is the first word
            assert target in first_words()
        else:  # an end has nothing to predict
            assert target == 0 and (begins or tokens[t - 1] in last_words())
        if (known := target if in_front and target != EOS else word) != EOS:
            assert domains[t] == owner()[known][1]
    return (targets if in_front else tokens)[:valid]


@BOTH
def test_rows_obey_the_law(corpus, start):
    for row in epoch(config(corpus, document_start=start)):
        assert all(
            column.dtype == (bool if name == "loss_mask_BT" else np.int32) for name, column in row._asdict().items()
        )
        check_row(row, start)


@BOTH
def test_an_epoch_has_every_token_once_but_for_the_declared_remainder(corpus, start):
    """Each word and each end is a target once, first words too; with nothing in front of documents, an input once."""
    data = config(corpus, document_start=start)
    opened = dataset(data)
    tokens = [token for row in epoch(data) for token in check_row(row, start)]
    words = [token for token in tokens if token != EOS]
    assert len(words) == len(set(words))
    assert len(tokens) + opened.remainder == opened.train_tokens and 0 <= opened.remainder < T
    train = {owner()[word][0] for word in words}
    assert abs(tokens.count(EOS) - len(train)) <= 1 + opened.remainder  # a short document may lie in the remainder
    expected = sum(length + 1 for n, (_, _, length) in enumerate(documents()) if n in train)
    assert abs(opened.train_tokens - expected) <= T


def test_no_token_more_is_computed_and_both_layouts_cut_one_stream(corpus):
    """Row r has the tokens r T .. r T + T - 1 of the stream as targets, of which the older layout makes its inputs;
    element by element, against the law written out. Padded rows and long documents are among them.
    """
    old, new = (dataset(config(corpus, document_start=start)) for start in ("none", "end_of_text"))
    assert (old.train_tokens, old.remainder) == (new.train_tokens, new.remainder)
    for domain in new.domains:
        (older, order), (newer, same) = (opened._eval_rows(domain, 1, None) for opened in (old, new))
        assert order == same and len(older) == len(newer) and newer.tokens == new.validation_tokens[domain]
        stream = np.concatenate([older[r].tokens_BT for r in range(len(older))])[: older.tokens].tolist()
        document = np.concatenate([older.documents(r) for r in range(len(older))]).tolist()
        for r in range(len(newer)):
            row, place = newer[r], {}
            np.testing.assert_array_equal(newer.documents(r), document[r * T : r * T + T])
            for t, i in enumerate(range(r * T, min(r * T + T, len(stream)))):
                place[document[i]] = place.get(document[i], -1) + 1
                expected = (stream[i - 1] if i else EOS, stream[i], len(place), place[document[i]], True)
                assert tuple(column[t] for column in row[:5]) == expected
            assert not any(column[t + 1 :].any() for column in row)


def test_the_token_before_a_row_is_that_of_the_row_before(corpus):
    rows, _ = dataset(config(corpus))._eval_rows("east", 1, None)
    assert rows[0].tokens_BT[0] == EOS
    for r in range(1, len(rows)):
        assert rows[r].tokens_BT[0] == rows[r - 1].targets_BT[-1]


def test_epochs_have_the_same_rows_in_another_order(corpus):
    first, second = ([row.tokens_BT.tobytes() for row in epoch(config(corpus), n)] for n in (0, 1))
    assert sorted(first) == sorted(second) and first != second


@BOTH
def test_validation_is_disjoint_and_whole_in_every_domain(corpus, start):
    data = config(corpus, document_start=start)
    opened = dataset(data)
    train = {owner()[word][0] for row in epoch(data) for word in check_row(row, start) if word != EOS}
    for domain in opened.domains:
        batches = list(opened.eval_batches(domain, batch_size=8))
        assert all(batch.tokens_BT.shape == (8, T) for batch in batches)
        tokens = [token for row in rows_of(batches) for token in check_row(row, start)]
        words = [word for word in tokens if word != EOS]
        found = {owner()[word][0] for word in words}
        assert found and not found & train
        assert all(documents()[n][0] == domain for n in found)
        assert len(tokens) == opened.validation_tokens[domain] == sum(documents()[n][2] + 1 for n in found)
        assert len(set(words)) == len(words)


def test_every_byte_of_a_held_out_document_is_a_targets(corpus):
    """Those of first words too, which with nothing in front of documents nobody had to predict."""
    new, old = (dataset(config(corpus, document_start=start)) for start in ("end_of_text", "none"))
    for domain in new.domains:
        seen = [word for row in rows_of(new.eval_batches(domain, 8)) for word in check_row(row) if word != EOS]
        found = [documents()[n] for n in {owner()[word][0] for word in seen}]
        words = [[str(word) for word in range(first, first + length)] for _, first, length in found]
        assert new.eval_bytes(domain) == sum(len(" ".join(text)) for text in words)
        assert 0 < new.eval_bytes(domain) - old.eval_bytes(domain) <= sum(len(text[0]) + 1 for text in words)


@BOTH
def test_every_validation_token_knows_its_document(corpus, start):
    opened, named, said = dataset(config(corpus, document_start=start)), {}, set()
    for domain in opened.domains:
        for batch, documents_BT in zip(opened.eval_batches(domain, 8), opened.eval_documents(domain, 8), strict=True):
            np.testing.assert_array_equal(documents_BT < 0, batch.segment_ids_BT == 0)
            for word, number in zip(
                batch.tokens_BT[documents_BT >= 0].tolist(), documents_BT[documents_BT >= 0].tolist()
            ):
                if word != EOS:
                    assert named.setdefault(owner()[word][0], number) == number
                said.add(number)
    assert len(set(named.values())) == len(named) and said == set(named.values())


def test_validation_does_not_depend_on_the_seed_and_is_cut_by_max_rows(corpus):
    data = config(corpus)
    first, second = (list(dataset(data, seed=seed).eval_batches("east", 2, 5)) for seed in (0, 1))
    assert [int((batch.segment_ids_BT > 0).any(-1).sum()) for batch in first] == [2, 2, 1]
    np.testing.assert_equal(first, second)
    np.testing.assert_equal(rows_of(first), rows_of(list(dataset(data).eval_batches("east", 2)))[:5])
    for size in (1, 3, 8):
        np.testing.assert_equal(rows_of(first), rows_of(list(dataset(data).eval_batches("east", size, 5))))


def test_random_access_equals_iteration_from_anywhere(corpus):
    opened = dataset(config(corpus))
    for start in (0, 5, 1000):
        batches = opened.train_batches(start)
        for step in range(start, start + 6):
            np.testing.assert_equal(next(batches), opened.batch(step))


def test_some_rows_of_a_batch_are_those_of_the_whole(corpus):
    """What a process of several loads of a step's batch."""
    opened, rows = dataset(config(corpus)), [3, 0]
    ours = opened.train_batches(7, rows)
    for step in range(7, 10):
        whole = opened.batch(step)
        assert len(whole.tokens_BT) > 3
        np.testing.assert_equal(next(ours), Batch(*(column[rows] for column in whole)))


def test_the_seed_changes_the_order_and_nothing_else(corpus):
    data = config(corpus)
    same, again, other = (dataset(data, seed=seed).batch(3) for seed in (0, 0, 1))
    np.testing.assert_equal(same, again)
    assert not np.array_equal(same.tokens_BT, other.tokens_BT)
    assert dataset(data, seed=0).fingerprint == dataset(data, seed=1).fingerprint


def test_the_seed_changes_where_documents_are_cut(corpus):
    rows = []
    for seed in (0, 1):
        one = dataset(config(corpus), batch_size=1, seed=seed)
        rows.append({one.batch(n).tokens_BT.tobytes() for n in range(one.train_tokens // T)})
    assert len(rows[0] & rows[1]) < len(rows[0]) / 2


@pytest.mark.slow
@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_another_process_makes_the_same_batch(corpus, hash_seed):
    data = config(corpus)
    code = (
        "import hashlib, sys\nfrom frugalmoe.schema import Data\nfrom frugalmoe.data import open_data\n"
        f"data = Data(path={data.path!r}, tokenizer={data.tokenizer!r}, sequence_length={T}, validation_fraction=0.2,"
        f" cache_dir={str(corpus / ('cache' + hash_seed))!r})\n"
        "batch = open_data(data, batch_size=4, seed=0, progress=False).batch(7)\n"
        "print(hashlib.sha256(b''.join(x.tobytes() for x in batch)).hexdigest())\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    expected = hashlib.sha256(b"".join(column.tobytes() for column in dataset(data).batch(7))).hexdigest()
    assert done.stdout.strip() == expected


def test_files_and_their_order_do_not_matter(corpus, tmp_path):
    """The same documents in one file, backwards."""
    lines = [line for file in (corpus / "all").iterdir() for line in file.read_text().splitlines()]
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "one.jsonl").write_text("\n".join(reversed(lines)))
    ours, theirs = dataset(config(corpus)), dataset(config(corpus, path=str(tmp_path / "all")))
    assert ours.fingerprint == theirs.fingerprint
    for step in (0, 9):
        np.testing.assert_equal(ours.batch(step), theirs.batch(step))


WEIGHTS = {"east": 0.6, "north": 0.3, "west": 0.1}


def mixture(corpus, weights):
    sources = {name: Source(path=str(corpus / "all" / f"{name}.jsonl"), weight=w) for name, w in weights.items()}
    return config(corpus, sources=sources)


def test_sources_are_drawn_by_their_weights(corpus):
    opened = dataset(mixture(corpus, WEIGHTS), batch_size=8)
    num_rows = 1200
    drawn = np.concatenate([opened.batch(step).domain_ids_BT[:, 0] for step in range(num_rows // 8)])
    for domain, weight in WEIGHTS.items():
        share = np.mean(drawn == opened.domains.index(domain))
        assert abs(share - weight) < 3 * np.sqrt(weight * (1 - weight) / num_rows), (domain, share)
    for row in rows_of(opened.batch(step) for step in range(20)):
        check_row(row)
        assert len(set(row.domain_ids_BT.tolist())) == 1  # a stream per source


def test_without_weights_sources_are_one_stream_of_all_tokens(corpus):
    data = mixture(corpus, dict.fromkeys(WEIGHTS, 0.0))
    words = [word for row in epoch(data) for word in row.tokens_BT.tolist() if word != EOS]
    opened = dataset(data)
    assert len(words) == len(set(words)) and opened.remainder == opened.train_tokens % T


@pytest.mark.slow
def test_the_fingerprint_tells_data_sets_apart(corpus, tmp_path):
    fingerprints = {
        dataset(data).fingerprint
        for data in (
            config(corpus),
            config(corpus, sequence_length=32),
            config(corpus, validation_fraction=0.3),
            config(corpus, tokenizer="bytes"),
            mixture(corpus, WEIGHTS),
            mixture(corpus, WEIGHTS | {"west": 0.2}),
            config(corpus, document_start="none"),
        )
    }
    assert len(fingerprints) == 7


def test_a_row_longer_than_the_data_is_refused(corpus):
    with pytest.raises(UserError, match=r"^data\.sequence_length=1000000: must not be longer than the \d+ training"):
        dataset(config(corpus, sequence_length=1_000_000))
    with pytest.raises(UserError, match="valid: east, north, west"):
        next(dataset(config(corpus)).eval_batches("south", 2))
