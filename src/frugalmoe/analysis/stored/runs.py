"""Reads a run directory into numpy arrays; nothing else is needed.

Letters: S logged steps, L MoE layers, E experts.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from frugalmoe.analysis.stored.probe import Probe, load_probe
from frugalmoe.analysis.stored.rounds import IslandLoads, Rounds, read_island_loads, read_rounds
from frugalmoe.data.tokenizer import Tokenizer, load_from
from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.files import read_json
from frugalmoe.shapes import NAMES, NUMBER, is_integer, is_number, misshapen
from frugalmoe.train import goodput
from frugalmoe.train.goodput import Goodput

_LAYERS = {re.compile(r"layer_\d{1,9}"): {NAMES: NUMBER}}
_SCORES = {NAMES: {NAMES: NUMBER}}
# What is read of a run's files, as far as they are there; runs of all ages have them so.
_CONFIG = {
    "name": str,
    "model?": {
        "num_layers?": int, "multi_token_prediction?": {"depth?": int},
        "moe": {"num_experts": int, "num_experts_per_token": int},
    },
    "train?": {"steps?": int, "batch_size?": int},
    "data?": {"sequence_length?": int},
}  # fmt: skip
_SUMMARY = {
    "status?": str, "step?": int, "steps?": int, "domains?": [str], "eval?": _SCORES, "validation?": _SCORES,
    "parameters?": {NAMES: NUMBER}, "speed?": {NAMES: NUMBER},
    "router?": {"name?": str, "causal?": str, "causal_in_evaluation?": str, "layers?": _LAYERS},
    "mixture_of_depths?": {"causal": str, "causal_in_evaluation": str, "layers": _LAYERS},
    "sample?": {"prompt": str, "text": str, "why?": str},
}  # fmt: skip
_ENVIRONMENT = {"command?": [str], "git_commit?": (str, None)}
_START = {"time?": (str, None), "command?": ([str], None), "git_commit?": (str, None), "changes?": {NAMES: [Any]}}


class Series(NamedTuple):
    """One metric over training."""

    steps: np.ndarray  # int64
    values: np.ndarray  # float64

    def tail(self, fraction: float = 0.1) -> float:
        """Mean of the last values (at least one), less noisy than the last one; NaN where there are none."""
        return float(self.values[-max(1, round(fraction * len(self.values))) :].mean()) if len(self.values) else np.nan


class Loads(NamedTuple):
    """Token slots that each expert received at the logged steps."""

    steps_S: np.ndarray
    layers_L: np.ndarray  # index in the whole network
    counts_SLE: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
    path: Path
    config: Mapping[str, Any]
    metrics: Mapping[str, Series]
    environment: Mapping[str, Any]  # empty where the file is absent, as the next three
    summary: Mapping[str, Any]
    loads: Loads | None
    probe: Probe | None
    tokenizer: Tokenizer | None
    # A row per start: time (UTC), step, command, versions, git_commit, platform, devices, processes, and the changes
    # of the config since the start before, field -> [then, now]. Empty for runs that are older than their history.
    history: Sequence[Mapping[str, Any]] = ()
    rounds: Rounds | None = None  # of a run that is one of several islands
    island_loads: IslandLoads | None = None
    goodput: Goodput | None = None  # where the wall time went; None for a run without goodput.jsonl
    # A row per event: step, kind, what, and seconds since the start. Empty where nothing happened.
    events: Sequence[Mapping[str, Any]] = ()

    @property
    def name(self) -> str:
        return self.config["name"]

    @property
    def domains(self) -> list[str]:
        """Names of the validation domains, indexed by the probe's domain ids."""
        if "domains" in self.summary:
            return list(self.summary["domains"])
        prefix = "eval/loss/"
        return [n.removeprefix(prefix) for n in self.metrics if n.startswith(prefix) and n != prefix + "mean"]

    def series(self, name: str) -> Series:
        """A metric's column; raises `UserError` for a name that the run does not have."""
        if name not in self.metrics:
            raise UserError(f"{self.path / 'metrics.jsonl'}: no metric {name!r}; {did_you_mean(name, self.metrics)}")
        return self.metrics[name]

    def layers(self, metric: str) -> dict[int, Series]:
        """`router/<metric>/layer_XX` of every layer that has it, by layer index."""
        prefix = f"router/{metric}/layer_"
        of_layer = lambda name: name.removeprefix(prefix)
        found = [(n, s) for n, s in sorted(self.metrics.items()) if n.startswith(prefix)]
        return {int(of_layer(name)): series for name, series in found if re.fullmatch(r"\d{1,9}", of_layer(name))}


