"""The report of a run: one HTML page that reads like an article, and its pictures as PNG files beside it."""

import json
import shlex
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from frugalmoe.analysis.measures.specialisation import Specialisation, group_units, specialise
from frugalmoe.analysis.measures.vocabulary import TypicalToken, hash_likeness, typical_tokens
from frugalmoe.analysis.pages import findings, plots
from frugalmoe.analysis.pages.page import Html, document, folded, join, picture, png, table, tag
from frugalmoe.analysis.pages.passage import coloured
from frugalmoe.analysis.pages.table import balance_rows, headline_rows, loss_rows
from frugalmoe.analysis.stored.probe import Probe
from frugalmoe.analysis.stored.runs import Run, load_run
from frugalmoe.analysis.stored.trace import load_trace, trace_files
from frugalmoe.analysis.wording import number, p_value, percent
from frugalmoe.data.tokenizer import Tokenizer
from frugalmoe.files import remove_leftovers, write_atomically
from frugalmoe.train import goodput

EVENTS_SHOWN = 200  # of the last ones, in the table
TYPICAL_EXPERTS = 6  # how many experts the table of typical tokens shows


class Picture(NamedTuple):
    name: str  # of the PNG file
    draw: Callable[[float], Figure]  # at a width in inches


class Section(NamedTuple):
    title: str
    parts: list  # Html and Picture, in reading order


def write_report(run_dir: str | Path) -> Path:
    """Writes `report/index.html` and its PNG files; returns the page's path. Replaces an older report file by file."""
    run = load_run(run_dir)
    folder = run.path / "report"
    folder.mkdir(exist_ok=True)
    remove_leftovers(folder)
    body = [_opening(run)]
    for section in _sections(run):
        body.append(tag("h2", section.title))
        for part in section.parts:
            if isinstance(part, Picture):
                wide, narrow = png(part.draw(plots.WIDE)), png(part.draw(plots.NARROW))
                write_atomically(folder / f"{part.name}.png", wide)
                part = picture(wide, narrow, section.title)
            body.append(part)
    body.append(tag("p", "Each picture is also a PNG file beside this page.", "note"))
    page = document(f"{run.name} – frugalmoe report", join(body))
    write_atomically(folder / "index.html", page.encode("utf-8", errors="replace"))
    return folder / "index.html"


def _sections(run: Run) -> list[Section]:
    probe = _probe_sections(run, run.probe) if run.probe is not None else []
    if not probe:
        probe = [Section("What the experts specialise in", [_missing("no routing of held-out tokens (probe.npz)")])]
    return [
        Section("Results", _results(run)),
        _section(run, LOSS),
        *_island_sections(run),
        _load_section(run),
        _section(run, BALANCE),
        *probe,
        *_trace_sections(run),
        _section(run, OPTIMIZATION),
        _section(run, AUXILIARY),
        _section(run, SPEED),
        _goodput_section(run),
        *_events(run),
        Section("Sample", [_sample(run)]),
        Section("Reproduce", [_reproduce(run)]),
    ]


