"""`frugalmoe islands DIR`, on directories that the protocol has made without training."""

import dataclasses
import functools
import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from party import SECTION, Party
from runs import command

from frugalmoe.cli import main
from frugalmoe.config import default, resolve
from frugalmoe.errors import UserError
from frugalmoe.islands import agreements, records, status, training
from frugalmoe.islands.records import Presence
from frugalmoe.islands.store import Store, open_store

pytestmark = pytest.mark.whole

COLORED = "\x1b[31mred\x1b[0m\n\u202e"  # what a terminal would obey


@pytest.fixture
def party(tmp_path: Path) -> Party:
    """Two rounds of a, b and c; in the second c read rows that are not the next ones; then b is gone for two."""
    made = Party(str(tmp_path / "islands"), "abc")
    made.round()
    made.round(broken="c")
    made.round(absent="b")
    made.round(absent="b")
    return made


def seen(store: Store) -> dict:
    """Island -> row."""
    return {row.island: row for row in status.look(store).islands}


def test_rows_say_what_the_records_say(party):
    found, rows = status.look(party.store), seen(party.store)
    last = party.islands["a"].held.commit
    assert (found.outer_sha256, found.round, found.rounds, found.tokens) == (last.outer, 4, 30, last.tokens)
    assert (found.merge, found.bits, found.members, found.damaged) == ("mean", 32, ("a", "c"), ())
    # A stream gives 10 tokens a round. Of eight streams a and b have 3 and c 2; without b, a and c have 4 each.
    assert {name: row.tokens for name, row in rows.items()} == {"a": 30 + 30 + 30 + 40, "b": 60, "c": 20 + 20 + 40}
    assert last.tokens == 80 + 60 + 50 + 80
    assert (rows["a"].round, rows["a"].behind, rows["a"].status) == (4, 0, "training")
    assert (rows["b"].round, rows["b"].behind, rows["b"].status) == (2, 2, "lapsed")
    assert rows["a"].merged == 1 and rows["c"].merged == 3 / 4  # of four rounds
    assert rows["b"].merged == 2 / 3  # it was a member of the third as well
    assert rows["a"].left_out == "" and rows["c"].left_out.startswith("round 2: read rows ")
    assert (rows["a"].streams, rows["b"].streams) == (4, 0)
    assert rows["a"].bytes == last.merged[0].bytes > 12  # three float32 and a header
    assert rows["a"].tokens_per_second == 1234.5
    assert (rows["a"].device, rows["a"].software) == ("2 x toaster", "python 3.12.1, jax 0.12.0, bfloat16")
    assert rows["a"].outer_sha256 == last.outer != rows["b"].outer_sha256 == party.islands["b"].held.commit.outer


