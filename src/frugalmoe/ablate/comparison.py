"""The results of a study in the shape that its report needs."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from frugalmoe.ablate import results, statistics
from frugalmoe.ablate.plan import read_study
from frugalmoe.cost import TRAIN_FACTOR


@dataclasses.dataclass(frozen=True)
class Comparison:
    workdir: Path
    study: Mapping[str, Any]
    table: pa.Table

    @property
    def arms(self) -> list[str]:
        """Returns the names of the arms: the baseline, then the others as declared."""
        baseline = self.study["baseline"]
        return [baseline, *(a for a in self.study["arms"] if a != baseline)]

    @functools.cached_property
    def diverged(self) -> list[str]:
        """Returns the runs whose loss became infinite or NaN."""
        return [f"{arm} seed {seed}" for arm in self.arms for seed in sorted(self._broken(arm))]

    def _broken(self, arm: str) -> set[int]:
        """Returns the seeds that are marked as diverged, or ended with a deciding metric that is not finite."""
        decided = self._finals.get((self.metric, arm), {})
        marked = self._finals.get((results.DIVERGED, arm), {})
        return {*marked, *(seed for seed, value in decided.items() if not np.isfinite(value))}

    @property
    def metric(self) -> str:
        """Returns the name of the metric that decides: the first of the study."""
        return self.study["metrics"][0]

    @functools.cached_property
    def _finals(self) -> dict[tuple[str, str], dict[int, float]]:
        found: dict[tuple[str, str], dict[int, float]] = {}
        for row in self.table.filter(self.table["final"]).to_pylist():
            found.setdefault((row["metric"], row["arm"]), {})[row["seed"]] = row["value"]
        return found

    def final(self, metric: str, arm: str) -> dict[int, float]:
        """Returns {seed: value} of the complete runs that did not diverge; empty where there is none."""
        values, broken = self._finals.get((metric, arm), {}), self._broken(arm)
        return {seed: v for seed, v in values.items() if seed not in broken and np.isfinite(v)}

    def mean(self, metric: str, arm: str) -> float:
        values = self.final(metric, arm)
        return float(np.mean(list(values.values()))) if values else np.nan

    @functools.cached_property
    def paired(self) -> dict[str, statistics.Paired]:
        values = {arm: dict.fromkeys(self._broken(arm), np.nan) | self.final(self.metric, arm) for arm in self.arms}
        return statistics.compare(values, self.study["baseline"])

    def verdict(self, arm: str) -> str:
        if arm == self.study["baseline"]:
            return "baseline"
        if arm not in self.paired:
            return "no complete pair of runs"
        return statistics.verdict(self.paired[arm], "nats" if self.metric.startswith("eval/loss") else "bits per byte")

    def curves(self, arm: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Returns {seed: (steps, values)} of the deciding metric: evaluations during a run and the last one."""
        return self._metric_curves.get(arm, {})

    def violations(self, arm: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Returns {seed: (steps, values)} of max violation in training batches, mean over layers."""
        return self._violation_curves.get(arm, {})

    @functools.cached_property
    def _metric_curves(self) -> dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]:
        return self._curves(pc.equal(self.table["metric"], self.metric))

    @functools.cached_property
    def _violation_curves(self) -> dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]:
        return self._curves(pc.starts_with(self.table["metric"], "router/max_violation/layer_"))

    def _curves(self, wanted: pa.Array) -> dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]:
        """Returns {arm: {seed: (steps, values)}}: at each step the mean of the wanted metrics' finite values."""
        points: dict[str, dict[int, dict[int, list[float]]]] = {}
        logged = pc.and_(pc.invert(self.table["final"]), pc.and_(wanted, pc.is_finite(self.table["value"])))
        for row in self.table.filter(logged).to_pylist():
            by_step = points.setdefault(row["arm"], {}).setdefault(row["seed"], {})
            by_step.setdefault(row["step"], []).append(row["value"])
        arrays = lambda by_step: (np.array(sorted(by_step)), np.array([np.mean(by_step[s]) for s in sorted(by_step)]))
        return {arm: {seed: arrays(p) for seed, p in seeds.items()} for arm, seeds in points.items()}

    def cost_to_target(self, arm: str) -> dict[str, np.ndarray] | None:
        """Returns how much of the baseline's whole training the arm needs to reach the baseline's final loss, per seed.

        The keys are `steps` and `flops`; NaN for a seed that does not reach it. None without a common seed.
        """
        base, found = self.study["baseline"], {"steps": [], "flops": []}
        ours, theirs = (self.final("cost/active_flops", a) for a in (arm, base))
        for seed, target in self.final(self.metric, base).items():
            if seed not in self.final(self.metric, arm) or seed not in self.curves(arm):
                continue
            share = statistics.reaches(*self.curves(arm)[seed], target) / self.study["steps"]
            found["steps"].append(share)
            found["flops"].append(share * ours.get(seed, np.nan) / (theirs.get(seed) or np.nan))
        return {k: np.array(v) for k, v in found.items()} if found["steps"] else None

    def training_flops(self, arm: str) -> float:
        """Returns the FLOPs of a whole run of an arm, forward and backward."""
        tokens = self.study["steps"] * self.study["tokens_per_step"]
        return TRAIN_FACTOR * tokens * self.mean("cost/active_flops", arm)

    def cross(self, arm: str) -> dict[str, list[float]]:
        """Returns {arm evaluated with: losses over seeds} of the runs trained with `arm`."""
        found = {other: list(self.final(f"{results.CROSS}{other}", arm).values()) for other in self.arms}
        return {other: losses for other, losses in found.items() if losses}


def load_comparison(workdir: str | Path) -> Comparison:
    """Reads study.json and results.parquet. Raises `UserError` for what is missing or damaged."""
    workdir = Path(workdir)
    study = read_study(workdir)
    return Comparison(workdir, study, results.read_table(workdir, study["name"]))