HOW_LOSS = (
    "Mean cross-entropy of predicting the next token; lower is better. Grey: training batches, smoothed if many. "
    "Dots: whole held-out documents of each domain; of more than eight domains the hardest and the easiest are named."
)
HOW_LOAD = (
    "One row per expert, steps from left to right. White: the load that balance would give; orange: more; "
    "purple: less. A row that stays orange is an overloaded expert, a dark purple one is dying."
)
HOW_BALANCE = (
    "Max violation is how far the busiest expert is above the mean load, per optimizer step; 0 is perfect balance, and "
    "the dashed line is what sampling alone gives. Router entropy says how undecided the router is about a token: "
    "at ln E all experts look the same to it, at 0 it is certain."
)
HOW_OPTIM = (
    "Gradient norm: the length of the gradient of all parameters, before it is clipped; a jump is a batch that pulled "
    "hard, a rise that stays is a run about to break. Parameter norm: the length of the parameters after the step. "
    "Learning rate: the size of a step, as the schedule sets it."
)
HOW_AUXILIARY = (
    "What training adds to the cross-entropy, or only watches: each loss as it is before its coefficient, mean over "
    "layers, of training batches. A load balance loss is 1 where every expert gets its share."
)
HOW_PASSAGE = (
    "Held-out text as the model saw it: the colour and the number under a token name the expert that it went to, or of "
    "its experts the one with the fewest tokens here (hover to see all). ⏎ is a line break, · a part of a character, "
    "▪ the end of a document. One layer is shown at a time."
)
HOW_ROUNDS = (
    "This run is one of several islands that train one model apart and merge what they found after every round. How "
    "long it trained and waited in each round that it handed something in for, and the bytes that it wrote into the "
    "directory of the islands and read from there. The first round includes compilation."
)
HOW_ISLAND_LOADS = (
    "One row per island: the share of its token slots that each expert gets, over the uniform share, in what was "
    "merged in the later half of the rounds. White: uniform; orange: more; purple: less. Columns in which islands "
    "differ are experts that specialise in what an island sees, or drift apart between two rounds."
)
HOW_EVENTS = (
    "What happened beside the training itself: batches that were skipped, and came again or were dropped; phases of a "
    "lowered learning rate; returns to a checkpoint; new starts. Seconds are those since the start that the row is of."
)
HOW_SPEED = "Tokens of all devices per second of training; evaluation and checkpoints are left out."
HOW_GOODPUT = (
    "Each second of the run, from its first start to its last row, is of one kind. Above: steps that the run still has "
    "and the work around them; what was done after a checkpoint that the run went back to is lost, and the time from a "
    "death to the end of the first step after it is restart."
)
HOW_DOMAINS = (
    "The share of a domain's held-out tokens that goes to each expert (domain specialisation of OLMoE, "
    "arXiv 2409.02060), over the share that chance would give, K / E. White: as chance. "
    "Numbers, where there is room: percent of the domain's tokens."
)
HOW_INTERVALS = (
    "The layer of the most specialised pair in detail: the pairs of domain and expert that differ most from the mean "
    "over domains. Dots: share of the domain's tokens, orange above and blue below the dashed line, which is chance; "
    "bars: 95% bootstrap intervals over units. A unit is a held-out document (a row of the probe in runs that did not "
    "note documents)."
)
HOW_CO_ACTIVATION = (
    "Of the tokens of expert i, how many also go to expert j, over what independent choices at the same loads would "
    "give. Orange: more often; purple: less; grey: no tokens."
)

HOW_SATURATION = (
    "Above: of the experts that a held-out token has at the last checkpoint, how many it had already (router "
    "saturation of OLMoE, arXiv 2409.02060); dashed: what routing that ignores the token would give at the same "
    "loads. Below: how many of a token's experts change from one checkpoint to the next."
)
HOW_VOCABULARY = (
    "Of the occurrences of a token id, the share that goes to its favourite expert, averaged over ids that occur at "
    "least 8 times (vocabulary specialisation of OLMoE): by the token that is read, the one that follows, and the one "
    "that the model predicts. Dashes: the same with ids exchanged between tokens, since a favourite of few "
    "occurrences is high by chance."
)


class Chart(NamedTuple):
    """A section of one picture of a run."""

    title: str
    name: str  # of the picture's file
    draw: Callable[..., Figure | None]  # of the run, at a width in inches
    find: Callable[[Run], str]  # what this run's picture shows, in words
    how: str  # to read it
    lacking: str  # what a run without the picture has


LOSS = Chart("Loss", "loss", plots.loss_curves, findings.loss, HOW_LOSS, "no training or evaluation metrics")
BALANCE = Chart("Balance of the routers", "balance", plots.balance, findings.balance, HOW_BALANCE, "no router metrics")
OPTIMIZATION = Chart(
    "Optimization", "optimization", plots.optimization, findings.optimization, HOW_OPTIM, "no optimizer metrics"
)
AUXILIARY = Chart(
    "Auxiliary losses", "auxiliary", plots.auxiliary_losses, findings.auxiliary_losses, HOW_AUXILIARY, "none"
)
GOODPUT = Chart(
    "Wall time", "goodput", plots.goodput, findings.goodput, HOW_GOODPUT, "no record of its wall time (goodput.jsonl)"
)
SPEED = Chart("Speed", "speed", plots.speed, findings.speed, HOW_SPEED, "no timed steps")


