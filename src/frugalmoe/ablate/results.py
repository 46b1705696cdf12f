"""The results of a study as one parquet table, made from its run directories and from nothing else.

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
import pyarrow.parquet as pq

from frugalmoe.errors import UserError
from frugalmoe.files import locked, read_json, write_atomically

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
ROUTER = (
    "max_violation",
    "load_entropy",
    "dead_experts",
    "active_per_token",
    "drop_rate",
    "entropy",
    "logit_lse",
    "tie_rate",
)
DEPTH = ("share", "predictor_accuracy")  # of the blocks that mixture of depths routes
DIVERGED, CROSS = "diverged", "cross/"
TAIL = 0.1  # share of the steps whose mean is `train/loss`
COST = ("cost/active_flops", "speed/tokens_per_second", "speed/step_seconds", "parameters/total", "parameters/active")


def known_metrics(domains: Iterable[str]) -> list[str]:
    """The names of final results that a study may ask for."""
    scores = [f"eval/{kind}/{d}" for kind in ("loss", "bits_per_byte") for d in (*domains, "mean")]
    return [*scores, "train/loss", *(f"router/{name}" for name in ROUTER), *(f"depth/{name}" for name in DEPTH), *COST]


def final_metrics(
    summary: Mapping[str, Any], logged: Sequence[Mapping[str, float]], study: Mapping[str, Any], arm: str
) -> dict[str, float]:
    """A complete run's results; metrics of layers are means over those that have them, absent where none has."""
    late = [row for row in logged if "loss/ce" in row and row["step"] > (1 - TAIL) * summary["step"]]
    values = {"train/loss": float(np.mean([_number(row["loss/ce"]) for row in late]))} if late else {}
    values |= {
        f"eval/{kind}/{d}": _number(v) for kind, by_domain in summary["eval"].items() for d, v in by_domain.items()
    }
    for kind, section, names in (("router", "router", ROUTER), ("depth", "mixture_of_depths", DEPTH)):
        layers = list(summary.get(section, {"layers": {}})["layers"].values())
        for name in names:
            found = [_number(layer[name]) for layer in layers if name in layer]
            if found:
                values[f"{kind}/{name}"] = float(np.mean(found))
    values["cost/active_flops"] = active_flops(study, arm, values.get("router/active_per_token"))
    values |= {f"parameters/{k}": float(summary["parameters"][k]) for k in ("total", "active")}
    if speed := summary["speed"]["tokens_per_second"]:
        values["speed/tokens_per_second"] = speed
        values["speed/step_seconds"] = study["tokens_per_step"] / speed
    return values


def _number(value: float | None) -> float:
    """A value of a run's JSON, where null stands for what is not finite."""
    return np.nan if value is None else value


def active_flops(study: Mapping[str, Any], arm: str, active_per_token: float | None) -> float:
    """Forward FLOPs per token with the experts that tokens really used; the declared number where it is not known."""
    parts = dict(study["forward_flops"][arm])
    if active_per_token is not None:
        parts["routed experts"] *= active_per_token / study["experts_per_token"][arm]
    return sum(parts.values())


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
        pq.write_table(table, buffer, compression="zstd")
        write_atomically(workdir / "results.parquet", buffer.getvalue())
    return table


def _rows(workdir: Path, study: Mapping[str, Any]) -> Iterator[tuple]:
    for arm in study["arms"]:
        for directory in sorted((workdir / arm).glob("seed_*"), key=lambda p: int(p.name.removeprefix("seed_"))):
            seed, path = int(directory.name.removeprefix("seed_")), directory / "summary.json"
            summary = read_json(path) if path.is_file() else {}
            if summary.get("status") == "diverged":
                yield (arm, seed, DIVERGED, 0, True, 1.0)
            if summary.get("status") != "complete":
                continue
            logged = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
            for row in logged:
                values = ((name, _number(v)) for name, v in row.items() if name != "step")
                yield from ((arm, seed, name, row["step"], False, v) for name, v in values)
            results = final_metrics(summary, logged, study, arm)
            if (cross := directory / "cross.json").is_file():
                results |= {f"{CROSS}{other}": loss for other, loss in read_json(cross).items()}
            yield from ((arm, seed, name, summary["step"], True, v) for name, v in results.items())


def check(workdir: Path, name: str) -> None:
    """Refuses a table that is damaged or another study's; an absent one is fine."""
    path = workdir / "results.parquet"
    if not path.exists():
        return
    try:
        schema = pq.read_schema(path)
        pq.read_table(path)
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{path}: not a readable table ({' '.join(str(e).split())[:80]}); {_REBUILD}") from e
    found = (schema.metadata or {}).get(b"study", b"?").decode(errors="replace")
    if found != name:
        raise UserError(f"{path}: holds the results of study {found!r}, not {name!r}; {_REBUILD}")
    if schema.remove_metadata() != SCHEMA:
        raise UserError(f"{path}: has columns {', '.join(schema.names)}, not {', '.join(SCHEMA.names)}; {_REBUILD}")


_REBUILD = "move it away and run `frugalmoe ablate` again: it is rebuilt from the run directories"


def load(workdir: Path, name: str) -> pa.Table:
    """The table of a study. Raises `UserError` for one that is missing, damaged or another study's."""
    path = workdir / "results.parquet"
    if not path.exists():
        raise UserError(f"{path}: missing; no run of the study is complete")
    check(workdir, name)
    return pq.read_table(path)
