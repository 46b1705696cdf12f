"""A study as the points of a law: what it foretells of arms that are not trained, and never of those that are."""

import json
import shutil
from pathlib import Path

import pytest

from frugalmoe.ablate import fit_study, load_comparison, publish_study, report, results, scaling
from frugalmoe.cli import main
from frugalmoe.cost.laws import fit_power, leverage_of, read_fit, read_shaped, size_of
from frugalmoe.errors import UserError
from frugalmoe.files import write_json

STEPS, EVERY, TOKENS = 100, 10, 1000
SIZES = {"w1": 1e5, "w2": 2e5, "w4": 4e5, "w16": 1.6e6}
SMALL = ("w1", "w2", "w4")


def loss(arm: str, step: float, seed: int) -> float:
    return 2 + 20 / SIZES[arm] ** 0.3 + 30 / (step * TOKENS) ** 0.4 + 0.002 * seed


def train(path, arm: str, seed: int, steps: int = STEPS, status: str = "complete", extra: float = 0.0) -> None:
    """What a run leaves behind."""
    run = path / arm / f"seed_{seed}"
    run.mkdir(parents=True)
    rows = [{"step": s, "eval/loss/mean": loss(arm, s, seed) + extra} for s in range(EVERY, steps + 1, EVERY)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = {"loss": {"mean": rows[-1]["eval/loss/mean"]}, "bits_per_byte": {"mean": 1.0}}
    counts = {"parameters": {"total": 2000, "active": 1000}, "speed": {"tokens_per_second": 1.0}}
    write_json(run / "summary.json", {"status": status, "step": STEPS, "eval": scores, **counts})


def study(path, trained=SMALL, declared=tuple(SIZES), seeds=(0, 1), **fields):
    """A study's directory with these arms trained."""
    described = {
        "name": "grid", "question": "?", "expectation": ".", "baseline": declared[0], "seeds": list(seeds),
        "arms": {arm: {"optim.learning_rate": 1e-3} for arm in declared}, "overrides": {"model.vocab_size": 64},
        "metrics": ["eval/loss/mean"], "steps": STEPS, "tokens_per_step": TOKENS, "constant_rate": True,
        "forward_flops": {arm: {"routed experts": SIZES[arm], "head": 7e5} for arm in declared},
        "experts_per_token": dict.fromkeys(declared, 2), "command": ["frugalmoe", "ablate", "grid.py"],
    }  # fmt: skip
    path.mkdir()
    write_json(path / "study.json", described | fields)
    for arm in trained:
        for seed in seeds:
            train(path, arm, seed)
    return gathered(path)


def gathered(path):
    results.gather(path, json.loads((path / "study.json").read_text()))
    return path


@pytest.fixture(scope="module")
def foretold(tmp_path_factory):
    path = study(tmp_path_factory.mktemp("scaling") / "grid")
    assert main(["report", str(path), "--fit"]) == 0
    return path


def test_points_are_those_after_the_warmup_and_only_of_a_constant_rate(tmp_path):
    found = scaling.points(load_comparison(study(tmp_path / "constant")), SMALL)
    assert {p.tokens for p in found} == {1000.0 * step for step in range(30, 101, 10)}
    assert all(p.loss == pytest.approx(loss(p.arm, p.tokens / 1000, p.seed)) and p.size == SIZES[p.arm] for p in found)
    for name, fields in (("decaying", {"constant_rate": False}), ("older", {"constant_rate": None})):
        found = scaling.points(load_comparison(study(tmp_path / name, **fields)), SMALL)
        assert {p.tokens for p in found} == {1e5} and len(found) == 6


def test_an_arm_is_foretold_and_the_report_says_how_far_off_that_was(foretold, tmp_path):
    said = json.loads((foretold / "fit.json").read_text())["foretold"]
    assert list(said) == ["w16"] and said["w16"]["tokens"] == 1e5
    truth = loss("w16", STEPS, 0) + 0.001
    assert said["w16"]["loss"] == pytest.approx(truth, abs=0.02)
    text = (foretold / "report/RESULTS.md").read_text()
    assert "## Foretold before it was trained" in text and "extrapolates 4 times the size, 4 times the compute" in text
    for seed in (0, 1):
        train(foretold, "w16", seed)
    gathered(foretold)
    page = report.markdown(load_comparison(foretold), ())
    error = said["w16"]["loss"] - truth
    assert f"| {said['w16']['loss']:.4f} |" in page and f"{error:+.4f} (" in page
    profiles = page.split("## Loss at equal compute")[1].split("##")[0]
    assert "| C | w1 | w2 | w4 | lowest |" in profiles and "w16" not in profiles
    published = publish_study(foretold, tmp_path).read_text()
    assert "## Law of size and tokens" in published and (tmp_path / "grid/fit.json").is_file()
    assert publish_study(tmp_path / "grid", tmp_path).read_text() == published  # from what is published alone


def test_what_was_foretold_is_not_written_anew(foretold, capsys):
    before = (foretold / "fit.json").read_bytes()
    assert main(["report", str(foretold), "--fit"]) == 2
    assert "move it away to fit again" in capsys.readouterr().err and (foretold / "fit.json").read_bytes() == before


def test_an_arm_that_has_begun_is_not_foretold(tmp_path):
    path = study(tmp_path / "grid")
    train(path, "w16", 0, steps=50, status="stopped")
    with pytest.raises(UserError, match="has begun, so that it cannot be foretold"):
        fit_study(gathered(path))
    assert not (path / "fit.json").exists()


def test_too_few_sizes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"size: .* needs more runs: .*there are 2; runs of w1, w2"):
        fit_study(study(tmp_path / "grid", trained=("w1", "w2")))


