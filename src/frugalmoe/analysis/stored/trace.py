"""The trace of a run: routing of the same held-out tokens at each checkpoint, as `frugalmoe trace RUN` stored it.

A router's probabilities of single tokens are not part of the routing contract and not in a trace; the combine weights
are, and each layer's mean router entropy where the router has probabilities.

Letters: S checkpoints, L MoE layers, N tokens, E experts, K experts per token (the most that any token has).
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from frugalmoe.analysis.measures import dynamics
from frugalmoe.analysis.measures.uncertainty import Estimate, mean
from frugalmoe.analysis.stored.probe import Probe, damage, make, read_columns
from frugalmoe.config.load import OPEN
from frugalmoe.config.settle import open_again
from frugalmoe.data.cache import digest
from frugalmoe.data.tokenizer import load_from
from frugalmoe.errors import UserError

FOLDER = "trace"
SAME = ("token_ids", "domain_ids", "documents", "segment_ids")  # columns that all checkpoints share


@dataclasses.dataclass(frozen=True)
class Trace:
    """Routing of the same held-out tokens at S checkpoints; about S L N K 6 bytes."""

    path: Path
    domains: tuple[str, ...]
    num_experts: int
    steps_S: np.ndarray
    loss_SN: np.ndarray  # nats; NaN where there is no next token
    expert_SLNK: np.ndarray  # uint16, in the plan's order, best first; `num_experts` where a token has fewer than K
    weight_SLNK: np.ndarray  # float32, of the combine matrix; 0 there
    router: Mapping[str, np.ndarray]  # [S, L], `routing.stats.metrics` of the traced tokens
    probes: tuple[Probe, ...]  # per checkpoint, without its selection: `probe` adds it

    def selected(self, s: int = -1, k: int | None = None) -> np.ndarray:
        """Which experts checkpoint s chose, bool [L, N, E]; with k, its k first choices only."""
        expert_LNK = self.expert_SLNK[s][..., :k]
        chosen_LNE = np.zeros((*expert_LNK.shape[:2], self.num_experts + 1), bool)
        np.put_along_axis(chosen_LNE, expert_LNK.astype(np.int64), True, axis=-1)
        return chosen_LNE[..., : self.num_experts]

    def gate(self, s: int = -1) -> np.ndarray:
        """The combine matrix of checkpoint s, float32 [L, N, E]."""
        gate_LNE = np.zeros((*self.expert_SLNK.shape[1:3], self.num_experts + 1), np.float32)
        np.put_along_axis(gate_LNE, self.expert_SLNK[s].astype(np.int64), self.weight_SLNK[s], axis=-1)
        return gate_LNE[..., : self.num_experts]

    @property
    def layers_L(self) -> np.ndarray:
        """Index in the whole network of each traced layer."""
        return self.probes[-1].layers_L

    def saturation(self) -> tuple[Estimate, np.ndarray]:
        """`dynamics.saturation` and `dynamics.saturation_chance`, [S, L]; one checkpoint in memory at a time."""
        last_LNE, unit_N = self.selected(), self.probes[-1].unit_ids_N
        found, chance = [], []
        for s in range(len(self.steps_S)):
            selected_LNE = self.selected(s)
            found.append(mean(dynamics.overlap(selected_LNE, last_LNE), unit_N))
            chance.append(dynamics.saturation_chance(selected_LNE, last_LNE))
        return _stacked(found), np.stack(chance)

    def churn(self) -> Estimate:
        """`dynamics.churn` between successive checkpoints, [S - 1, L]."""
        unit_N = self.probes[-1].unit_ids_N
        pairs = ((self.selected(s), self.selected(s + 1)) for s in range(len(self.steps_S) - 1))
        return _stacked([mean(dynamics.churn(*pair), unit_N) for pair in pairs])

    def probe(self, s: int = -1) -> Probe:
        """Checkpoint s as a probe: whatever measures or draws a probe works on it."""
        return self.probes[s]._replace(selected_LNE=self.selected(s))


def _stacked(estimates: list[Estimate]) -> Estimate:
    return Estimate(*map(np.stack, zip(*estimates)))


def fingerprints(run: Path) -> dict[str, str]:
    """Returns fingerprints of what a trace depends on, from the run directory alone: its model, data and tokenizer."""
    with damage(run / "config.json", "config"):
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        config = open_again(config, config.pop(OPEN, []))  # so had older runs it, whose traces are still good
        data = json.loads((run / "data.json").read_text(encoding="utf-8"))["fingerprint"]
    return {
        "config": digest([config["model"], config["data"]]),
        "data": data,
        "tokenizer": load_from(run / "tokenizer").fingerprint,
    }


def check_file(path: Path, columns: Mapping[str, np.ndarray], expected: Mapping[str, str]) -> None:
    for name, value in expected.items():
        there = str(columns.get(name, "none"))
        if there != value:
            raise UserError(
                f"{path}: traced with another {name} (fingerprint {there} there, {value} in the run); "
                f"delete {path.parent} and run `frugalmoe trace {path.parents[1]}` again"
            )


def trace_files(run: Path) -> list[Path]:
    """Returns the files of a run's trace, in the order of their steps."""
    return sorted((run / FOLDER).glob("step_*.npz"), key=lambda p: (len(p.stem), p.stem))


def load_trace(run: str | Path) -> Trace:
    """The trace of a run directory. Raises `UserError` naming the file that is damaged or of another run."""
    run = Path(run)
    files = trace_files(run)
    if not files:
        raise UserError(f"{run / FOLDER}: no trace; make one with `frugalmoe trace {run}`")
    expected, tables = fingerprints(run), []
    for path in files:
        columns = read_columns(path, "trace")
        check_file(path, columns, expected)
        if tables and any(not np.array_equal(columns.get(n), tables[0].get(n)) for n in SAME):
            raise UserError(f"{path}: holds other tokens than {files[0].name}; delete {path.parent} and trace again")
        tables.append(columns)
    with damage(run / FOLDER, "trace"):
        return _assemble(run / FOLDER, tables)


def _assemble(path: Path, tables: list[dict[str, np.ndarray]]) -> Trace:
    first = tables[0]
    real_N, experts = first["segment_ids"] > 0, int(first["num_experts"])
    k = max(t["expert"].shape[-1] for t in tables)
    widen = lambda a, fill: np.pad(a[:, real_N], ((0, 0), (0, 0), (0, k - a.shape[-1])), constant_values=fill)
    empty = np.zeros((0, real_N.size, 0), np.uint8)
    probes = tuple(make({**t, "selected": empty}) for t in tables)
    names = [n for n in first if n.startswith("router/")]
    return Trace(
        path=path,
        domains=tuple(map(str, first["domains"])),
        num_experts=experts,
        steps_S=np.array([int(t["step"]) for t in tables]),
        loss_SN=np.stack([p.loss_N for p in probes]),
        expert_SLNK=np.stack([widen(t["expert"], experts) for t in tables]),
        weight_SLNK=np.stack([widen(t["weight"], 0) for t in tables]),
        router={n.removeprefix("router/"): np.stack([t[n] for t in tables]) for n in names},
        probes=probes,
    )
