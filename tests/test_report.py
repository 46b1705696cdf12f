"""The report finds what was planted, says honestly what is not there, and is one safe, self-contained page."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from runs import TINY
from test_analysis_runs import DOMAINS, SCRIPT, write_planted_run

from frugalmoe import config as configs
from frugalmoe.analysis import load_run, plots, write_report
from frugalmoe.analysis.measures.specialisation import group_units, specialise
from frugalmoe.analysis.pages import findings
from frugalmoe.analysis.pages.passage import _pieces, passages
from frugalmoe.analysis.pages.table import headline_rows
from frugalmoe.analysis.wording import count
from frugalmoe.cli import main
from frugalmoe.cost import forward_flops
from frugalmoe.data.tokenizer import ByteTokenizer
from frugalmoe.errors import UserError
from frugalmoe.fields import to_dict
from frugalmoe.train import goodput

pytestmark = pytest.mark.whole

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


def test_every_start_is_shown_where_there_were_several(tmp_path):
    """A run that three commands made names them all, escaped, with what each changed."""
    run = write_planted_run(tmp_path / "run")
    for name in ("probe.npz", "expert_load.jsonl", "summary.json"):
        (run / name).unlink()
    (run / "metrics.jsonl").write_text("")
    starts = [
        {"time": None, "step": 0, "command": ["/bin/frugalmoe", "train", "<b>"], "git_commit": "aaa", "changes": {}},
        {"time": "2026-11-29T18:00:00+00:00", "step": 400, "changes": {"optim.learning_rate": [0.003, 0.001]}},
    ]
    for several in (False, True):
        (run / "history.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts[: 1 + several]))
        _, text = read(write_report(run))
        assert ("2 starts" in text) == several
    assert "frugalmoe train '<b>' aaa" in text and "optim.learning_rate: 0.003 → 0.001 400" in text


def test_events_are_shown_where_there_are_any(tmp_path):
    """Escaped; of very many the last ones."""
    run = write_planted_run(tmp_path / "run")
    for name in ("probe.npz", "expert_load.jsonl", "summary.json"):
        (run / name).unlink()
    (run / "metrics.jsonl").write_text("")
    assert "What happened beside" not in read(write_report(run))[1]
    rows = [{"step": i, "kind": "skipped", "what": f"batch {i} <b>", "seconds": 0.5} for i in range(300)]
    (run / "events.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"step": 300, "kind": "rate_lowered"}])
    )
    _, text = read(write_report(run))
    assert "skipped 300, rate lowered 1." in text and "the last 200 of 301 events" in text
    assert "batch 299 <b> 299 0.5" in text and "batch 101 <b>" in text and "batch 100 <b>" not in text
    assert "rate_lowered – 300 –" in text


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


def plant(monkeypatch, path, domains: list[str], experts: int, k: int, layers=(1, 2)):
    """A run of another shape, with losses that differ by domain; routing at random."""
    import test_analysis_runs as planting

    shape = {"E": experts, "K": k, "DOMAINS": domains, "LAYERS": list(layers), "ROWS": max(36, 2 * len(domains))}
    for name, value in shape.items():
        monkeypatch.setattr(planting, name, value)
    at_random = lambda rng, d, t: rng.random((len(layers), t.size, experts)).argsort(-1).argsort(-1) < k
    monkeypatch.setattr(planting, "planted_selection", at_random)
    monkeypatch.setattr(planting, "_counts", lambda rng: [rng.multinomial(4096, [1 / experts] * experts).tolist()] * 2)
    run = write_planted_run(path)
    config = json.loads((run / "config.json").read_text())
    config["model"]["moe"] |= {"num_experts": experts, "num_experts_per_token": k}
    (run / "config.json").write_text(json.dumps(config))
    rows = (run / "metrics.jsonl").read_text()
    more = {"loss/load_balance": 1.2, "loss/prototype_alignment": 0.5, "optim/gradient_norm": 0.7}
    row = {"step": 500, **more, "optim/learning_rate": 1e-3}
    (run / "metrics.jsonl").write_text(rows + json.dumps(row) + "\n")
    return load_run(run)


LONG = "a very long name of a domain, with <b>markup</b> and $x_1$, number"
SHAPES = {
    "1 domain, 1 expert": (["plays"], 1, 1),
    "8 domains": ([f"domain {i}" for i in range(8)], 16, 2),
    "15 domains, 64 experts": ([f"kind {i}" for i in range(15)], 64, 8),
    "40 domains with long names": ([f"{LONG} {i}" for i in range(40)], 64, 8),
}


def pictures_of(run, width: float) -> dict:
    probe, found = run.probe, None
    figures = [
        draw(run, width) for draw in (plots.loss_curves, plots.balance, plots.optimization, plots.auxiliary_losses)
    ]
    figures += [plots.expert_load(run.loads, width), plots.co_activation(probe, width)]
    if len(run.domains) > 1:
        units = group_units(probe.selected_LNE, probe.domain_ids_N, probe.unit_ids_N)
        found = specialise(units, len(run.domains), shuffles=3)
        args = (found, probe.layers_L, run.domains, width)
        figures += [plots.domain_heatmaps(*args), plots.domain_intervals(*args)]
    return [figure for figure in figures if figure is not None]


@pytest.mark.parametrize("width", [plots.WIDE, plots.NARROW])
@pytest.mark.parametrize("name", SHAPES)
def test_nothing_leaves_a_picture(tmp_path, monkeypatch, name, width):
    """On a page and on a telephone: every legend and every label lies inside, however many domains and experts."""
    run = plant(monkeypatch, tmp_path / "run", *SHAPES[name])
    for figure in pictures_of(run, width):
        check_inside(figure, width)


def check_inside(figure, width: float) -> None:
    assert figure.get_figwidth() == width and figure.get_figheight() < 60
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [axis.label for a in figure.axes for axis in (a.xaxis, a.yaxis)] + [a.title for a in figure.axes]
    drawn = lambda axes, tick: min(axes.get_ylim()) <= tick.get_position()[1] <= max(axes.get_ylim())
    ticks = [t for a in figure.axes for t in a.get_yticklabels() if t.get_visible() and drawn(a, t)]
    for shown in [*figure.legends, *(t for t in texts if t.get_text()), *ticks]:
        box = shown.get_window_extent(canvas.get_renderer())
        assert box.x0 > -2 and box.x1 < figure.bbox.x1 + 2, (shown, box)
        assert box.y0 > -2 and box.y1 < figure.bbox.y1 + 2, (shown, box)
    for axes in figure.axes:
        assert axes.get_window_extent().width > 0.3 * figure.bbox.width or len(figure.axes) > 2


@pytest.mark.parametrize("name", SHAPES)
def test_no_colour_stands_for_two_domains(tmp_path, monkeypatch, name):
    domains = SHAPES[name][0]
    figure = plots.loss_curves(plant(monkeypatch, tmp_path / "run", *SHAPES[name]))
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 5]  # evaluations
    colours = [line.get_color() for line in lines]
    named = [colour for colour in colours if colour != plots.UNNAMED]
    assert len(lines) == len(domains) and len(set(named)) == len(named) == min(len(domains), 8)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(set(labels)) == len(labels) == 1 + len(named) + (len(domains) > 8)
    if len(domains) > 8:
        assert labels[-1] == f"{len(domains) - 8} other domains between them"
        ends = {line.get_color(): line.get_ydata()[-1] for line in lines if line.get_color() != plots.UNNAMED}
        assert max(ends.values()) < figure.axes[0].get_ylim()[1], "where a curve ends is in the picture"


def test_what_training_adds_is_shown(tmp_path, monkeypatch):
    _, text = read(write_report(plant(monkeypatch, tmp_path / "run", *SHAPES["8 domains"]).path))
    assert "load balance loss 1.20 (times 0.01)" in text and "prototype alignment loss 0.500 (watched only)" in text
    assert "The gradient norm was 0.700 in the median" in text and "learning rate went up to 0.001" in text
    assert "training tokens 512 k" in text  # 500 steps of 16 x 64


def test_tokens_and_compute_by_hand(tmp_path):
    """A run of this code: 3 x forward FLOPs x 500 steps of 16 sequences of 64 tokens."""
    run = write_planted_run(tmp_path / "run")
    config = to_dict(configs.resolve(configs.override(configs.default(), TINY)))
    config["train"]["steps"], config["train"]["batch_size"], config["data"]["sequence_length"] = 500, 16, 64
    (run / "config.json").write_text(json.dumps(config))
    model = dataclasses.replace(configs.resolve(config).model, vocab_size=64)  # 30 words, rounded up
    flops = 3 * sum(forward_flops(model, 64).values())
    rows = dict(headline_rows(load_run(run)))
    assert rows["training tokens"] == "512 k"
    assert rows["training compute"] == f"{count(flops * 512_000)} FLOPs ({count(flops)} per token)"


class Passages(HTMLParser):
    """Of a page: for each layer the (token, number under it, experts of its title) of its passages."""

    def __init__(self):
        super().__init__()
        self.layers, self.title, self.inside = [], None, None

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        if tag == "details" and dict(attrs).get("name") == "passage":
            self.layers.append([])
        if tag == "ruby":
            self.title = dict(attrs)["title"]
            self.layers[-1].append(["", "", self.title])

    def handle_endtag(self, tag):
        self.inside = "ruby" if tag == "rt" else None

    def handle_data(self, data):
        if self.inside in ("ruby", "rt"):
            self.layers[-1][-1][self.inside == "rt"] += data


def test_a_passage_names_the_experts_that_its_tokens_went_to(tmp_path):
    """Against the probe: the longest document of each domain, one part per layer, SCRIPT as text."""
    path = write_planted_run(tmp_path / "run")
    reader = Passages()
    reader.feed(write_report(path).read_text())
    run = load_run(path)
    assert len(reader.layers) == 2
    for l, tokens in enumerate(reader.layers):
        at = iter(np.concatenate([p.tokens_N for p in passages(run.probe, run.domains)]))
        for shown, number, title in tokens:
            n = next(at)
            experts = np.flatnonzero(run.probe.selected_LNE[l, n])
            assert int(number) in experts and re.findall(r"\d+", title) == [str(e) for e in experts]
            assert shown.strip() == run.tokenizer.decode([run.probe.token_ids_N[n]])
        assert next(at, None) is None
    assert SCRIPT in {shown.strip() for shown, _, _ in reader.layers[0]}


def test_a_passage_of_bytes_is_whole_characters(tmp_path):
    """Three bytes of one character and a line break: marks, then the character; an end of text starts anew."""
    ids = np.array([*"é€\nx".encode(), 256, 97])
    assert list(_pieces(ByteTokenizer(), ids)) == ["·", "é", "·", "·", "€", "⏎\n", "x", "▪", "a"]


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


# A run that is one of several islands.

ROUND = {
    "merged": True, "islands": 2, "tokens": 1000, "tokens_of_all": 4000, "seconds/trained": 9.0, "seconds/waited": 1,
    "bytes/written": 2_000_000, "bytes/read": 5_000_000,
}  # fmt: skip


def write_rounds(path, loads=None, rounds: int = 4, **fields):
    """Adds to a run what an island writes; of its two layers the experts of the first are loaded as `loads` says."""
    rows = [{"step": 10 * n, "round": n, **ROUND, **fields} for n in range(1, rounds + 1)]
    (path / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loads = {"a": [1, 3, 0, 0], "b": [1, 1, 1, 1]} if loads is None else loads
    of_round = [(name, [counts, [5] * len(counts)]) for name, counts in loads.items()]
    rows = [{"step": row["step"], "round": row["round"], "layers": [1, 2], "loads": of_round} for row in rows]
    (path / "island_load.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rounds_and_loads_of_all_islands_are_shown(tmp_path):
    path = write_rounds(write_planted_run(tmp_path / "run"))
    _, text = read(write_report(path))
    assert "4 of 4 rounds merged what it found, with 2 contributions each. It trained 90.0% of the time." in text
    assert "A round wrote 2.00 MB and read 5.00 MB" in text and "hold 4.00 k tokens" in text
    assert "handed in 4.00 k" in text
    assert "Rounds 3 to 4. The busiest expert of any island has 3.00 times the uniform load." in text
    assert "about expert 1 of layer 1: it gets 75.0% of a and 25.0% of b." in text
    assert {"rounds.png", "island_load.png"} <= {file.name for file in (path / "report").iterdir()}
    assert "Rounds of this island" not in read(write_report(write_planted_run(tmp_path / "alone")))[1]


def test_what_islands_say_cannot_break_the_page(tmp_path):
    """Names that are markup, counts of another shape or of nothing."""
    run = write_planted_run(tmp_path / "run")
    wrong = {"<script>": [1, 2, 3, 4], "long": [1] * 3, "empty": [], "none": [0] * 4}
    page, _ = read(write_report(write_rounds(run, wrong)))
    assert "script" not in page.tags and load_run(run).island_loads.islands == ["<script>", "none"]


def test_rounds_in_which_nothing_was_merged_are_said_so(tmp_path):
    nothing = {"seconds/trained": 0.0, "seconds/waited": 0.0, "bytes/read": 0, "merged": False, "islands": 0}
    run = load_run(write_rounds(write_planted_run(tmp_path / "run"), {}, **nothing))
    assert findings.rounds(run).startswith(
        "0 of 4 rounds merged what it found, with 0 contributions each. A round wrote"
    )
    assert run.island_loads is None and plots.rounds(run) is not None
    alone = load_run(write_rounds(run.path, {"one": [0, 0]}, rounds=1))
    assert "Islands differ" not in findings.island_loads(alone)


@pytest.mark.parametrize(("name", "row"), [("rounds", {"round": "1"}), ("rounds", {"merged": 1}), ("rounds", {}),
                                           ("island_load", {"round": 1}), ("island_load", {"layers": 3})])  # fmt: skip
def test_a_damaged_line_of_an_island_is_named(tmp_path, name, row):
    path = write_rounds(write_planted_run(tmp_path / "run")) / f"{name}.jsonl"
    path.write_text(path.read_text() + json.dumps({"step": 50, **row}) + "\n")
    with pytest.raises(UserError, match=f"{name}.jsonl line 5: "):
        load_run(path.parent)


@pytest.mark.parametrize("width", [plots.WIDE, plots.NARROW])
@pytest.mark.parametrize("islands", [1, 2, 300])
def test_nothing_leaves_a_picture_of_islands(tmp_path, islands, width):
    names = {f"{'a-long-name-of-an-island-' * 3}{n}": [n, 1, 2, 3] * 4 for n in range(islands)}
    run = load_run(write_rounds(write_planted_run(tmp_path / "run"), names, rounds=200))
    for figure in (plots.rounds(run, width), plots.island_loads(run.island_loads, width)):
        check_inside(figure, width)


@pytest.mark.parametrize("width", [plots.WIDE, plots.NARROW])
@pytest.mark.parametrize("starts", [1, 40])
def test_nothing_leaves_a_picture_of_the_wall_time(tmp_path, starts, width):
    seconds = dict.fromkeys(goodput.KINDS, 1e6)
    found = goodput.Goodput(seconds, [seconds] * starts, [3.0] * starts)
    run = dataclasses.replace(load_run(write_planted_run(tmp_path / "run")), goodput=found)
    check_inside(plots.goodput(run, width), width)
    assert findings.goodput(run).startswith(f"7.1% of 14,000,000 s of wall time in {starts} start")