def test_runs_that_diverged_are_no_points(tmp_path):
    path = study(tmp_path / "grid")
    train(path, "w16", 0)
    write_json(path / "w16/seed_0/summary.json", {"status": "diverged", "why": "?"})
    with pytest.raises(UserError, match="has begun"):
        fit_study(gathered(path))
    assert {p.arm for p in scaling.points(load_comparison(path), list(SIZES))} == set(SMALL)


def test_a_metric_that_is_no_loss_is_refused(tmp_path):
    with pytest.raises(UserError, match="a law is fitted to a loss in nats"):
        fit_study(study(tmp_path / "grid", metrics=["eval/bits_per_byte/mean"]))


def test_trials_over_a_field(tmp_path):
    """Three rates in one study, and three batches as three studies."""
    rates = {"w1": {"optim.learning_rate": 1e-3}, "w2": {"optim.learning_rate": 2e-3}, "w4": {}}
    fields = {"overrides": {"optim.learning_rate": 4e-3}, "arms": rates}
    c = load_comparison(study(tmp_path / "rates", declared=SMALL, **fields))
    found = scaling.trials([c], "optim.learning_rate")
    assert {t.value for t in found} == {1e-3, 2e-3, 4e-3}
    with pytest.raises(UserError, match=r"optim\.b1: not among the fields"):
        scaling.trials([c], "optim.b1")
    batches = [load_comparison(study(tmp_path / f"batch_{b}", tokens_per_step=b)) for b in (500, 1000, 2000)]
    assert {t.value for t in scaling.trials(batches, "batch")} == {500, 1000, 2000}
    with pytest.raises(UserError, match="needs three values"):
        fit_power(scaling.trials(batches[:1], "batch"))


def test_a_fit_is_read_where_the_study_is(foretold):
    assert read_fit(foretold / "fit.json").arms == SMALL
    with pytest.raises(UserError, match="not a study"):
        fit_study(foretold / "w1")


LEVERAGE = Path(__file__).parent / "leverage_runs"  # ten runs of an earlier experiments/leverage.py


def test_a_studys_runs_have_compute_activation_and_granularity():
    """64 experts of which 2 are active, each as wide as the model: A = 1/32, G = 2; of 8 of 64, cut in four, G = 8."""
    c = load_comparison(LEVERAGE)
    found = {arm: scaling.shaped(c, [arm]) for arm in ("dense_48", "active_32th_48", "cut_8_48")}
    shapes = {arm: {(p.activation, p.granularity) for p in of_arm} for arm, of_arm in found.items()}
    assert shapes == {"dense_48": {(1.0, 1.0)}, "active_32th_48": {(2 / 64, 2.0)}, "cut_8_48": {(8 / 64, 8.0)}}
    last = max(found["dense_48"], key=lambda p: p.compute)
    assert last.compute == 3 * size_of(c.study["forward_flops"]["dense_48"]) * 500 * 2048
    assert last.loss == c.final(c.metric, "dense_48")[0]


def test_a_study_is_fitted_with_the_law_of_leverage(tmp_path):
    """Of runs in this repository. What it says of Ling 2.0's shape is nothing, and it says so: a band of ten times."""
    path = shutil.copytree(LEVERAGE, tmp_path / "leverage")
    (path / "leverage.json").unlink()
    fit = read_shaped(scaling.fit_study(path, "leverage"))
    assert fit == read_shaped(LEVERAGE / "leverage.json") and len(fit.arms) == 10 and fit.seeds == (0,)
    law, leverage = scaling.grids(load_comparison(path))
    assert [row[0] for row in law.rows][2:5] == ["alpha", "base", "per_decade"]
    assert leverage.rows[-1][0] == "as Ling 2.0" and "times the compute" in leverage.rows[-1][-1]
    band = leverage_of(fit, 9 / 257, 8.0, 1e18)
    assert band.high > 10 * band.low
    with pytest.raises(UserError, match=r"--fit=other: must be one of size, leverage"):
        scaling.fit_study(path, "other")
