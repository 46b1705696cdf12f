"""The catalogue of routing strategies, and of what routes tokens around whole blocks, from their own declarations:
`frugalmoe routers`, docs/routers.md.
"""

import dataclasses
import re
from collections.abc import Iterable

from rich import box
from rich.table import Table

from frugalmoe.model import depths
from frugalmoe.routing import strategies
from frugalmoe.routing.contract import About, Router
from frugalmoe.schema import MixtureOfDepths, MoE

COLUMNS = ("name", "year", "paper", "score", "selection", "weights", "balance", "causal", "form", "state")
HEADER = """# Routing strategies

Written by `frugalmoe routers --format=markdown > docs/routers.md` from what each file of
`src/frugalmoe/routing/strategies` declares. Claims that vary with the options are given at the defaults; the laws in
`frugalmoe laws NAME` check them. `causal`: safe, a token's experts depend on no later token; batch, on other
sequences; leak, on later tokens of its own; executor and exchange may add to that, and a run's summary says what holds
for all together. `form`: token, tokens choose experts; expert, experts choose tokens.
`state`: what is carried from step to step beside the parameters.
"""
BLOCKS = "Around whole blocks"
BLOCKS_HEADER = f"""
## {BLOCKS}

Not a router of experts: a section of the config, `model.<name>`, beside any router. A block that it routes, attention
included, is the one expert, and chooses tokens; the others skip it. `tests/test_depths.py` checks the claims.
"""


def catalogue() -> list[dict]:
    """One row per sound strategy, ready for JSON; claims that vary with the options are given at the defaults."""
    return [_row(strategies.get(name)) for name in strategies.sound()]


def blocks() -> list[dict]:
    """The same of what routes tokens around whole blocks."""
    return [_filled("mixture_of_depths", {f: getattr(depths.ABOUT, f) for f in _CLAIMS}, MixtureOfDepths())]


def _row(router: Router) -> dict:
    options = router.options()
    config = MoE(options=options)
    return _filled(router.name, {f: router.claim(f, config) for f in _CLAIMS}, options)


_CLAIMS = tuple(f.name for f in dataclasses.fields(About))


def _filled(name: str, claims: dict, options: object) -> dict:
    return {
        "name": name,
        **claims,
        "losses": list(claims["losses"]),
        "state": "yes" if claims["stateful"] else "no",
        "options": dataclasses.asdict(options),
    }


def _cells(row: dict) -> dict:
    """The row with both claims about causality in one cell."""
    evaluation = row["causal_in_evaluation"]
    return row | {"causal": f"{row['causal']}; {evaluation} in evaluation" if evaluation else row["causal"]}


def format_table(rows: list[dict], title: str = "Routing strategies") -> Table:
    """The rows for a terminal of 120 columns: year and arXiv numbers stand under the name."""
    under = ("year", "paper")
    table = Table(
        *("name, year, paper" if column == "name" else column for column in COLUMNS if column not in under),
        title=title,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 1, 0),
    )
    for column in table.columns:
        column.no_wrap = column.header not in ("score", "selection", "weights", "balance", "causal")
        column.max_width = 14 if column.header in ("score", "causal") else None
    for row in map(_cells, rows):
        identifiers = re.findall(r"\d{4}\.\d{5}", row["paper"])
        name = "\n".join([row["name"], " ".join([str(row["year"]), *identifiers[:1]]), *identifiers[1:]])
        table.add_row(name, *(row[column] for column in COLUMNS if column not in ("name", *under)))
    return table


def format_markdown(rows: list[dict], blocks: list[dict]) -> str:
    """The page docs/routers.md: all columns, then every strategy's options with their defaults and its losses."""
    return "\n".join([HEADER, *_tables(rows), BLOCKS_HEADER, *_tables(blocks)])


def _tables(rows: list[dict]) -> list[str]:
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    lines += [_line([f"`{row['name']}`", *(row[column] for column in COLUMNS[1:])]) for row in map(_cells, rows)]
    lines += ["", _line(["name", "options", "losses"]), _line(["---"] * 3)]
    for row in rows:
        options = ", ".join(f"`{name}={value!r}`" for name, value in row["options"].items())
        lines.append(_line([f"`{row['name']}`", options, ", ".join(f"`{name}`" for name in row["losses"])]))
    return lines


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
