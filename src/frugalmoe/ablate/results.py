"""The results of a study as one parquet table, made from its run directories and study.json.

| column | |
|---|---|
| arm, seed, metric | |
| step | optimizer step of the value |
| final | True: the run's result; False: a point of its curve |
| value | float64 |

Beside the metrics, `cross/ARM` is the run's held-out loss under the router of ARM; `diverged` marks a run whose loss
became infinite or NaN, and which has no other result.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from frugalmoe import metrics
from frugalmoe.errors import UserError
from frugalmoe.evaluate import suite
from frugalmoe.fields import check_integer
from frugalmoe.files import locked, read_json, write_atomically
from frugalmoe.routing.strategies import loss_names
from frugalmoe.shapes import is_integer

SCHEMA = pa.schema(
    [
        ("arm", pa.string()),
        ("seed", pa.int32()),
        ("metric", pa.string()),
        ("step", pa.int32()),
        ("final", pa.bool_()),
        ("value", pa.float64()),
    ]
)
DIVERGED, CROSS, SUITE = "diverged", "cross/", "suite/"
TAIL = 0.1  # share of the steps whose mean is `train/loss`


def known_metrics(domains: Iterable[str]) -> list[str]:
    """Returns the names of final results that a study may ask for: every row of `metrics`, by domain, task and loss."""
    members = {"eval/loss/": (*domains, "mean"), "eval/bits_per_byte/": (*domains, "mean"), "loss/": loss_names()}
    members |= {"validation/loss/": ("mean",), "validation/bits_per_byte/": ("mean",)}
    members |= {f"{SUITE}{kind}/": (*suite.names(), "mean") for kind in ("accuracy", "margin")}
    found = [m.name + member for m in metrics.ROWS for member in members.get(m.name, ("",))]
    return list(dict.fromkeys(found))


def final_metrics(
    summary: Mapping[str, Any], logged: Sequence[Mapping[str, float | None]], study: Mapping[str, Any], arm: str
) -> dict[str, float]:
    """Returns a complete run's results. Metrics of layers are means over those that have them, absent where none has.

    Losses and the optimizer's figures are means over the last tenth of the steps.
    """
    late = [row for row in logged if row["step"] > (1 - TAIL) * summary["step"]]
    names = dict.fromkeys(n for row in late for n in row if n.startswith(("loss/", "optim/")))
    values = {name: float(np.mean([_number(row[name]) for row in late if name in row])) for name in names}
    if "loss/ce" in values:
        values["train/loss"] = values["loss/ce"]
    for part in ("eval", "validation"):
        scores = summary.get(part, {})
        values |= {f"{part}/{kind}/{d}": _number(v) for kind, of_kind in scores.items() for d, v in of_kind.items()}
    for kind, section in (("router", "router"), ("depth", "mixture_of_depths")):
        layers = list(summary.get(section, {}).get("layers", {}).values())
        for name in dict.fromkeys(name for layer in layers for name in layer):
            values[f"{kind}/{name}"] = float(np.mean([_number(layer[name]) for layer in layers if name in layer]))
    if islands := summary.get("islands"):
        values |= {f"islands/{name}": float(np.mean(islands[name])) for name in ("seconds", "tokens", "share_trained")}
        values["islands/tokens_per_second"] = islands["tokens"] / islands["seconds"]
    values["cost/active_flops"] = active_flops(study, arm, values.get("router/active_per_token"))
    values |= {f"parameters/{k}": float(summary["parameters"][k]) for k in ("total", "active")}
    if speed := summary["speed"]["tokens_per_second"]:
        values["speed/tokens_per_second"] = speed = _number(speed)
        values["speed/step_seconds"] = study["tokens_per_step"] / speed
    return values


def _number(value: float | None) -> float:
    """Returns a number of a JSON file as a float: null, which stands for what is not finite, becomes NaN."""
    return np.nan if value is None else float(value)


def active_flops(study: Mapping[str, Any], arm: str, active_per_token: float | None) -> float:
    """Returns forward FLOPs per token with the experts that tokens really used, or the declared number if not known."""
    parts = dict(study["forward_flops"][arm])
    if active_per_token is not None and np.isfinite(active_per_token):
        parts["routed experts"] *= active_per_token / study["experts_per_token"][arm]
    return float(sum(parts.values()))


def gather(workdir: Path, study: Mapping[str, Any]) -> pa.Table:
    """Reads every complete run of the study and rewrites results.parquet, whole or not at all."""
    with locked(workdir / "results.parquet"):
        check(workdir, study["name"])
        columns: dict[str, list] = {name: [] for name in SCHEMA.names}
        for row in _rows(workdir, study):
            for name, value in zip(SCHEMA.names, row):
                columns[name].append(value)
        table = pa.table(columns, SCHEMA.with_metadata({"study": study["name"]}))
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        write_atomically(workdir / "results.parquet", buffer.getvalue())
    return table


def _rows(workdir: Path, study: Mapping[str, Any]) -> Iterator[tuple]:
    for arm in study["arms"]:
        found = ((d.name.removeprefix("seed_"), d) for d in (workdir / arm).glob("seed_*"))
        for seed, directory in sorted((int(seed), d) for seed, d in found if seed.isdecimal()):
            try:
                yield from _rows_of_run(directory, study, arm, seed)
            except (ArithmeticError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as e:
                if isinstance(e, UserError) and not str(e).startswith("step="):
                    raise
                rule = "its summary and logs are not those of a run"
                raise UserError(f"{directory}: {rule} ({type(e).__name__}: {' '.join(str(e).split())[:80]})") from e


def _rows_of_run(directory: Path, study: Mapping[str, Any], arm: str, seed: int) -> Iterator[tuple]:
    path = directory / "summary.json"
    summary = read_json(path) if path.is_file() else {}
    if summary.get("status") == "diverged":
        yield (arm, seed, DIVERGED, 0, True, 1.0)
    if summary.get("status") != "complete":
        return
    logged = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for row in (summary, *logged):
        if not is_integer(row["step"]):
            raise TypeError(f"step={row['step']!r:.40}: no step")
        check_integer("step", row["step"])
    for row in logged:
        yield from ((arm, seed, name, row["step"], False, _number(v)) for name, v in row.items() if name != "step")
    results = final_metrics(summary, logged, study, arm)
    if (cross := directory / "cross.json").is_file():
        results |= {f"{CROSS}{other}": _number(loss) for other, loss in read_json(cross).items()}
    if (graded := directory / "suite.json").is_file():
        results |= {name: _number(value) for name, value in read_json(graded).items()}
    yield from ((arm, seed, name, summary["step"], True, value) for name, value in results.items())


def check(workdir: Path, name: str) -> None:
    """Refuses a table that is damaged or another study's; an absent one is fine."""
    if (workdir / "results.parquet").exists():
        _read(workdir / "results.parquet", name)


