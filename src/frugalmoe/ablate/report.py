"""The report of a study: one HTML page with pictures, and the same tables as markdown beside it."""

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from frugalmoe.ablate import plots, scaling, statistics, worktime
from frugalmoe.ablate.comparison import Comparison, load_comparison
from frugalmoe.ablate.grid import Grid
from frugalmoe.analysis.pages.page import Html, document, folded, join, picture, png, table, tag
from frugalmoe.analysis.pages.plots import NARROW, WIDE
from frugalmoe.analysis.wording import count, number, spread
from frugalmoe.files import write_atomically
from frugalmoe.metrics import titled

COSTS = ("cost/active_flops", "parameters/total")  # not the time, which on a shared machine is no measure of cost


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


def pictures(c: Comparison, width: float = WIDE) -> dict[str, bytes]:
    """Returns PNG files by name, in reading order; pictures that the study has no values for are left out."""
    figures = {name: plot(c, width) for name, (plot, _, _) in PICTURES.items()}
    return {name: png(figure) for name, figure in figures.items() if figure is not None}


# ---------------------------------------------------------------- what there is to say


def summary_line(c: Comparison) -> str:
    """Returns one line: how many arms the study could tell from its baseline."""
    told = [arm for arm in c.arms[1:] if arm in c.paired and statistics.judge(c.paired[arm]) in ("better", "worse")]
    count = f"{len(told) or 'none'} of {len(c.arms) - 1} arm{'s' * (len(c.arms) > 2)}"
    return f"{count} can be told from the baseline {c.arms[0]} by these runs"


def verdict_lines(c: Comparison) -> list[str]:
    return [f"{arm}: {c.verdict(arm)}{_saving(c, arm)}" for arm in c.arms[1:]]


def _saving(c: Comparison, arm: str) -> str:
    """Returns what the arm needs to reach the baseline's final loss; empty unless all seeds reach it before the end."""
    share = c.cost_to_target(arm)
    if share is None or not (share["steps"] < 1).all() or not np.isfinite(share["flops"]).all():
        return ""
    return f"; reaches the baseline's final loss with {share['flops'].mean():.2f}× the FLOPs"


def state_line(c: Comparison) -> str:
    """Returns one line: how many runs of the study are complete."""
    runs = sum(len(c.final(c.metric, arm)) for arm in c.arms)
    seeds = c.study["seeds"]
    whole = f"{len(c.arms)} arms, seeds {', '.join(map(str, seeds))}, {c.study['steps']:,} steps of "
    whole += f"{c.study['tokens_per_step']:,} tokens"
    missing = len(c.arms) * len(seeds) - runs
    whole += f"; {missing} of {len(c.arms) * len(seeds)} runs are missing" if missing else ""
    return whole + (f", of which diverged: {', '.join(c.diverged)}" if c.diverged else "")


def statistics_note(c: Comparison) -> str:
    compared = sum(p.n > 1 for p in c.paired.values())
    return (
        "Differences are paired: seed s has the same start and the same batches in every arm. A verdict of better or "
        f"worse holds at 5% over all {compared} comparisons (paired t tests, Holm's correction). ±: the t interval "
        f"over seeds at the confidence that the correction asks of the arm{_confidences(c)}; it holds 0 exactly where "
        "the verdict is not distinguishable. Seeds needed: with which the same test would find a difference like the "
        "one that is seen in 80% of studies, if the spread between seeds is the one that is seen: from few seeds a "
        "rough estimate."
    )


def _confidences(c: Comparison) -> str:
    """Returns the confidences of the study's intervals, as " (95% to 99.8%)"."""
    found = sorted(p.confidence for p in c.paired.values() if p.n > 1)
    return f" ({spread(f'{100 * found[0]:.4g}%', f'{100 * found[-1]:.4g}%')})" if found else ""


def grids(c: Comparison) -> list[Grid]:
    found = [_result_grid(c), *scaling.grids(c), _metric_grid(c), _target_grid(c), _domain_grid(c), _cross_grid(c)]
    return [grid for grid in found if grid is not None]


