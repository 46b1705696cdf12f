"""A tiny study end to end: alone and at once, killed and resumed, over processes, reported; and what it refuses."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from runs import command, config_file, rows, run, without_times, write_text

from frugalmoe.ablate import Study, load_comparison, load_study, results, run_study, worktime
from frugalmoe.cli import main
from frugalmoe.errors import UserError
from frugalmoe.routing import strategies

pytestmark = pytest.mark.slow

FILE = """
from frugalmoe.ablate import Study

STUDY = Study(
    name="tiny",
    question="Does a <b>balance</b> loss help?",
    expectation="Not in {steps} steps.",
    base={base!r},
    arms={{"aux": {{}}, "none": {{"model.moe.losses.load_balance": 0.0}}}},
    baseline="aux",
    varies=("model.moe.losses",),
    seeds=(0, 1),
    evaluate_with=True,
)
"""
STEPS = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with texts, a config and a study of 2 arms x 2 seeds."""
    root = tmp_path_factory.mktemp("study")
    text = write_text(root / "text")
    fields = {"train.steps": STEPS, "train.eval_every": 4, "checkpoint.every_steps": 2}
    base = config_file(root, text, root / "cache", fields)
    (root / "tiny_study.py").write_text(FILE.format(base=str(base), steps=STEPS))
    return root


@pytest.fixture(scope="module")
def study(place) -> Study:
    return load_study(place / "tiny_study.py")


@pytest.fixture(scope="module")
def alone(place, study):
    """Every run by itself, never disturbed."""
    assert run_study(study, place / "alone", at_once=1).missing == []
    return place / "alone"


RUNS = [(arm, seed) for arm in ("aux", "none") for seed in (0, 1)]


def metrics(workdir, arm, seed):
    return without_times(rows(workdir / arm / f"seed_{seed}"))


def same_results(a, b, tolerance: float) -> None:
    for arm, seed in RUNS:
        ours, theirs = metrics(a, arm, seed), metrics(b, arm, seed)
        assert [row.keys() for row in ours] == [row.keys() for row in theirs]
        for x, y in zip(ours, theirs):
            for name in x:
                assert x[name] == pytest.approx(y[name], rel=tolerance, abs=tolerance), (arm, seed, x["step"], name)


def test_a_seed_is_the_same_start_and_the_same_batches_in_every_arm(alone):
    """The loss of step 1 is that of the fresh weights on the first batch; the auxiliary loss acts from step 2 on."""
    first = {run: metrics(alone, *run)[0]["loss/ce"] for run in RUNS}
    assert first["aux", 0] == first["none", 0] and first["aux", 1] == first["none", 1]
    assert first["aux", 0] != first["aux", 1]
    last = {run: metrics(alone, *run)[-1]["eval/loss/mean"] for run in RUNS}
    assert len(set(last.values())) == 4, "arms and seeds differ in the end"


def test_each_run_is_a_run_directory_without_checkpoints(alone, capsys):
    for arm, seed in RUNS:
        directory = alone / arm / f"seed_{seed}"
        assert json.loads((directory / "config.json").read_text())["name"] == f"tiny/{arm}/{seed}"
        assert not (directory / "checkpoints").exists()
    assert main(["report", str(alone / "aux" / "seed_0")]) == 0
    assert (alone / "aux" / "seed_0" / "report" / "index.html").is_file()


def test_the_table_holds_every_run(alone):
    table = results.read_table(alone, "tiny").to_pylist()
    finals = {(r["arm"], r["seed"]): r["value"] for r in table if r["final"] and r["metric"] == "eval/loss/mean"}
    summaries = {run: json.loads((alone / run[0] / f"seed_{run[1]}" / "summary.json").read_text()) for run in RUNS}
    assert finals == {run: s["eval"]["loss"]["mean"] for run, s in summaries.items()}
    steps = {r["step"] for r in table if not r["final"] and r["metric"] == "eval/loss/mean"}
    assert steps == {4, STEPS}


def test_the_time_of_a_study_is_that_of_its_runs_and_what_is_between_them(alone):
    """Runs are evaluated under other arms' routers after their summary, which is of no run's own time."""
    (found,) = worktime.processes(alone).values()
    own = [json.loads((alone / a / f"seed_{s}" / "summary.json").read_text())["goodput"]["seconds"] for a, s in RUNS]
    assert found["step"] == pytest.approx(sum(of["step"] for of in own), abs=0.1)
    assert found["compiling"] == pytest.approx(sum(of.get("compiling", 0) for of in own), abs=0.1)
    assert found["evaluation"] > sum(of["evaluation"] for of in own)
    assert sum(found.values()) > sum(sum(of.values()) for of in own)
    later = [of.get("compiling", 0) for of in own[1:]]
    assert own[0]["compiling"] > 2 * max(later), "arms that differ in a coefficient, and seeds, share all programs"


