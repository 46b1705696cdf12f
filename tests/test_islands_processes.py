"""Islands proven with real processes: killed, frozen, stopped, poisoned, of unlike speed and software. The long form is
`python tests/islands_soak.py`.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from islands_processes import (
    COMPLETE,
    KILLED,
    OF_RUNS,
    PATIENCE,
    REFUSED,
    SMALL,
    STOPPED,
    Disturber,
    Place,
    Process,
    Reader,
    Spoil,
    at_speed,
    check,
    check_kills,
    product,
    product_rules,
    until,
    vectors,
)
from runs import figures, write_text
from s3_server import s3_server
from test_islands_rounds import SIZES, check_accounts, make_rules

import frugalmoe
from frugalmoe.islands import blobs, outer, records, streams
from frugalmoe.islands.store import open_store

pytestmark = pytest.mark.whole

PATIENT = {"lapse_seconds": 600.0}  # nobody is given up
TWO = OF_RUNS | {"train.steps": 60, "islands.round_steps": 6, "islands.bits": 8, "islands.wait_for": 2}


@pytest.fixture
def room(tmp_path):
    """A folder in memory where there is one: a disk's fsync takes more time than all else here."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="islands-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("islands") / "text")


# ---------------------------------------------------------------- a kill between any two operations on files


@pytest.mark.parametrize(("slow_disk", "fields"), [(False, {}), (True, {"bits": 4, "overlap_steps": 2})])
def test_a_kill_between_any_two_operations_changes_nothing(room, slow_disk, fields):
    """All of a run of two rounds, from the agreement to the last sign of life; the same command then goes on."""
    fields = {"steps": 6, "snapshot_rounds": 2} | PATIENT | fields
    start = lambda place, k: place.start(vectors, 0.0, 0.0, slow_disk, k)
    killed = check_kills(room, start, fields, make_rules(**fields), lambda count: range(1, count + 1))
    figures("F25 SIGKILL of an island between any two operations", len(killed), len(killed))


