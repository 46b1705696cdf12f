"""Gradients that are not finite, noise, and kills amid the ways back: real commands, which end with the bits of one
that read the same batches in the same order and met no fault.
"""

import json
import random
import signal
import time

import pytest
from faulted import LONG, bits, logged, recovered
from runs import config_file, figures, rows, write_text
from test_guard import FIELDS, TROUBLE, WIDE

pytestmark = pytest.mark.slow
STEPS, EVERY = FIELDS["train.steps"], FIELDS["checkpoint.every_steps"]
KILLS = 12 if LONG else 3
# What the file of a config does to the process that reads it, as SPEC says.
FAULTS = """

import os, signal
import jax, numpy as np
import frugalmoe.train.loop
from frugalmoe import sharding
from frugalmoe.data.batches import Dataset
from frugalmoe.train import rollbacks
from frugalmoe.train.program import Program

whole, step, add = Dataset.batch, Program.step, rollbacks.add


def batch(self, position, rows=None, ramp=None):
    order = SPEC.get("order", [])
    place = order[position] if position < len(order) else position + (order[-1] + 1 - len(order) if order else 0)
    found = whole(self, place, rows, ramp)
    if place not in SPEC.get("noise", []):
        return found
    drawn = np.random.default_rng(place).integers(200, 256, (2, *found.tokens_BT.shape)).astype(np.int32)
    return found._replace(tokens_BT=drawn[0], targets_BT=drawn[1] * found.loss_mask_BT)


def stepped(self, batch, again=False):
    tried, known, known_again = self.runs[0].queue.tried, self.knobs, self.knobs_again
    if [tried.position, tried.again] in SPEC.get("broken", []) or tried.position >= SPEC.get("broken_from", 10**9):
        nan = lambda a: sharding.put(self.runs[0].mesh, np.full(a.shape, np.nan, np.float32), "." * a.ndim)
        with jax.transfer_guard("allow"):
            losses = jax.tree.map(nan, known.losses)
        self.knobs, self.knobs_again = known._replace(losses=losses), known_again._replace(losses=losses)
    report = step(self, batch, again)
    self.knobs, self.knobs_again = known, known_again
    return report


def added(*given):
    add(*given)
    if SPEC.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)


Dataset.batch, Program.step, rollbacks.add = batch, stepped, added
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("guarded")
    write_text(root / "text")
    return root


@pytest.fixture(scope="module")
def begin(place, forks):
    def begin(workdir: str, *flags: str, **spec: object) -> None:
        """Starts a run with the faults that `spec` names."""
        folder = place / "configs" / f"{abs(hash(json.dumps(spec)))}"
        folder.mkdir(parents=True, exist_ok=True)
        file = config_file(folder, place / "text", place / "cache", FIELDS)
        file.write_text(f"{file.read_text()}\n\nSPEC = {spec!r}\n{FAULTS}")
        forks.start("train", f"--config={file}", f"--workdir={place / workdir}", *flags, said=place / f"{workdir}.said")

    return begin


@pytest.fixture(scope="module")
def run(place, forks, begin):
    def run(workdir: str, *flags: str, code: int = 0, **spec: object) -> str:
        """Trains to the end; returns what it said."""
        begin(workdir, *flags, **spec)
        assert forks.wait() == code, (place / f"{workdir}.said").read_text()[-3000:]
        return (place / f"{workdir}.said").read_text()

    return run


def trained(workdir) -> dict:
    """What training came to: without the guard's memory and the place in the data."""
    found = {name: value for name, value in bits(workdir).items() if name.startswith(("params", "opt_state", "router"))}
    assert {name.partition("[")[0] for name in found} == {"params", "opt_state", "router_state"}
    metrics = [{k: v for k, v in row.items() if k != "data/position"} for row in bits(workdir)["metrics.jsonl"]]
    return found | {"metrics": metrics}


@pytest.fixture(scope="module")
def as_if(place, run):
    def as_if(workdir: str, order: list[int]) -> None:
        """Whether a run ended as one that skips nothing, and reads the batches of these positions."""
        run(f"{workdir}.order", "--config.guard.policy=stop", order=order)
        ours, theirs = trained(place / workdir), trained(place / f"{workdir}.order")
        assert ours.keys() == theirs.keys() and not [name for name in ours if ours[name] != theirs[name]]

    return as_if


def kinds(workdir) -> list[str]:
    return [row["kind"] for row in rows(workdir, "events.jsonl")]


def test_a_gradient_that_is_once_not_finite_comes_again(place, run, as_if):
    run("once", broken=[[6, False]])
    assert kinds(place / "once") == ["skipped", "retried"]
    as_if("once", [*range(6), 7, 8, 9, 6, *range(10, 24)])
    figures("F11 a gradient that is not finite, once", 1, 1, 1)


