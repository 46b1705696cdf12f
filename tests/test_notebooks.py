"""Every notebook runs from top to bottom on a tiny run, and its rendered twin is the same notebook with outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import tiny, write_text

from frugalmoe.cli import main
from frugalmoe.train.loop import train

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))


def cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text())["cells"]


def jupytext(*args: object, **environment: str) -> None:
    out = subprocess.run(
        [sys.executable, "-m", "jupytext", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | environment,
    )
    assert out.returncode == 0, out.stdout + out.stderr


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs(notebook, run_dir, tmp_path):
    done = tmp_path / "done.ipynb"
    small = {"FRUGALMOE_RUN": run_dir, "FRUGALMOE_TOKENS": "500", "FRUGALMOE_WORKDIR": str(tmp_path / "study")}
    small |= {"FRUGALMOE_CONFIGS": "quickstart,study"}
    small |= {"FRUGALMOE_TEXT": f"{run_dir}/../one", "FRUGALMOE_STEPS": "24"}
    small |= {"FRUGALMOE_PUBLISHED": f"{run_dir}/../published", "FRUGALMOE_LINKED": str(tmp_path / "linked")}
    jupytext("--to=notebook", "--execute", f"--run-path={FOLDER}", f"--output={done}", notebook, **small)
    pictures = [o for c in cells(done) for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == notebook.read_text().count("\nplots.")


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_rendered_twin_is_the_same_with_outputs(notebook, tmp_path):
    plain = tmp_path / "plain.ipynb"
    jupytext("--to=notebook", f"--output={plain}", notebook)
    twin = cells(notebook.with_suffix(".ipynb"))
    said = lambda cells: [(c["cell_type"], "".join(c["source"])) for c in cells]
    assert said(twin) == said(cells(plain)), f"render it again: jupytext --to=notebook --execute {notebook}"
    assert all(c["execution_count"] for c in twin if c["cell_type"] == "code")
    assert any(c["outputs"] for c in twin if c["cell_type"] == "code")
    assert not [o for c in twin for o in c.get("outputs", []) if o["output_type"] == "error"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Two domains and three checkpoints."""
    root = tmp_path_factory.mktemp("notebooks")
    sources = {d: {"path": str(write_text(root / d))} for d in ("one", "two")}
    (root / "two" / "doc00.txt").write_text("Another first document, so that the domains differ.\n" * 9)
    fields = {"data.sources": sources, "data.validation_fraction": 0.5, "checkpoint.every_steps": 4}
    train(tiny(root, root / "cache", fields | {"checkpoint.keep_last": 9}), root / "run")
    as_qwen3 = {
        "model.qk_norm": "head",
        "model.moe.num_shared_experts": 0,
        "data.tokenizer": "bpe:300",
        "train.steps": 5,
    }
    train(tiny(root, root / "cache", fields | as_qwen3), root / "ours")
    assert main(["convert", "to-hf", str(root / "ours"), str(root / "published")]) == 0
    return str(root / "run")
