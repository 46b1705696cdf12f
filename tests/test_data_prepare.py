"""Preparing: the split, interruption, prepared directories, damage."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from frugalmoe.config.schema import Data, Source
from frugalmoe.data import open_data, prepare
from frugalmoe.data.shards import Store
from frugalmoe.errors import UserError

SMALL_SHARDS = "import frugalmoe.data.prepare\nsys.modules['frugalmoe.data.prepare'].SHARD_BYTES = (4000, 4000)\n"


def write_corpus(root: Path, documents: int = 40, domains: tuple[str, ...] = ("a", "b")) -> Data:
    """Numbered documents of about 1 KB in one file, `bytes` as the tokenizer."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "d.jsonl", "w") as file:
        for n in range(documents):
            text = f"document {n}: " + " ".join(str(x) for x in rng.integers(0, 10_000, 200))
            file.write(json.dumps({"text": text, "domain": domains[n % len(domains)]}) + "\n")
    return Data(path=str(root / "d.jsonl"), sequence_length=32, cache_dir=str(root / "cache"))


def texts(directory: Path) -> dict[str, set[tuple[str, str]]]:
    """The (domain, text) of each side, from the stored records."""
    store = Store(directory)
    joined: dict[int, list] = {}
    for piece, document in enumerate(store.columns["document"]):
        joined.setdefault(int(document), []).append(piece)
    sides = {"train": set(), "validation": set()}
    for pieces in joined.values():
        records = [store.read(piece) for piece in pieces]
        tokens = np.concatenate([record.tokens for record in records])
        assert tokens[-1] == store.tokenizer.eos
        side = "validation" if store.columns["validation"][pieces[0]] else "train"
        sides[side].add((store.manifest["domains"][records[0].domain], store.tokenizer.decode(tokens)))
    return sides


@pytest.mark.parametrize("fraction", [0.001, 0.25, 0.999])
def test_split_by_document_with_both_sides_in_each_domain(fraction, tmp_path):
    data = write_corpus(tmp_path)
    sides = texts(prepare(Data(**(vars(data) | {"validation_fraction": fraction})), progress=False))
    written = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    assert sides["train"] | sides["validation"] == {(r["domain"], r["text"]) for r in written}
    assert not sides["train"] & sides["validation"]
    for side in sides.values():
        assert {domain for domain, _ in side} == {"a", "b"}
    share = len(sides["validation"]) / 40
    assert abs(share - np.clip(fraction, 2 / 40, 38 / 40)) < 3 * np.sqrt(fraction * (1 - fraction) / 40) + 1e-9


def test_the_split_of_a_document_does_not_depend_on_the_others(tmp_path):
    few, many = write_corpus(tmp_path / "few", 40), write_corpus(tmp_path / "many", 400)
    before, after = (texts(prepare(data, progress=False)) for data in (few, many))
    assert before["train"] & after["validation"] == set()
    assert len(before["validation"] - after["validation"]) <= 2  # the one that each small domain had to have


def test_duplicates_are_on_one_side(tmp_path):
    data = write_corpus(tmp_path, 20)
    lines = (tmp_path / "d.jsonl").read_text()
    (tmp_path / "d.jsonl").write_text(lines * 3)
    directory = prepare(Data(**(vars(data) | {"validation_fraction": 0.3})), progress=False)
    columns = Store(directory).columns
    for text_hash in np.unique(columns["hash"]):
        assert len(set(columns["validation"][columns["hash"] == text_hash].tolist())) == 1
    assert len(np.unique(columns["document"])) == 60


def test_a_domain_of_one_document_is_refused(tmp_path):
    data = write_corpus(tmp_path)
    with open(tmp_path / "d.jsonl", "a") as file:
        file.write('{"text": "alone", "domain": "rare"}\n')
    with pytest.raises(UserError, match=r"domain 'rare' has only 1 distinct document"):
        prepare(data, progress=False)


