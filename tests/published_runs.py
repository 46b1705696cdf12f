"""The planner against published runs: what `make paper` writes into docs/planner.md, from tests/published_runs.toml."""

import functools
import statistics
import sys
import textwrap
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  its environment of JAX, for the command too

from frugalmoe.config import default, load, override, resolve
from frugalmoe.convert import families, settings
from frugalmoe.cost import TRAIN_FACTOR, forward_flops
from frugalmoe.cost.laws import published
from frugalmoe.files import write_generated
from frugalmoe.schema import Config

PAGE = Path(__file__).parents[1] / "docs/planner.md"
DATA = tomllib.loads((Path(__file__).with_suffix(".toml")).read_text(encoding="utf-8"))
PLAIN = {"rms_norm_eps": 1e-5, "hidden_act": "silu"}  # keys of a config.json that no shape follows from
FLOPS_BAR = 0.005


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows))


def _wrapped(paragraph: str) -> str:
    plain = paragraph.startswith(("|", "#", "- "))
    return paragraph if plain else textwrap.fill(paragraph, 118, break_on_hyphens=False, break_long_words=False)


@functools.cache
def config_of(name: str) -> Config:
    """Returns the config of a published model: one of ours, or what `convert` makes of the keys of its config.json."""
    keys = dict(DATA["models"][name])
    if "ours" in keys:
        return load(keys["ours"])
    theirs = PLAIN | {key: value for key, value in keys.items() if key not in ("total", "active")}
    return resolve(override(default(), settings.to_ours(families.get(keys["model_type"]), theirs, name)))


# FLOPs.


def counted(row: Mapping[str, Any]) -> float:
    """Returns the formula's training FLOPs of a token in GFLOP, attention counted as the published figure counts it."""
    model = config_of(row["model"]).model
    parts = forward_flops(model, row["sequence"])
    if row["count"] == "all keys":
        modules = parts.get("multi-token prediction", 0.0)
        return TRAIN_FACTOR * (published.nonembedding_flops(model, row["sequence"]) + parts["head"] + modules) / 1e9
    return TRAIN_FACTOR * sum(parts.values()) / 1e9


def flops_errors() -> dict[tuple[str, str], float]:
    """Returns the relative error of each row whose way of counting is known."""
    rows = [row for row in DATA["flops"] if "outside" not in row]
    return {(row["model"], row["run"]): counted(row) / row["published"] - 1 for row in rows}


def _flops() -> str:
    rows = []
    for row in DATA["flops"]:
        ours, source = counted(row), DATA["sources"][row["source"]]
        rows.append((
            f"{row['model']}, {row['run']}", str(row["sequence"]), row["count"], f"{ours:,.2f}",
            f"{row['published']:,.2f}", f"{ours / row['published'] - 1:+.2%}", f"{source['text']} ({source['date']})",
            row.get("outside", ""),
        ))  # fmt: skip
    errors = [abs(error) for error in flops_errors().values()]
    outside = len(rows) - len(errors)
    columns = ("run", "sequence", "attention", "formula, GFLOP", "published", "error", "source", "why outside")
    return f"""\
### FLOPs of a token

Training FLOPs per token by `cost/flops.py`, against what is published: TFLOP/s, or utilization times the peak, over
tokens per second of the same row. Nothing is fitted. Published figures count attention in two ways, over the keys that
a causal model sees or over all; each source is counted as it does. Where it gives no length of sequences, 4,096 or
8,192 is taken, whichever its figure shows. Mean error of the {len(errors)} rows whose way of
counting is known {statistics.mean(errors):.2%}, worst {max(errors):.2%}; bar {FLOPS_BAR:.1%}. {outside} rows stand
outside of the mean: they differ from other figures of the same source, or do not say how they count.

{table(columns, rows)}"""


def text() -> str:
    return "\n\n".join(map(_wrapped, "\n\n".join([_flops()]).split("\n\n")))


def main() -> int:
    write_generated(PAGE, text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
