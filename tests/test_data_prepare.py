"""Preparing: the split, interruption, prepared directories, damage."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from frugalmoe import sharding
from frugalmoe.config import default, override, resolve
from frugalmoe.data import corpus, open_data, prepare, quickstart
from frugalmoe.data.cache import digest
from frugalmoe.data.shards import Store
from frugalmoe.data.tokenizer import train_bpe
from frugalmoe.errors import UserError
from frugalmoe.files import write_json
from frugalmoe.schema import Data, Source
from frugalmoe.train.evaluate import evaluate
from frugalmoe.train.step import Evaluated
from frugalmoe.train.weights import Weights

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
        "from frugalmoe.schema import Data\n"
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


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("sound")
    data = Data(**(vars(write_corpus(root)) | {"tokenizer": "bpe:300"}))
    return data, prepare(data, root / "prepared", progress=False)


@pytest.fixture
def copied(prepared, tmp_path):
    data, directory = prepared
    return data, Path(shutil.copytree(directory, tmp_path / "prepared"))


def refused(data: Data, directory: Path) -> str:
    """The line that opening and reading all of a directory ends with."""
    with pytest.raises(UserError) as error:
        open_directory(data, directory)
        read_all(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_tokenizer_in_a_prepared_directory_is_refused(copied):
    data, directory = copied
    train_bpe(["another text, of other words"] * 9, 290).save_into(directory)
    assert refused(data, directory).startswith(f"{directory}: prepared with 'bpe:300' (fingerprint json-")
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").write_text('{"kind": "bytes"}')
    assert "the tokenizer there now has bytes-257" in refused(data, directory)


@pytest.mark.parametrize("content", [b"{", b"[]", b"3", b"\xff", b"", b"{}", b'{"format": 2}', b'{"format": [1]}'])
def test_a_broken_manifest_is_one_line(content, copied):
    data, directory = copied
    (directory / "manifest.json").write_bytes(content)
    assert refused(data, directory).startswith(f"{directory / 'manifest.json'}: ")


def test_a_manifest_is_as_it_was_written(copied):
    data, directory = copied
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, value in manifest.items():
        path.write_text(json.dumps({k: v for k, v in manifest.items() if k != name}))
        assert str(path) in refused(data, directory), name
        path.write_text(json.dumps(manifest | {name: [] if isinstance(value, dict) else {}}))
        assert str(path) in refused(data, directory), name
    forged = {k: v for k, v in manifest.items() if k != "digest"}
    for name in ("../shard-00000", str(directory / "shard-00000"), "shard-00000/../shard-00000"):
        forged["shards"] = {name: manifest["shards"]["shard-00000"]}
        path.write_text(json.dumps(forged | {"digest": digest(forged)}))
        assert "is no name of a shard" in refused(data, directory)


def _without(value, *keys):
    """JSON with one entry gone."""
    if len(keys) == 1:
        return {k: v for k, v in value.items() if k != keys[0]}
    new = value.copy()
    new[keys[0]] = _without(value[keys[0]], *keys[1:])
    return new


def test_a_manifest_of_another_shape_is_one_line_whatever_its_digest_says(copied):
    data, directory = copied
    path = directory / "manifest.json"
    manifest = {k: v for k, v in json.loads(path.read_text()).items() if k != "digest"}
    domain = manifest["domains"][0]
    broken = [{**manifest, name: wrong} for name in manifest for wrong in (None, [None], {"": {}}, "1")]
    broken += [{k: v for k, v in manifest.items() if k != name} for name in manifest]
    cuts = (("tokenizer", "spec"), ("counts", domain), ("counts", domain, "train"), ("sources", 0, "weight"))
    broken += [_without(manifest, *cut) for cut in (*cuts, ("shards", "shard-00000", "bytes"))]
    for forged in broken:
        path.write_text(json.dumps(forged | {"digest": digest(forged)}))
        try:
            open_directory(data, directory)
        except UserError as error:  # any other error fails the test
            assert "\n" not in str(error)


def test_an_index_and_records_are_those_that_were_written(prepared, copied, tmp_path):
    data, directory = copied
    index = directory / "shard-00000.npz"
    with np.load(index) as columns:
        flipped = dict(columns) | {"validation": ~columns["validation"]}
    np.savez(index, **flipped)
    assert refused(data, directory).startswith(f"{index}: damaged (its hash is not the manifest's)")
    other = Data(**(vars(data) | {"path": str(tmp_path / "d.jsonl")}))
    text = Path(data.path).read_text().replace("document 1", "DOCUMENT 1")
    (tmp_path / "d.jsonl").write_text(text)
    others = prepare(other, tmp_path / "other", progress=False)
    for file in ("shard-00000.npz", "shard-00000.array_record"):
        shutil.copy(prepared[1] / file, directory / file)
    shutil.copy(others / "shard-00000.array_record", directory / "shard-00000.array_record")
    size = (directory / "shard-00000.array_record").stat().st_size
    assert size == (prepared[1] / "shard-00000.array_record").stat().st_size  # else its size alone would tell
    assert "is not the one that was written" in refused(data, directory)


def test_no_flipped_bit_gives_other_text(prepared, copied):
    data, directory = copied
    sound = [record.tokens for record in read_all(prepared[1])]
    rng = np.random.default_rng(0)
    for file in ("manifest.json", "shard-00000.npz", "tokenizer.json", "tokenizer_config.json"):
        content = (prepared[1] / file).read_bytes()
        for position in rng.integers(len(content), size=30):
            flipped = bytearray(content)
            flipped[position] ^= 1 << int(rng.integers(8))
            (directory / file).write_bytes(flipped)
            try:
                open_directory(data, directory)
                np.testing.assert_equal([record.tokens for record in read_all(directory)], sound)
            except UserError as error:
                assert "\n" not in str(error) and str(directory) in str(error)
        (directory / file).write_bytes(content)


def built_in(cache: Path) -> Data:
    """A small corpus where the quickstart is looked for."""
    root = cache / quickstart.NAME
    root.mkdir(parents=True)
    texts = {f"{n}": f"document {n} of a small corpus, number {n}.\n" * 9 for n in range(60)}
    domains = {name: corpus.write_domain(root, name, texts, "here", "none") for name in ("novel", "code")}
    write_json(root / "manifest.json", {"format": 1, "domains": domains, "missing": {}})
    return Data(path="quickstart", cache_dir=str(cache), sequence_length=32)


def test_a_corpus_of_the_cache_is_as_it_was_built(tmp_path):
    data = built_in(tmp_path)
    sound = texts(prepare(data, progress=False))
    path = tmp_path / quickstart.NAME / "novel.jsonl.zst"
    content, line = (
        path.read_bytes(),
        f"is not as it was built (its hash differs); delete {path.parent} to build it again",
    )
    rng = np.random.default_rng(0)
    noticed = 0
    for position in rng.choice(len(content), 60, replace=False):
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            assert texts(prepare(data, tmp_path / f"out{position}", progress=False)) == sound
        except UserError as error:
            assert str(error) == f"{path}: {line}"
            noticed += 1
    assert noticed > 50  # some bits mean nothing
    path.unlink()
    with pytest.raises(UserError, match=r"novel\.jsonl\.zst: is missing; delete .* to build it again"):
        prepare(data, tmp_path / "out", progress=False)
    (path.parent / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match=r"manifest\.json: must hold a JSON object"):
        prepare(data, tmp_path / "out", progress=False)


def lower_cased(root: Path) -> tuple[Data, dict[int, int]]:
    """Words that all differ, read without case and the spaces before each; id -> bytes that a word stands for."""
    numbers = {f"word{n}é": n for n in range(2000)}
    tokenizer = Tokenizer(models.WordLevel(numbers | {"?": 2000, "</s>": 2001}, "?"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(root / "tokenizer.json"))
    documents = [[f"Word{n}É" for n in range(start, start + 50)] for start in range(0, 2000, 50)]
    lines = [json.dumps({"text": "  ".join(words) + "\n", "domain": "ab"[n % 2]}) for n, words in enumerate(documents)]
    (root / "d.jsonl").write_text("\n".join(lines))
    sizes = {n: len(word.encode()) + 2 * (n % 50 > 0) for word, n in numbers.items()} | {2001: 1}
    data = {"path": str(root / "d.jsonl"), "tokenizer": str(root / "tokenizer.json"), "cache_dir": str(root / "cache")}
    return Data(**data, sequence_length=32, validation_fraction=0.3), sizes


def test_bits_per_byte_count_the_bytes_that_the_targets_stand_for(tmp_path):
    """A model that knows nothing needs log2(V) bits for a target, whatever a tokenizer makes of its text."""
    data, sizes = lower_cased(tmp_path)
    dataset = open_data(data, batch_size=4, seed=0, progress=False)
    total = sum(len(json.loads(line)["text"].encode()) for line in Path(data.path).read_text().splitlines())
    assert total == sum(side["bytes"] for sides in dataset.manifest["counts"].values() for side in sides.values())
    fields = {f"data.{name}": value for name, value in vars(data).items() if name not in ("sources", "validation")}
    config = resolve(override(default(), fields | {"train.batch_size": 4, "train.eval_rows": 8}))
    mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])
    seen = {"targets": 0, "bytes": 0}

    def uniform(params, router_state, batch, first_row):
        targets = np.array(batch.targets_BT)[np.array(batch.loss_mask_BT)]
        seen["targets"] += len(targets)
        seen["bytes"] += sum(sizes[int(target)] for target in targets)
        return Evaluated(jnp.where(batch.loss_mask_BT, np.log(2002), 0.0), {}, {}, None, None, None)

    with jax.set_mesh(mesh):
        for domain in dataset.domains:
            seen.update(targets=0, bytes=0)
            dataset.domains = (domain,)
            scores = evaluate(uniform, Weights({}, {}), dataset, config, mesh)
            assert seen["bytes"] > 0
            np.testing.assert_allclose(
                scores.bits_per_byte[domain], seen["targets"] * np.log2(2002) / seen["bytes"], rtol=1e-6
            )


def test_a_trained_tokenizer_of_the_cache_is_as_it_was_trained(tmp_path):
    data = Data(**(vars(write_corpus(tmp_path)) | {"tokenizer": "bpe:300"}))
    prepare(data, progress=False)
    (path,) = (tmp_path / "cache" / "tokenizers").glob("*/tokenizer.json")
    changed = json.loads(path.read_text())
    vocabulary = changed["model"]["vocab"]
    vocabulary["0"], vocabulary["1"] = vocabulary["1"], vocabulary["0"]
    path.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=rf"has the fingerprint .*; delete {path.parent} to train it again$"):
        prepare(data, tmp_path / "out", progress=False)


def test_what_a_user_should_know_is_told_and_kept(tmp_path, capsys):
    data, _ = lower_cased(tmp_path)
    with open(data.path, "a") as file:
        file.write("\n" + json.dumps({"text": "Word1É\r\n" * 3, "domain": "a"}) + "\n")
        file.write(json.dumps({"text": "Word1É\r\n" * 3, "domain": "a"}) + "\n" + json.dumps({"text": "\n"}))
    directory = prepare(data, tmp_path / "out")
    notes = json.loads((directory / "manifest.json").read_text())["notes"]
    told = capsys.readouterr().err.splitlines()
    for expected in (
        "decoding gives other text than was read for 42 of 42 documents",
        "1 of 42 documents repeat the text of another one",
        "left out 1 records or files of white space alone",
        "2 of 42 documents have line ends \\r\\n, which are kept",
    ):
        assert (
            len([line for line in notes if expected in line]) == 1 == len([line for line in told if expected in line])
        )


def test_the_suffixes_that_a_directory_does_not_give_are_told_at_each_start(tmp_path, capsys):
    code = tmp_path / "code"
    code.mkdir()
    for n in range(13):
        (code / f"m{n}.py").write_text("import os\n")
    for n in range(3):
        (code / f"readme{n}.md").write_text(f"about {n}\n" * 9)
    for _ in range(2):
        sys.modules["frugalmoe.data.prepare"]._say.cache_clear()  # as another process begins
        prepare(Data(path=str(code), cache_dir=str(tmp_path / "cache")))
        told = f"data.path='{code}': left out 13 .py; a glob takes any text: '{code}/**/*.py'\n"
        assert capsys.readouterr().err == told
