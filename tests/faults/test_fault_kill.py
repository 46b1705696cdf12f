"""SIGKILL at any moment, SIGTERM, runs that share a directory: what was saved is whole, and no answer changes."""

import contextlib
import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faulted import FIELDS, LONG, Forks, assert_same, bits, logged, recovered
from runs import config_file, figures, tiny, write_text

from frugalmoe.data import prepare
from frugalmoe.errors import EXIT_PREEMPTED
from frugalmoe.train import saved

pytestmark = pytest.mark.slow
STEPS, EVERY = 96, 8
KILLS = 24 if LONG else 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("kill")
    write_text(root / "text")
    fields = FIELDS | {"train.steps": STEPS, "checkpoint.every_steps": EVERY, "train.trackers": "tensorboard"}
    config_file(root, root / "text", root / "cache", fields)
    return root


@pytest.fixture(scope="module")
def begin(place, forks):
    def begin(workdir: str, *flags: str) -> None:
        line = ("train", f"--config={place / 'tiny.py'}", f"--workdir={place / workdir}", *flags)
        forks.start(*line, said=place / f"{workdir}.said")

    return begin


@pytest.fixture(scope="module")
def calm(place, forks, begin):
    """(The bits of a run that nothing happened to, the seconds that it took.)"""
    began = time.monotonic()
    begin("calm")
    assert forks.wait() == 0, (place / "calm.said").read_text()
    return bits(place / "calm"), time.monotonic() - began


def verified(workdir: Path) -> int:
    """The newest step that is whole; 0: none."""
    return max((step for step in saved.entries(workdir) if not saved.fault(workdir, step)), default=0)


def anything(folder: Path, pattern: str) -> Callable[[], bool]:
    """Whether there is something of a name that was made after this call."""
    began = time.time_ns()

    def there() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return any(path.stat().st_ctime_ns >= began for path in folder.glob(pattern))
        return False

    return there


def test_killed_at_any_moment_it_ends_as_if_nothing_had_been(place, forks, begin, calm):
    rng, (theirs, seconds) = random.Random(0), calm
    moments = ("anywhere", "in a save", "after its last save", "as it writes its report")
    number, kills, lost, times = 0, dict.fromkeys(moments, 0), [0], []
    while sum(kills.values()) < KILLS:
        name, number = f"run{number}", number + 1
        workdir, newest = place / name, 0
        while True:
            moment = rng.choice([*kills])
            done = lambda: forks.poll() is not None
            begin(name)
            if moment == "anywhere":
                end = time.monotonic() + rng.uniform(0, seconds)
                hit = lambda end=end: time.monotonic() > end
            elif moment == "in a save":
                hit = anything(workdir / "checkpoints", "*tmp*")
            elif moment == "after its last save":
                hit = lambda workdir=workdir: (workdir / "checkpoints" / str(STEPS)).is_dir()
            else:
                hit = anything(workdir, "report/*")
            while not (hit() or done()):
                time.sleep(0.0005)
            if done():
                break
            time.sleep(rng.choice([0, 0, 0.002, 0.01]))
            forks.kill()
            if forks.wait() == 0:
                break
            kills[moment] += 1
            at, there = logged(workdir), verified(workdir)
            assert there >= newest, "an older step than one that was there"
            lost.append(at - there)
            newest = there
            if moment in ("anywhere", "in a save") and at < STEPS and sum(kills.values()) % 3 == 0:
                times.append(recovered(forks, begin, name, workdir, at))
                if forks.poll() == 0:
                    break
                forks.kill()
                forks.wait()
            if sum(kills.values()) >= KILLS:
                begin(name)
                break
        assert forks.wait() == 0, (place / f"{name}.said").read_text()[-3000:]
        assert_same(bits(workdir), theirs)
        assert not list(workdir.rglob("*tmp*")) and (workdir / "report" / "index.html").is_file()
    for moment, count in kills.items():
        fault = "F2" if moment == "in a save" else "F1"
        figures(f"{fault} SIGKILL {moment}", count, count, max(lost), times if moment == "anywhere" else [])
    assert max(lost) <= 2 * EVERY, "an interval, and the steps while the save of the next one was being written"


def test_killed_while_data_are_prepared_the_same_data_come_out(place, forks, tmp_path):
    rng, kills = random.Random(1), 12 if LONG else 3
    lines = [json.dumps({"text": f"{n} {rng.random()} " * 300, "domain": "ab"[n % 2]}) for n in range(3000)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    data = lambda cache: tiny(tmp_path / "data.jsonl", tmp_path / cache, FIELDS).data
    whole = prepare(data("whole"), progress=False)
    fields = FIELDS | {"data.path": str(tmp_path / "data.jsonl"), "data.cache_dir": str(tmp_path / "cache")}
    config = config_file(tmp_path, place, place, fields)
    hits, cache = 0, tmp_path / "cache"
    while hits < kills:
        forks.start("data", "prepare", f"--config={config}", said=tmp_path / "said")
        under_way = anything(cache, "prepared/*.partial/*")
        while forks.poll() is None and not under_way():
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.5))
        forks.kill()
        hits += (code := forks.wait()) != 0
        if code == 0 or hits == kills:
            assert_same_data(whole, prepare(data("cache"), progress=False), cache)
            shutil.rmtree(cache)
    figures("F1 SIGKILL while data are prepared", hits, hits)


