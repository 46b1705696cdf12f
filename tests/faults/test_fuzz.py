"""The short form of `fuzz`: some cases of each parser, and the guard itself, which must see what it is there for."""

import gc
import mmap
import os
import pickle
import subprocess
import time
from pathlib import Path

import fuzz
import numpy as np
import pytest
from fuzz import PARSERS, Bench, Finding, Parser, case, prepared, trials
from runs import figures

CASES = 25  # of each parser, times its share

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    prepared(root)
    return root


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_what_is_read_is_accepted_or_refused_in_one_line(parser, place, tmp_path):
    said = trials(Bench(parser, tmp_path), CASES * parser.share)
    assert len(said) >= CASES * parser.share // 2  # hypothesis leaves out what it has had
    assert any(said) or parser.name == "checksums of a checkpoint"  # whose faults are returned
    if parser.name in ("overrides of a config", "a config file"):
        figures("F23 fuzzed: overrides and files of configs", len(said), len(said))
    else:
        figures("F22 fuzzed: all other parsers of outside bytes", len(said), len(said))


def _write_outside(folder: Path, changed: list) -> None:
    (folder.parent / "beside").write_text("x")


def _load_pickle(folder: Path, changed: list) -> None:
    pickle.loads(b"cbuiltins\nlist\n.")


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (_write_outside, "writes .*beside"),
        (_load_pickle, "pickle.find_class"),
        (lambda folder, changed: (folder / "own").write_text("x"), "writes .*own"),
        (lambda folder, changed: subprocess.run(["true"]), "subprocess.Popen"),
        (lambda folder, changed: os.rename(folder / "a", folder.parent / "b"), "writes"),
        (lambda folder, changed: {}["x"], "KeyError"),
        (lambda folder, changed: _loop(), "takes more than 0.2 s"),
        (lambda folder, changed: time.sleep(5), "takes more than 0.2 s"),
    ],
)
def test_the_guard_sees(read, said, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    monkeypatch.setattr(fuzz, "WAIT", 0.5)
    monkeypatch.setattr(fuzz, "MEMORY", 1 << 26)
    (tmp_path / "case").mkdir()
    (tmp_path / "case/a").write_text("")
    with pytest.raises(Finding, match=said):
        case(Parser("own", lambda folder: {}, read), tmp_path / "case")


def test_the_guard_sees_memory(tmp_path, monkeypatch):
    """Eight times as much as is allowed: what else the process gives back meanwhile does not hide it. Where memory is
    short, pages of files that the system takes away count too.
    """
    monkeypatch.setattr(fuzz, "MEMORY", 1 << 26)
    gc.collect()
    with pytest.raises(Finding, match=r"takes (0\.[4-9]|1\.\d) GB"):
        case(Parser("own", lambda folder: {}, lambda folder, changed: np.ones(1 << 26)), tmp_path)


def test_memory_that_the_system_takes_away_makes_no_room(tmp_path, monkeypatch):
    """The pages of a file that the process had read are gone after the case, as where memory is short."""
    (tmp_path / "file").write_bytes(bytes(1 << 28))
    monkeypatch.setattr(fuzz, "MEMORY", 1 << 27)
    with (tmp_path / "file").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        sum(mapped[:: mmap.PAGESIZE])  # now they are the process's

        def read(folder: Path, changed: list) -> None:
            mapped.madvise(mmap.MADV_DONTNEED)
            np.ones(1 << 25)

        with pytest.raises(Finding, match=r"takes (0\.[2-9]|1\.\d) GB"):
            case(Parser("own", lambda folder: {}, read), tmp_path)


def _loop() -> None:
    while True:
        pass


def test_an_error_that_is_no_line_is_a_finding(tmp_path):
    class Of(ValueError):
        pass

    def read(folder: Path, changed: list) -> None:
        raise Of("a\nb")

    with pytest.raises(Finding, match="several lines"):
        case(Parser("own", lambda folder: {}, read, (Of,)), tmp_path)