def start_preparing(data: Data, workers: int = 1) -> subprocess.Popen:
    code = (
        f"import sys\n{SMALL_SHARDS}"
        "from frugalmoe.config.schema import Data\n"
        f"frugalmoe.data.prepare(Data(path={data.path!r}, tokenizer={data.tokenizer!r}, cache_dir={data.cache_dir!r}),"
        f" workers={workers}, progress=False)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def shards(directory: Path) -> dict[str, int]:
    """Complete shards, by name -> the time they were written at."""
    return {file.name: file.stat().st_mtime_ns for file in directory.glob("shard-*.npz")}


@pytest.mark.slow
def test_a_killed_preparation_goes_on_and_ends_the_same(tmp_path):
    data = write_corpus(tmp_path, 2500)
    process = start_preparing(data)
    partial = None
    while process.poll() is None and (partial is None or len(shards(partial)) < 10):
        partial = (
            next((tmp_path / "cache" / "prepared").glob("*.partial"), None) if (tmp_path / "cache").exists() else None
        )
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and partial.is_dir(), "the preparation ended before it was killed"
    complete = shards(partial)
    (partial / ".shard-00010.npz.1.tmp").write_bytes(b"half")  # as a writer killed in the middle leaves it
    resumed = start_preparing(data)
    assert resumed.communicate()[1] == "" and resumed.returncode == 0
    directory = partial.with_suffix("")
    assert not partial.exists() and complete.items() <= shards(directory).items()  # none was written again
    assert len(shards(directory)) > len(complete)
    assert not [file.name for file in directory.iterdir() if file.name.endswith(".tmp")]
    undisturbed = prepare(data, tmp_path / "undisturbed", progress=False)
    assert texts(directory) == texts(undisturbed)
    ours, theirs = (open_directory(data, d) for d in (directory, undisturbed))
    np.testing.assert_equal(ours.batch(3), theirs.batch(3))


def test_what_an_interrupted_preparation_of_other_data_left_is_not_used(tmp_path):
    data, other = write_corpus(tmp_path, 40), write_corpus(tmp_path / "other", 80)
    left = prepare(other, tmp_path / "left", progress=False)
    partial = tmp_path / "out.partial"
    shutil.copytree(left, partial)
    for suffix in (".npz", ".array_record"):
        shutil.copy(partial / f"shard-00000{suffix}", partial / f"shard-00007{suffix}")
    directory = prepare(data, tmp_path / "out", progress=False)
    assert texts(directory) == texts(prepare(data, tmp_path / "sound", progress=False))
    assert sorted(shards(directory)) == ["shard-00000.npz"]


def open_directory(data: Data, directory: Path):
    data = Data(**(vars(data) | {"path": str(directory)}))
    return open_data(data, batch_size=4, seed=0, progress=False)


def test_two_processes_prepare_once(tmp_path):
    data = write_corpus(tmp_path, 200)
    both = [start_preparing(data, workers=2) for _ in range(2)]
    assert [(process.communicate()[1], process.returncode) for process in both] == [("", 0)] * 2
    assert len([d for d in (tmp_path / "cache" / "prepared").iterdir() if d.is_dir()]) == 1


def test_a_second_start_reads_no_document(tmp_path):
    data = write_corpus(tmp_path)
    directory = prepare(data, progress=False)
    size, stat = (tmp_path / "d.jsonl").stat().st_size, (tmp_path / "d.jsonl").stat()
    (tmp_path / "d.jsonl").write_bytes(b"\xff" * size)  # unreadable, same size
    os.utime(tmp_path / "d.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert prepare(data, progress=False) == directory
    os.utime(tmp_path / "d.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # changed: is read again
    with pytest.raises(UserError, match="not UTF-8"):
        prepare(data, progress=False)


def test_a_prepared_directory_equals_the_data(tmp_path):
    data = write_corpus(tmp_path)
    data = Data(**(vars(data) | {"tokenizer": "bpe:300"}))
    directory = prepare(data, tmp_path / "prepared", workers=3, progress=False)
    moved = shutil.move(directory, tmp_path / "elsewhere")
    direct = open_data(data, batch_size=4, seed=0, progress=False)
    ours = open_directory(data, Path(moved))
    assert ours.fingerprint == direct.fingerprint and ours.tokenizer.fingerprint == direct.tokenizer.fingerprint
    assert (ours.train_tokens, ours.validation_tokens) == (direct.train_tokens, direct.validation_tokens)
    for step in (0, 5):
        np.testing.assert_equal(ours.batch(step), direct.batch(step))
    np.testing.assert_equal(list(ours.eval_batches("a", 2)), list(direct.eval_batches("a", 2)))
    total = sum(sum(side["bytes"] for side in sides.values()) for sides in ours.manifest["counts"].values())
    written = [json.loads(line)["text"] for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    assert total == sum(len(text.encode()) for text in written)


def test_weights_are_kept_with_the_prepared_data(tmp_path):
    data = write_corpus(tmp_path)
    weighted = {name: Source(path=data.path, weight=w, domain=name) for name, w in (("x", 3.0), ("y", 1.0))}
    data = Data(**(vars(data) | {"sources": weighted}))
    directory = prepare(data, tmp_path / "prepared", progress=False)
    direct = open_data(data, batch_size=4, seed=0, progress=False)
    ours = open_directory(Data(**(vars(data) | {"sources": {}})), directory)
    assert ours.fingerprint == direct.fingerprint
    np.testing.assert_equal(ours.batch(2), direct.batch(2))


@pytest.mark.parametrize(
    ("field", "value"), [("tokenizer", "bytes"), ("tokenizer", "bpe:301"), ("validation_fraction", 0.1)]
)
def test_prepared_data_and_config_must_agree(field, value, tmp_path):
    data = Data(**(vars(write_corpus(tmp_path)) | {"tokenizer": "bpe:300"}))
    directory = prepare(data, tmp_path / "prepared", progress=False)
    with pytest.raises(UserError, match=rf"^data\.{field}={value!r}: .*was prepared with"):
        open_directory(Data(**(vars(data) | {field: value})), directory)


def test_an_output_of_other_data_is_refused(tmp_path):
    data = write_corpus(tmp_path)
    directory = prepare(data, tmp_path / "prepared", progress=False)
    assert prepare(data, tmp_path / "prepared", progress=False) == directory
    with pytest.raises(UserError, match="--output="):
        prepare(Data(**(vars(data) | {"tokenizer": "bpe:300"})), tmp_path / "prepared", progress=False)


def test_damage_is_never_silent(tmp_path):
    data = write_corpus(tmp_path)
    directory = prepare(data, tmp_path / "prepared", progress=False)
    sound = [record.tokens for record in read_all(directory)]
    path = directory / "shard-00000.array_record"
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    detected = 0
    for position in rng.choice(np.flatnonzero(np.frombuffer(content, np.uint8)), 60):  # zeros are the file's padding
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            np.testing.assert_equal([record.tokens for record in read_all(directory)], sound)
        except UserError as error:
            assert str(path) in str(error) and "prepare it again" in str(error)
            detected += 1
    assert detected > 30
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"has {len(content) - 1} bytes, not {len(content)}"):
        open_directory(data, directory)
    path.write_bytes(content)
    (directory / "shard-00000.npz").unlink()
    with pytest.raises(UserError, match=r"shard-00000\.npz: is missing"):
        open_directory(data, directory)


def read_all(directory: Path):
    store = Store(directory)
    return [store.read(piece) for piece in range(len(store.columns["length"]))]
