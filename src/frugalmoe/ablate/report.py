"""The report of a study: one HTML page with pictures, and the same tables as markdown beside it."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from frugalmoe.ablate import plots, statistics
from frugalmoe.ablate.comparison import Comparison, load_comparison
from frugalmoe.analysis.page import Html, count, document, folded, join, number, picture, png, table, tag
from frugalmoe.files import write_atomically

NAMES = {
    "speed/step_seconds": "step time (ms)",
    "speed/tokens_per_second": "tokens/s",
    "cost/active_flops": "active FLOPs per token",
    "router/drop_rate": "drop rate",
    "router/max_violation": "max violation",
    "router/entropy": "router entropy (nats)",
    "router/load_entropy": "load entropy (nats)",
    "router/dead_experts": "dead experts",
    "router/active_per_token": "experts per token",
    "router/tie_rate": "tie rate",
    "router/logit_lse": "log-normaliser of the router",
    "depth/share": "share of tokens that pass",
    "depth/predictor_accuracy": "accuracy of the depth predictor",
    "train/loss": "training loss, last tenth",
    "parameters/total": "parameters",
    "parameters/active": "active parameters",
    "eval/loss/mean": "loss (nats per token)",
    "eval/bits_per_byte/mean": "bits per byte",
}
COSTS = ("speed/step_seconds", "speed/tokens_per_second", "cost/active_flops", "parameters/total")


class Grid(NamedTuple):
    """A table that is written as HTML and as markdown."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    text_columns: int = 1


def write_study_report(workdir: str | Path) -> Path:
    """Writes `report/index.html`, its PNG files and `report/RESULTS.md`; returns the page's path."""
    c = load_comparison(workdir)
    folder = c.workdir / "report"
    folder.mkdir(exist_ok=True)
    drawn = pictures(c)
    for name, data in drawn.items():
        write_atomically(folder / f"{name}.png", data)
    write_atomically(folder / "RESULTS.md", markdown(c, drawn).encode())
    write_atomically(folder / "index.html", _page(c, drawn).encode("utf-8", errors="replace"))
    return folder / "index.html"


def pictures(c: Comparison) -> dict[str, bytes]:
    """PNG files by name, in reading order; what the study has no values for is left out."""
    figures = {name: plot(c) for name, (plot, _, _) in PICTURES.items()}
    return {name: png(figure) for name, figure in figures.items() if figure is not None}


# ---------------------------------------------------------------- what there is to say


def verdict_lines(c: Comparison) -> list[str]:
    return [f"{arm}: {c.verdict(arm)}{_saving(c, arm)}" for arm in c.arms[1:]]


def _saving(c: Comparison, arm: str) -> str:
    """What the arm needs to reach the baseline's final loss, where every seed reaches it before the end."""
    share = c.cost_to_target(arm)
    if share is None or not (share["steps"] < 1).all():
        return ""
    flops, time = share["flops"].mean(), share["time"].mean()
    return f"; reaches the baseline's final loss with {flops:.2f}× the FLOPs and {time:.2f}× the time"


def state_line(c: Comparison) -> str:
    """How much of the study is there."""
    runs = sum(len(c.final(c.metric, arm)) for arm in c.arms)
    seeds = c.study["seeds"]
    whole = f"{len(c.arms)} arms, seeds {', '.join(map(str, seeds))}, {c.study['steps']:,} steps of "
    whole += f"{c.study['tokens_per_step']:,} tokens"
    missing = len(c.arms) * len(seeds) - runs
    whole += f"; {missing} of {len(c.arms) * len(seeds)} runs are missing" if missing else ""
    return whole + (f", of which diverged: {', '.join(c.diverged)}" if c.diverged else "")


def statistics_note(c: Comparison) -> str:
    return (
        f"Differences are paired: seed s has the same start and the same batches in every arm. ±: 95% t interval over "
        f"seeds, not corrected. A verdict of better or worse holds at 5% over all {len(c.paired)} comparisons (paired "
        f"t tests, Holm's correction). The percentile bootstrap over seeds is shown for comparison only: with few "
        f"seeds it is too narrow."
    )


