"""Checkpoints whose files were changed, cut off or lost: seen before anything is read of them, and never read."""

import gc
import itertools
import json
import random
import shutil
import signal
import subprocess
import threading
import time

import jax
import numpy as np
import pytest
from runs import command, config_file, figures, rows, tiny, without_times, write_text

from frugalmoe import sharding
from frugalmoe.cli import main
from frugalmoe.config.checks import check_devices
from frugalmoe.errors import UserError
from frugalmoe.train import checkpoint, checksums, saved
from frugalmoe.train.loop import train
from frugalmoe.train.step import abstract
from frugalmoe.train.weights import load_checkpoint

pytestmark = pytest.mark.whole

FIELDS = {
    "train.steps": 4,
    "checkpoint.every_steps": 2,
    "optim.warmup_steps": 1,
    "optim.schedule": "constant",
    "model.num_layers": 2,
    "model.moe.router": "sigmoid_bias",
    "train.eval_rows": 8,
    "model.vocab_size": 320,
}
HARMS = {
    "a flipped bit": lambda b, rng: _flipped(b, rng.randrange(8 * len(b))),
    "half": lambda b, rng: b[: len(b) // 2],
    "all but a byte": lambda b, rng: b[:-1],
    "empty": lambda b, rng: b"",
    "a byte more": lambda b, rng: b + b"\0",
    "zeros in its place": lambda b, rng: bytes(len(b)),
    "gone": lambda b, rng: None,
}

WHAT = {"half": "cut off", "all but a byte": "cut off", "empty": "cut off", "gone": "missing"}

# Orbax closes the loop of reads that have not all failed yet.
of_failing_reads = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def _flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


class Heard:
    """What a run says, kept."""

    def __init__(self):
        self.said = []

    def __enter__(self):
        return self

    def __exit__(self, *error): ...

    def say(self, text):
        self.said.append(text)

    def update(self, *numbers): ...


def trained(config, workdir, **flags) -> list[str]:
    heard = Heard()
    train(config, workdir, progress=lambda *_: heard, **flags)
    return heard.said


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("damaged")
    write_text(root / "text")
    return root


@pytest.fixture(scope="module")
def make(place):
    return lambda **fields: tiny(
        place / "text", place / "cache", FIELDS | {k.replace("__", "."): v for k, v in fields.items()}
    )


@pytest.fixture(scope="module")
def good(place, make):
    """A run of 4 steps with the checkpoints 2 and 4; it is not harmed."""
    trained(make(), place / "good")
    return place / "good"


@pytest.fixture
def run(good, tmp_path):
    shutil.copytree(good, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def read(make):
    """The newest state that can be read as bytes, with its step and what was passed over."""
    config = make()
    mesh = sharding.make_mesh(check_devices(config, 1))

    def read(run):
        with jax.set_mesh(mesh), checkpoint.open_manager(run, config.checkpoint) as manager:
            state, step, skipped = checkpoint.restore_newest(manager, abstract(config))
            return [leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(state))], step, skipped

    return read


def files(run, step: int) -> list:
    return [path for path in sorted(saved.place(run, step).rglob("*")) if path.is_file()]


def harm(path, how: str, seed: object = 0) -> None:
    content = HARMS[how](path.read_bytes(), random.Random(f"{seed} {path.name}"))
    path.unlink() if content is None else path.write_bytes(content)


def largest(run, step: int):
    return max(files(run, step), key=lambda path: path.stat().st_size)


# ---------------------------------------------------------------- what is seen


def test_each_file_of_a_step_has_its_checksum(good):
    for step in (2, 4):
        there = {str(path.relative_to(saved.place(good, step))) for path in files(good, step)}
        assert checksums._read(saved.place(good, step) / checksums.NAME).keys() == there - {checksums.NAME}
        assert saved.fault(good, step) == "" == saved.fault(good, step, quick=True)


def test_each_of_hundreds_of_flipped_bits_is_seen(run):
    """Drawn over all bits of a step, so that most are in its arrays; 100 in the small files, one byte of which counts
    as much.
    """
    rng, paths = random.Random(0), files(run, 4)
    of_all = [rng.choices(paths, [path.stat().st_size for path in paths])[0] for _ in range(300)]
    for path in (*of_all, *rng.choices(paths, k=100)):
        content = path.read_bytes()
        path.write_bytes(_flipped(content, rng.randrange(8 * len(content))))
        assert saved.fault(run, 4) == f"{path.relative_to(saved.place(run, 4))}: changed"
        path.write_bytes(content)
    assert saved.fault(run, 4) == ""
    figures("F7 a flipped bit in any file of a checkpoint", 400, 400)


@pytest.mark.parametrize("how", HARMS)
def test_each_harm_to_each_file_is_seen_and_named(run, how):
    for path in files(run, 4):
        content = path.read_bytes()
        harm(path, how)
        said, name = saved.fault(run, 4), str(path.relative_to(saved.place(run, 4)))
        what = WHAT.get(how, "changed")
        if name != checksums.NAME:
            assert said == f"{name}: {what}"
        elif how != "gone":  # then it is as if an older version had saved it, with the values that it has
            assert said == f"{name}: changed"
        path.write_bytes(content)
    figures(f"F6 any file of a checkpoint: {how}", len(files(run, 4)), len(files(run, 4)))


def test_what_the_checksums_file_may_not_be(run):
    path = saved.place(run, 4) / checksums.NAME
    whole = path.read_bytes()
    others = (b"{}", b"[]", b"3", b"null", b'{"files": {}}', b'{"files": []}', b"\xff", b"[" * 100_000, whole * 2)
    for content in others:
        path.write_bytes(content)
        assert saved.fault(run, 4) == f"{checksums.NAME}: changed"
    path.write_bytes(checksums._content({"../../2/step/_METADATA": (3, "x")}))
    assert saved.fault(run, 4) == f"{checksums.NAME}: changed", "a path out of the step"
    path.unlink()
    path.symlink_to(saved.place(run, 2) / checksums.NAME)
    assert saved.fault(run, 4) == f"{checksums.NAME}: changed"
    path.unlink()
    path.mkdir()
    assert saved.fault(run, 4) == f"{checksums.NAME}: changed"


# ---------------------------------------------------------------- what is read


def test_a_damaged_step_gives_way_to_the_one_before(run, read):
    """A file of each kind, each harm in turn; what is read is what was saved, or nothing."""
    newest, before = read(run), None
    assert newest[1:] == (4, [])
    step = saved.place(run, 4)
    kinds = [largest(run, 4), step / checksums.NAME, step / "_CHECKPOINT_METADATA", step / "params/_METADATA"]
    kinds += [step / "step/manifest.ocdbt", next((step / "opt_state/ocdbt.process_0/d").iterdir())]
    for path, how in zip(kinds * 2, [*HARMS, *HARMS], strict=False):
        content = path.read_bytes()
        harm(path, how)
        state, found, skipped = read(run)
        before = before or state
        assert found == 2 and state == before != newest[0] and [each.step for each in skipped] == [4]
        path.write_bytes(content)
    assert read(run) == newest


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a flipped bit", "half", "empty", "gone"])
def test_no_harm_to_any_file_is_read(run, read, how):
    newest = read(run)
    shutil.copytree(saved.place(run, 4), saved.place(run, 4).with_name("kept"))
    shutil.rmtree(saved.place(run, 4))
    before = read(run)
    saved.place(run, 4).with_name("kept").rename(saved.place(run, 4))
    for path in files(run, 4):
        content = path.read_bytes()
        harm(path, how)
        state, step, _ = read(run)
        assert (state, step) == (newest[:2] if step == 4 else before[:2]), path
        assert step == 2 or (how, path.name) == ("gone", checksums.NAME)
        path.write_bytes(content)


def without_checksums(run, step: int) -> None:
    """As older versions saved it."""
    (saved.place(run, step) / checksums.NAME).unlink()


@of_failing_reads
def test_steps_without_checksums_are_read_and_it_is_said(run, read, capsys):
    newest = read(run)
    without_checksums(run, 4)
    assert read(run) == newest
    assert load_checkpoint(run).step == 4
    assert "checkpoints/4: carries no checksums" in capsys.readouterr().err
    for name in ("params/_METADATA", "params/manifest.ocdbt", "step/_METADATA"):
        path = saved.place(run, 4) / name
        content = path.read_bytes()
        for how in ("half", "empty"):
            harm(path, how)
            _, step, skipped = read(run)
            assert step == 2 and skipped[0].step == 4 and skipped[0].why.startswith("cannot be read: ")
            assert "tensorstore_spec" not in skipped[0].why and len(skipped[0].why) < 500
        path.write_bytes(content)


STRAY = ("16.bak", "x", "-3", "08", "4.damaged", "７")  # names that mean no step


def junk(folder) -> dict[int, str]:
    """Puts what is no checkpoint among checkpoints; the steps that it seems to be, and what it is."""
    (folder / "99").mkdir()
    (folder / "98").write_text("")
    (folder / "97").symlink_to("4")
    (folder / "96").symlink_to("nowhere")
    shutil.copytree(folder / "4", folder / "95")
    shutil.rmtree(folder / "95" / "params")
    shutil.copytree(folder / "4", folder / "94")
    (folder / "94" / "params" / "_METADATA").write_text('{"tree_metadata": {')
    shutil.copytree(folder / "4", folder / "93")
    shutil.rmtree(folder / "93" / "opt_state")
    for name in STRAY:
        (folder / name).mkdir()
    return {
        99: "params, step: missing",
        98: "is no folder",
        97: "is a symbolic link",
        96: "is a symbolic link",
        95: "params: missing",
        94: "params/_METADATA: cut off",
        93: "opt_state/_METADATA: missing, and 13 other files",
    }


def test_junk_among_checkpoints_is_passed_over_with_a_line_each(run, read, capsys):
    newest = read(run)
    known = junk(run / "checkpoints")
    state, step, skipped = read(run)
    assert (state, step) == newest[:2] and [each.step for each in skipped] == list(known)
    for each in skipped:
        assert each.why.partition(", and")[0] == known[each.step].partition(", and")[0]
    assert saved.saved_steps(run) == [2, 4, 93, 94]  # those two have the form of one
    assert main(["generate", str(run), "--prompt=x", "--max-tokens=1"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in said] == [f"{run}/checkpoints/{step}" for step in known]
    assert all(line.endswith("; step 4 is taken") for line in said)
    figures("F8 junk among checkpoints", len(known) + len(STRAY), len(known) + len(STRAY), 0)


# ---------------------------------------------------------------- who reads


@pytest.mark.parametrize("argv", [["generate", "--prompt=x", "--max-tokens=1"], ["evaluate"], ["trace", "--tokens=9"]])
def test_readers_pass_a_damaged_step_over_and_leave_it(run, argv, capsys):
    path = largest(run, 4)
    harm(path, "a flipped bit")
    name = f"checkpoints/4: a damaged checkpoint ({path.relative_to(saved.place(run, 4))}: changed)"
    assert main([argv[0], str(run), *argv[1:]]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and name in shown.err
    assert path.is_file() and saved.entries(run) == [2, 4]
    if argv[0] == "trace":
        assert [each.name for each in (run / "trace").iterdir()] == ["step_00000002.npz"]
        return
    assert main([argv[0], f"{run}@4", *argv[1:]]) == 2, "a step that is named"
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and name in shown.err and not shown.out
    harm(largest(run, 2), "gone")
    assert main([argv[0], str(run), *argv[1:]]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and "no checkpoint is whole and finite (4: " in shown.err


@pytest.mark.slow
@of_failing_reads
def test_a_reader_beside_a_run_that_saves_and_deletes_finds_none_damaged(run, read):
    """As a run that keeps two: what is gone while it is read is no damaged one, and no older step is taken."""
    newest, before, done = read(run)[0], 0, threading.Event()

    def go_on():
        for step in itertools.count(5):
            made = saved.place(run, step).with_name(f"{step}{saved.UNFINISHED}-7")
            shutil.copytree(saved.place(run, step - 1), made)
            made.rename(saved.place(run, step))
            saved.delete(run, saved.entries(run)[0])
            if done.wait(0.3):
                return

    writer = threading.Thread(target=go_on)
    writer.start()
    try:
        for _ in range(5):
            state, step, skipped = read(run)
            assert (state, skipped) == (newest, []) and step >= before
            before = step
            time.sleep(0.1)
    finally:
        done.set()
        writer.join()
        gc.collect()  # what reads that failed leave
    assert before > 4


def test_what_is_converted_and_what_a_run_begins_with_is_looked_at_too(run, make, tmp_path, capsys):
    from frugalmoe.train.origin import Origin

    harm(largest(run, 4), "a flipped bit")
    said = trained(make(train__steps=2), tmp_path / "new", origin=Origin(run))
    assert "checkpoints/4: a damaged checkpoint" in said[0] and "; step 2 is taken" in said[0]
    assert "parameters of step 2, with routers' state" in said[1]
    with pytest.raises(UserError, match=r"^--from=.*@4: .*checkpoints/4: a damaged checkpoint \(.*: changed\)$"):
        train(make(train__steps=2), tmp_path / "named", origin=Origin(run, 4))
    assert not (tmp_path / "named" / "config.json").exists()
    assert main(["convert", "to-hf", f"{run}@4", str(tmp_path / "hf")]) == 2
    assert "checkpoints/4: a damaged checkpoint" in capsys.readouterr().err and not (tmp_path / "hf").exists()


# ---------------------------------------------------------------- a run that goes on


@pytest.fixture(scope="module")
def six(place, make):
    """The run that nothing happens to."""
    trained(make(train__steps=6), place / "six")
    return place / "six"


def same_end(run, other, read) -> bool:
    """Whether two runs end with the same bits, and logged the same."""
    logs = [(without_times(rows(each)), rows(each, "expert_load.jsonl")) for each in (run, other)]
    return read(run) == read(other) and logs[0] == logs[1]


@pytest.mark.slow
def test_a_run_goes_on_from_the_step_before_and_ends_with_the_same_bits(run, six, make, read):
    path = largest(run, 4)
    harm(path, "a flipped bit")
    changed = path.read_bytes()
    known = junk(run / "checkpoints")
    said = trained(make(train__steps=6), run, resume="force")
    for step in (4, *known):
        (line,) = [line for line in said if f"checkpoints/{step}: " in line]
        assert f"; step 2 is taken; is {step}.damaged" in line
        kept = [json.loads(row) for row in (run / "events.jsonl").read_text().splitlines()]
        assert [row for row in kept if row["what"] == line and (row["kind"], row["step"]) == ("checkpoint", 2)]
    assert saved.saved_steps(run) == [4, 6] == saved.entries(run), "step 4 was saved anew"
    aside = run / "checkpoints" / "4.damaged.2" / path.relative_to(saved.place(run, 4))
    assert aside.read_bytes() == changed, "moved, not deleted; 4.damaged was there"
    assert same_end(run, six, read)
    trained(make(), run, fresh=True)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["-3", "08", "16.bak", "2", "4", "x", "７"]


def test_a_run_without_a_good_step_does_not_begin_anew(run, make):
    for step in (2, 4):
        harm(largest(run, step), "half")
    before = sorted(run.rglob("*"))
    with pytest.raises(UserError, match=r"no checkpoint is whole and finite \(4: .*; 2: .*\), so there is nothing"):
        train(make(train__steps=6), run, resume="force")
    assert sorted(run.rglob("*")) == before


@pytest.mark.slow
def test_a_kill_while_it_saves_leaves_whole_steps_only(place, make, read, tmp_path):
    """Real processes, each killed while a step is being saved: its folder has another name until it is whole."""
    fields = FIELDS | {"train.steps": 16, "checkpoint.every_steps": 1, "train.log_every": 1}
    config = config_file(tmp_path, place / "text", place / "cache", fields)
    run = tmp_path / "run"
    argv = command("train", f"--config={config}", f"--workdir={run}")
    rng, killed = random.Random(1), 0
    for _ in range(3):
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        first = max(saved.entries(run), default=0)
        while process.poll() is None and max(saved.entries(run), default=0) < first + 2:
            time.sleep(0.005)
        time.sleep(rng.random() / 4)
        while process.poll() is None and not list((run / "checkpoints").glob("*.orbax-checkpoint-tmp*")):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        assert saved.entries(run) and not any(saved.fault(run, step) for step in saved.entries(run))
        assert all(checksums.are_there(saved.place(run, step)) for step in saved.entries(run))
    assert killed == 3
    assert subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    trained(make(**{k.replace(".", "__"): v for k, v in fields.items()}), tmp_path / "whole")
    assert same_end(run, tmp_path / "whole", read)
    assert np.array_equal(*(sorted(saved.entries(each)) for each in (run, tmp_path / "whole")))