_LARGEST = 1e100  # squares of it are still numbers
_REBUILD = "move it away and run `frugalmoe ablate` again: it is rebuilt from the run directories"


def read_table(workdir: Path, name: str) -> pa.Table:
    """Returns the table of a study. Raises `UserError` for one that is missing, damaged or another study's."""
    path = workdir / "results.parquet"
    if not path.exists():
        raise UserError(f"{path}: missing; no run of the study is complete")
    return _read(path, name)


def _read(path: Path, name: str) -> pa.Table:
    try:
        table = pq.read_table(path, partitioning=None, page_checksum_verification=True)
        table.validate(full=True)
    except (pa.ArrowException, OSError, MemoryError, ValueError) as e:
        raise UserError(f"{path}: not a readable table ({' '.join(str(e).split())[:80]}); {_REBUILD}") from e
    found = (table.schema.metadata or {}).get(b"study", b"?").decode(errors="replace")
    if found != name:
        raise UserError(f"{path}: holds the results of study {found!r}, not {name!r}; {_REBUILD}")
    if table.schema.remove_metadata() != SCHEMA:
        columns, expected = ", ".join(table.schema.names), ", ".join(SCHEMA.names)
        raise UserError(f"{path}: has columns {columns}, not {expected} of their types; {_REBUILD}")
    largest = pc.max(pc.abs(pc.drop_null(pc.if_else(pc.is_finite(table["value"]), table["value"], None)))).as_py()
    if largest is not None and largest > _LARGEST:
        raise UserError(f"{path}: holds the value {largest:g}, with which nothing can be compared; {_REBUILD}")
    if empty := [column for column in SCHEMA.names if table[column].null_count]:
        raise UserError(f"{path}: has no value in places of {', '.join(empty)}; {_REBUILD}")
    return table