def _section(run: Run, chart: Chart) -> Section:
    if chart.draw(run) is None:
        return Section(chart.title, [_missing(chart.lacking)])
    return Section(
        chart.title, [_how(chart.how), Picture(chart.name, partial(chart.draw, run)), _shows(chart.find(run))]
    )


def _goodput_section(run: Run) -> Section:
    section = _section(run, GOODPUT)
    if run.goodput is None:
        return section
    return section._replace(parts=[*section.parts, _seconds_table(run.goodput)])


def _seconds_table(found: goodput.Goodput) -> Html:
    return table(["kind", "what it is", "seconds", "share"], goodput.table(found), text_columns=2)


def _how(sentence: str) -> Html:
    return tag("p", sentence)


def _shows(sentence: str) -> Html:
    return tag("p", join([tag("strong", "This run:"), sentence], " "), "shows")


def _missing(what: str) -> Html:
    return tag("p", f"Not shown: the run has {what}.", "note")


# ---------------------------------------------------------------- top of the page


def _opening(run: Run) -> Html:
    summary = run.summary
    steps = run.config.get("train", {}).get("steps")
    status = {
        "complete": f"Complete: {summary.get('step', 0):,} optimizer steps.",
        "stopped": f"Stopped at optimizer step {summary.get('step', 0):,} of {summary.get('steps', 0):,}.",
    }.get(summary.get("status"), f"Unfinished: {_last_step(run):,} of {steps or '?'} optimizer steps are logged.")
    return join([tag("h1", run.name), tag("p", f"Report of a mixture-of-experts training run. {status}", "lead")])


def _last_step(run: Run) -> int:
    return max((int(s.steps[-1]) for s in run.metrics.values()), default=0)


def _results(run: Run) -> list[Html]:
    parts = []
    if losses := loss_rows(run):
        header = ["validation domain", "loss (nats per token)", "bits per byte"]
        parts.append(table(header, losses))
    else:
        parts.append(_missing("no final evaluation"))
    if headline := headline_rows(run):
        parts.append(table(["", ""], headline, text_columns=2))
    header, rows = balance_rows(run)
    if rows:
        caption = "Routing of each MoE layer on the held-out documents"
        short = len(rows) <= 8
        parts.append(table(header, rows, caption) if short else folded(caption, table(header, rows)))
    return parts


def _island_sections(run: Run) -> list[Section]:
    """Returns the sections of a run that is one of several islands."""
    if run.rounds is None:
        return []
    parts = [_how(HOW_ROUNDS), Picture("rounds", partial(plots.rounds, run)), _shows(findings.rounds(run))]
    loads = [_missing("no expert loads of islands (island_load.jsonl)")]
    if run.island_loads is not None:
        draw = partial(plots.island_loads, run.island_loads)
        loads = [_how(HOW_ISLAND_LOADS), Picture("island_load", draw), _shows(findings.island_loads(run))]
    return [Section("Rounds of this island", parts), Section("Expert loads of all islands", loads)]


def _load_section(run: Run) -> Section:
    title = "Expert load over training"
    if run.loads is None or not run.loads.counts_SLE.sum(-1).all():
        return Section(title, [_missing("no expert loads (expert_load.jsonl)")])
    return Section(
        title,
        [_how(HOW_LOAD), Picture("expert_load", partial(plots.expert_load, run.loads)), _shows(findings.load(run))],
    )


# ---------------------------------------------------------------- what the probe shows


def _probe_sections(run: Run, probe: Probe) -> list[Section]:
    domains = run.domains or [f"domain {g}" for g in range(int(probe.domain_ids_N.max()) + 1)]
    units = group_units(probe.selected_LNE, probe.domain_ids_N, probe.unit_ids_N)
    found = specialise(units, len(domains))
    sections = [
        Section("What the experts specialise in: domains", _domain_parts(found, probe, domains)),
        Section("What the experts specialise in: tokens", _token_parts(run, probe)),
        Section("A passage, token by token", _passage_parts(run, probe, domains)),
    ]
    draw, together = partial(plots.co_activation, probe), [_missing("one expert per token at most, so no pairs")]
    if draw() is not None:
        together = [_how(HOW_CO_ACTIVATION), Picture("co_activation", draw), _shows(findings.co_activation(probe))]
    return [*sections, Section("Experts that work together", together)]


