"""The house is as docs/architecture.md says: its rooms, their imports, and what one writes to add something."""

import ast
import collections
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import config_file, write_text
from runs import rows as rows_of

import frugalmoe

PACKAGE = Path(frugalmoe.__file__).parent
PAGE = Path(__file__).parents[1] / "docs/architecture.md"
TEXT = PAGE.read_text(encoding="utf-8")
TREES = {path.relative_to(PACKAGE): ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
FRONT = {"__init__", "__main__"}  # the package itself, which gives names of all rooms
MOST_POSITIONAL = 6


def room_of(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else path.stem


def imported(tree: ast.AST) -> set[str]:
    """The rooms that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("frugalmoe.")}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute, so that they can be read here"
            parts = (node.module or "").split(".")
            if parts[0] == "frugalmoe":
                found |= {alias.name for alias in node.names} if len(parts) == 1 else {parts[1]}
    return found


ARROWS = collections.defaultdict(set)
for path, tree in TREES.items():
    ARROWS[room_of(path)] |= imported(tree) - {room_of(path)}


def rows(title: str) -> list[list[str]]:
    """The cells of the table under a heading of the page, without its header."""
    part = TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


MAP = rows("The map, from the ground up")
ROOMS = [cell.strip("`/").removesuffix(".py") for cell, *_ in MAP if cell.startswith("`")]
GROUND = ROOMS[: [cell for cell, *_ in MAP].index("**the library**") - 1]


def test_the_map_names_every_room_and_what_it_imports():
    assert set(ROOMS) == set(ARROWS) - FRONT and len(ROOMS) == len(set(ROOMS))
    for cell, _, imports in (row for row in MAP if row[0].startswith("`")):
        name = cell.strip("`/").removesuffix(".py")
        there = [room for room in ROOMS if room in ARROWS[name] and room not in GROUND]
        assert imports == ", ".join(there), f"the row of {name} in {PAGE.name}"


def test_no_import_runs_up_and_no_two_rooms_import_each_other():
    floor = {room: i for i, room in enumerate(ROOMS)}
    up = [
        f"{path} imports {other}"
        for path, tree in TREES.items()
        for other in imported(tree) & floor.keys()
        if room_of(path) in floor and floor[other] > floor[room_of(path)]
    ]
    assert not up
    assert not [(a, b) for a in ROOMS for b in ARROWS[a] if a in ARROWS.get(b, ())]


def test_no_function_has_more_than_six_positional_parameters():
    """`self` is not counted. Those after `*` are named where they are given, and cannot be mixed up."""
    long = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.Lambda) and not is_kernel(node):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
                if len(names) > MOST_POSITIONAL:
                    long.append(f"{path}:{node.lineno} {getattr(node, 'name', 'lambda')}: {len(names)}")
    assert not long


def is_kernel(node: ast.AST) -> bool:
    """Whether a compiler of kernels calls the function, with an argument for each array, and no other can."""
    return "triton.jit" in map(ast.unparse, getattr(node, "decorator_list", ()))


def names_in(tree: ast.AST) -> set[str]:
    """What a file defines at its top level, and the members of its classes as Class.member."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{member.name}" for member in node.body if isinstance(member, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AnnAssign):
            found.add(node.target.id)
    return found


NAMED = re.findall(r"`([\w/]+\.py)(?:: ([\w.]+))?`", TEXT)


@pytest.mark.parametrize("file, name", sorted(set(NAMED)))
def test_what_the_page_names_exists(file, name):
    if "NAME" in file or file.startswith(("configs/", "tests/")):
        assert (PAGE.parents[1] / file).parent.is_dir() or (PACKAGE / file).parent.is_dir()
        return
    assert (PACKAGE / file).is_file(), file
    assert not name or name in names_in(TREES[Path(file)]), f"{file}: {name}"


# Additions. Each is written as the page says into a copy of the package; one run then uses all of them.

ROUTER = """
from frugalmoe.routing import select, stats
from frugalmoe.routing.contract import About, Router, Routing, linear_init, linear_logits
from frugalmoe.routing.losses import GATE_LOSSES, gate_losses

import jax


def route(params, state, inputs, config):
    logits_BTE = linear_logits(params, inputs)
    probs_BTE = jax.nn.softmax(logits_BTE)
    choice = select.top_k(logits_BTE, config.num_experts_per_token)
    plan = select.token_plan(choice.expert_BTK, select.at(probs_BTE, choice.expert_BTK), inputs, config.num_experts)
    load_BE = stats.load(plan, inputs, config.num_experts)
    losses = gate_losses(logits_BTE, probs_BTE, load_BE, inputs, config)
    return Routing(plan, losses, stats.of_layer(load_BE, inputs, logits_BTE=logits_BTE, probs_BTE=probs_BTE))


ROUTER = Router(
    about=About(year=2026, paper="", score="softmax", selection="K largest", weights="their probabilities",
                balance="losses", losses=GATE_LOSSES),
    route=route, init=linear_init,
)
"""
EXECUTOR = """
from frugalmoe.experts.contract import Executor
from frugalmoe.experts.executors import dense

EXECUTOR = Executor(run=dense.run, work="E / K", purpose="the oracle by another name", keeps_room=False)
"""
ATTENTION = """
import dataclasses

from frugalmoe.model.attention.kinds import grouped

ATTENTION = dataclasses.replace(grouped.ATTENTION, about="grouped-query attention by another name")
"""
FAMILY = """
import dataclasses

from frugalmoe.convert.families.glm4_moe import FAMILY

FAMILY = dataclasses.replace(
    FAMILY,
    keys=tuple(key for key in FAMILY.keys if "options" not in key.ours),
    settings={"moe.router": "mine", "attention": "plain"},
)
"""
TASK = """
from frugalmoe.evaluate.contract import Square, Task

TASK = Task(about="a day's number", choices=2, squares=lambda rng: iter([Square(("One", "Two"), (" is 1.", " is 2."))]))
"""
MERGE = """
import numpy as np

from frugalmoe.islands.contract import Merge, Merged

MERGE = Merge(
    about="the first of all",
    rule=lambda offered, history, options: Merged(np.eye(len(offered.islands), 1) @ np.ones((1, len(offered.tensors)))),
)
"""
CORPUS = """
from frugalmoe.data.corpus import Corpus

CORPUS = Corpus(documents=lambda: [f"The {n} of the " + "moon and the river. " * 20 for n in range(40)])
"""
TERM = """
def _size(micro):
    size = jnp.mean(jnp.square(micro.out.hidden_BTD)) / micro.config.train.accumulate_steps
    return 1e-4 * size, size


TERMS = {
    "size": Term(_size, lambda size, of_step, config: {"loss/size": size}, lambda knobs: {"size": 1e-4}),
"""
PEAK = """

def peak(probs_BTE, inputs):
    return Loss(jnp.sum(probs_BTE.max(-1), where=inputs.valid_BT), "token")
"""

# What is added -> file -> the text of a new file, or pairs of what stands there and what shall stand there.
ADDITIONS = {
    "router": {"routing/strategies/mine.py": ROUTER},
    "executor": {"experts/executors/own.py": EXECUTOR},
    "attention kind": {"model/attention/kinds/plain.py": ATTENTION},
    "model family": {"convert/families/own_moe.py": FAMILY},
    "task of the suite": {"evaluate/suite/days.py": TASK},
    "data source": {"../songs.py": CORPUS},
    "merge rule": {"islands/merges/first.py": MERGE},
    "gate loss": {
        "routing/losses.py": [
            ('    "mutual_information",\n)', '    "mutual_information",\n    "peak",\n)'),
            ("    makers = {\n", '    makers = {\n        "peak": lambda: peak(probs_BTE, inputs),\n'),
            ("\n\n# Losses of a group", PEAK + "\n\n# Losses of a group"),
        ]
    },
    "loss term": {"train/objective.py": [("\nTERMS = {\n", TERM)]},
    "optimizer": {
        "optimizers.py": [('"sgd": sgd}', '"sgd": sgd, "still": lambda *_: optax.set_to_zero()}')]
    },
    "metric": {
        "metrics.py": [("ROWS = (\n", 'ROWS = (\n    Metric("loss/peak", "peak", "", LESS, TRAINING),\n')]
    },
    "metric of routing": {
        "metrics.py": [
            ("ROWS = (\n", 'ROWS = (\n    Metric("router/top_share", "share of the first", "", LESS, HELD_OUT),\n')
        ],
        "routing/stats.py": [
            ('    values = {\n', '    values = {\n        "top_share": share.max(-1),\n'),
        ],
    },
}  # fmt: skip
FLAGS = ("model.moe.router=mine", "model.moe.losses.peak=0.1", "model.moe.executor=own", "optim.name=still",
         "model.attention=plain", "data.path=songs.py")  # fmt: skip
AFTER = """
import json, sys
from frugalmoe import metrics
from frugalmoe.ablate.results import known_metrics
from frugalmoe.cli import main
from frugalmoe.islands import merges
code = main(["train", *sys.argv[1:]])
run = sys.argv[2].removeprefix("--workdir=")
code = code or main(["evaluate", run, "--suite=days"])
code = code or main(["convert", "to-hf", run, run + "-published", "--family=own_moe"])
names = ("loss/peak", "router/top_share")
about = [merges.get(n).about for n in merges.names() if n == "first"]
titles = [metrics.titled(n) for n in names]
print(json.dumps({"code": code, "titles": titles, "known": known_metrics(["a"]), "merges": about}))
"""


def test_the_page_lists_the_additions_and_how_many_files_each_takes():
    assert {what: int(files) for what, _, files in rows("To add something")} == {
        k: len(v) for k, v in ADDITIONS.items()
    }


@pytest.fixture(scope="module")
def enlarged(tmp_path_factory):
    """The run of a package with all additions, and what that package says of them."""
    place = tmp_path_factory.mktemp("enlarged")
    shutil.copytree(PACKAGE, place / "frugalmoe", ignore=shutil.ignore_patterns("__pycache__"))
    for what, files in ADDITIONS.items():
        for file, change in files.items():
            path = place / "frugalmoe" / file
            assert path.is_file() != isinstance(change, str), f"{what}: {file}"
            text = change if isinstance(change, str) else path.read_text()
            for old, new in () if isinstance(change, str) else change:
                assert text.count(old) == 1, f"{what}: {file}: {old!r}"
                text = text.replace(old, new)
            path.write_text(text)
    config = config_file(place, write_text(place / "text"), place / "cache", {"train.steps": 5})
    flags = [f"--config={config}", f"--workdir={place / 'run'}", *(f"--config.{flag}" for flag in FLAGS)]
    environment = os.environ | {"PYTHONPATH": str(place), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-c", AFTER, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "run", json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_run_uses_all_that_was_added(enlarged):
    run, said = enlarged
    summary, logged = json.loads((run / "summary.json").read_text()), rows_of(run)
    assert said["code"] == 0 and summary["status"] == "complete"
    assert summary["router"]["name"] == "mine"
    assert 1 / 8 < logged[0]["loss/peak"] <= 1  # the largest of 8 probabilities
    assert 0 < logged[0]["loss/size"] < logged[0]["loss/total"]
    norms = {row["optim/parameter_norm"] for row in logged if "loss/ce" in row}
    assert len(norms) == 1  # the optimizer that was added leaves all as it is
    config = json.loads((run / "config.json").read_text())
    assert (config["model"]["moe"]["executor"], config["model"]["attention"]) == ("own", "plain")
    assert summary["domains"] == ["songs"]
    assert json.loads((run.parent / "run-published/config.json").read_text())["model_type"] == "own_moe"
    assert {layer["top_share"] >= 1 / 8 for layer in summary["router"]["layers"].values()} == {True}


@pytest.mark.slow
def test_what_is_added_is_known_to_studies_and_reports(enlarged):
    run, said = enlarged
    assert said["titles"] == ["peak", "share of the first"] and said["merges"] == ["the first of all"]
    assert {"loss/peak", "router/top_share", "suite/accuracy/days", "suite/margin/days"} <= set(said["known"])
    report = (run / "report/index.html").read_text()
    assert "share of the first" in report
    assert re.search(r"size loss [\d.]+ \(times 0\.0001\)", report)
