"""The report finds what was planted, says honestly what is not there, and is one safe, self-contained page."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from test_analysis_runs import DOMAINS, SCRIPT, write_planted_run

from frugalmoe.analysis import write_report
from frugalmoe.cli import main

VOID = {"meta", "img", "br", "source"}


class Reader(HTMLParser):
    """Collects text and attributes, and checks that elements nest."""

    def __init__(self):
        super().__init__()
        self.open, self.words, self.attributes, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.words.append(" " if tag in ("td", "th") else "")

    def handle_data(self, data):
        self.words.append(data)


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader, " ".join("".join(reader.words).split())


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return read(write_report(write_planted_run(tmp_path_factory.mktemp("runs") / "planted")))


def test_the_planted_domain_expert_is_found(planted):
    _, text = planted
    assert re.search(r"expert 3 of layer 1 with domain code: it gets 9\d\.\d% of that domain's tokens", text)
    assert "chance 25.0%" in text and "Shuffled domain labels do not give such an excess" in text
    assert "Routing depends on the domain, beyond shuffled labels, in layer 1." in text
    assert re.search(r"2 0\.00\d+ 0\.\d% 0\.00\d+ 0\.\d+ not above", text)  # layer 2 of the table


def test_the_planted_token_and_load_are_found(planted):
    _, text = planted
    assert re.search(r"layer 2, expert 5 " + re.escape(SCRIPT) + r" \((\d+)/\1\)", text)  # all of its occurrences
    # expert 0 of layer 1 gets 0.3 of the slots: 0.3 * 8 = 2.4 times the uniform load
    assert re.search(r"busiest expert is 0 of layer 1 with 2\.(3|4)\d? times", text)
    assert "no layer is above twice" not in text


def test_text_from_the_run_cannot_become_markup(planted):
    reader, text = planted
    assert not {"script", "b", "i", "br"} & set(reader.tags)
    for written in (SCRIPT, "or </pre><script>\\x00", "To be <br>", "planted & <b>bold</b>", DOMAINS[2]):
        assert written in text


def test_nothing_is_fetched(planted):
    reader, _ = planted
    links = [value for name, value in reader.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert links and all(value.startswith("data:image/png;base64,") for value in links)
    assert not {"link", "iframe", "object"} & set(reader.tags)


def test_every_picture_is_described_and_lies_beside_the_page(planted, tmp_path):
    page = write_report(write_planted_run(tmp_path / "run"))
    names = {p.name for p in page.parent.iterdir()}  # no temporary file is left
    pictures = ["loss", "expert_load", "balance", "domains", "domain_intervals", "co_activation", "speed"]
    assert names == {"index.html", *(f"{p}.png" for p in pictures)}
    reader, _ = planted
    assert reader.tags.count("img") == len(pictures)
    assert all(value for name, value in reader.attributes if name == "alt")


def test_the_same_run_gives_the_same_page(tmp_path):
    run = write_planted_run(tmp_path / "run")
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


PIECES = [
    ("probe.npz", "no routing of held-out tokens (probe.npz)"),
    ("expert_load.jsonl", "no expert loads (expert_load.jsonl)"),
    ("summary.json", "no final evaluation"),
    ("tokenizer", "no tokenizer to name the tokens with"),
]


@pytest.mark.parametrize("name, said", PIECES)
def test_a_missing_piece_is_said_in_one_line(tmp_path, name, said):
    run = write_planted_run(tmp_path / "run")
    (run / name).rename(tmp_path / "away")
    _, text = read(write_report(run))
    assert f"Not shown: the run has {said}." in text


def test_a_run_that_has_just_begun(tmp_path):
    run = write_planted_run(tmp_path / "run")
    for name in ("probe.npz", "expert_load.jsonl", "summary.json", "environment.json"):
        (run / name).unlink()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss/ce": 5.5}\n')
    _, text = read(write_report(run))
    assert "Unfinished: 1 of 500 optimizer steps" in text and "The run has no evaluation yet." in text
    (run / "metrics.jsonl").write_text("")
    _, text = read(write_report(run))
    assert "no training or evaluation metrics" in text


def test_noise_is_not_reported_as_specialisation(tmp_path, monkeypatch):
    import test_analysis_runs as planting

    def at_random(rng, domain_N, token_N):
        scores = rng.random((len(planting.LAYERS), token_N.size, planting.E))
        return scores.argsort(-1).argsort(-1) < planting.K

    monkeypatch.setattr(planting, "planted_selection", at_random)
    _, text = read(write_report(write_planted_run(tmp_path / "run")))
    assert "This is not above the shuffled baseline" in text
    assert "In no layer does routing depend on the domain more than shuffled labels explain." in text


def test_the_command_prints_where_the_page_is(tmp_path, capsys):
    assert main(["report", str(write_planted_run(tmp_path / "run"))]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'report' / 'index.html'}\n"


def test_one_expert_one_domain_one_row(tmp_path, monkeypatch):
    """The smallest run: nothing to compare, no pairs, no interval; the page says so and no number is made up."""
    import test_analysis_runs as planting

    for name, value in {"E": 1, "K": 1, "ROWS": 1, "DOMAINS": ["plays"]}.items():
        monkeypatch.setattr(planting, name, value)
    monkeypatch.setattr(planting, "planted_selection", lambda rng, d, t: np.ones((2, t.size, 1), bool))
    monkeypatch.setattr(planting, "_counts", lambda rng: [[64], [64]])
    run = write_planted_run(tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["model"]["moe"] |= {"num_experts": 1, "num_experts_per_token": 1}
    (run / "config.json").write_text(json.dumps(config))
    _, text = read(write_report(run))
    assert "fewer than two domains in its probe" in text and "one expert per token at most" in text
    assert "nan" not in text.split("Configuration")[0].lower()
