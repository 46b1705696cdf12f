"""Supervisors of one run agree on who starts it: all, or those that are there; what is forged changes nothing."""

import contextlib
import json
import os
import random
import threading
import time

import pytest

from frugalmoe.errors import EXIT_PREEMPTED, UserError
from frugalmoe.train import gathering
from frugalmoe.train.gathering import Flags, Gathering, Place


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(gathering, "_SECONDS", 0.05)
    monkeypatch.setattr(gathering, "_QUIET", 0.2)
    monkeypatch.setattr(gathering, "_BEATS", 40)  # two seconds: a machine with other work


class Supervisor:
    """One in a thread: meets, and says what came of it."""

    def __init__(self, workdir, number, of, least=None, wait=1.5, fits=()):
        flags = Flags("127.0.0.1:4000", of, number)
        self.life = Gathering(workdir, flags, wait, least or of)
        self.life.__enter__()
        self.life.knows(fits)
        self.said, self.asked, self.came = [], [], None

    def meets(self):
        self.came = None

        def act():
            try:
                self.came = self.life.meet(self.asked, self.said.append)
            except UserError as e:
                self.came = e

        self.thread = threading.Thread(target=act, daemon=True)
        self.thread.start()
        return self

    def place(self, seconds=20.0):
        self.thread.join(seconds)
        assert not self.thread.is_alive(), self.said
        return self.came

    def dies(self):
        """Its record stays, and no longer moves."""
        self.life.__exit__()
        time.sleep(0.1)


@pytest.fixture
def begin():
    with contextlib.ExitStack() as lives:

        def begin(*given, **more):
            supervisor = Supervisor(*given, **more)
            lives.callback(supervisor.asked.append, 15)
            lives.callback(supervisor.life.__exit__)
            return supervisor

        yield begin


def says(supervisor, line, seconds=20.0):
    """Waits until that is the last thing that it said."""
    until = time.monotonic() + seconds
    while (not supervisor.said or line not in supervisor.said[-1]) and time.monotonic() < until:
        time.sleep(0.02)
    assert line in supervisor.said[-1] and supervisor.came is None, supervisor.said


def meet(begin, *given, numbers, **more):
    """All are there before the first one looks for the others."""
    found = [begin(given[0], number, *given[1:], **more) for number in numbers]
    return [supervisor.meets() for supervisor in found]


def places(supervisors):
    """[(process, processes)], of one coordinator."""
    found = [supervisor.place() for supervisor in supervisors]
    assert all(isinstance(place, Place) for place in found), found
    assert len({place.flags.coordinator for place in found}) == 1
    return [(place.flags.process, place.flags.processes) for place in found]


def test_all_that_there_are_start_at_once(tmp_path, begin):
    all_three = meet(begin, tmp_path, 3, wait=60, numbers=(2, 0, 1))
    assert places(all_three) == [(2, 3), (0, 3), (1, 3)]
    first = all_three[1].came
    assert first.flags.coordinator.startswith("127.0.0.1:") and not first.again and not first.news
    again = [supervisor.meets() for supervisor in all_three]
    assert places(again) == [(2, 3), (0, 3), (1, 3)]
    assert all(supervisor.came.again and not supervisor.came.news for supervisor in again)


def test_those_that_remain_go_on_in_the_old_order_and_who_returns_is_taken_in(tmp_path, begin):
    all_three = meet(begin, tmp_path, 3, least=1, fits=[1, 2, 3], numbers=range(3))
    assert places(all_three) == [(0, 3), (1, 3), (2, 3)]
    all_three[0].dies()
    rest = [supervisor.meets() for supervisor in all_three[1:]]
    assert places(rest) == [(0, 2), (1, 2)]
    assert rest[0].came.news == "the run goes on in processes 1, 2 of 3, without process 0" and not rest[1].came.news
    late = begin(tmp_path, 0, 3, least=1).meets()
    says(late, "the run goes on in processes 1, 2 of 3; process 0 joins it when it starts again")
    back = [late, *(supervisor.meets() for supervisor in rest)]
    assert places(back) == [(0, 3), (1, 3), (2, 3)]
    assert late.came.again and late.came.news == "the run goes on in all 3 processes"


def test_without_being_told_that_fewer_may_go_on_one_waits_and_says_so(tmp_path, begin):
    both = meet(begin, tmp_path, 2, fits=[1, 2], numbers=range(2))
    assert places(both) == [(0, 2), (1, 2)]
    both[0].dies()
    left = both[1].meets()
    line = f"waiting for process 0 of 2: no sign of life in {tmp_path}/supervisors; with --supervise.min-processes=N "
    says(left, f"{line}the run would go on with N that are there")
    time.sleep(3.0)
    assert left.came is None and len(left.said) == 1
    left.asked.append(15)
    assert left.place() == EXIT_PREEMPTED