def _domain_parts(found: Specialisation, probe: Probe, domains: list[str]) -> list:
    present = np.flatnonzero(found.tokens_G)
    if len(present) < 2:
        return [_missing("fewer than two domains in its probe")]
    few = sorted(present, key=lambda g: found.tokens_G[g])[:8]
    sizes = ", ".join(f"{domains[g]} {found.tokens_G[g]:,} tokens in {found.units_G[g]:,} units" for g in sorted(few))
    sizes += f", and more of {len(present) - 8} other domains" if len(present) > 8 else ""
    return [
        _how(HOW_DOMAINS),
        Picture("domains", partial(plots.domain_heatmaps, found, probe.layers_L, domains)),
        _shows(findings.specialisation(found, probe.layers_L, domains)),
        _how(HOW_INTERVALS),
        Picture("domain_intervals", partial(plots.domain_intervals, found, probe.layers_L, domains)),
        _information_table(found, probe),
        tag(
            "p",
            "The shuffled baseline exchanges the domain labels of whole units, 999 times: it shows how much "
            "information chance alone would give between domains and experts in a probe of this size. A router that "
            "follows the token id alone also lies above it, since domains use "
            f"different words: compare the next section. Probe: {sizes}.",
            "note",
        ),
    ]


def _passage_parts(run: Run, probe: Probe, domains: list[str]) -> list[Html]:
    if run.tokenizer is None:
        return [_missing("no tokenizer to write the tokens with")]
    return [_how(HOW_PASSAGE), coloured(probe, run.tokenizer, domains)]


def _information_table(found: Specialisation, probe: Probe) -> Html:
    rows = []
    for l, (layer, above) in enumerate(zip(probe.layers_L, findings.verdicts(found))):
        rows.append(
            [
                str(layer),
                number(found.information_L[l]),
                percent(found.information_L[l] / found.domain_entropy),
                number(found.shuffled_L[l]),
                p_value(found.p_L[l]).removeprefix("p = ").removeprefix("p "),
                "above" if above else "not above",
            ]
        )
    header = ["layer", "I(domain; expert), nats", "of H(domain)", "shuffled baseline, nats", "p", "verdict"]
    return table(header, rows, caption="Information between the domain of a token and the expert it goes to")


def _token_parts(run: Run, probe: Probe) -> list[Html]:
    likeness_L = [hash_likeness(s_NE, probe.token_ids_N) for s_NE in probe.selected_LNE]
    layers = [str(layer) for layer in probe.layers_L]
    parts = [
        _how(
            "Routers often follow the token itself more than its context. Below: how much of the routing the token id "
            "explains, from 0% (context only) to 100% (an id always gets the same experts, as with a hash router)."
        ),
        table(["layer", *layers], [["explained by the token id", *map(percent, likeness_L)]]),
    ]
    if run.tokenizer is None:
        return [*parts, _missing("no tokenizer to name the tokens with")]
    rows = _typical_rows(run, probe)
    if not rows:
        return [*parts, _missing("no expert with typical tokens: no id stands out")]
    how = (
        f"The experts with the clearest vocabulary (at most {TYPICAL_EXPERTS}), and the tokens that go to them much "
        "more often than other tokens do; in brackets, how many of a token's occurrences in the probe the expert got. "
        "Ordered by log-odds ratio with a prior; what chance explains is left out. ␣ is a space, ⏎ a line break."
    )
    return [*parts, _how(how), table(["expert", "most typical tokens"], rows, text_columns=2)]


def _typical_rows(run: Run, probe: Probe) -> list[tuple[str, Html]]:
    found = []
    for layer, selected_NE in zip(probe.layers_L, probe.selected_LNE):
        for expert in range(selected_NE.shape[1]):
            if tokens := typical_tokens(selected_NE, probe.token_ids_N, expert):
                found.append((sum(t.log_odds for t in tokens), f"layer {layer}, expert {expert}", tokens))
    found.sort(key=lambda row: -row[0])
    return [(name, join((_token(run, t) for t in tokens), ", ")) for _, name, tokens in found[:TYPICAL_EXPERTS]]