def test_a_run_evaluated_with_its_own_router_gives_its_own_loss(alone):
    """The arms differ in a loss coefficient, which evaluation does not use: every entry is the run's own loss."""
    for arm, seed in RUNS:
        directory = alone / arm / f"seed_{seed}"
        own = json.loads((directory / "summary.json").read_text())["eval"]["loss"]["mean"]
        assert json.loads((directory / "cross.json").read_text()) == {"aux": own, "none": own}


def test_four_runs_at_once_are_the_four_runs(place, study, alone):
    """Sums are ordered differently under vmap: equal up to rounding, 2e-6 of a metric as measured."""
    run_study(study, place / "at_once", at_once=4)
    same_results(alone, place / "at_once", 1e-5)


def test_what_is_complete_is_not_touched(study, alone):
    before = {p: p.stat().st_mtime_ns for p in alone.rglob("metrics.jsonl")}
    assert run_study(study, alone, at_once=1).missing == []
    assert before == {p: p.stat().st_mtime_ns for p in before}


def ablate(place, workdir, *flags, study="tiny_study.py") -> list[str]:
    return ["ablate", str(place / study), f"--workdir={place / workdir}", *flags]


def steps_done(workdir) -> int:
    return sum(len(p.read_text().splitlines()) for p in workdir.glob("*/seed_*/metrics.jsonl"))


def wait_for(condition, process, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)


def no_worker_of(workdir) -> bool:
    """True when no process trains in the directory any more."""
    pids = [p.read_text() for p in workdir.glob("*/seed_*/.lock")]
    return not any(pid and os.path.exists(f"/proc/{pid}") for pid in pids)