@pytest.mark.slow
def test_a_kill_of_a_run_between_operations_changes_nothing(room, text):
    """The same of `frugalmoe train --islands`, at three of the operations; the long form tries all."""
    start = lambda place, k: place.start(product, text, None, k)
    points = lambda count: [count // 3, count // 2, count - 8]
    check_kills(room, start, KILLED, product_rules(text, KILLED), points, at_once=3)


# ---------------------------------------------------------------- random faults


def test_random_kills_joins_leaves_and_freezes_keep_the_accounts(room):
    """Whatever happens to them, a run ends, no row is lost or read twice, and its files give all of it again."""
    fields = {"steps": 72, "lapse_seconds": 1.5}
    disturber = Disturber(room, 3, fields, vectors, 0.02)
    found = disturber.run(islands=2, faults=6, freeze=3.0)
    assert len(found.faults) == 6 and found.complete
    check(disturber, make_rules(**fields))
    figures("F25 islands are killed, freeze, leave and join", len(found.faults), len(found.faults))


def test_islands_that_are_killed_and_go_on_end_as_if_nothing_had_been(room):
    fields = {"steps": 40, "wait_for": 2, "bits": 4, "overlap_steps": 2} | PATIENT
    runs = [Disturber(room / str(faults), 5, fields, vectors, 0.01) for faults in (0, 6)]
    results = [run.run(islands=2, faults=faults, kinds=("kill",)) for run, faults in zip(runs, (0, 6))]
    assert [len(result.complete) for result in results] == [2, 2]
    clean, disturbed = (check(run, make_rules(**fields)) for run in runs)
    assert [commit.outer for commit in clean] == [commit.outer for commit in disturbed]
    assert [commit.members for commit in clean] == [commit.members for commit in disturbed]
    figures("F25 islands are killed, to the bits of a calm run", len(results[1].faults), len(results[1].faults))


@pytest.mark.slow
def test_runs_that_are_killed_and_go_on_end_as_if_nothing_had_been(room, text):
    """The same of `frugalmoe train --islands`, with all that a checkpoint holds; the long form has 50 faults."""
    runs = [Disturber(room / str(faults), 1, TWO, product, text) for faults in (0, 2)]
    results = [run.run(islands=2, faults=faults, kinds=("kill",)) for run, faults in zip(runs, (0, 2))]
    assert [len(result.complete) for result in results] == [2, 2] and len(results[1].faults) == 2
    clean, disturbed = (check(run, product_rules(text, TWO)) for run in runs)
    assert [commit.outer for commit in clean] == [commit.outer for commit in disturbed]


# ---------------------------------------------------------------- unlike speeds

SPEEDS = (1.0, 0.5, 0.25, 0.125)


def test_rounds_of_time_take_from_each_island_what_it_can(room):
    """A processor for 1, 1/2, 1/4 and 1/8 of the time: more steps of the faster in the same rounds, and all merged."""
    fields = {"steps": 8000, "round_steps": 2000, "round_seconds": 1.5, "wait_for": 4, "lapse_seconds": 60.0}
    places = [Place(str(room / "islands"), room / "runs", f"i{n}", fields) for n in range(4)]
    with contextlib.ExitStack() as held:
        processes = [place.start(vectors, 0.0, 0.002) for place in places]
        for process, share in zip(processes, SPEEDS):
            held.enter_context(at_speed(process, share))
        assert [process.wait() for process in processes] == [COMPLETE] * 4, processes[0].said()
    rows = [place.rows() for place in places]
    assert [[(row["round"], row["islands"], row["merged"]) for row in own] for own in rows] == [
        [(n, 4, True) for n in range(1, 5)]
    ] * 4
    steps = [sum(row["steps"] for row in own) for own in rows]
    assert steps == sorted(steps, reverse=True) and steps[0] > 2 * steps[3]
    assert all(0 < row["steps"] < 2000 for own in rows for row in own)
    check_accounts(Reader(open_store(places[0].islands), make_rules(**fields)))


# ---------------------------------------------------------------- equal islands are synchronous training


PLAIN = {  # what is a mean over rows, and no state beside the parameters
    "optim.name": "sgd",
    "optim.learning_rate": 0.3,
    "optim.schedule": "constant",
    "optim.warmup_steps": 0,
    "optim.weight_decay": 0.0,
    "optim.clip_norm": 0.0,
}


def all_complete(places: list[Place], *starts) -> None:
    processes = [start() for start in starts]
    for place, process in zip(places, processes, strict=True):
        assert process.wait() == COMPLETE, f"{place.name}: {process.said()[-3000:]}"


@pytest.mark.slow
def test_equal_islands_that_meet_after_every_step_are_synchronous_training(room, text):
    section = {"round_steps": 1, "merge": "mean", "learning_rate": 1.0, "momentum": 0.0, "streams": 4, "wait_for": 2}
    fields = SMALL | PLAIN | {"train.steps": 6} | {f"islands.{k}": v for k, v in section.items()}
    islands = [Place(str(room / "islands"), room / "runs", name, fields) for name in "ab"]
    alone = Place("", room / "runs", "alone", fields | {"train.batch_size": 4})
    starts = [functools.partial(place.start, product, text) for place in (*islands, alone)]
    all_complete([*islands, alone], *starts)
    a, b, expected = (place.outer() for place in (*islands, alone))
    for name, value in expected.items():
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
        np.testing.assert_allclose(a[name], value, rtol=0, atol=1e-6, err_msg=name)
    assert [row["islands"] for row in islands[0].rows()] == [2] * 6
    losses = [
        [row["loss/ce"] for row in place.rows("metrics.jsonl") if "loss/ce" in row] for place in (*islands, alone)
    ]
    np.testing.assert_allclose(np.mean(losses[:2], axis=0), losses[2], atol=1e-5)
    assert losses[2][-1] < losses[2][0]


# ---------------------------------------------------------------- unlike software


def other_python() -> tuple[Path | None, str]:
    """The interpreter of the other stack, beside this repository or this interpreter's; or what is missing."""
    folders = dict.fromkeys([Path(__file__).absolute().parents[1], *Path(sys.executable).absolute().parents])
    other = ".venv" if sys.version_info >= (3, 12) else ".venv-newest"
    missing = f"{other}/bin/python beside the repository, which `make test` and `make test-newest` make"
    for python in (folder / other / "bin" / "python" for folder in folders):
        if python.is_file():
            asked = subprocess.run([python, "-c", "import jax, hypothesis, pytest"], capture_output=True, text=True)
            if asked.returncode == 0:
                return python, ""
            missing = f"{python}: {asked.stderr.strip().splitlines()[-1]}"
    return None, missing


def in_stack(python: Path | str, place: Place, text: Path, devices: int) -> subprocess.Popen:
    """`product` by an interpreter, with the flags of XLA that its version knows."""
    folders = [str(Path(frugalmoe.__file__).parents[1]), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    code = f"""import os, sys
from pathlib import Path, PosixPath
from frugalmoe.laws import xla_flags
os.environ["XLA_FLAGS"] = xla_flags() + " --xla_force_host_platform_device_count={devices}"
from islands_processes import Place, product
sys.exit(product({place!r}, Path({str(text)!r})))"""
    with (place.runs / f"{place.name}.log").open("w") as log:
        return subprocess.Popen([python, "-c", code], env=environment, stdout=log, stderr=subprocess.STDOUT)


@pytest.mark.slow
@pytest.mark.newest  # of the two stacks the second one to be made has both
def test_islands_of_unlike_software_hold_the_same_bits(room, text):
    """Two versions of Python and of JAX, bfloat16 on 8 devices beside float32 on one; contributions of 8 bits, in two
    fragments.
    """
    other, missing = other_python()
    if other is None:
        pytest.skip(f"no second stack to train with: {missing}")
    old, new = (sys.executable, other) if sys.version_info < (3, 12) else (other, sys.executable)
    section = {"round_steps": 2, "wait_for": 2, "streams": 8, "bits": 8, "fragments": 2, "snapshot_rounds": 2}
    fields = SMALL | {"train.steps": 8, "model.moe.router": "sigmoid_bias"}
    fields |= {f"islands.{name}": value for name, value in section.items()}
    own = {"old": {"train.batch_size": 8, "model.compute_dtype": "bfloat16"}, "new": {}}
    places = [Place(str(room / "islands"), room / "runs", name, fields | own[name]) for name in own]
    places[0].runs.mkdir()
    processes = [in_stack(python, p, text, n) for python, p, n in zip((old, new), places, (8, 1))]
    said = lambda: [(room / "runs" / f"{name}.log").read_text()[-2000:] for name in own]
    try:
        until(lambda: any(process.poll() is not None for process in processes))
        assert all(process.poll() in (None, COMPLETE) for process in processes), said()
        assert [process.wait(PATIENCE) for process in processes] == [COMPLETE] * 2, said()
    finally:
        for process in processes:
            process.kill()
    about = [json.loads((room / "islands" / "islands" / f"{name}.json").read_text())["about"] for name in own]
    assert about[0]["jax"] != about[1]["jax"] and about[0]["python"] != about[1]["python"]
    assert [a["devices"] for a in about] == [8, 1]
    hashes = [[(row["round"], row["outer_sha256"], row["islands"]) for row in place.rows()] for place in places]
    assert hashes[0] == hashes[1] and [row[0::2] for row in hashes[0]] == [(n, 2) for n in range(1, 5)]
    ends = [place.outer() for place in places]
    for name in ends[0]:
        assert ends[0][name].tobytes() == ends[1][name].tobytes(), name
    assert outer.sha256(ends[0]) == hashes[0][-1][1]


# ---------------------------------------------------------------- bad input

FIELDS = {"steps": 12, "lapse_seconds": 2.0}


def test_two_islands_of_one_name_are_told_apart(room):
    """The second refuses while the first shows signs of life, and takes its place when it does no more."""
    places = [Place(str(room / "islands"), room / runs, "a", FIELDS | {"steps": 400}) for runs in ("first", "second")]
    first = places[0].start(vectors, 0.02)
    until(lambda: len(places[0].rows()) > 1)
    second = places[1].start(vectors)
    assert second.wait() == REFUSED
    assert second.said() == (
        "error: --island=a: another run shows signs of life under this name; give another --island\n"
    )
    assert first.alive
    first.signal(signal.SIGKILL)
    first.wait()
    assert places[1].start(vectors).wait() == COMPLETE


def test_other_rules_are_refused_by_name(room):
    place = Place(str(room / "islands"), room / "runs", "a", FIELDS)
    assert place.start(vectors).wait() == COMPLETE
    other = Place(str(room / "islands"), room / "others", "b", FIELDS | {"momentum": 0.5})
    process = other.start(vectors)
    assert process.wait() == REFUSED
    assert "islands.momentum is 0.9 there and 0.5 here" in process.said() and process.said().count("\n") == 1


def test_contributions_that_are_none_are_left_out_and_the_others_go_on(room):
    """Four hand in what is no contribution, by hand; the one that trains goes on, and its record says what is wrong."""
    fields = {"steps": 8, "wait_for": 5, "lapse_seconds": 2.0, "round_steps": 4}
    place = Place(str(room / "islands"), room / "runs", "a", fields)
    store = open_store(place.islands)
    names = ["checksum", "leaves", "shapes", "torn"]
    process = place.start(vectors)

    def announce(beat: int) -> None:
        for name in names:
            here = records.Presence(
                island=name, run=name, beat=beat, round=0, status="joining", step=0, tokens_per_second=0.0, about={}
            )
            store.write(records.path_of_presence(name), records.to_bytes(here))

    beats = iter(range(1, 10**6))
    until(lambda: announce(next(beats)) or store.read(records.path_of_commit(0)) is not None)
    begun = records.from_bytes(records.Commit, store.read(records.path_of_commit(0)), "commit")
    assert set(begun.members) == {"a", *names}
    good = {f"delta/{n}": np.ones(size, np.float32) for n, size in SIZES.items()} | {
        "routers/bias": np.ones(2, np.float32)
    }
    written = {
        "checksum": blobs.to_bytes(good) + b" ",
        "shapes": blobs.to_bytes(good | {"delta/a": np.ones(7, np.float32)}),
        "torn": blobs.to_bytes(good)[:-3],
    }
    for name in names:
        data = written.get(name, b"")
        sha256 = blobs.sha256(blobs.to_bytes(good) if name == "checksum" else data)
        numbers = streams.read(begun.members[name], begun.rows, 4)
        made = records.Contribution(
            island=name, run=name, round=1, base=begun.outer, blob="../../etc/passwd" if name == "leaves" else sha256,
            bytes=len(data), tokens=40, steps=1, rows=streams.used(numbers, len(begun.rows)), seconds=1.0,
        )  # fmt: skip
        if data:
            store.write(records.path_of_blob(sha256), data)
        store.create(records.path_of_contribution(1, name), records.to_bytes(made))
    assert process.wait() == COMPLETE, process.said()
    commit = records.from_bytes(records.Commit, store.read(records.path_of_commit(1)), "commit")
    assert [c.island for c in commit.merged] == ["a"] and set(commit.left_out) == set(names)
    assert "no sha256 of a blob" in commit.left_out["leaves"] and "(7,)" in commit.left_out["shapes"]
    assert all("\n" not in why for why in commit.left_out.values()), commit.left_out
    figures("F25 an island hands in what is no contribution", len(names), len(commit.left_out))


# ---------------------------------------------------------------- a store that cannot be reached for a while


def events(place: Place) -> list[str]:
    return [row["kind"] for row in place.rows("events.jsonl")]


def while_it_trains(place: Place, process: Process, away: Callable[[], None], back: Callable[[], None]) -> None:
    """Takes the store away in the midst of a run, until the island has said so, and waits for the end."""
    until(lambda: len(place.rows()) > 2)
    away()
    until(lambda: "store" in events(place))
    known = len(place.rows())
    assert process.alive and events(place).count("store") == 1
    back()
    assert process.wait() == COMPLETE, process.said()
    assert len(place.rows()) == 40 > known
    found = check_accounts(Reader(open_store(place.islands), make_rules(**place.fields)))
    assert found[-1].round == 40


AWAY = {"steps": 160} | PATIENT


def test_a_full_disk_is_told_and_waited_for(room):
    """A file system of 4 MiB where this process may mount one; else a folder that cannot be written."""
    islands, filler = room / "islands", room / "islands" / "filler"
    islands.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(islands)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    place = Place(str(islands), room / "runs", "a", AWAY)

    def fill() -> None:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1 << 12)):
                pass

    try:
        process = place.start(vectors, 0.01)
        if mounted:
            while_it_trains(place, process, fill, filler.unlink)
        else:
            while_it_trains(place, process, *blocked(islands))
        (said,) = [row["what"] for row in place.rows("events.jsonl") if row["kind"] == "store"]
        assert said.startswith(str(islands)) and ("No space left" in said or not mounted) and "\n" not in said
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(islands)], check=True)