def _result_grid(c: Comparison) -> Grid:
    rows = []
    for arm in c.arms:
        values, p = c.final(c.metric, arm), c.paired.get(arm)
        row = [arm, str(len(values)), number(c.mean(c.metric, arm), 4)]
        row += ["–", "–", "–"] if p is None or not p.n else [_difference(p), _p(p.adjusted_p), _needed(p)]
        rows.append([*row, "baseline" if p is None and arm == c.arms[0] else statistics.judge(p) if p else "–"])
    header = ["arm", "n", titled(c.metric), f"difference to {c.arms[0]}", "p (Holm)", "seeds needed", "verdict"]
    return Grid("Result", header, rows, statistics_note(c))


def _difference(p: statistics.Paired) -> str:
    return f"{p.mean:+.4f} ± {p.half_width:.4f}" if p.n > 1 else f"{p.mean:+.4f}"


def _needed(p: statistics.Paired) -> str:
    """Returns how many seeds a comparison that found nothing would need."""
    if statistics.judge(p) != "not distinguishable":
        return "–"
    return str(statistics.needed(p) or f"> {statistics.MOST_SEEDS}")


def _p(p: float) -> str:
    return "–" if not np.isfinite(p) else ("< 0.001" if p < 0.001 else f"{p:.3f}")


def _metric_grid(c: Comparison) -> Grid:
    """Returns the study's further metrics and the costs, means over seeds; what no arm has is left out."""
    metrics = [m for m in dict.fromkeys([*c.study["metrics"][1:], *COSTS]) if any(c.final(m, a) for a in c.arms)]
    rows = [[arm, *(_value(m, c.mean(m, arm)) for m in metrics)] for arm in c.arms]
    note = (
        "Means over seeds. Router metrics are means over MoE layers on held-out documents; active FLOPs are those of a "
        "forward pass with the experts that tokens really used. For speed see `benchmarks/`: runs of a study share "
        "their machine with each other and with whatever else runs there."
    )
    return Grid("Routing and cost", ["arm", *map(titled, metrics)], rows, note)


def _value(metric: str, value: float) -> str:
    return count(value) if metric.startswith(("cost/", "parameters/")) else number(value)


def _target_grid(c: Comparison) -> Grid | None:
    rows = []
    for arm in c.arms[1:]:
        share = c.cost_to_target(arm)
        if share is None:
            continue
        reached = np.isfinite(share["steps"])
        cells = [f"{share[k][reached].mean():.2f}×" if reached.any() else "–" for k in ("steps", "flops")]
        rows.append([arm, f"{reached.sum()} of {len(reached)}", *cells])
    if not rows:
        return None
    note = (
        "What an arm needs to reach the baseline's final loss of the same seed, over what the baseline spent: steps "
        "and active FLOPs; means over the seeds that reach it, linear between evaluations. With a learning rate that "
        "decays at the end, losses before the end are pessimistic, so a saving is understated."
    )
    return Grid("Cost to the baseline's final loss", ["arm", "seeds that reach it", "steps", "FLOPs"], rows, note)


def _domain_grid(c: Comparison) -> Grid | None:
    kind = "/".join(c.metric.split("/")[:2]) + "/"  # a domain's own name may hold a slash
    finals = {metric for metric, _ in c._finals if metric.startswith(kind)}
    domains = sorted(m.removeprefix(kind) for m in finals if m != f"{kind}mean")
    if len(domains) < 2:
        return None
    rows = [[arm, *(number(c.mean(kind + d, arm), 4) for d in domains)] for arm in c.arms]
    title = titled(c.metric)
    return Grid(f"{title[0].upper()}{title[1:]} by domain", ["arm", *domains], rows)


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
    study, narrow = c.study, pictures(c, NARROW)
    first, *others = [join([tag("h2", g.title), _html(g)]) for g in grids(c)]
    body = [
        tag("h1", study["name"]),
        tag("p", f"Report of a study: {state_line(c)}.", "lead"),
        *(tag("p", f"Time: {line}.", "note") for line in filter(None, [worktime.line(c.workdir)])),
        tag("p", study["question"]),
        tag("p", join([tag("strong", "Expected:"), study["expectation"]], " ")),
        tag(
            "div",
            join([tag("strong", f"Found: {summary_line(c)}."), *(tag("div", v) for v in verdict_lines(c))]),
            "shows",
        ),
        first,
        *(_drawn(c, name, data, narrow[name]) for name, data in drawn.items()),
        *others,
        tag("h2", "Reproduce"),
        tag("pre", reproduce(c)),
        folded("Arms: what each one changes", tag("pre", json.dumps(_changes(study), indent=1))),
        folded("The study as it was run", tag("pre", json.dumps(study, indent=1))),
        tag("p", "Each picture is also a PNG file beside this page; RESULTS.md has the tables as markdown.", "note"),
    ]
    return document(f"{study['name']} – frugalmoe study", join(body))


