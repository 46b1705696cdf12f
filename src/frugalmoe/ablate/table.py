"""Terminal tables of a study: its budgets before it runs, its result after."""

from pathlib import Path

from rich.table import Table
from rich.text import Text

from frugalmoe.ablate.comparison import Comparison, load_comparison
from frugalmoe.ablate.plan import Plan, budget_ratios
from frugalmoe.ablate.together import groups
from frugalmoe.analysis.wording import count, number
from frugalmoe.data import ramp
from frugalmoe.fields import to_dict


def budget_table(plan: Plan, workdir: Path) -> Table:
    """Returns a table of the arms with parameters and active FLOPs per token, and of how runs would be trained."""
    config = plan.arms[plan.study.baseline].config
    tokens = ramp.of(to_dict(config.train)).before(plan.steps) * config.data.sequence_length
    together = max(map(len, groups(plan)))
    caption = f"{len(plan.pairs)} runs of {count(tokens)} tokens in {workdir}, {together} at once in a process"
    title = f"{plan.study.name}: {plan.study.question}"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for header in ("arm", "parameters", "active", "active FLOPs per token (forward)", "of the baseline's"):
        table.add_column(header, justify="left" if header == "arm" else "right")
    for name, ratio in budget_ratios(plan.study, plan.flops).items():
        parameters, flops = plan.parameters[name], sum(plan.flops[name].values())
        marked = f"{name} (baseline)" if name == plan.study.baseline else name
        table.add_row(
            Text(marked), count(parameters["total"]), count(parameters["active"]), count(flops), f"{ratio:.3f}"
        )
    return table


def result_table(workdir: Path) -> Table:
    """Returns a table of each arm's first metric and the verdict on its difference to the baseline."""
    c: Comparison = load_comparison(workdir)
    table = Table(title=Text(c.study["name"], style="bold"), title_justify="left")
    for header in ("arm", "n", c.metric, "verdict"):
        table.add_column(header, justify="right" if header in ("n", c.metric) else "left")
    for arm in c.arms:
        values = c.final(c.metric, arm)
        mean = number(sum(values.values()) / len(values), 4) if values else "–"
        table.add_row(Text(arm), str(len(values)), mean, Text(c.verdict(arm)))
    return table
