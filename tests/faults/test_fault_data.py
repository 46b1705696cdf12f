"""Prepared data that are damaged or missing: named, and left out where that is allowed; data that changed are named."""

import json
import random
import shutil

import pytest
from faulted import FIELDS, STEPS, Heard, bits, events
from runs import figures, rows, tiny, write_text

from frugalmoe.data import open_data, prepare
from frugalmoe.data.quarantine import FILE
from frugalmoe.data.shards import Store
from frugalmoe.errors import UserError
from frugalmoe.train.loop import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_text(root / "text")
    return root


@pytest.fixture(scope="module")
def make(place):
    def make(data, **fields):
        fields = {name.replace("__", "."): value for name, value in fields.items()}
        return tiny(data, place / "cache", FIELDS | fields)

    return make


@pytest.fixture
def prepared(place, make, tmp_path):
    """A prepared directory of 40 records, to be harmed."""
    prepare(make(place / "text").data, tmp_path / "prepared", progress=False)
    return tmp_path / "prepared"


def harm(prepared, make, rng: random.Random) -> bytes:
    """Flips a bit of one record's text in the only shard, of one in the first batches; returns what was there."""
    (path,) = prepared.glob("*.array_record")
    whole = path.read_bytes()
    for _ in range(1000):
        changed = bytearray(whole)
        changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        if damaged(prepared) == 1:
            try:
                data = open_data(make(prepared).data, batch_size=8, seed=0, progress=False)
                [data.batch(position) for position in range(3)]
            except UserError:
                return whole
    raise AssertionError("no flip damaged one record alone")


def damaged(prepared) -> int:
    """How many records cannot be read."""
    try:
        store = Store(prepared)
    except UserError:
        return -1
    count = 0
    for piece in range(len(store.columns["length"])):
        try:
            store.read(piece)
        except UserError:
            count += 1
    return count


def test_a_damaged_record_ends_the_run_or_is_left_out_for_good(prepared, make, tmp_path):
    config = lambda **fields: make(prepared, **fields)
    whole = harm(prepared, make, random.Random(0))
    (path,) = prepared.glob("*.array_record")
    with pytest.raises(UserError, match=r"shard-00000.array_record: record \d+ is .*; data.quarantine=N leaves up to"):
        train(config(), tmp_path / "run", progress=Heard())
    heard = Heard()
    summary = train(config(data__quarantine=3), tmp_path / "run", progress=heard)
    assert summary["status"] == "complete" and summary["records_left_out"] == 1
    (told,) = events(tmp_path / "run", "data")
    assert told["what"].startswith("left out, 1 of at most 3 records: ") and str(path) in told["what"]
    assert told["what"] in heard.said
    assert [list(row) for row in rows(tmp_path / "run", FILE)] == [["record", "why"]]
    ours = bits(tmp_path / "run")

    # Stopped half way, and the file mended meanwhile: what was left out stays so, for the checkpoint has it.
    half = config(data__quarantine=3, train__steps=STEPS // 2, optim__schedule="constant")
    full = config(data__quarantine=3, optim__schedule="constant")
    train(full, tmp_path / "calm", progress=Heard())
    train(half, tmp_path / "half", progress=Heard())
    (tmp_path / "half" / FILE).unlink()
    path.write_bytes(whole)
    train(full, tmp_path / "half", resume="force", progress=Heard())
    log = lambda workdir: [row for row in bits(tmp_path / workdir)["metrics.jsonl"] if "loss/ce" in row]
    assert log("half") == log("calm") and log("half") != ours["metrics.jsonl"]
    assert rows(tmp_path / "half", FILE) == rows(tmp_path / "calm", FILE)
    ours, calm = bits(tmp_path / "half"), bits(tmp_path / "calm")
    assert not [name for name in ours if name.startswith("params") and ours[name] != calm[name]]
    figures("F9 a bit flipped in a record of data", 2, 2, 0)


def test_only_what_is_damaged_changes(prepared, make):
    """All rows are as before; what is left out is not predicted, and stands for no bytes."""
    whole = open_data(make(prepared).data, batch_size=1, seed=0, progress=False)
    before = [whole.rows([n]) for n in range(whole.train_tokens // 32)]
    bytes_before = {domain: whole.eval_bytes(domain) for domain in whole.domains}
    harm(prepared, make, random.Random(1))
    harmed = open_data(make(prepared, data__quarantine=1).data, batch_size=1, seed=0, progress=False)
    assert harmed.fingerprint == whole.fingerprint
    after = [harmed.rows([n]) for n in range(len(before))]
    evaluated = {domain: harmed.eval_bytes(domain) for domain in harmed.domains}
    changed = [n for n, (one, other) in enumerate(zip(before, after)) if (one.tokens_BT != other.tokens_BT).any()]
    assert len(harmed.quarantine) == 1 and (changed or evaluated != bytes_before)
    for one, other in zip(before, after):
        same = (one.tokens_BT == other.tokens_BT) | ~other.loss_mask_BT
        assert (same | (other.targets_BT == one.targets_BT)).all()
        assert (other.loss_mask_BT <= one.loss_mask_BT).all()
        assert (other.segment_ids_BT == one.segment_ids_BT).all()


def test_a_missing_shard_is_named_and_more_than_is_allowed_ends_the_run(prepared, make, tmp_path):
    (path,) = prepared.glob("*.array_record")
    content = path.read_bytes()
    cases = {"cut off": content[: len(content) // 2], "empty": b""}
    for name, harmed in cases.items():
        path.write_bytes(harmed)
        with pytest.raises(UserError, match=r"shard-00000.array_record: has \d+ bytes, not"):
            train(make(prepared), tmp_path / name, progress=Heard())
        with pytest.raises(UserError, match=r"as many records as may be left out are \(data.quarantine=5\)"):
            train(make(prepared, data__quarantine=5), tmp_path / name, progress=Heard())
        assert len(rows(tmp_path / name, FILE)) == 5
    with pytest.raises(UserError, match=r"data.quarantine=-1: must not be negative"):
        make(prepared, data__quarantine=-1)
    figures("F9 a shard of data cut off or empty", 2 * len(cases), 2 * len(cases), 0)


def test_data_that_changed_are_named(place, make, tmp_path):
    """Refused with what differs; with force the run goes on, and its events say with what."""
    shutil.copytree(place / "text", tmp_path / "text")
    config = make(tmp_path / "text")
    calm = train(config, tmp_path / "run", progress=Heard())
    changes = {
        "one word": lambda: (tmp_path / "text" / "doc00.txt").write_text(
            (tmp_path / "text" / "doc00.txt").read_text().replace("x1", "y1")
        ),
        "one more": lambda: (tmp_path / "text" / "more.txt").write_text("The moon calls the sword.\n" * 9),
    }
    told = {"one word": "as many tokens in the same domains, but other texts", "one more": "tokens: "}
    for name, change in changes.items():
        change()
        (tmp_path / "run" / "summary.json").unlink(missing_ok=True)  # one that is complete needs no data
        with pytest.raises(UserError, match="the run's data changed") as error:
            train(config, tmp_path / "run", progress=Heard())
        message = str(error.value)
        assert told[name] in message and "--resume=force to go on with it as it is now" in message, message
    summary = train(make(tmp_path / "text", train__steps=STEPS + 2), tmp_path / "run", progress=Heard(), resume="force")
    assert summary["status"] == "complete" and summary["eval"] != calm["eval"]
    assert "the run's data changed" in events(tmp_path / "run", "data")[0]["what"]
    assert json.loads((tmp_path / "run" / "data.json").read_text())["train_tokens"]
    figures("F10 other data than before", len(changes), len(changes), 0)