def load_run(path: str | Path) -> Run:
    """Reads a run, finished or not. Raises `UserError` naming the file (and line) that is missing or damaged."""
    path = Path(path)
    if not (path / "config.json").is_file():
        near = sorted(p.parent.name for p in path.parent.glob("*/config.json"))
        raise UserError(f"{path}: not a run directory (no config.json); {did_you_mean(path.name, near)}")
    if not (path / "metrics.jsonl").is_file():
        raise UserError(f"{path / 'metrics.jsonl'}: missing; the run has not logged a step")
    return Run(
        path=path,
        config=_shaped(path / "config.json", _CONFIG, {"name": path.name}),
        metrics=read_metrics(path / "metrics.jsonl"),
        environment=_shaped(path / "environment.json", _ENVIRONMENT),
        summary=_shaped(path / "summary.json", _SUMMARY),
        loads=_loads(path / "expert_load.jsonl"),
        probe=load_probe(path / "probe.npz") if (path / "probe.npz").exists() else None,
        tokenizer=_tokenizer(path / "tokenizer"),
        history=tuple(_history(path / "history.jsonl")),
        rounds=read_rounds(_rows_if_there(path / "rounds.jsonl")),
        island_loads=read_island_loads(_rows_if_there(path / "island_load.jsonl")),
        goodput=goodput.account(rows) if (rows := goodput.read(path / goodput.FILE)) else None,
        events=tuple(row for _, row in _rows_if_there(path / "events.jsonl")),
    )


def _tokenizer(path: Path) -> Tokenizer | None:
    if not path.is_dir():
        return None
    try:
        return load_from(path)
    except UserError:
        raise
    except ValueError as e:
        raise UserError(f"{path}: not a readable tokenizer ({e})") from e


def _shaped(path: Path, shape: Mapping[str, Any], before: Mapping[str, Any] = {}) -> dict:
    """A JSON object of a shape, put over what it may lack; empty where the file is absent."""
    if not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    value = {**before, **value}
    if wrong := next(misshapen(value, shape), None):
        raise UserError(f"{path}: not as a run writes it at {wrong}")
    return value


def _history(path: Path) -> Iterator[dict]:
    for where, row in _rows_if_there(path):
        if wrong := next(misshapen(row, _START), None):
            raise UserError(f"{where}: not as a run writes it at {wrong}")
        yield row


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields (where, object) of each line. A last line without a newline is still being written and is left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    for number, line in enumerate(lines, 1):
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{where}: not valid JSON ({e})") from e
        if not isinstance(row, dict) or not is_integer(row.get("step")):
            raise UserError(f"{where}: expected a JSON object with an integer 'step'")
        yield where, row


def _rows_if_there(path: Path) -> Iterator[tuple[str, dict]]:
    return _rows(path) if path.exists() else iter(())


def read_metrics(path: Path) -> dict[str, Series]:
    """Returns every metric of a metrics.jsonl; NaN where a value was not finite. Raises `UserError` naming the line."""
    columns: dict[str, tuple[list, list]] = {}
    for where, row in _rows(path):
        for name, value in row.items():
            if name == "step":
                continue
            if value is not None and not is_number(value):
                raise UserError(f"{where}: {name}={value!r:.80}: expected a number")
            steps, values = columns.setdefault(name, ([], []))
            steps.append(row["step"])
            values.append(np.nan if value is None else value)
    return {n: Series(np.array(s, np.int64), np.array(v, np.float64)) for n, (s, v) in columns.items()}


def _loads(path: Path) -> Loads | None:
    if not path.exists():
        return None
    steps, counts, layers = [], [], None
    for where, row in _rows(path):
        layers = row.get("layers") if layers is None else layers
        try:
            table_LE = np.array(row["counts"])
            whole = table_LE.dtype.kind == "i" and table_LE.shape == (len(layers), table_LE.shape[-1])
        except (KeyError, ValueError, TypeError, IndexError):  # numpy raises ValueError for ragged lists
            whole = False
        if not whole or row.get("layers") != layers or (counts and table_LE.shape != counts[0].shape):
            raise UserError(f"{where}: 'counts' must hold one equally long list of integers per entry of 'layers'")
        steps.append(row["step"])
        counts.append(table_LE)
    return Loads(np.array(steps), np.array(layers), np.array(counts)) if steps else None