def blocked(islands: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """What makes a folder one that cannot be written, by root neither, and what makes it one that can."""
    writing = islands / ".writing"

    def block() -> None:
        writing.rename(islands / ".aside")
        writing.write_text("")

    def free() -> None:
        writing.unlink()
        (islands / ".aside").rename(writing)

    return block, free


def test_a_folder_that_cannot_be_written_is_told_and_waited_for(room):
    place = Place(str(room / "islands"), room / "runs", "a", AWAY)
    process = place.start(vectors, 0.01)
    until(lambda: len(place.rows()) > 1)
    while_it_trains(place, process, *blocked(room / "islands"))


def test_an_island_is_stopped_while_its_store_is_away(room):
    """It has saved what it found: the same command hands that in."""
    place = Place(str(room / "islands"), room / "runs", "a", AWAY)
    process = place.start(vectors, 0.01)
    until(lambda: len(place.rows()) > 2)
    block, free = blocked(room / "islands")
    block()
    until(lambda: "store" in events(place))
    process.signal(signal.SIGTERM)
    assert process.wait() == STOPPED, process.said()
    said, again = process.said(), place.start(vectors)
    assert again.wait() == REFUSED
    assert re.fullmatch(rf"error: {place.islands}: cannot be created: .*\n", again.said().removeprefix(said))
    free()
    assert place.start(vectors).wait() == COMPLETE
    assert check_accounts(Reader(open_store(place.islands), make_rules(**place.fields)))[-1].round == 40


def test_a_bucket_that_goes_and_comes_back_is_told_and_waited_for(room, monkeypatch):
    """The server is gone, then it does not know who asks; at the start either is one line."""
    with s3_server() as server:
        for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
            monkeypatch.delenv(name, raising=False)
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        place = Place(f"{server.url}/run", room / "runs", "a", AWAY)
        start = lambda place: place.start(vectors, 0.01, 0.0, False, -1, 0.5, **server.environment)
        while_it_trains(place, start(place), lambda: server.tell("stop"), lambda: server.tell("start"))
        other = dataclasses.replace(place, islands=f"{server.url}/other", name="b")
        process = start(other)
        while_it_trains(other, process, lambda: server.tell("lock"), lambda: server.tell("unlock"))
        server.tell("lock")
        said, refused = process.said(), start(other)
        assert refused.wait() == REFUSED
        line = rf"error: {other.islands}: cannot be listed: .*(Access|Denied|Forbidden).*\n"
        assert re.fullmatch(line, refused.said().removeprefix(said)), refused.said()


# ---------------------------------------------------------------- a bad island

POISON = SMALL | {"train.steps": 280, "optim.warmup_steps": 20, "islands.round_steps": 40, "islands.wait_for": 4}


def poisoned(room: Path, text: Path, name: str, merge: str, spoil: Spoil | None, **fields) -> float:
    """The held-out loss, in nats, that four islands end with, of which one may be bad; infinite where the outer state
    is so far from any model that all of them give up.
    """
    fields = POISON | {"islands.merge": merge} | fields
    places = [Place(str(room / name), room / f"{name}-runs", f"i{n}", fields) for n in range(4)]
    processes = [place.start(product, text, spoil if n == 3 else None) for n, place in enumerate(places)]
    ended = [process.wait() for process in processes]
    if ended == [REFUSED] * 4:
        assert all("not finite" in p.said() and "4 times in a row from the outer state" in p.said() for p in processes)
        return np.inf
    assert ended == [COMPLETE] * 4, [process.said()[-1000:] for process in processes]
    ends = [json.loads((place.workdir / "summary.json").read_text())["eval"]["loss"]["mean"] for place in places]
    assert max(ends) == min(ends) and {place.rows()[-1]["outer_sha256"] for place in places} == {
        outer.sha256(places[0].outer())
    }
    return ends[0]


@pytest.mark.slow
def test_a_bad_island_is_left_out_by_edit_and_ruins_the_mean(room, text):
    clean = poisoned(room, text, "clean", "edit", None)
    bad = poisoned(room, text, "bad", "edit", Spoil())
    ruined = poisoned(room, text, "ruined", "mean", Spoil())
    print(f"clean {clean:.4f}, with a bad island {bad:.4f}, with the mean {ruined:.4f}")
    assert abs(bad - clean) <= 0.02
    assert not ruined - clean <= 0.02