def interrupt(flags: list[str], number: int, condition) -> tuple[int, str]:
    """Starts the command and signals it once the condition holds; its exit code and output."""
    process = subprocess.Popen(command(*flags), stdout=-1, stderr=subprocess.STDOUT, text=True)
    wait_for(condition, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def test_stopped_and_killed_it_continues_to_the_same_bits(place, alone):
    """SIGTERM in the first run saves it; SIGKILL in a later one does not."""
    workdir, flags = place / "killed", ablate(place, "killed")
    code, output = interrupt(flags, signal.SIGTERM, lambda: steps_done(workdir) >= 3)
    assert code == 75 and "4 of 4 runs to go; the same command continues" in output, output
    interrupt(flags, signal.SIGKILL, lambda: steps_done(workdir) >= STEPS + 3)
    out = run(*flags, timeout=900)
    assert out.returncode == 0, out.stderr
    assert re.search("continuing at [12] of 4 runs", out.stdout) and "not distinguishable at n=2" in out.stdout
    same_results(alone, workdir, 0)
    table = lambda w: [r for r in results.read_table(w, "tiny").to_pylist() if not r["metric"].startswith("speed/")]
    assert table(alone) == table(workdir)


def test_processes_and_slurm_tasks_share_the_runs(place, alone):
    """The first process is killed, its workers save and end; a SLURM task (submitit's local executor) goes on."""
    workdir, flags = place / "jobs", ablate(place, "jobs")
    both_train = lambda: len(list(workdir.glob("*/seed_*/metrics.jsonl"))) >= 2
    interrupt([*flags, "--jobs=2"], signal.SIGKILL, both_train)
    end = time.monotonic() + 300
    while not no_worker_of(workdir):
        assert time.monotonic() < end, "workers outlive the process that started them"
        time.sleep(0.1)
    out = run(*flags, "--slurm=cluster=local,timeout_min=15", timeout=900)
    assert out.returncode == 0, out.stderr
    same_results(alone, workdir, 1e-5)
    assert list((workdir / "slurm").glob("*_result.pkl"))


def test_the_report_is_one_page_with_a_verdict(alone, capsys):
    assert main(["report", str(alone)]) == 0
    assert capsys.readouterr().out == f"{alone / 'report' / 'index.html'}\n"
    page = (alone / "report" / "index.html").read_text()
    assert f"Time: {worktime.line(alone)}." in page and " of wall time, added up over processes, was " in page
    assert "none: not distinguishable at n=2" in page and "<b>balance" not in page and "&lt;b&gt;balance" in page
    words = re.sub(r"data:image/png;base64,[\w+/=]+", "picture", page)  # in whose letters any word may stand
    assert 'src="picture"' in words and "http" not in words
    markdown = (alone / "report" / "RESULTS.md").read_text()
    c = load_comparison(alone)
    paired = c.paired["none"]
    assert f"| none | 2 | {c.mean(c.metric, 'none'):.3f} | {paired.mean:+.4f} ± {paired.half_width:.4f} |" in markdown
    assert {p.name for p in (alone / "report").iterdir()} == {
        "index.html",
        "RESULTS.md",
        "differences.png",
        "curves.png",
        "balance.png",
    }


def test_a_kept_checkpoint_is_generated_from_and_traced_and_no_sample_was_drawn(place, capsys):
    """A study in small has a name of its own, so that it is not taken for the whole one; a kept run can be traced."""
    flags = ["--steps=2", "--keep-checkpoints", "--seeds=0", "--arms=aux", "--config.checkpoint.every_steps=1"]
    assert main(ablate(place, "kept", *flags)) == 0
    study = json.loads((place / "kept" / "study.json").read_text())
    assert study["name"] == "tiny-2-steps" and study["steps"] == 2
    run = place / "kept" / "aux" / "seed_0"
    assert json.loads((run / "config.json").read_text())["train"]["eval_every"] == 1
    assert "sample" not in json.loads((run / "summary.json").read_text())
    assert (run / "checkpoints" / "2").is_dir()
    assert main(["trace", str(run), "--tokens=64"]) == 0
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt=The ", "--max-tokens=4"]) == 0
    assert capsys.readouterr().out.startswith("The ")
    refused(capsys, ablate(place, "kept", "--seeds=0", "--arms=aux"), "'tiny-2-steps', not 'tiny'")
    shutil.rmtree(run / "checkpoints")
    refused(capsys, ablate(place, "kept", *flags), "is complete and kept no checkpoint; --fresh trains it again")


def test_a_router_from_a_notebook_and_a_run_that_diverges(place, study, capsys):
    """A strategy that is no file of the package is an arm; an arm whose loss becomes infinite ends alone."""
    mine = dataclasses.replace(strategies.get("topk_softmax"), name="mine")
    arms = {"base": {}, "mine": {"model.moe.router": mine}, "wild": {"optim.learning_rate": 1e30}}
    changes = {"arms": arms, "baseline": "base", "varies": ("model.moe.router", "optim"), "evaluate_with": False}
    other = dataclasses.replace(study, name="notebook", **changes)
    outcome = run_study(other, place / "notebook", seeds=[0])
    assert outcome.missing == [] and [p.arm for p in outcome.diverged] == ["wild"]
    assert "wild seed 0: optim/parameter_norm=inf at step 1: not finite" in capsys.readouterr().out
    config = json.loads((place / "notebook" / "mine" / "seed_0" / "config.json").read_text())
    assert config["model"]["moe"]["router"] == "mine"
    c = load_comparison(place / "notebook")
    assert c.paired["mine"].mean == 0, "the same router under another name"
    assert c.verdict("wild") == "no complete pair of runs: 1 of 1 diverged"


def test_a_run_that_diverges_does_not_take_those_with_it_that_share_its_program(place, study):
    """The coefficient of a loss is an argument of the program: the gradients of one run alone are infinite."""
    arms = {"aux": {}, "wild": {"model.moe.losses.load_balance": 3e38}}
    other = dataclasses.replace(study, name="together", arms=arms, baseline="aux", evaluate_with=False)
    outcome = run_study(other, place / "together", seeds=[0], at_once=2)
    assert outcome.missing == [] and [p.arm for p in outcome.diverged] == ["wild"]
    summary = json.loads((place / "together" / "aux" / "seed_0" / "summary.json").read_text())
    assert summary["status"] == "complete" and np.isfinite(summary["eval"]["loss"]["mean"])


# ---------------------------------------------------------------- what is refused


def refused(capsys, argv, *texts) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("frugalmoe: ") and len(error.strip().splitlines()) == 1, error
    for text in texts:
        assert text in error, error


def variant(place, name: str, old: str, new: str) -> str:
    text = (place / "tiny_study.py").read_text()
    assert old in text
    (place / f"{name}.py").write_text(text.replace(old, new))
    return f"{name}.py"


BAD = [
    (
        "metric",
        "evaluate_with=True",
        "metrics=('eval/loss/maen',)",
        "metrics='eval/loss/maen': unknown metric; did you mean",
    ),
    ("first", "evaluate_with=True", "metrics=('router/entropy',)", "the first one decides and must be one of eval/..."),
    ("baseline", 'baseline="aux"', 'baseline="axu"', "baseline='axu': no such arm; did you mean 'aux'"),
    ("varies", 'varies=("model.moe.losses",)', "varies=()", "undeclared difference; varies=nothing"),
]


@pytest.mark.parametrize("name, old, new, message", BAD, ids=[b[0] for b in BAD])
def test_a_bad_study_is_one_line_and_writes_nothing(place, capsys, name, old, new, message):
    refused(capsys, ablate(place, "bad", study=variant(place, name, old, new)), message)
    assert not (place / "bad").exists()


def test_unequal_budgets_are_refused_unless_declared(place, capsys):
    """Twice the experts per token: 2 layers x 2 more experts x 6 x 32 x 16 more FLOPs than the baseline."""
    old = 'varies=("model.moe.losses",)'
    new = 'varies=("model.moe",)'
    arms = '"none": {"model.moe.losses.load_balance": 0.0}'
    name = variant(place, "budget", old, new)
    text = (place / name).read_text()
    assert arms in text
    (place / name).write_text(text.replace(arms, '"none": {"model.moe.num_experts_per_token": 4}'))
    refused(
        capsys, ablate(place, "bad", study=name), "arm 'none': 1.", "times the active FLOPs per token", "tolerance=0.03"
    )
    declared = (place / name).read_text().replace(new, new + ", equal_flops=False")
    (place / name).write_text(declared)
    assert main(ablate(place, "bad", "--dry-run", study=name)) == 0
    assert "1.000" in capsys.readouterr().out
    assert not (place / "bad").exists()


def test_bad_flags_are_refused(place, capsys):
    refused(capsys, ablate(place, "bad", "--arms=nine"), "--arms=nine: no such arm; did you mean 'none'")
    refused(capsys, ablate(place, "bad", "--jobs=0"), "--jobs=0: must be at least 1")
    refused(capsys, ablate(place, "bad", "--slurm=partition"), "must be NAME=VALUE")
    refused(capsys, ablate(place, "bad", "--config.model.dmi=3"), "did you mean 'dim'")
    refused(capsys, ["ablate", str(place / "no.py")], "no.py: no such study; valid: ")
    refused(capsys, ["report", str(place / "text")], "not a run directory")
    assert not (place / "bad").exists()


def test_another_study_and_another_config_are_refused(place, alone, capsys):
    other = variant(place, "other", 'name="tiny"', 'name="other"')
    refused(capsys, ablate(place, "alone", study=other), "holds the study 'tiny', not 'other'")
    refused(capsys, ablate(place, "alone", "--config.train.steps=9"), "train.steps: 8 there, 9 here")
    refused(capsys, ablate(place, "text"), "holds files but no study.json")
    assert json.loads((alone / "study.json").read_text())["name"] == "tiny"


def test_a_damaged_table_is_refused_and_rebuilt_from_the_runs(place, alone, capsys):
    path = alone / "results.parquet"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:100])
        refused(
            capsys, ablate(place, "alone"), "results.parquet: not a readable table", "rebuilt from the run directories"
        )
        refused(capsys, ["report", str(alone)], "results.parquet: not a readable table")
        path.unlink()
        refused(capsys, ["report", str(alone)], "results.parquet: missing")
        assert main(ablate(place, "alone")) == 0
        assert results.read_table(alone, "tiny").num_rows > 0
        assert np.isfinite([r["value"] for r in results.read_table(alone, "tiny").to_pylist()]).all()
    finally:
        path.write_bytes(whole)


