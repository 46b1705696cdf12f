"""The driver's side of a benchmark: several workers alive at one time, one step each in turn, so that all see the same
machine in the same minute. What differs between minutes cancels in the ratio of two workers within one round.
"""

import contextlib
import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sizes import Size

HERE = Path(__file__).parent
WARM_UP = 2  # rounds that are run and not counted: compilation, then the first reuse of buffers


class Model(NamedTuple):
    """A worker to start: `script` run by `python` with the size and the model's name in that framework."""

    label: str
    python: str
    script: str
    name: str
    size: Size


class Measured(NamedTuple):
    """What one model did: lists have one entry per counted round."""

    parameters: int
    versions: Mapping[str, str]
    tokens: int  # in a step
    rounds: Sequence[Mapping[str, float]]  # answers of `serve`
    start_peak_mib: float  # with compilation
    updates: Sequence[Mapping[str, float]]  # the optimizer's part alone, where the worker offers it

    def median(self, field: str) -> float:
        return statistics.median(r[field] for r in self.rounds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.median("seconds")

    @property
    def peak_mib(self) -> float:
        return max(r["peak_mib"] for r in self.rounds)

    @property
    def update_seconds(self) -> float:
        return statistics.median(u["seconds"] for u in self.updates)

    def speed_of(self, other: "Measured") -> float:
        """How many times as fast as this one `other` is: the median over rounds of the ratio within a round."""
        return statistics.median(a["seconds"] / b["seconds"] for a, b in zip(self.rounds, other.rounds))


class WorkerDied(RuntimeError):
    pass


class Worker:
    def __init__(self, model: Model, log: Path):
        self.model, self._log = model, log
        command = [model.python, str(HERE / model.script), model.size.to_json(), model.name]
        with log.open("w") as errors:
            self._process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=errors, text=True)

    def answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            tail = self._log.read_text().strip().splitlines() or ["no message"]
            raise WorkerDied(f"exit code {self._process.wait()}: {tail[-1][:200]}")
        return json.loads(line)

    def do(self, action: str) -> dict:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(action + "\n")
            self._process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(timeout=60)


def measure(models: Sequence[Model], rounds: int, updates: bool = False) -> dict[str, Measured | str]:
    """Every model's result by label, or why it has none. `updates` also times the optimizer, of all models."""
    results: dict[str, Measured | str] = {}
    with _workers(models) as workers:
        alive, about, first = [], {}, {}
        for worker in workers:  # one after the other: a worker that compiles must not slow one that is measured
            try:
                about[worker] = worker.answer()
                first[worker] = max(worker.do("step")["peak_mib"] for _ in range(WARM_UP))
                alive.append(worker)
            except WorkerDied as e:
                results[worker.model.label] = str(e)
        steps = [[worker.do("step") for worker in alive] for _ in range(rounds)]
        if updates:
            optimizer = [[worker.do("update") for worker in alive] for _ in range(rounds + WARM_UP)][WARM_UP:]
        for i, worker in enumerate(alive):
            results[worker.model.label] = Measured(
                parameters=about[worker]["parameters"],
                versions=about[worker]["versions"],
                tokens=worker.model.size.tokens,
                rounds=[r[i] for r in steps],
                start_peak_mib=first[worker],
                updates=[r[i] for r in optimizer] if updates else [],
            )
    return {m.label: results[m.label] for m in models}


@contextlib.contextmanager
def _workers(models: Sequence[Model]) -> Iterator[list[Worker]]:
    with tempfile.TemporaryDirectory() as directory:
        workers = []
        try:
            for i, model in enumerate(models):
                workers.append(Worker(model, Path(directory) / f"{i}.log"))
            yield workers
        finally:
            for worker in workers:
                worker.stop()