def _token(run: Run, token: TypicalToken) -> Html:
    return join([tag("code", show_token(run.tokenizer, token.token_id)), f"({token.routed}/{token.seen})"], " ")


def show_token(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as it can be seen; its id where it is no text of its own (part of a character, or special)."""
    if token_id == tokenizer.eos:
        return "end of document"
    shown = tokenizer.decode([token_id])
    if not shown or "\ufffd" in shown:
        return f"id {token_id}"
    return shown.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


# ---------------------------------------------------------------- what the trace shows


def _trace_sections(run: Run) -> list[Section]:
    """Returns the sections of a run that `frugalmoe trace` has traced."""
    if not trace_files(run.path):
        return []
    trace = load_trace(run.path)
    count, draw = len(trace.steps_S), partial(plots.saturation, trace)
    settling = [_missing(f"{count} traced checkpoint{'s' * (count > 1)}, and when the routing settles takes three")]
    if draw() is not None:
        settling = [_how(HOW_SATURATION), Picture("saturation", draw), _shows(findings.saturation(trace))]
    words = [
        _how(HOW_VOCABULARY),
        Picture("vocabulary", partial(plots.vocabulary_specialisation, trace.probe())),
        _shows(findings.vocabulary(trace.probe())),
    ]
    return [Section("When the routing settles", settling), Section("Whose words the experts follow", words)]


# ---------------------------------------------------------------- end of the page


def _sample(run: Run) -> Html:
    sample = run.summary.get("sample")
    if not sample:
        return _missing("no sample of generated text")
    if not sample["text"]:
        return tag("p", f"No text: {sample.get('why', 'the model ended the document at once')}.", "note")
    return tag("pre", join([tag("strong", sample["prompt"]), sample["text"]], ""))


def _events(run: Run) -> list[Section]:
    """A table of the last events of a run, where there are any, below how many there are of each kind."""
    if not run.events:
        return []
    shown = lambda row, name: "–" if row.get(name) is None else str(row[name])
    kinds = Counter(shown(row, "kind").replace("_", " ") for row in run.events)
    found = ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common())
    rows = [[*(shown(row, name) for name in ("kind", "what", "step", "seconds"))] for row in run.events]
    last = table(["event", "what", "step", "seconds"], rows[-EVENTS_SHOWN:], text_columns=2)
    title = f"{len(rows)} events" if len(rows) <= EVENTS_SHOWN else f"the last {EVENTS_SHOWN} of {len(rows):,} events"
    return [Section("Events", [_how(HOW_EVENTS), _shows(f"{found}."), folded(title, last)])]


def _starts(run: Run) -> list[Html]:
    """A table of a run's starts where there were several: the command above alone would not give this run."""
    if len(run.history) < 2:
        return []
    rows = []
    for start in run.history:
        command, changes = start.get("command") or ["–"], start.get("changes") or {}
        shown = shlex.join([Path(command[0]).name, *command[1:]])
        changed = "; ".join(f"{field}: {' → '.join(map(str, values))}" for field, values in changes.items())
        rows.append([start.get("time") or "–", shown, start.get("git_commit") or "–", changed or "–", start["step"]])
    header = ["time (UTC)", "command", "commit", "changes of the configuration", "from step"]
    return [folded(f"{len(rows)} starts", table(header, rows, text_columns=4))]


def _reproduce(run: Run) -> Html:
    environment = dict(run.environment)
    lines = []
    if command := environment.get("command"):
        lines += [shlex.join([Path(command[0]).name, *command[1:]])]
    lines += [shlex.join(["frugalmoe", "report", str(run.path)])]
    commit = environment.get("git_commit")
    note = tag("p", f"At commit {commit}:" if commit else "Commands:")
    return join(
        [
            note,
            tag("pre", "\n".join(lines)),
            *_starts(run),
            folded("Configuration", tag("pre", json.dumps(run.config, indent=1))),
            folded("Environment", tag("pre", json.dumps(environment, indent=1))),
        ]
    )