def _changes(study: Mapping[str, Any]) -> dict[str, Any]:
    """What each arm changes, and with whose weights it begins where those are another run's."""
    begun = study.get("origins", {})
    return {
        arm: {**({"begins with": begun[arm]} if arm in begun else {}), **fields}
        for arm, fields in study["arms"].items()
    }


HOW_DIFFERENCES = (
    "Dots: mean over seeds of the paired difference to the baseline; ticks: single seeds; left of the dashed line an "
    "arm is better. Bars: the t interval that decides, at the confidence that the correction for all comparisons asks "
    "of the arm{confidences}. An arm whose bar touches the line cannot be told from the baseline by these runs; a bar "
    "that does not is a verdict. An arrow is a bar that goes on."
)
HOW_CURVES = (
    "Held-out loss in the course of training. Lines: means over seeds; bands: their range. The second "
    "picture is the paired difference to the baseline, where the spread between seeds cancels."
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


def how_to_read(c: Comparison, name: str) -> str:
    return PICTURES[name][2].replace("{confidences}", _confidences(c))


def _drawn(c: Comparison, name: str, wide: bytes, narrow: bytes) -> Html:
    title = PICTURES[name][1]
    return join([tag("h2", title), tag("p", how_to_read(c, name)), picture(wide, narrow, title)])


def _html(grid: Grid) -> Html:
    parts = [table(grid.header, grid.rows, text_columns=grid.text_columns)]
    return join([*parts, tag("p", grid.note, "note")] if grid.note else parts)


def reproduce(c: Comparison, report: str = "") -> str:
    command = c.study["command"]
    lines = [shlex.join(["frugalmoe", *command[1:]])] if command else []
    return "\n".join([*lines, report or shlex.join(["frugalmoe", "report", str(c.workdir)])])


# ---------------------------------------------------------------- as markdown


def markdown(c: Comparison, drawn: Iterable[str], report: str = "") -> str:
    """Returns the report as markdown. `drawn` names its pictures; `report` is the command that makes it again, where it
    is not the usual one.
    """
    study = c.study
    parts = [
        f"# {study['name']}",
        study["question"],
        f"**Expected.** {study['expectation']}",
        f"**Run.** {state_line(c)[0].upper()}{state_line(c)[1:]}.",
        *(f"**Time.** {line}." for line in filter(None, [worktime.line(c.workdir)])),
        f"**Found.** {summary_line(c)[0].upper()}{summary_line(c)[1:]}.\n\n"
        + "\n".join(f"- {line}" for line in verdict_lines(c)),
    ]
    for grid in grids(c):
        parts += [f"## {grid.title}", pipes(grid)] + ([grid.note] if grid.note else [])
        if grid.title == "Result":
            for name in drawn:
                parts += [f"![{PICTURES[name][1]}]({name}.png)", f"*{how_to_read(c, name)}*"]
    return "\n\n".join([*parts, "## Reproduce", f"```bash\n{reproduce(c, report)}\n```"]) + "\n"


def pipes(grid: Grid) -> str:
    escape = lambda cell: " ".join(str(cell).split()).replace("|", "\\|")
    line = lambda cells: f"| {' | '.join(map(escape, cells))} |"
    rule = ["---"] * grid.text_columns + ["---:"] * (len(grid.header) - grid.text_columns)
    return "\n".join([line(grid.header), line(rule), *map(line, grid.rows)])