@pytest.mark.parametrize(("fits", "least", "starts"), [([1, 2, 4], 1, 2), ([4], 1, 0), ([1, 4], 2, 0), ([], 1, 0)])
def test_as_many_go_on_as_the_config_allows(tmp_path, begin, fits, least, starts):
    """Of four processes one is gone: where three do not fit two start, and the third waits to be taken in."""
    rest = meet(begin, tmp_path, 4, least=least, fits=fits, numbers=range(3))
    if starts:
        assert places(rest[:starts]) == [(i, starts) for i in range(starts)]
        line = "the run goes on in processes 0, 1 of 4; process 2 joins it when it starts again"
    elif fits:
        do = ", ".join(str(n) for n in fits if n >= least)
        line = f"the config goes on with {do} processes (--supervise.min-processes={least})"
    else:
        line = "is known once it has begun"
    for supervisor in rest[starts:]:
        says(supervisor, line)
    time.sleep(0 if starts else 3.0)
    assert all(supervisor.came is None for supervisor in rest[starts:])


def test_one_whose_run_has_not_ended_is_waited_for(tmp_path, begin):
    both = meet(begin, tmp_path, 2, least=1, fits=[1, 2], numbers=range(2))
    places(both)
    first = both[0].meets()
    says(first, "waiting for the run of process 1 of 2 to end")
    time.sleep(3.0)
    assert first.came is None and len(first.said) == 1
    assert places([first, both[1].meets()]) == [(0, 2), (1, 2)]


@pytest.mark.parametrize(
    ("code", "least", "over"), [(0, 1, True), (2, 1, True), (75, 1, False), (75, 2, True), (1, 2, True)]
)
def test_who_ends_for_good_ends_the_others(tmp_path, begin, code, least, over):
    """A stop of one process ends a run that needs all of them; else the others go on, and wait for nobody who left."""
    both = meet(begin, tmp_path, 2, least=least, fits=[1, 2], wait=600, numbers=range(2))
    places(both)
    both[0].life.ends(code)
    both[0].dies()
    came = both[1].meets().place()
    assert came == code if over else places([both[1]]) == [(0, 1)]


def test_of_bad_input_nothing_stays(tmp_path, begin):
    """Nor is anything deleted that is not the supervisors' own."""
    workdir = tmp_path / "run"
    both = meet(begin, workdir, 2, numbers=range(2))
    places(both)
    both[0].life.ends(2)
    assert (workdir / "supervisors" / "process-0.json").is_file(), "the other one is to read it"
    both[1].life.ends(2)
    assert not workdir.exists()
    workdir.mkdir()
    (workdir / "notes.txt").touch()
    begin(workdir, 0, 2).life.ends(2)
    assert [path.name for path in workdir.iterdir()] == ["notes.txt"]
    (workdir / "config.json").touch()
    begin(workdir, 0, 2).life.ends(2)
    assert (workdir / "supervisors" / "process-0.json").is_file()


def test_what_ended_before_one_began_does_not_end_it(tmp_path, begin):
    old = [begin(tmp_path, i, 2).meets() for i in range(2)]
    places(old)
    for supervisor in old:
        supervisor.life.ends(0)
        supervisor.dies()
    assert places([begin(tmp_path, i, 2).meets() for i in range(2)]) == [(0, 2), (1, 2)]


def test_a_process_has_one_supervisor(tmp_path, begin):
    first = begin(tmp_path, 0, 2)
    with pytest.raises(UserError, match=r"--process-id=0: process 0 of this run is supervised on .* already"):
        begin(tmp_path, 0, 2)
    first.dies()  # or stands still
    second = begin(tmp_path, 0, 2)
    first.life._write()  # it goes on
    assert isinstance(first.meets().place(), UserError) and "has taken its place" in str(first.came)
    assert places([second.meets(), begin(tmp_path, 1, 2).meets()]) == [(0, 2), (1, 2)]


def garbage(path, kind, record):
    """Puts something else in a record's place."""
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("/etc/passwd")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "large":
        path.write_bytes(b" " * 2**20 + json.dumps(record).encode())
    else:
        path.write_bytes(kind)


