"""`frugalmoe checkpoints`: what a run has kept, whether it is whole, fewer of it, and runs made of it."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import rows, tiny, write_text
from test_damaged import Heard, harm, largest

from frugalmoe import sharding
from frugalmoe.cli import main
from frugalmoe.config.checks import check_devices
from frugalmoe.convert import from_run
from frugalmoe.files import read_json
from frugalmoe.routing import strategies
from frugalmoe.train import checkpoint, checksums, kept, rundir, saved
from frugalmoe.train.loop import train
from frugalmoe.train.step import abstract
from frugalmoe.train.weights import load_checkpoint

pytestmark = pytest.mark.whole

FIELDS = {
    "train.steps": 5,
    "train.eval_every": 1,
    "checkpoint.every_steps": 1,
    "checkpoint.keep_last": 5,
    "checkpoint.keep_best": "eval/loss/mean",
    "optim.warmup_steps": 1,
    "model.num_layers": 2,
    "model.moe.router": "sigmoid_bias",
    "train.eval_rows": 8,
    "model.vocab_size": 320,
}
STEPS = [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("kept")
    return tiny(write_text(root / "text"), root / "cache", FIELDS)


@pytest.fixture(scope="module")
def good(config, tmp_path_factory):
    """A run with the checkpoints of all its 5 steps; it is not harmed."""
    path = tmp_path_factory.mktemp("kept") / "good"
    train(config, path, progress=lambda *_: Heard())
    assert saved.entries(path) == STEPS
    return path


@pytest.fixture(scope="module")
def weights(good):
    return {step: jax.device_get(load_checkpoint(good, step).weights) for step in STEPS}


@pytest.fixture
def run(good, tmp_path):
    shutil.copytree(good, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def said(capsys):
    """Runs `frugalmoe checkpoints ...`: (exit code, what it printed, what it said of errors)."""

    def said(*arguments):
        code = main(["checkpoints", *map(str, arguments)])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return said


def refused(answer, text: str) -> None:
    code, out, err = answer
    assert code == 2 and not out and err.count("\n") == 1 and text in err, answer


def best_step(run, last: int = 5) -> int:
    losses = {row["step"]: row["eval/loss/mean"] for row in rows(run) if "eval/loss/mean" in row}
    return min(range(1, last + 1), key=losses.__getitem__)


def make_not_finite(config, run, step: int) -> None:
    """As the newest, with checksums."""
    mesh = sharding.make_mesh(check_devices(config, 1))
    with jax.set_mesh(mesh), checkpoint.open_manager(run, config.checkpoint, kept=set(STEPS)) as manager:
        state, _, _ = checkpoint.restore_newest(manager, abstract(config))
        broken = state._replace(params=jax.tree.map(lambda a: a * jnp.inf, state.params))
        checkpoint.save(manager, step, broken)


# ---------------------------------------------------------------- list and verify


def test_the_list_says_what_each_is(run, said):
    harm(largest(run, 2), "a flipped bit")
    (saved.place(run, 3) / checksums.NAME).unlink()
    (run / "checkpoints" / "99").mkdir()
    code, out, _ = said(run, "list", "--format=json")
    found = {row["step"]: row for row in json.loads(out)}
    assert code == 0 and list(found) == [*STEPS, 99]
    states = {1: "whole", 2: "damaged", 3: "no checksums", 4: "whole", 5: "whole", 99: "damaged"}
    assert {step: row["state"] for step, row in found.items()} == states
    assert found[99]["fault"] == "params, step: missing" and not found[1]["fault"]
    assert [step for step, row in found.items() if row["metric"] is not None] == [best_step(run)]
    size = sum(path.stat().st_size for path in saved.place(run, 1).rglob("*") if path.is_file())
    assert found[1]["bytes"] == size and found[1]["saved"].endswith("+00:00")
    for arguments in ([run], [run, "list"]):
        code, out, _ = said(*arguments)
        head, *lines = out.splitlines()
        assert code == 0 and head.split() == ["step", "MB", "age", "best", "eval/loss/mean", "state"]
        assert [int(line.split()[0]) for line in lines] == [*STEPS, 99] and ": changed" in lines[1]


def test_verify_is_zero_only_where_all_are_whole_and_finite(run, said, config):
    assert said(run, "verify") == (0, f"{run}: 5 of 5 checkpoints are whole and finite\n", "")
    make_not_finite(config, run, 6)
    code, out, _ = said(run, "verify")
    assert code == 1 and out.startswith(f"{run}/checkpoints/6: params/") and ": not finite\n" in out
    shutil.rmtree(saved.place(run, 6))
    path = largest(run, 2)
    content = path.read_bytes()
    for how in ("a flipped bit", "half", "gone"):
        harm(path, how)
        code, out, _ = said(run, "verify")
        assert code == 1 and len(out.splitlines()) == 2 and out.startswith(f"{run}/checkpoints/2: ")
        path.write_bytes(content)
    (saved.place(run, 3) / checksums.NAME).unlink()
    code, out, _ = said(run, "verify")
    assert (code, out.splitlines()[0]) == (1, f"{run}/checkpoints/3: no checksums")


# ---------------------------------------------------------------- prune


def test_prune_keeps_the_best_the_newest_good_one_and_what_is_asked_for(run, said):
    best = best_step(run)
    expected = sorted({1, 5, best})
    gone = [step for step in STEPS if step not in expected]
    words = lambda steps: ", ".join(map(str, steps))
    code, out, _ = said(run, "prune", "--keep-last=0", "--keep=1", "--dry-run")
    assert (code, out) == (0, f"{run}: would be deleted: {words(gone)}; kept: {words(expected)}\n")
    assert saved.entries(run) == STEPS
    code, out, _ = said(run, "prune", "--keep-last=0", "--keep=1")
    assert (code, out) == (0, f"{run}: deleted: {words(gone)}; kept: {words(expected)}\n")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [str(step) for step in expected]


def test_prune_counts_good_ones_only(run, said, config):
    """The two newest are harmed, and one that is not finite is newer still: the newest good one is 3."""
    make_not_finite(config, run, 6)
    harm(largest(run, 5), "a flipped bit")
    harm(largest(run, 4), "half")
    code, _, _ = said(run, "prune", "--keep-last=1")
    assert code == 0 and saved.entries(run) == sorted({3, 4, 5, 6, best_step(run)})
    assert load_checkpoint(run).step == 3


def test_prune_deletes_nothing_while_a_run_trains_or_where_nothing_good_stays(run, said):
    with rundir.locked(run):
        refused(said(run, "prune", "--keep-last=1"), "is training here")
    for step in STEPS:
        harm(largest(run, step), "half")
    assert said(run, "prune", "--keep-last=1")[0] == 0 and saved.entries(run) == STEPS


# ---------------------------------------------------------------- export


def test_an_export_is_a_run_with_the_same_bits(run, said, tmp_path):
    to = tmp_path / "deep" / "exported"
    assert said(run, "export", 3, to)[:2] == (0, f"{to}: a run with the checkpoint of step 3\n")
    assert saved.entries(to) == [3] and not saved.fault(to, 3)
    assert rows(to) == [row for row in rows(run) if row["step"] <= 3] and not (to / "summary.json").exists()
    same = jax.tree.map(np.array_equal, load_checkpoint(to).weights, load_checkpoint(run, 3).weights)
    assert jax.tree.all(same)
    assert said(run, "export", "best", tmp_path / "best")[0] == 0
    assert saved.entries(tmp_path / "best") == [best_step(run)]
    refused(said(run, "export", 3, to), "exists; give a new directory")
    harm(largest(run, 2), "a flipped bit")
    refused(said(run, "export", 2, tmp_path / "two"), "checkpoints/2: a damaged checkpoint")
    assert not (tmp_path / "two").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_an_export_goes_on_to_the_same_end(good, config, said, tmp_path):
    said(good, "export", 3, tmp_path / "run")
    summary = train(config, tmp_path / "run", progress=lambda *_: Heard())
    assert summary["eval"] == read_json(good / "summary.json")["eval"]
    same = jax.tree.map(np.array_equal, load_checkpoint(tmp_path / "run").weights, load_checkpoint(good).weights)
    assert jax.tree.all(same)


# ---------------------------------------------------------------- merge

DECAYS = {
    "mean": lambda i, n: 1 - i / n,
    "linear": lambda i, n: 1 - i * (i + 1) / (n * (n + 1)),
    "1-sqrt": lambda i, n: 1 - (i / n) ** 0.5,
}


@pytest.mark.parametrize("kind", from_run.COEFFICIENTS)
@pytest.mark.parametrize("steps", [[2, 3, 4, 5], [1, 4], [3]], ids=str)
def test_a_merge_is_the_decay_that_it_stands_for(good, weights, kind, steps):
    """x_0 + sum_i w_i (x_i - x_(i-1)): what moved the parameters counts as a rate would have that is lower by w_i."""
    merged = from_run.merge(good, kind, steps=steps[::-1])
    states = [weights[step] for step in steps]
    n = len(steps)

    def decayed(*values):
        x = np.float64(np.stack(values))
        return x[0] + sum(DECAYS[kind](i, n) * (x[i] - x[i - 1]) for i in range(1, n))

    expected = jax.tree.map(decayed, *(state.params for state in states))
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7, atol=1e-9)
    jax.tree.map(same, merged.weights.params, expected)
    assert merged.steps == steps and sum(merged.coefficients) == pytest.approx(1)
    if n == 1:
        assert jax.tree.all(jax.tree.map(np.array_equal, merged.weights, states[0]))
    own = [{"bias_E": state.router_state["moe_blocks"]["moe"]["router_state"]["bias_E"]} for state in states]
    ours = strategies.get("sigmoid_bias").merge(own, merged.coefficients, load_checkpoint(good).config.model.moe)
    found = merged.weights.router_state["moe_blocks"]["moe"]["router_state"]
    np.testing.assert_allclose(found["bias_E"], ours["bias_E"], rtol=1e-6, atol=1e-9)


def test_equal_checkpoints_merge_into_themselves(run):
    for step in (2, 3, 4):
        shutil.rmtree(saved.place(run, step))
        shutil.copytree(saved.place(run, 5), saved.place(run, step))
    for kind in from_run.COEFFICIENTS:
        merged = from_run.merge(run, kind, last=4)
        assert merged.steps == [2, 3, 4, 5]
        assert jax.tree.all(jax.tree.map(np.array_equal, merged.weights, load_checkpoint(run).weights))


def test_a_merged_run_is_evaluated_and_generated_from(run, said, tmp_path, capsys):
    to = tmp_path / "merged"
    harm(largest(run, 4), "a flipped bit")
    code, out, err = said(run, "merge", "--last=3", "--weights=1-sqrt", f"--to={to}")
    assert code == 0 and "checkpoints 2 (0.577), 3 (0.239), 5 (0.184); without an optimizer's state" in out
    assert err.count("\n") == 1 and "checkpoints/4: a damaged checkpoint" in err and "is not merged" in err
    assert read_json(to / from_run.MERGED)["steps"] == [2, 3, 5] and not list(kept.faults(to))
    assert main(["evaluate", str(to), "--json"]) == 0
    assert 3 < json.loads(capsys.readouterr().out)["loss"]["mean"] < 6
    assert main(["generate", str(to), "--prompt=x", "--max-tokens=2"]) == 0
    assert not capsys.readouterr().err
    refused(said(run, "merge", "--steps=3,4", f"--to={tmp_path / 'named'}"), "checkpoints/4: a damaged checkpoint")
    assert not (tmp_path / "named").exists()


BAD = [
    (["merge", "--last=2"], "needs --to=RUN2"),
    (["merge", "--to=NEW"], "needs --last=N or --steps="),
    (["merge", "--to=NEW", "--last=2", "--steps=1"], "and not both"),
    (["merge", "--to=NEW", "--last=0"], "--last=0: must be"),
    (["merge", "--to=NEW", "--last=6"], "--last=6: the run has 5 whole checkpoints"),
    (["merge", "--to=NEW", "--steps=1,9"], "no checkpoint of step 9; valid: [1, 2, 3, 4, 5]"),
    (["merge", "--to=NEW", "--steps=1,x"], "--steps=1,x: must be whole numbers"),
    (["merge", "--to=NEW", "--last=2", "--weights=ema"], "--weights=ema: unknown; valid: mean, linear, 1-sqrt"),
    (["merge", "--to=RUN", "--last=2"], "exists; give a new directory"),
    (["prune"], "--keep-last=N or --keep=STEP,STEP"),
    (["prune", "--keep-last=-1"], "--keep-last=-1: must be"),
    (["prune", "--keep=7"], "no checkpoint of step 7"),
    (["prune", "--keep="], "--keep=: must be whole numbers"),
    (["verify", "--keep=1"], "--keep=1: is a flag of prune, not of verify"),
    (["list", "3"], "3: list takes a run and flags only"),
    (["export", "3"], "export 3: needs STEP"),
    (["export", "-", "NEW"], "STEP=-: must be whole numbers"),
    (["export", "9", "NEW"], "no checkpoint of step 9"),
]


@pytest.mark.parametrize("arguments, text", BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_what_cannot_be_done_is_one_line(good, said, tmp_path, arguments, text):
    names = {"NEW": str(tmp_path / "new"), "RUN": str(good)}
    filled = [a.replace("NEW", names["NEW"]).replace("RUN", names["RUN"]) for a in arguments]
    refused(said(good, *filled), text)
    assert saved.entries(good) == STEPS and not (tmp_path / "new").exists()


def test_what_is_no_run_is_one_line(said, tmp_path):
    refused(said(tmp_path), "not a run directory")
    (tmp_path / "config.json").write_text("{}")
    refused(said(tmp_path, "verify"), "holds no checkpoint yet")
