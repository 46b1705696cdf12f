"""A study with planted differences: the report says which are real, and is one safe, self-contained page."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_report import read

from frugalmoe.ablate import load_comparison, plots, publish_study, results, write_study_report
from frugalmoe.cli import main
from frugalmoe.files import write_json

STEPS, EVERY, TOKENS = 100, 10, 1000
PNG = ("differences.png", "curves.png", "balance.png")
# arm -> (loss added to the baseline's, its noise per seed, seconds per step over the baseline's)
PLANTED = {"base": (0.0, 0.0, 1.0), "good": (-0.2, 0.001, 2.0), "bad": (0.1, 0.001, 1.0), "same": (0.0, 0.05, 1.0)}


def curve(step: int) -> float:
    return 4.0 - 2.0 * step / STEPS  # a line from 4 to 2


def write_planted_study(path, planted=PLANTED, seeds=(0, 1, 2)):
    rng = np.random.default_rng(0)
    parts = {"routed experts": 600.0, "head": 400.0}
    study = {
        "name": "planted",
        "question": "Is <script>alert(1)</script> harmless?",
        "expectation": "Yes & always.",
        "arms": {arm: {} for arm in planted},
        "baseline": "base",
        "metrics": ["eval/loss/mean", "router/max_violation"],
        "seeds": list(seeds),
        "steps": STEPS,
        "tokens_per_step": TOKENS,
        "forward_flops": {arm: parts for arm in planted},
        "experts_per_token": {arm: 2 for arm in planted},
        "command": ["frugalmoe", "ablate", "planted.py"],
    }
    path.mkdir(parents=True)
    write_json(path / "study.json", study)
    for arm, (shift, noise, slower) in planted.items():
        for seed in seeds:
            run = path / arm / f"seed_{seed}"
            run.mkdir(parents=True)
            # alternating noise of a fixed size: its mean over three seeds is a third of it
            added = shift + 0.3 * seed + noise * (1 if seed % 2 else -1) * (1 + 0.1 * rng.random())
            rows = [_row(step, added) for step in range(EVERY, STEPS + 1, EVERY)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            loss = curve(STEPS) + added
            summary = {
                "status": "complete",
                "step": STEPS,
                "eval": {
                    "loss": {"code": loss - 0.5, "plays": loss + 0.5, "mean": loss},
                    "bits_per_byte": {"code": 1.0, "plays": 1.0, "mean": 1.0},
                },
                "parameters": {"total": 2000, "active": 1000},
                "speed": {"tokens_per_second": TOKENS / slower},
                "router": {"layers": {"layer_00": {"max_violation": 0.25, "active_per_token": 1.0}}},
            }
            write_json(run / "summary.json", summary)
    results.gather(path, study)
    return path


def _row(step: int, added: float) -> dict:
    balance = {"router/max_violation/layer_00": 1 / step}
    return {"step": step, "loss/ce": curve(step), "eval/loss/mean": curve(step) + added, **balance}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return write_planted_study(tmp_path_factory.mktemp("study") / "planted")


@pytest.fixture(scope="module")
def page(planted):
    return write_study_report(planted)


def test_verdicts_find_what_was_planted(planted):
    c = load_comparison(planted)
    assert re.match(r"better by 0\.200\d ± 0\.00\d+ nats \(n=3\)", c.verdict("good"))
    assert re.match(r"worse by 0\.099\d ± 0\.00\d+ nats \(n=3\)|worse by 0\.100\d ± 0\.00\d+ nats", c.verdict("bad"))
    assert c.verdict("same").startswith("not distinguishable at n=3")
    assert c.verdict("base") == "baseline"


def test_cost_to_the_baselines_loss_by_hand(planted):
    """The arm is 0.2 lower and falls by 0.02 per step: it is there 10 steps earlier, at twice the time per step."""
    share = load_comparison(planted).cost_to_target("good")
    np.testing.assert_allclose(share["steps"], 0.9, atol=1e-3)
    np.testing.assert_allclose(share["flops"], 0.9, atol=1e-3)
    np.testing.assert_allclose(share["time"], 1.8, atol=2e-3)
    assert np.isnan(load_comparison(planted).cost_to_target("bad")["steps"]).all()


def test_active_flops_are_those_of_the_experts_really_used(planted):
    """One of two experts on average: 600 / 2 + 400, and thrice that for training on 100 steps of 1000 tokens."""
    c = load_comparison(planted)
    assert c.mean("cost/active_flops", "good") == 700
    assert c.training_flops("good") == 3 * 700 * 100 * 1000


def test_the_page(planted, page):
    reader, text = read(page)
    assert "script" not in reader.tags and "<script>alert(1)</script>" in text
    assert re.search(
        r"good: better by 0.20.{15,30}; reaches the baseline's final loss with 0.90× the FLOPs and 1.80×", text
    )
    assert "same: not distinguishable at n=3" in text
    assert "4 arms, seeds 0, 1, 2, 100 steps of 1,000 tokens" in text and "missing" not in text
    assert "good 3 of 3 0.90× 0.90× 1.80×" in text and "bad 0 of 3 – – –" in text
    links = [value for name, value in reader.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert len(links) == 3 and all(value.startswith("data:image/png;base64,") for value in links)
    assert {p.name for p in (planted / "report").iterdir()} == {
        *("index.html", "RESULTS.md"),
        *PNG,
    }


def test_the_markdown_has_the_same_tables(page):
    text = page.with_name("RESULTS.md").read_text()
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 4
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    assert "## Cost to the baseline's final loss" in text and "frugalmoe ablate planted.py" in text


@pytest.mark.slow
def test_the_same_study_gives_the_same_page(planted, page):
    first = page.read_bytes()
    assert write_study_report(planted).read_bytes() == first


@pytest.mark.slow
def test_a_study_that_is_half_there(tmp_path):
    """One arm has no run yet, another one seed only: said, and no number is made up."""
    path = write_planted_study(tmp_path / "planted")
    for gone in ("bad/seed_0", "bad/seed_1", "good/seed_0", "good/seed_1"):
        (path / gone / "summary.json").unlink()
    write_json(path / "bad" / "seed_2" / "summary.json", {"status": "diverged", "why": "NaN"})
    results.gather(path, json.loads((path / "study.json").read_text()))
    _, text = read(write_study_report(path))
    assert "5 of 12 runs are missing, of which diverged: bad seed 2" in text
    assert "bad: no complete pair of runs" in text and "good: one seed: 0.2" in text
    assert "nan" not in text.split("Arms: what each one changes")[0].lower()


@pytest.mark.slow
def test_the_command_tells_a_study_from_a_run(planted, capsys):
    assert main(["report", str(planted)]) == 0
    assert capsys.readouterr().out == f"{planted / 'report' / 'index.html'}\n"
    assert main(["report", str(planted / "good")]) == 2
    assert "not a run directory" in capsys.readouterr().err


@pytest.mark.slow
def test_a_published_study_is_made_again_from_what_is_published(planted, tmp_path, capsys):
    """Without the run directories: same tables and pictures; what was written by hand stays."""
    root = tmp_path / "experiments"
    assert main(["report", str(planted), f"--publish={root}"]) == 0
    assert capsys.readouterr().out == f"{root / 'planted' / 'RESULTS.md'}\n"
    page = root / "planted" / "RESULTS.md"
    files = {p.name: p.read_bytes() for p in page.parent.iterdir()}
    assert set(files) == {*("RESULTS.md", "study.json", "results.parquet"), *PNG}
    page.write_text(page.read_text() + "\nWritten by hand.\n")
    assert main(["report", str(page.parent), f"--publish={root}"]) == 0
    again = {p.name: p.read_bytes() for p in page.parent.iterdir()}
    assert again.pop("RESULTS.md") == files.pop("RESULTS.md") + b"\nWritten by hand.\n"
    assert again == files
    table = (root / "RESULTS.md").read_text()
    assert "[planted](planted/RESULTS.md)" in table and "good: better by 0.2" in table
    assert f"frugalmoe report {planted} --publish={root}" in page.read_text()


@pytest.mark.slow
def test_a_study_can_be_published_where_it_was_trained(tmp_path):
    path = write_planted_study(tmp_path / "planted")
    assert f"frugalmoe report {path} --publish={tmp_path}" in publish_study(path, tmp_path).read_text()


def test_of_many_arms_the_best_and_the_worst_have_colours():
    """The baseline and seven of thirty arms: the four with the lowest loss, the three with the highest."""
    comparison = load_comparison(Path(__file__).parents[1] / "experiments/league")
    found = plots.colours(comparison)
    ranked = sorted(comparison.arms[1:], key=lambda arm: comparison.mean(comparison.metric, arm))
    named = [arm for arm, colour in found.items() if colour != plots.UNNAMED]
    assert named == ["topk_softmax", *ranked[:4], *ranked[-3:]] and len(set(map(found.get, named))) == 8
    labels = [text.get_text() for text in plots.balance(comparison).axes[0].get_legend().get_texts()]
    assert labels == [*named, "23 others"]