def test_a_batch_that_is_never_finite_is_left_out(place, run, as_if):
    run("twice", broken=[[6, False], [6, True]])
    assert kinds(place / "twice") == ["skipped", "dropped"]
    as_if("twice", [*range(6), *range(7, 25)])
    figures("F11 a batch whose gradient is never finite", 1, 1, 2)


def test_five_in_a_row_send_the_run_back(place, run, as_if):
    """To the checkpoint of step 8; the batches from there to the last of them are left out."""
    patience = ("--config.guard.last_patience=5", "--config.guard.patience=50")
    run("five", *patience, broken=[[position, False] for position in range(10, 15)])
    assert kinds(place / "five") == [*["skipped"] * 5, "rolled_back"]
    (back,) = rows(place / "five", "rollbacks.jsonl")
    assert (back["from_step"], back["to_step"], back["position"]) == (10, 8, 15)
    as_if("five", [*range(8), *range(15, 31)])
    figures("F11 five gradients in a row that are not finite", 1, 1, 5 + back["from_step"] - back["to_step"])


def test_a_run_that_is_never_finite_again_ends_and_what_was_saved_stays(place, run):
    """With one line; as it ends it has gone back twice."""
    said = run("never", code=2, broken_from=10).splitlines()[-1]
    assert said.startswith("frugalmoe: trouble since step 8 ") and "guard.rollbacks=2" in said, said
    assert len(rows(place / "never", "rollbacks.jsonl")) == 2 and bits(place / "never")["step"] == 8
    run("calm of never", "--config.guard.policy=stop", "--config.train.steps=8")
    ours, theirs = trained(place / "never"), trained(place / "calm of never")
    assert not [name for name in ours if name != "metrics" and ours[name] != theirs[name]]
    figures("F11 a gradient that is never finite again: ended, with a whole checkpoint", 1, 1)


def test_a_batch_of_noise_does_no_harm(place, run, as_if):
    run("narrow", noise=[16])
    assert kinds(place / "narrow") == ["skipped", "dropped"]
    as_if("narrow", [*range(16), *range(17, 25)])
    figures("F12 a narrow spike: one batch of noise", 1, 1, 2)


def test_noise_that_stays_sends_the_run_back(place, run, as_if):
    run("wide", noise=sorted(WIDE))
    assert kinds(place / "wide") == TROUBLE
    (back,) = rows(place / "wide", "rollbacks.jsonl")
    as_if("wide", [*range(back["to_step"]), *range(23, 35)])
    tried = TROUBLE.count("skipped") + TROUBLE.count("dropped")
    figures("F12 a wide spike: nine batches of noise", 1, 1, tried + back["from_step"] - back["to_step"])


def test_killed_amid_its_ways_back_it_ends_as_if_it_had_not_been(place, forks, begin, run):
    """While a batch waits, between the record of a rollback and the rollback, just after it, and later."""
    fault = {"broken": [[6, False]], "noise": sorted(WIDE)}
    run("calm", **fault)
    theirs, rng = bits(place / "calm"), random.Random(0)
    assert "rolled_back" in kinds(place / "calm") and (place / "calm" / "rollbacks.jsonl").is_file()
    number, kills, lost, times = 0, 0, [0], []
    while kills < KILLS:
        name, number = f"killed{number}", number + 1
        workdir = place / name
        there = lambda file, workdir=workdir: (workdir / file).is_file()
        moments = {
            "waiting": lambda there=there: there("events.jsonl"),
            "going back": lambda: False,  # it kills itself
            "gone back": lambda there=there: there("rollbacks.jsonl"),
            "after": lambda there=there, workdir=workdir: there("rollbacks.jsonl") and logged(workdir) > 18,
        }
        for moment, hit in moments.items():
            begin(name, kill=moment == "going back", **fault)
            while not hit() and forks.poll() is None:
                time.sleep(0.0005)
            if forks.poll() is None:
                time.sleep(rng.choice([0, 0.002, 0.02]))
                forks.kill()
            if forks.wait() == 0:
                break
            assert forks.poll() == -signal.SIGKILL, (place / f"{name}.said").read_text()[-3000:]
            kills, at = kills + 1, logged(workdir)
            saved = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
            lost.append(at - max(saved, default=0))
            if moment == "gone back":
                times.append(recovered(forks, lambda name: begin(name, **fault), name, workdir, at))
                forks.kill()
                forks.wait()
        run(name, **fault)
        ours = bits(workdir)
        assert ours.keys() == theirs.keys() and not [key for key in ours if ours[key] != theirs[key]]
        assert rows(workdir, "rollbacks.jsonl") == rows(place / "calm", "rollbacks.jsonl")
    figures("F13 SIGKILL while batches wait, amid a rollback, and after it", kills, kills, max(lost), times)
    assert max(lost) <= 2 * EVERY