def grids(c: Comparison) -> list[Grid]:
    found = [_result_grid(c), _metric_grid(c), _target_grid(c), _domain_grid(c), _cross_grid(c)]
    return [grid for grid in found if grid is not None]


def _result_grid(c: Comparison) -> Grid:
    rows = []
    for arm in c.arms:
        values, p = c.final(c.metric, arm), c.paired.get(arm)
        row = [arm, str(len(values)), number(c.mean(c.metric, arm), 4)]
        if p is None:
            row += ["–", "–", "–"]
        else:
            row += [f"{p.mean:+.4f}" + (f" ± {p.half_width:.4f}" if p.n > 1 else "")]
            row += [f"{p.bootstrap[0]:+.4f} to {p.bootstrap[1]:+.4f}" if p.n > 1 else "–", _p(p.adjusted_p)]
        rows.append([*row, "baseline" if p is None and arm == c.arms[0] else statistics.judge(p) if p else "–"])
    header = ["arm", "n", name_of(c.metric), f"difference to {c.arms[0]}", "bootstrap", "p (Holm)", "verdict"]
    return Grid("Result", header, rows, statistics_note(c))


def _p(p: float) -> str:
    return "–" if not np.isfinite(p) else ("< 0.001" if p < 0.001 else f"{p:.3f}")


def _metric_grid(c: Comparison) -> Grid:
    """The study's further metrics and the costs, means over seeds; what no arm has is left out."""
    metrics = [m for m in dict.fromkeys([*c.study["metrics"][1:], *COSTS]) if any(c.final(m, a) for a in c.arms)]
    rows = [[arm, *(_value(m, c.mean(m, arm)) for m in metrics)] for arm in c.arms]
    note = (
        "Means over seeds. Router metrics are means over MoE layers on held-out documents; active FLOPs are those of a "
        "forward pass with the experts that tokens really used. Step times are comparable where all arms ran alike."
    )
    return Grid("Routing and cost", ["arm", *map(name_of, metrics)], rows, note)


def name_of(metric: str) -> str:
    return NAMES.get(metric, metric)


def _value(metric: str, value: float) -> str:
    if metric == "speed/step_seconds":
        return number(1000 * value)
    return count(value) if metric.startswith(("cost/", "parameters/")) else number(value)


def _target_grid(c: Comparison) -> Grid | None:
    rows = []
    for arm in c.arms[1:]:
        share = c.cost_to_target(arm)
        if share is None:
            continue
        reached = np.isfinite(share["steps"])
        cells = [f"{share[k][reached].mean():.2f}×" if reached.any() else "–" for k in ("steps", "flops", "time")]
        rows.append([arm, f"{reached.sum()} of {len(reached)}", *cells])
    if not rows:
        return None
    note = (
        "What an arm needs to reach the baseline's final loss of the same seed, over what the baseline spent: steps, "
        "active FLOPs and time; means over the seeds that reach it, linear between evaluations. With a learning rate "
        "that decays at the end, losses before the end are pessimistic, so a saving is understated."
    )
    return Grid(
        "Cost to the baseline's final loss", ["arm", "seeds that reach it", "steps", "FLOPs", "time"], rows, note
    )


def _domain_grid(c: Comparison) -> Grid | None:
    kind = "/".join(c.metric.split("/")[:2]) + "/"  # a domain's own name may hold a slash
    finals = {metric for metric, _ in c._finals if metric.startswith(kind)}
    domains = sorted(m.removeprefix(kind) for m in finals if m != f"{kind}mean")
    if len(domains) < 2:
        return None
    rows = [[arm, *(number(c.mean(kind + d, arm), 4) for d in domains)] for arm in c.arms]
    return Grid(f"{name_of(c.metric)} by domain".capitalize(), ["arm", *domains], rows)


def _cross_grid(c: Comparison) -> Grid | None:
    tables = {arm: c.cross(arm) for arm in c.arms}
    if not any(tables.values()):
        return None
    mean = lambda values: number(float(np.mean(values)), 4) if values else "–"
    rows = [[arm, *(mean(tables[arm].get(other, [])) for other in c.arms)] for arm in c.arms]
    note = (
        "Held-out loss of the weights trained with the arm of the row under the router of the column, means over "
        "seeds. –: parameters or router state have other shapes."
    )
    return Grid("Trained with one router, evaluated with another", ["trained with", *c.arms], rows, note)