RECORD = {
    "token": "t",
    "beat": 1,
    "start": 3,
    "state": "waiting",
    "code": 0,
    "host": "h",
    "address": "h:1",
    "fits": [1],
    "starts": 1,
}
FORGED = {
    "state": ["king", 1],
    "start": [-1, 10**9],
    "beat": ["1", 2**70, True],
    "code": [-9, 10**9],
    "fits": [[0], 1, [True]],
    "address": ["h:1 --fresh", "h:99999", "h\n:1"],
    "token": [None],
}
BROKEN = [b"", b"\0" * 64, b"{", b"[" * 10**5, b"\xff\xfe{}", b"null", b"[]", b"1e999"]
CHANGED = [json.dumps(RECORD | {name: value}).encode() for name, values in FORGED.items() for value in values]
KINDS = ["folder", "link", "pipe", "large", *BROKEN, *CHANGED]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind)[:24])
def test_what_is_no_record_is_as_if_it_were_not_there(tmp_path, kind):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(RECORD))
    assert gathering._record(path).token == "t"
    path.unlink()
    before = len(os.listdir("/proc/self/fd"))
    garbage(path, kind, RECORD)
    assert gathering._record(path) is None and gathering._agreed(path, 2) is None
    assert len(os.listdir("/proc/self/fd")) == before


AGREED = {"members": {"0": "a", "1": "b"}, "coordinator": "h:1", "again": True}
MEMBERS = [{}, {"-1": "a"}, {"2": "a"}, {"0": "a", "00": "b"}, ["a"], {"0": 1}]
NONE = [*({"members": each} for each in MEMBERS), {"coordinator": "h"}, {"coordinator": "$(x):1"}, {"again": 1}]


@pytest.mark.parametrize("change", NONE, ids=str)
def test_what_is_no_agreement_is_none(tmp_path, change):
    (tmp_path / "start.json").write_text(json.dumps(AGREED))
    assert gathering._agreed(tmp_path / "start.json", 2).members == {0: "a", 1: "b"}
    (tmp_path / "start.json").write_text(json.dumps(AGREED | change))
    assert gathering._agreed(tmp_path / "start.json", 2) is None


def test_records_of_random_bytes_change_nothing(tmp_path):
    """Bits flipped, cut, doubled: a record, or none; never an error."""
    draw, whole = random.Random(0), json.dumps(RECORD).encode()
    path, kept = tmp_path / "record.json", 0
    for _ in range(400):
        changed = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        path.write_bytes(bytes(changed[: draw.randint(0, len(changed))]) if draw.random() < 0.2 else bytes(changed))
        record = gathering._record(path)
        kept += record is not None
        assert record is None or gathering._is_address(record.address)
    assert 0 < kept < 400


def test_forged_and_torn_files_in_the_folder_neither_start_nor_stop_anybody(tmp_path, begin):
    """Starts that nobody agreed on are spent numbers; one that names others is no start of ours."""
    folder = tmp_path / "supervisors"
    folder.mkdir()
    (folder / "start-1.json").write_text(json.dumps(AGREED))
    (folder / "start-2.json").write_text("{torn")
    (folder / "start-3.json").symlink_to("nowhere")
    (folder / "start-4.json").mkdir()
    (folder / "start-x.json").touch()
    os.mkfifo(folder / "start-5.json")
    for i, kind in enumerate(("folder", b"{torn")):
        garbage(folder / f"process-{2 + i}.json", kind, RECORD)
    (folder / "process-1.json").write_text(json.dumps(RECORD))
    both = [begin(tmp_path, i, 4, least=1, fits=[1, 2], wait=3.0) for i in range(2)]
    assert places([supervisor.meets() for supervisor in both]) == [(0, 2), (1, 2)]
    assert (folder / "start-6.json").is_file()


def test_a_start_that_is_no_number_of_ours_is_named(tmp_path, begin):
    (tmp_path / "supervisors").mkdir()
    (tmp_path / "supervisors" / "start-999999999.json").touch()
    came = begin(tmp_path, 0, 2).meets().place()
    assert isinstance(came, UserError) and "start-999999999.json: no supervisor has come so far; delete it" in str(came)


def test_a_folder_that_leads_elsewhere_or_cannot_be_made_is_refused(tmp_path, begin):
    (tmp_path / "supervisors").symlink_to(tmp_path)
    with pytest.raises(UserError, match="is a symbolic link"):
        begin(tmp_path, 0, 2)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        begin(tmp_path / "file", 0, 2)


def test_whoever_decides_at_one_time_it_is_decided_once(tmp_path, begin):
    """Twelve that all hold themselves for the lowest."""
    all_of_them = [begin(tmp_path, i, 12) for i in range(12)]
    line = threading.Barrier(12)

    def decide(supervisor):
        line.wait()
        supervisor.life._agree(1, {supervisor.life.number: supervisor.life._own})

    threads = [threading.Thread(target=decide, args=(supervisor,)) for supervisor in all_of_them]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    agreed = gathering._agreed(tmp_path / "supervisors" / "start-1.json", 12)
    assert len(agreed.members) == 1
    assert not [name for name in os.listdir(tmp_path / "supervisors") if name.startswith(".start-")]