def test_arms_begin_with_the_weights_of_other_runs(place, alone, study, tmp_path):
    """Of the same seed; what is no run, or not the one that a run began with, is refused before a step."""
    kept = dataclasses.replace(study, keep_checkpoints=True, seeds=(0,), evaluate_with=False)
    run_study(kept, tmp_path / "first")
    where = f"{tmp_path}/first/aux/seed_{{seed}}"
    on = dataclasses.replace(kept, origins={"none": where}, name="on")
    run_study(on, tmp_path / "on")
    assert metrics(tmp_path / "on", "aux", 0) == metrics(tmp_path / "first", "aux", 0)
    began, fresh = (metrics(tmp_path / name, "none", 0)[0]["loss/ce"] for name in ("on", "first"))
    last = [row["loss/ce"] for row in metrics(tmp_path / "first", "aux", 0) if "loss/ce" in row][-1]
    assert abs(began - last) < 0.3 < fresh - began
    page = (tmp_path / "on" / "study.json").read_text()
    assert json.loads(page)["origins"] == {"none": where}
    (origin,) = (row["origin"] for row in [json.loads((tmp_path / "on/none/seed_0/history.jsonl").read_text())])
    assert origin["run"] == where.format(seed=0)

    def refused(**changes):
        with pytest.raises(UserError) as e:
            run_study(dataclasses.replace(on, **changes), tmp_path / changes.get("name", "on"))
        return str(e.value)

    assert "no such arm" in refused(origins={"nine": where}, name="a")
    assert "must be RUN or RUN@STEP" in refused(origins={"none": "runs/{arm}"}, name="b")
    assert "not a run directory" in refused(origins={"none": str(tmp_path / "gone")}, name="c")
    shutil.rmtree(tmp_path / "on" / "none" / "seed_0" / "checkpoints")
    (tmp_path / "on" / "none" / "seed_0" / "summary.json").unlink()
    assert "did not begin with" in refused(origins={"none": f"{tmp_path}/first/none/seed_{{seed}}"})