def assert_same_data(whole: Path, again: Path, cache: Path) -> None:
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert not list(cache.glob("prepared/*.partial"))
    for name in names:
        assert name.endswith(".array_record") or (whole / name).read_bytes() == (again / name).read_bytes(), name


@pytest.mark.parametrize("grace", [0.0, 0.3])
def test_grace_that_runs_out_is_a_kill(place, forks, begin, calm, grace):
    """SIGTERM, and SIGKILL before there was time to save."""
    name, workdir = f"grace{grace}", place / f"grace{grace}"
    begin(name)
    while logged(workdir) < 20:
        time.sleep(0.002)
    forks.kill(signal.SIGTERM)
    time.sleep(grace)
    forks.kill()
    code, at = forks.wait(), logged(workdir)
    assert code in (-signal.SIGKILL, EXIT_PREEMPTED) and verified(workdir) > 0
    lost = at - verified(workdir)
    begin(name)
    assert forks.wait() == 0
    assert_same(bits(workdir), calm[0])
    figures("F4 SIGTERM, then SIGKILL", 1, 1, lost)


def test_asked_to_stop_it_saves_and_goes_on_exactly(place, forks, begin, calm):
    """At moments from before anything is imported to the end; before the first step there is nothing to save."""
    rng, signals = random.Random(2), 10 if LONG else 3
    number, lost, times = 0, [0], []
    while len(times) < signals:
        name, number = f"asked{number}", number + 1
        workdir, said = place / name, place / f"{name}.said"
        begin(name)
        while forks.poll() is None and len(times) < signals:
            end = time.monotonic() + rng.uniform(0, calm[1] / 2)
            while forks.poll() is None and time.monotonic() < end:
                time.sleep(0.002)
            began = time.monotonic()
            forks.kill(signal.SIGTERM)
            code = forks.wait(60)
            if code == 0:  # it was done already
                break
            assert code in (EXIT_PREEMPTED, -signal.SIGTERM), said.read_text()
            times.append(time.monotonic() - began)
            if said.read_text().endswith("after saving; the same command continues it\n"):
                lost.append(logged(workdir) - verified(workdir))
            begin(name)
        assert forks.wait() == 0, said.read_text()
        assert_same(bits(workdir), calm[0])
    assert max(lost) == 0
    figures("F3 SIGTERM", len(times), len(times), 0, times)


def test_there_is_a_whole_step_at_every_instant(place, forks, begin, calm):
    """Two are kept of many; whoever looks, at whatever moment, finds one that is whole, and never an older one."""
    name, workdir, steps = "kept", place / "kept", 200 if LONG else 40
    begin(name, f"--config.train.steps={steps}", "--config.checkpoint.every_steps=1", "--config.train.trackers=")
    looks, newest = 0, 0
    while forks.poll() is None:
        there = verified(workdir)
        if not newest and not there:
            time.sleep(0.001)
            continue
        if there < newest:  # deleted between the list and the look
            there = verified(workdir)
        assert there >= newest > 0 or not newest, (there, newest)
        looks, newest = looks + 1, there
    assert forks.wait() == 0 and newest == steps and looks > 20
    figures("F24 a whole step at every instant (looks)", looks, looks)


def test_a_lock_of_a_process_that_is_gone_is_no_lock(place, forks, begin, calm):
    """Of this host, of another one, or of a process that lives and is none of ours: the file alone blocks nothing."""
    name, workdir = "lock", place / "lock"
    shutil.copytree(place / "calm", workdir)
    (workdir / "summary.json").unlink()
    for content in (b"1", b"4242 on another.host", b"\xff\0"):
        (workdir / ".lock").write_bytes(content)
        begin(name)
        assert forks.wait() == 0, (place / "lock.said").read_text()
        (workdir / "summary.json").unlink()
    figures("F21 a stale lock", 3, 3, 0)


def test_of_two_runs_in_a_directory_the_second_is_refused(place, forks, begin, calm):
    name, workdir = "both", place / "both"
    begin(name, "--config.train.steps=100000")
    while logged(workdir) < 10:
        time.sleep(0.01)
    second = Forks()
    try:
        line = ("train", f"--config={place / 'tiny.py'}", f"--workdir={workdir}", "--resume=force")
        began = time.monotonic()
        second.start(*line, said=place / "second.said")
        assert second.wait(60) == 2
        took = time.monotonic() - began
        assert f"process {forks.pid} is training here" in (place / "second.said").read_text()
    finally:
        second.close()
    before = logged(workdir)
    while logged(workdir) <= before:
        time.sleep(0.01)
    forks.kill()
    forks.wait()
    figures("F21 a second run in a directory (seconds to be refused)", 1, 1, 0, [took])
