"""A study with planted differences: the report says which are real, and is one safe, self-contained page."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_report import read

from frugalmoe.ablate import load_comparison, plots, publish_study, results, write_study_report
from frugalmoe.cli import main
from frugalmoe.errors import UserError
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
    """The arm is 0.2 lower and falls by 0.02 per step: it is there 10 steps earlier."""
    share = load_comparison(planted).cost_to_target("good")
    np.testing.assert_allclose(share["steps"], 0.9, atol=1e-3)
    np.testing.assert_allclose(share["flops"], 0.9, atol=1e-3)
    assert share.keys() == {"steps", "flops"}, "a clock on a shared machine measures no cost"
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
        r"good: better by 0.20.{15,30}; reaches the baseline's final loss with 0.90× the FLOPs bad: worse", text
    )
    assert "Found: 2 of 3 arms can be told from the baseline base by these runs." in text
    assert "same: not distinguishable at n=3" in text
    assert "4 arms, seeds 0, 1, 2, 100 steps of 1,000 tokens" in text and "missing" not in text
    assert "good 3 of 3 0.90× 0.90×" in text and "bad 0 of 3 – –" in text
    assert not re.search(r"step time|tokens/s|per second", text.partition("The study as it was run")[0])
    links = [value for name, value in reader.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert len(links) == 6 and all(value.startswith("data:image/png;base64,") for value in links)
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
    labels = [text.get_text() for text in plots.balance(comparison).legends[0].get_texts()]
    assert labels == [*named, "23 others"]


def bars(figure) -> dict[str, tuple[float, float]]:
    """{arm: the ends of its horizontal bar} of the picture of differences."""
    axes = figure.axes[0]
    names = [label.get_text().partition(" (n")[0] for label in axes.get_yticklabels()]
    segments = [segment for lines in axes.collections for segment in lines.get_segments()]
    return {names[round(a[1])]: (a[0], b[0]) for a, b in segments}


@pytest.mark.parametrize("study", ["league", "hash_frozen_random", "granularity"])
def test_what_is_drawn_is_what_decides(study):
    """A bar touches the line if and only if the verdict beside it is "not distinguishable"."""
    c = load_comparison(Path(__file__).parents[1] / "experiments" / study)
    drawn = bars(plots.differences(c))
    assert drawn.keys() == set(c.arms[1:])
    for arm, (low, high) in drawn.items():
        assert (low <= 0 <= high) == c.verdict(arm).startswith("not distinguishable"), arm
        assert ("seeds would be needed" in c.verdict(arm)) == (low <= 0 <= high)


# ---------------------------------------------------------------- what diverged, what is missing


def rewrite_run(path, arm: str, seed: int, change) -> None:
    """Changes the summary of a planted run and gathers the table again."""
    file = path / arm / f"seed_{seed}" / "summary.json"
    summary = json.loads(file.read_text())
    change(summary)
    file.write_text(json.dumps(summary))
    results.gather(path, json.loads((path / "study.json").read_text()))


def broken(summary: dict) -> None:
    """As an older version wrote it: complete, with NaN."""
    summary["eval"]["loss"] = {"code": float("nan"), "plays": float("inf"), "mean": float("nan")}


def nulls(summary: dict) -> None:
    """The same in strict JSON."""
    summary["eval"]["loss"] = dict.fromkeys(("code", "plays", "mean"))
    summary["router"]["layers"]["layer_00"]["max_violation"] = None


@pytest.mark.parametrize("change", [broken, nulls])
def test_a_baseline_that_broke_makes_no_arm_win_or_lose(tmp_path, change):
    path = write_planted_study(tmp_path / "planted")
    rewrite_run(path, "base", 1, change)
    c = load_comparison(path)
    assert c.diverged == ["base seed 1"]
    assert re.match(r"better by 0\.2.* \(n=2\); 1 of 3 pairs diverged", c.verdict("good"))
    for seed in (0, 2):
        rewrite_run(path, "base", seed, change)
    c = load_comparison(path)
    assert {c.verdict(arm) for arm in c.arms[1:]} == {"no complete pair of runs: 3 of 3 diverged"}
    _, text = read(write_study_report(path))
    said = text.partition("Arms: what each one changes")[0].lower()
    assert "of which diverged: base seed 0, base seed 1, base seed 2" in said
    assert not re.search(r"\bnan\b|\binf\b", said) and "none of 3 arms can be told" in said


@pytest.mark.parametrize("change", [broken, nulls])
def test_an_arm_that_broke_has_no_part_in_means(tmp_path, change):
    path = write_planted_study(tmp_path / "planted")
    rewrite_run(path, "bad", 0, change)
    c = load_comparison(path)
    assert c.final(c.metric, "bad").keys() == {1, 2} == c.final("eval/bits_per_byte/mean", "bad").keys()
    assert np.isfinite(c.mean("router/max_violation", "bad")) and c.cost_to_target("bad")["steps"].shape == (2,)


def test_a_metric_that_some_arms_log_and_one_that_none_does(tmp_path):
    """An arm with a device load, a deciding metric that no run has, a curve that one arm did not log."""
    path = write_planted_study(tmp_path / "planted")
    rewrite_run(
        path, "good", 0, lambda s: s["router"]["layers"]["layer_00"].update(device_load=1.25, overflow_rate=0.5)
    )
    study = json.loads((path / "study.json").read_text())
    write_json(
        path / "study.json", study | {"metrics": ["eval/loss/mean", "router/device_load", "router/overflow_rate"]}
    )
    _, text = read(write_study_report(path))
    assert "load of the busiest device (of the mean)" in text and "good 1.25 0.500" in text
    (path / "same" / "seed_0" / "metrics.jsonl").write_text("")
    results.gather(path, study)
    assert load_comparison(path).cost_to_target("same")["steps"].shape == (2,)
    write_json(path / "study.json", study | {"metrics": ["eval/bits_per_byte/nowhere"]})
    _, text = read(write_study_report(path))
    assert "good: no complete pair of runs" in text


# ---------------------------------------------------------------- files that somebody changed

TAMPERED = [
    (lambda s: s | {"name": "../../evil"}, "name='../../evil': a name holds letters"),
    (lambda s: s | {"name": "/tmp/evil"}, "name='/tmp/evil': a name holds"),
    (lambda s: s | {"name": ".."}, "name='..': a name holds"),
    (lambda s: s | {"name": "x" * 300}, "a name has at most 128 bytes"),
    (lambda s: s | {"name": 3}, "name=3: must be text"),
    (lambda s: s | {"arms": {**s["arms"], "../x": {}}}, "arm='../x': a name holds"),
    (lambda s: s | {"arms": {**s["arms"], "report": {}}}, "arm='report': the study has a file or folder of this name"),
    (lambda s: s | {"arms": ["base"]}, "arms=['base']: must be a mapping"),
    (lambda s: s | {"baseline": "nobody"}, "baseline='nobody': no such arm"),
    (lambda s: s | {"metrics": []}, "metrics=[]: must be a list of names, at least one"),
    (lambda s: s | {"steps": 0}, "steps=0: must be a positive integer"),
    (lambda s: s | {"seeds": ["0"]}, "seeds=['0']: must be a list of integers"),
    (lambda s: s | {"forward_flops": {}}, "must hold the numbers of arm 'base'"),
    (lambda s: s | {"experts_per_token": dict.fromkeys(s["arms"], 0)}, "must hold the numbers of arm 'base'"),
    (lambda s: {k: v for k, v in s.items() if k != "command"}, "command=missing: must be a list of words"),
    (lambda s: [s], "not a study's description"),
]


@pytest.mark.parametrize("change, message", TAMPERED, ids=[message[:30] for _, message in TAMPERED])
def test_a_tampered_study_is_one_line_and_publishes_nothing(planted, tmp_path, capsys, change, message):
    study, root = tmp_path / "deep" / "planted", tmp_path / "deep" / "root"
    study.mkdir(parents=True)
    root.mkdir()
    (study / "results.parquet").write_bytes((planted / "results.parquet").read_bytes())
    write_json(study / "study.json", change(json.loads((planted / "study.json").read_text())))
    before = sorted(tmp_path.rglob("*"))
    for flags in ([], [f"--publish={root}"]):
        assert main(["report", str(study), *flags]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_table_whose_bits_flipped_is_refused_not_believed(planted, tmp_path, capsys):
    """One bit anywhere: the same numbers or a line, never other numbers and never a traceback."""
    study = tmp_path / "planted"
    study.mkdir()
    (study / "study.json").write_bytes((planted / "study.json").read_bytes())
    whole, refused = bytearray((planted / "results.parquet").read_bytes()), 0
    table = results.read_table(planted, "planted")
    rng = np.random.default_rng(0)
    for position in rng.integers(len(whole), size=60):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.integers(8)
        (study / "results.parquet").write_bytes(damaged)
        try:
            assert load_comparison(study).table.equals(table), position
        except UserError as e:
            refused += 1
            assert "results.parquet: " in str(e) and "\n" not in str(e)
    assert refused > 30


def test_nothing_is_published_through_a_link_or_beside_a_damaged_study(planted, tmp_path, capsys):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "planted").symlink_to(outside)
    assert main(["report", str(planted), f"--publish={root}"]) == 2
    assert "is no folder of its own there" in capsys.readouterr().err and not list(outside.iterdir())
    (root / "planted").unlink()
    (root / "other").mkdir()
    (root / "other" / "results.parquet").write_text("damaged")
    (root / "other" / "study.json").write_text("{")
    assert main(["report", str(planted), f"--publish={root}"]) == 2
    assert "other/study.json: not valid JSON" in capsys.readouterr().err
    assert sorted(p.name for p in root.iterdir()) == ["other"], "nothing was written"
    (tmp_path / "file").write_text("")
    assert main(["report", str(planted), f"--publish={tmp_path / 'file'}"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_study_of_another_size_does_not_take_the_place_of_a_published_one(planted, tmp_path, capsys):
    root = tmp_path / "experiments"
    publish_study(planted, root)
    files = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    small = tmp_path / "small"
    small.mkdir()
    (small / "results.parquet").write_bytes((planted / "results.parquet").read_bytes())
    write_json(small / "study.json", json.loads((planted / "study.json").read_text()) | {"steps": 10})
    assert main(["report", str(small), f"--publish={root}"]) == 2
    assert "holds the study as it was run with steps: 100 there, 10 here" in capsys.readouterr().err
    assert files == {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