def test_json_has_the_names_that_scripts_rely_on(party, capsys):
    assert main(["islands", party.store.place, "--format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"outer_sha256", "round", "rounds", "tokens", "islands"} <= found.keys()
    for row in found["islands"]:
        assert {"island", "round", "tokens", "status", "outer_sha256"} <= row.keys()
    assert [row["island"] for row in found["islands"]] == ["a", "b", "c"]


def test_a_table_has_a_line_for_each_island(party, capsys):
    before = sorted(path for path in Path(party.store.place).rglob("*"))
    assert main(["islands", party.store.place]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{party.store.place}: round 4 of 30, 270 tokens merged; merge mean, 32 bits, 2 members")
    assert [line.split()[0] for line in lines[3:]] == ["a", "b", "c"]
    assert "lapsed" in lines[4] and "read rows" in lines[5]
    assert sorted(path for path in Path(party.store.place).rglob("*")) == before  # it only looks


def test_no_more_than_the_newest_rounds_are_read(monkeypatch):
    party, read = Party("memory://long", "ab"), []
    for _ in range(status.ROUNDS + 8):
        party.round()
    monkeypatch.setattr(
        party.store, "list", lambda prefix: read.append(prefix) or type(party.store).list(party.store, prefix)
    )
    monkeypatch.setattr(party.store, "read", lambda key: read.append(key) or type(party.store).read(party.store, key))
    rows = seen(party.store)
    assert rows["a"].merged == 1 and rows["a"].tokens == 4 * 10 * (status.ROUNDS + 8)
    assert len([key for key in read if key.endswith("commit.json")]) <= status.ROUNDS + 3
    assert "rounds/" not in read  # a list of all would grow with them


def test_the_newest_round_is_found_whatever_islands_say(party):
    """One that says it is at a round that nobody has, and all of them started anew."""
    for said in (10**9, 0):
        for name in "abc":
            there = party.islands["a"].presence(name)
            data = records.to_bytes(dataclasses.replace(there, round=said))
            party.store.write(records.path_of_presence(name), data)
        assert status.look(party.store).round == 4


def _hostile(store: Store, name: str, **fields) -> None:
    plain = Presence(island=name, run="r", beat=1, round=0, status="joining", step=0, tokens_per_second=0.0, about={})
    store.write(f"islands/{name}.json", records.to_bytes(dataclasses.replace(plain, **fields)))


def test_what_is_damaged_is_a_line_and_the_rest_is_shown(party, capsys):
    store = party.store
    store.write("islands/half.json", store.read("islands/a.json")[:40])
    store.write("islands/empty.json", b"")
    store.write("islands/deep.json", b"[" * 100_000)
    store.write("islands/binary.json", bytes(range(256)))
    store.write("islands/b.json", store.read("islands/a.json"))  # of somebody else
    _hostile(store, "evil", island="../evil")
    _hostile(store, "infinite", tokens_per_second=1e308)
    store.write("rounds/000002/commit.json", b'{"format": 1}')
    store.write("rounds/000003/commit.json", store.read("rounds/000001/commit.json"))
    (Path(store.place) / "islands/link.json").symlink_to("/etc/passwd")
    assert main(["islands", store.place]) == 0
    lines = capsys.readouterr().out.splitlines()
    damaged = [line for line in lines if line.startswith("damaged: ")]
    for key in ("half", "empty", "deep", "binary", "b", "evil", "link", "000002", "000003"):
        assert sum(f"{key}.json" in line or f"/{key}/" in line for line in damaged) == 1, key
    assert [line.split()[0] for line in lines[len(damaged) + 3 :]] == ["a", "b", "c", "infinite"]
    assert seen(store)["b"].status == "unknown"
    store.write("rounds/000004/commit.json", b"\0" * 10)
    store.write("agreement.json", b"{}")
    assert main(["islands", store.place, "--format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["round"], found["rounds"], found["merge"]) == (1, None, None)  # the newest that can be read
    (Path(store.place) / "rounds/000005/commit.json").mkdir(parents=True)
    assert main(["islands", store.place]) == 0
    assert "000005/commit.json" in capsys.readouterr().out


def test_what_a_terminal_would_obey_is_not_printed(party, capsys):
    """Names cannot hold it; statuses, devices and reasons can."""
    store, last = party.store, party.islands["a"].held.commit
    _hostile(store, "a", status=COLORED, about={"device": COLORED, "devices": COLORED, "jax": [COLORED], "python": {}})
    whys = {COLORED: COLORED, f"a@{COLORED}": COLORED}
    changed = dataclasses.replace(last, left_out=whys, notes={"a": COLORED}, members={COLORED: (1,)}, outer=COLORED)
    store.write(records.path_of_commit(4), records.to_bytes(changed))
    for flags in ([], ["--format=json"]):
        assert main(["islands", store.place, *flags]) == 0
        out = capsys.readouterr().out
        assert "red" in out and all(c.isprintable() or c == "\n" for c in out)
        assert len(out.splitlines()) < 10 or flags


def test_nothing_there_yet_is_no_error(tmp_path, capsys):
    (tmp_path / "new").mkdir()
    assert main(["islands", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new'}: no islands yet\n"
    assert main(["islands", str(tmp_path / "new"), "--format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["islands"], found["round"], found["outer_sha256"]) == ([], None, None)
    _hostile(open_store(str(tmp_path / "new")), "early")
    assert main(["islands", str(tmp_path / "new")]) == 0
    assert "not begun" in (out := capsys.readouterr().out) and "early" in out


@pytest.mark.parametrize("where", ["absent", "file", "file://x", "s3://", "ftp://a/b", "", "a\0b"])
def test_what_is_no_directory_of_islands_is_refused(where, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("text")
    assert main(["islands", where]) == 2
    error = capsys.readouterr().err
    assert error.startswith("frugalmoe: ") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("flags", [(), ("--format=json",)])
def test_watching_goes_on_until_it_is_interrupted(party, flags):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command("islands", party.store.place, "--watch", *flags), **pipes)
    first = process.stdout.readline()
    assert json.loads(first)["round"] == 4 if flags else "round 4 of 30" in first
    party.round(absent="b")
    while not re.search(r'round 5 of 30|"round": 5', line := process.stdout.readline()):
        assert line
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0


def test_who_shows_no_life_is_silent(party, monkeypatch):
    from frugalmoe.commands.islands import _Lives

    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    lives, by_name = _Lives(), lambda found: {row.island: row.status for row in found.islands}
    assert by_name(lives.marked(status.look(party.store))) == {"a": "training", "b": "lapsed", "c": "training"}
    now[0] += SECTION.lapse_seconds
    party.announce("training", "a")
    assert by_name(lives.marked(status.look(party.store))) == {"a": "training", "b": "lapsed", "c": "silent"}


# What is refused before there is a run.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", 2),
        ("model.dim", 48),
        ("model.moe.router", "hash"),
        ("data", "other"),
        ("tokenizer", "other"),
        ("seed", 7),
        ("steps", 3),
        ("islands.bits", 4),
        ("islands.merge_options.staleness", 2.0),
    ],
)
def test_a_directory_of_something_else_is_refused_by_the_field(field, value):
    ours = agreements.of(resolve(default()), "data", "tokenizer")
    there = json.loads(records.to_bytes(ours))
    *parents, leaf = field.split(".")
    functools.reduce(lambda section, name: section[name], parents, there)[leaf] = value
    store = open_store(f"memory://{field}")
    store.write(records.AGREEMENT, json.dumps(there).encode())
    with pytest.raises(
        UserError, match=rf"^--islands=memory://\S+: {re.escape(field)} is {value!r} there and .* here; "
    ):
        agreements.check(store, ours)


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b'{"format": 1}', b"\xff\x00", b'{"format": 1, "new": 2}'])
def test_a_directory_of_another_version_is_refused(data):
    store = open_store(f"memory://version-{len(data)}")
    store.write(records.AGREEMENT, data)
    with pytest.raises(UserError, match="no directory of islands, or of another version") as error:
        agreements.check(store, agreements.of(resolve(default()), "data", "tokenizer"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "..", "../b", "a/b", "/a", "a b", "a\nb", "a\0", "-a", "é" * 200, "a" * 300])
def test_a_name_that_would_leave_the_directory_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"^--island=") as error:
        training.check(resolve(default()), str(tmp_path / "islands"), name)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