# ---------------------------------------------------------------- as HTML


def _page(c: Comparison, drawn: Mapping[str, bytes]) -> str:
    study = c.study
    first, *others = [join([tag("h2", g.title), _html(g)]) for g in grids(c)]
    body = [
        tag("h1", study["name"]),
        tag("p", f"Report of a study: {state_line(c)}.", "lead"),
        tag("p", study["question"]),
        tag("p", join([tag("strong", "Expected:"), study["expectation"]], " ")),
        tag("div", join([tag("strong", "Found:"), *(tag("div", line) for line in verdict_lines(c))]), "shows"),
        first,
        *(_drawn(data, *PICTURES[name][1:]) for name, data in drawn.items()),
        *others,
        tag("h2", "Reproduce"),
        tag("pre", reproduce(c)),
        folded("Arms: what each one changes", tag("pre", json.dumps(study["arms"], indent=1))),
        folded("The study as it was run", tag("pre", json.dumps(study, indent=1))),
        tag("p", "Each picture is also a PNG file beside this page; RESULTS.md has the tables as markdown.", "note"),
    ]
    return document(f"{study['name']} – frugalmoe study", join(body))


HOW_DIFFERENCES = (
    "Dots: mean over seeds of the paired difference; bars: 95% t interval; ticks: single seeds. Left of the dashed "
    "line an arm is better than the baseline. An interval that touches the line says that these runs cannot tell."
)
HOW_CURVES = (
    "Held-out loss in the course of training. Lines: means over seeds; bands: their range. Right: the paired "
    "difference to the baseline, where the spread between seeds cancels."
)

HOW_BALANCE = (
    "How far the busiest expert is above the mean load in a training batch, mean over MoE layers; 0 is perfect "
    "balance. Lines: means over seeds; bands: their range."
)


# name of the file -> how it is drawn, its title, how to read it
PICTURES = {
    "differences": (plots.differences, "Paired differences to the baseline", HOW_DIFFERENCES),
    "curves": (plots.learning_curves, "Learning curves", HOW_CURVES),
    "balance": (plots.balance, "Balance in the course of training", HOW_BALANCE),
}


def _drawn(data: bytes, title: str, how: str) -> Html:
    return join([tag("h2", title), tag("p", how), picture(data, title)])


def _html(grid: Grid) -> Html:
    parts = [table(grid.header, grid.rows, text_columns=grid.text_columns)]
    return join([*parts, tag("p", grid.note, "note")] if grid.note else parts)


def reproduce(c: Comparison, report: str = "") -> str:
    command = c.study["command"]
    lines = [shlex.join(["frugalmoe", *command[1:]])] if command else []
    return "\n".join([*lines, report or shlex.join(["frugalmoe", "report", str(c.workdir)])])


# ---------------------------------------------------------------- as markdown


def markdown(c: Comparison, drawn: Iterable[str], report: str = "") -> str:
    """`drawn`: names of its pictures; `report`: the command that makes it again, where it is not the plain one."""
    study = c.study
    parts = [
        f"# {study['name']}",
        study["question"],
        f"**Expected.** {study['expectation']}",
        f"**Run.** {state_line(c)[0].upper()}{state_line(c)[1:]}.",
        "**Found.**\n\n" + "\n".join(f"- {line}" for line in verdict_lines(c)),
    ]
    for grid in grids(c):
        parts += [f"## {grid.title}", pipes(grid)] + ([grid.note] if grid.note else [])
        if grid.title == "Result":
            parts += [f"![{PICTURES[name][1]}]({name}.png)" for name in drawn]
    return "\n\n".join([*parts, "## Reproduce", f"```bash\n{reproduce(c, report)}\n```"]) + "\n"


def pipes(grid: Grid) -> str:
    escape = lambda cell: str(cell).replace("|", "\\|")
    line = lambda cells: f"| {' | '.join(map(escape, cells))} |"
    rule = ["---"] * grid.text_columns + ["---:"] * (len(grid.header) - grid.text_columns)
    return "\n".join([line(grid.header), line(rule), *map(line, grid.rows)])
