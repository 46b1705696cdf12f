"""Every command and every file of the README, run in a copy of the repository as a newcomer would.

What is changed: configs run in laptop mode, a study trains two arms for a few steps, `make test` lists instead of
running, `make bench` takes small models, and islands, which are for several terminals, begin together.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
LINES = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
ISLANDS = [line for line in LINES if "--islands=" in line]
COMMANDS = [line for line in LINES if line not in ISLANDS[1:]]
SMALL_STUDY = "--seeds=0,1 --config.train.steps=4 --config.optim.warmup_steps=1 --config.train.eval_every=0"
LIST_TESTS = "--collect-only -q tests/test_configs.py"


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A copy whose environments are this one's, so that nothing is installed again."""
    copy = tmp_path_factory.mktemp("clone") / "frugalmoe"
    shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "prepared", "*_cache"))
    environment = Path(sys.prefix)
    for name in (".venv", ".venv-bench"):
        (copy / name).mkdir()
        for part in environment.iterdir():
            if not part.name.endswith("stamp"):
                (copy / name / part.name).symlink_to(part)
    for stamp in (".venv/run.stamp", ".venv/laws.stamp", ".venv/dev.stamp", ".venv-bench/stamp"):
        (copy / stamp).touch()
    code = re.findall(r"Save this as `(.*?)`.*?```python\n(.*?)```", README, re.S)
    for path, text in code:
        (copy / path).write_text(text)
    return copy


def small(command: str) -> str:
    if command in ISLANDS:
        begun = [line.replace("--islands=", "--config.islands.wait_for=2 --islands=") for line in ISLANDS]
        return f"{begun[0]} & {begun[1]} && wait $!"
    command = re.sub(r"(--config=configs/\w+\.py)\b(?!:)", r"\1:laptop", command).replace(
        "runs/quickstart", "runs/quickstart-laptop"
    )
    if command.startswith("frugalmoe ablate") and "--dry-run" not in command:
        command += f" --arms=none,loss_global {SMALL_STUDY}"
    arguments = {"make test": LIST_TESTS, "make test-fast": LIST_TESTS, "make bench": "--quick"}.get(command)
    return f'{command} ARGS="{arguments}"' if arguments else command


def test_there_are_commands():
    assert {"make run", "make test", "make bench"} <= set(COMMANDS)


@pytest.mark.parametrize("command", list(dict.fromkeys(COMMANDS)))
def test_command(command, house):
    environment = os.environ | {
        "PATH": f"{house / '.venv/bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(house / "src"),
        "CONFIG": "configs/quickstart.py:laptop",
    }
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        ["bash", "-c", small(command)], cwd=house, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{small(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_two_terminals_train_one_model(house):
    """What they ended with, after the commands."""
    from frugalmoe.islands import status
    from frugalmoe.islands.store import open_store

    found = status.look(open_store(str(house / re.search(r"--islands=(\S+)", ISLANDS[0])[1]), write=False))
    assert len(ISLANDS) == 2 and [row.status for row in found.islands] == ["complete"] * 2
    assert {row.outer_sha256 for row in found.islands} == {found.outer_sha256}
    assert [row.tokens for row in found.islands] == [found.tokens / 2] * 2 and found.round == found.rounds == 10
    rounds = [json.loads(line) for line in (house / "runs/one/island_load.jsonl").read_text().splitlines()]
    slots = found.tokens / 2 / 10 * 2  # of a round of an island; 2 experts per token
    assert [[name for name, _ in row["loads"]] for row in rounds] == [["one", "two"]] * 10
    assert {sum(layer) for row in rounds for _, counts in row["loads"] for layer in counts} == {slots}


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (REPOSITORY / target).exists(), target
