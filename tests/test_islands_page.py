"""docs/islands.md: its tables are the code's, and what it says of traffic is what islands write and read."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
from party import SECTION, Party

from frugalmoe.config.describe import field_meanings
from frugalmoe.islands import merges, packing, records, status
from frugalmoe.islands.island import Work
from frugalmoe.schema import Islands

PAGE = (Path(__file__).parents[1] / "docs/islands.md").read_text(encoding="utf-8")
SIZES = {"embedding": 5000, "w/00": 1200, "w/01": 1200, "norm": 7}
HEADER = 8 + 200 * 9  # bytes: the length, and a row for each array, two of a tensor at most


def rows(title: str) -> list[list[str]]:
    """The cells of the table under a heading, without its header."""
    part = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines[2:]]


def test_the_table_of_merge_rules_is_what_they_say():
    found = {name: (about, options) for name, about, options in rows("Merge rules")}
    plain = {field.name for field in dataclasses.fields(merges.get("mean").options)}
    expected = {}
    for name in merges.names():
        own = [f"`{field.name}`" for field in dataclasses.fields(merges.get(name).options) if field.name not in plain]
        expected[name] = (merges.get(name).about, ", ".join(own).strip("`"))
    assert found == expected


def test_every_field_of_the_section_is_explained():
    """As `frugalmoe config` explains it."""
    fields = {field.name: getattr(Islands(), field.name) for field in dataclasses.fields(Islands)}
    shown = {name: str(dict(value) if name == "merge_options" else value) for name, value in fields.items()}
    meaning = {name: field_meanings()[f"islands.{name}"].replace("|", r"\|") for name in fields}
    assert rows("`--config.islands`") == [[name, shown[name], meaning[name]] for name in fields]


def test_the_names_that_scripts_rely_on_are_those_that_are_printed():
    part = PAGE.split("\n## Names that scripts rely on\n")[1].split("\n## ")[0]
    named = [
        name
        for line in part.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    ]
    assert set(named) == {*status.Directory._fields, *status.Row._fields}


def test_every_kind_of_file_is_named():
    for path in (records.path_of_commit(7), records.path_of_contribution(7, "a"), records.path_of_presence("a")):
        assert path in PAGE
    assert records.AGREEMENT in PAGE and "blobs/SHA256" in PAGE


@pytest.mark.parametrize(("bits", "fragments"), [(32, 1), (16, 2), (8, 1), (4, 3), (2, 1)])
def test_an_island_writes_and_reads_what_the_formula_says(bits, fragments):
    """Written: a contribution; read: those of the two others and the state of routers, whoever made the record."""
    section = dataclasses.replace(SECTION, bits=bits, fragments=fragments, snapshot_rounds=100)
    party = Party(f"memory://traffic-{bits}", "abc", section, SIZES, state=11)
    kind = {number: name for name, number in packing.BITS.items()}[bits]
    for _ in range(fragments):
        before = {name: (island.bytes_written, island.bytes_read) for name, island in party.islands.items()}
        party.round()
        names = party.rules.names(party.islands["a"].held.round)
        contribution = sum(packing.bytes_of(SIZES[name], kind) for name in names) + 4 * 11
        for name, island in party.islands.items():
            written, read = (now - then for now, then in zip((island.bytes_written, island.bytes_read), before[name]))
            made_the_record = party.islands["a"].held.commit.by == name
            assert 0 <= written - contribution - 4 * 11 * made_the_record <= HEADER * (1 + made_the_record)
            assert 0 <= read - 2 * contribution - 4 * 11 * (not made_the_record) <= 3 * HEADER


def test_a_whole_outer_state_is_written_as_often_as_said():
    section = dataclasses.replace(SECTION, snapshot_rounds=2)
    party, values = Party("memory://snapshots", "ab", section, SIZES, state=11), sum(SIZES.values())
    for round in (1, 2, 3, 4):
        before = sum(island.bytes_written for island in party.islands.values())
        party.round()
        written = sum(island.bytes_written for island in party.islands.values()) - before
        whole = 2 * 4 * values + 4 * 11 if round % 2 == 0 else 0
        assert 0 <= written - 2 * (4 * values + 4 * 11) - 4 * 11 - whole <= 4 * HEADER


@pytest.mark.parametrize("lie", [{"tokens": 2**62}, {"tokens": 0}, {"steps": 0}, {"steps": 10**9}, {"numbers": 10**15}])
def test_work_that_cannot_be_true_is_left_out(lie):
    """Or it would weigh without end, overflow the record, or move a stream to where nobody ever reads."""
    party = Party("memory://lie-" + "-".join(f"{name}-{value}" for name, value in lie.items()), "ab")
    a, b = party.islands.values()
    for island in (a, b):
        streams, leased = party.section.streams, island.held.commit.members[island.name]
        numbers = [stream + n * streams for stream in leased for n in range(2)]
        if island is a and "numbers" in lie:
            numbers.append(leased[0] + lie["numbers"] * streams)
            lie = {"tokens": 10 * (2 * len(leased) + lie["numbers"] - 1)}  # of all rows up to that one
        did = {"tokens": 10 * len(numbers), "steps": 2} | (lie if island is a else {})
        island.contribute(party.values(1.0), party.routers(), {}, Work(numbers, did["tokens"], did["steps"], 1.0))
    commit = b.poll(1)
    assert [c.island for c in commit.merged] == ["b"] and "says " in commit.left_out["a"]


def test_who_proposes_a_record_and_is_second_reads_nothing_twice(monkeypatch):
    """Both find the round due at one time; one is first, and the other takes what it has computed already."""
    party = Party("memory://second", "ab", sizes=SIZES)
    a, b = party.islands.values()
    create = type(b.store).create

    def first_the_other(store, key, data):
        if key == records.path_of_commit(1) and a.commit(1) is None:
            monkeypatch.setattr(type(b.store), "create", create)
            a.poll(1)
        return create(store, key, data)

    for island in (a, b):
        streams = island.held.commit.members[island.name]
        island.contribute(party.values(ord(island.name)), party.routers(), {}, Work(list(streams), 40, 2, 1.0))
    monkeypatch.setattr(type(b.store), "create", first_the_other)
    commit = b.poll(1)
    assert commit.by == "a"
    read = b.bytes_read
    b.take(commit)
    assert b.bytes_read == read and b.held.commit == commit and math.isfinite(b.held.outer.params["norm"][0])
    a.take(commit)
    assert all((a.held.outer.params[name] == value).all() for name, value in b.held.outer.params.items())
