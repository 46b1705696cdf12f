"""Disks, checkpoints and data that fail under real commands, which a user starts again as they were."""

import random
import shutil
import time

import pytest
from faulted import EVERY, FIELDS, LONG, STEPS, assert_same, bits, events, logged, saved, small_disk
from runs import config_file, figures, write_text

pytestmark = pytest.mark.slow
HARMS = 12 if LONG else 3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("commands")
    write_text(root / "text")
    config_file(root, root / "text", root / "cache", FIELDS | {"checkpoint.keep_last": 3})
    return root


@pytest.fixture(scope="module")
def train(place, forks):
    def train(workdir, *flags: object, code: int = 0) -> str:
        """Trains to the end; returns what this start said."""
        said = place / "said"
        said.unlink(missing_ok=True)
        forks.start("train", f"--config={place / 'tiny.py'}", f"--workdir={workdir}", *flags, said=said)
        assert forks.wait() == code, said.read_text()[-3000:]
        return said.read_text()

    return train


@pytest.fixture(scope="module")
def calm(place, train):
    train(place / "calm")
    return place / "calm"


def files(workdir, step: int) -> list:
    return sorted(path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file())


def test_a_harmed_checkpoint_gives_way_to_the_one_before(place, train, calm, tmp_path):
    """Any file of the newest one, in any of four ways: named, moved aside, and the end is that of the calm run."""
    rng, ways = random.Random(0), ("a flipped bit", "half", "empty", "gone")
    for number in range(HARMS):
        workdir, way = tmp_path / f"run{number}", ways[number % len(ways)]
        shutil.copytree(calm, workdir)
        (workdir / "summary.json").unlink()
        path = rng.choice([path for path in files(workdir, STEPS) if path.stat().st_size > 1])
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        harmed = {"a flipped bit": content, "half": content[: len(content) // 2], "empty": b""}
        path.unlink() if way == "gone" else path.write_bytes(harmed[way])
        said = train(workdir)
        assert f"checkpoints/{STEPS}: " in said and f"step {STEPS - EVERY} is taken" in said, said
        assert (workdir / "checkpoints" / f"{STEPS}.damaged").is_dir()
        assert_same(bits(workdir), bits(calm))
    figures("F6 a command whose newest checkpoint is harmed in a file", HARMS, HARMS, EVERY)


def test_a_command_goes_on_when_there_is_space_again(place, forks, calm):
    """Full while it trains, and free again while it waits for space at its end."""
    with small_disk(16) as disk:
        workdir, said = disk.path / "run", place / "full"
        forks.start("train", f"--config={place / 'tiny.py'}", f"--workdir={workdir}", said=said)
        while logged(workdir) < EVERY + 1 or not saved(workdir):
            assert forks.poll() is None, said.read_text()
            time.sleep(0.001)
        disk.fill()
        while "the run waits up to" not in said.read_text():
            assert forks.poll() is None, said.read_text()
            time.sleep(0.01)
        disk.free()
        assert forks.wait() == 0, said.read_text()
        assert "No space left on device" in said.read_text() and events(workdir, "checkpoint")
        assert_same(bits(workdir), bits(calm))
    figures("F5 disk full under a command, and free again at its end", 1, 1, 0)


def test_a_command_says_that_its_data_changed(place, train, calm, tmp_path):
    """One word of one text: refused, and told where it is forced."""
    workdir, text = tmp_path / "run", place / "text" / "doc00.txt"
    shutil.copytree(calm, workdir)
    (workdir / "summary.json").unlink()
    whole = text.read_text()
    text.write_text(whole.replace("x1", "y1"))
    try:
        line = train(workdir, code=2)
        assert line.count("\n") == 1 and "the run's data changed" in line, line
        said = train(workdir, "--resume=force", "--config.train.steps=14")
        assert "the run's data changed" in said and events(workdir, "data"), said
    finally:
        text.write_text(whole)
    figures("F10 a command with other data than before", 2, 2, 0)


def test_a_command_names_a_shard_that_is_cut_off(place, train, calm, tmp_path):
    """As one that is empty; nothing is saved."""
    shard = min((place / "cache").glob("prepared/*/*.array_record"))
    shutil.copytree(shard.parent, tmp_path / "prepared")
    (own,) = (tmp_path / "prepared").glob("*.array_record")
    content = own.read_bytes()
    for size in (len(content) // 2, 0):
        own.write_bytes(content[:size])
        line = train(tmp_path / "run", f"--config.data.path={tmp_path / 'prepared'}", code=2)
        assert line.count("\n") == 1 and f"{own}: has " in line, line
        assert not saved(tmp_path / "run")
    figures("F9 a command whose shard of data is cut off", 2, 2)
