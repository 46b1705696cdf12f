"""The best checkpoint of a run: which it is, that it stays, and that it can be named."""

import shutil

import numpy as np
import pytest
from runs import config_file, rows, tiny, write_text

from frugalmoe.cli import main
from frugalmoe.errors import UserError
from frugalmoe.evaluate import evaluate
from frugalmoe.files import read_json
from frugalmoe.train import best, checkpoint
from frugalmoe.train.best import Best
from frugalmoe.train.loop import train
from frugalmoe.train.weights import load_model, run_and_step

pytestmark = pytest.mark.whole

METRIC = "eval/bits_per_byte/text"
STEPS = 6
# So large a rate that the loss goes down and then up.
FIELDS = {
    "train.steps": STEPS,
    "train.eval_every": 1,
    "train.batch_size": 4,
    "train.eval_rows": 4,
    "optim.warmup_steps": 0,
    "optim.learning_rate": 0.06,
    "optim.schedule": "constant",
    "model.num_layers": 2,
    "checkpoint.every_steps": 1,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_best": METRIC,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("best")
    write_text(root / "text")
    return root


def config(place, **changes):
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return tiny(place / "text", place / "cache", FIELDS | changes)


@pytest.fixture(scope="module")
def run(place):
    train(config(place), place / "run")
    return place / "run"


@pytest.fixture(scope="module")
def everything(place):
    """The same with all checkpoints."""
    train(config(place, checkpoint__keep_every_steps=1), place / "everything")
    return place / "everything"


def logged(run) -> dict[int, float]:
    return {row["step"]: row[METRIC] for row in rows(run) if METRIC in row}


def test_the_best_is_kept_beside_the_last_and_scores_as_was_logged(run):
    by_step = logged(run)
    lowest = min(by_step, key=by_step.get)
    assert len(by_step) == STEPS and lowest not in (1, STEPS), f"the loss goes down and then up: {by_step}"
    assert checkpoint.saved_steps(run) == [lowest, STEPS]
    assert run_and_step(f"{run}@best") == (run, lowest)
    found = evaluate(*run_and_step(f"{run}@best"))
    assert found.bits_per_byte["text"] == pytest.approx(by_step[lowest], rel=1e-6)
    assert read_json(run / "summary.json")["best"] == {"metric": METRIC, "step": lowest, "value": by_step[lowest]}


@pytest.mark.parametrize("killed", [1, 3, 5])
def test_a_run_that_goes_on_keeps_the_best_of_before(place, run, everything, tmp_path, killed):
    """Killed after a step, before or after the best, it ends with the checkpoints of a run that was not."""
    shutil.copytree(everything, tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    for step in checkpoint.saved_steps(everything):
        if step > killed or step not in (killed, min(list(logged(run))[:killed], key=logged(run).get)):
            shutil.rmtree(tmp_path / "run/checkpoints" / str(step))
    train(config(place), tmp_path / "run", resume="force")
    assert checkpoint.saved_steps(tmp_path / "run") == checkpoint.saved_steps(run)
    assert run_and_step(f"{tmp_path / 'run'}@best")[1] == run_and_step(f"{run}@best")[1]
    ours, theirs = (load_model(r, run_and_step(f"{run}@best")[1])[1].params for r in (tmp_path / "run", run))
    assert np.array_equal(ours["embed_VD"], theirs["embed_VD"]) and logged(tmp_path / "run") == logged(run)


def test_of_equals_the_first_is_best_and_what_is_not_finite_never_is(tmp_path):
    lines = [(1, "2.5"), (2, "2.0"), (3, "2.0"), (4, "null"), (5, "NaN"), (6, "-Infinity"), (7, '"0"'), (8, "true"),
             (9, "1.0")]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {s}, "{METRIC}": {v}}}\n' for s, v in lines) + '{"st')
    assert best.find(tmp_path, METRIC, range(9)) == Best(2, 2.0)
    assert best.find(tmp_path, METRIC, {1, 3, 9}) == Best(9, 1.0)
    assert best.find(tmp_path, METRIC, {4, 5, 6, 7, 8}) is best.find(tmp_path / "none", METRIC, {1}) is None
    assert best.is_better("router/load_entropy", 2.0, Best(1, 1.0)), "more of it is better"
    assert not best.is_better(METRIC, float("nan"), None) and not best.is_better(METRIC, float("-inf"), Best(1, 1.0))


def test_it_is_named_to_the_commands(place, run, tmp_path, capsys):
    lowest = run_and_step(f"{run}@best")[1]
    assert main(["evaluate", f"{run}@best", "--json", "--tokens=64"]) == 0
    assert f'"step": {lowest}' in capsys.readouterr().out
    file = config_file(tmp_path, place / "text", place / "cache", FIELDS | {"name": "new"})
    flags = [f"--from={run}@best", f"--config={file}", f"--workdir={tmp_path / 'new'}", "--config.model.dim=64"]
    assert main(["train", *flags]) == 2
    assert f"--from={run}@{lowest}: " in capsys.readouterr().err
    assert main(["convert", "to-hf", f"{run}@best", str(tmp_path / "hf"), "--step=3"]) == 2
    assert "names a step already" in capsys.readouterr().err
    assert main(["generate", str(run), "--step=best", "--max-tokens=3", "--temperature=0"]) == 0
    found = capsys.readouterr().out
    assert main(["generate", f"{run}@{lowest}", "--max-tokens=3", "--temperature=0"]) == 0
    assert capsys.readouterr().out == found
    assert main(["generate", f"{run}@best", "--step=best"]) == 2
    assert f"--step=best: {run}@best names a step already" in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "traced")
    assert main(["trace", f"{tmp_path / 'traced'}@best", "--tokens=64"]) == 0
    assert [path.stem for path in (tmp_path / "traced/trace").iterdir()] == [f"step_{lowest:08d}"]
    assert main(["trace", f"{run}@best", "--checkpoints=last"]) == 2 and main(["trace", f"{run}@99"]) == 2
    shown = capsys.readouterr().err
    assert "--checkpoints=last: " in shown and f"{run}: no checkpoint of step 99; valid: [{lowest}, " in shown
    assert main(["runs", str(run.parent)]) == 0
    shown = capsys.readouterr().out
    value = read_json(run / "summary.json")["best"]["value"]
    assert "best checkpoint" in shown and f"{METRIC} {value:.4g} at step {lowest}" in shown


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"checkpoint__keep_best": "eval/loss/txet"}, "'eval/loss/txet': not measured; did you mean 'eval/loss/text'"),
        ({"checkpoint__keep_best": "loss/ce"}, "must be a metric of evaluations"),
        ({"checkpoint__keep_best": "router/entropy"}, "must be a metric of evaluations"),
        ({"checkpoint__keep_best": "eval/nothing/mean"}, "must be a metric of evaluations"),
        ({"checkpoint__keep_best": "validation/loss/mean"}, "needs a validation set, data.validation.path"),
        ({"train__eval_every": 0}, "needs train.eval_every, which is 0"),
    ],
)
def test_a_metric_that_is_not_measured_is_one_line(place, tmp_path, fields, said):
    with pytest.raises(UserError) as refused:
        train(config(place, **fields), tmp_path / "run")
    assert "checkpoint.keep_best=" in str(refused.value) and said in str(refused.value)
    assert not (tmp_path / "run/config.json").exists()


def test_a_run_without_a_best_is_one_line(place, run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    record = (run / "config.json").read_text()
    (tmp_path / "none").mkdir()
    (tmp_path / "none/config.json").write_text(record.replace(METRIC, ""))
    for name, said in (("run", f"no checkpoint with {METRIC} yet"), ("none", "kept no best"), ("x", "not a run")):
        assert main(["evaluate", f"{tmp_path / name}@best"]) == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1 and said in shown
