"""Small real runs for the tests: text on disk, a tiny config, and the command line in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from frugalmoe.config import Config, default, override, resolve

TINY = {
    "name": "tiny",
    "model.dim": 32,
    "model.num_layers": 3,
    "model.num_dense_layers": 1,
    "model.dense_dim": 64,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 8,
    "model.moe.num_experts": 8,
    "model.moe.expert_dim": 16,
    "model.moe.num_shared_experts": 1,
    "data.tokenizer": "bytes",
    "data.sequence_length": 32,
    "optim.learning_rate": 3e-3,
    "optim.warmup_steps": 4,
    "train.steps": 12,
    "train.batch_size": 8,
    "train.log_every": 1,
    "train.eval_rows": 16,
}


def write_text(directory: Path, documents: int = 40) -> Path:
    """Documents of two kinds, drawn from small grammars, one file each."""
    rng = np.random.default_rng(0)
    nouns, verbs = ["moon", "river", "crown", "sword", "queen"], ["calls", "holds", "leaves", "finds"]
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        if i % 2:
            lines = [f"The {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}." for _ in range(12)]
        else:
            lines = [f"x{j} = f({rng.integers(100)}, y={rng.integers(100)})" for j in range(12)]
        (directory / f"doc{i:02d}.txt").write_text("\n".join(lines) + "\n")
    return directory


def tiny(text: Path, cache: Path, overrides: Mapping = {}) -> Config:
    fields = TINY | {"data.path": str(text), "data.cache_dir": str(cache)} | dict(overrides)
    return resolve(override(default(), fields))


def config_file(directory: Path, text: Path, cache: Path, overrides: Mapping = {}) -> Path:
    """The same config as a file for the command line."""
    fields = TINY | {"data.path": str(text), "data.cache_dir": str(cache)} | dict(overrides)
    path = directory / "tiny.py"
    path.write_text(
        "from frugalmoe.config import default, override\n\n\n"
        f"def get_config(arg=None):\n    return override(default(), {fields!r})\n"
    )
    return path


def command(*args: object, **environment: str) -> list[str]:
    return [sys.executable, "-W", "error::UserWarning", "-m", "frugalmoe.cli", *map(str, args)]


def run(
    *args: object, timeout: float = 300, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """`frugalmoe ARGS` in its own process."""
    return subprocess.run(
        command(*args), capture_output=True, text=True, timeout=timeout, cwd=cwd, env=os.environ | environment
    )


def rows(workdir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def without_times(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("speed/")} for row in rows]


def figures(
    fault: str, injections: int, survived: int, lost: float | None = None, seconds: list[float] | None = None
) -> None:
    """Gives a row to the table of faults (faults/matrix.py): of so many injections so many were survived, the most
    steps that one cost, and the seconds to recover of each.
    """
    if table := os.environ.get("FRUGALMOE_FAULTS_TABLE"):
        row = {"fault": fault, "injections": injections, "survived": survived, "lost": lost, "seconds": seconds or []}
        with open(table, "a") as file:
            file.write(json.dumps(row) + "\n")
