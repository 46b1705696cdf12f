"""The catalogue of routing strategies, from their own declarations (`frugalmoe routers`)."""

import dataclasses

from rich.table import Table

from frugalmoe.config.schema import MoE
from frugalmoe.routing import strategies
from frugalmoe.routing.contract import Router

COLUMNS = ("name", "selection", "weights", "balance", "causal", "form", "state")


def catalogue() -> list[dict]:
    """One row per strategy, ready for JSON; claims that vary with the options are given at the defaults."""
    return [_row(strategies.get(name)) for name in strategies.names()]


def _row(router: Router) -> dict:
    options = router.options()
    config = MoE(options=options)
    claims = {f.name: router.claim(f.name, config) for f in dataclasses.fields(router.about)}
    return {"name": router.name} | claims | {"losses": list(claims["losses"]), "options": dataclasses.asdict(options)}


def format_table(rows: list[dict]) -> Table:
    """The rows for a terminal; JSON holds the papers and options too."""
    table = Table(*COLUMNS, title="Routing strategies")
    table.columns[0].no_wrap = True
    for row in rows:
        evaluation = row["causal_in_evaluation"]
        causal = f"{row['causal']}; {evaluation} in evaluation" if evaluation else row["causal"]
        cells = row | {"causal": causal, "state": "yes" if row["stateful"] else "no"}
        table.add_row(*(cells[column] for column in COLUMNS))
    return table
