"""A wheel works in an empty folder: configs, studies and templates come with it."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]
NOT_SOURCE = (".git", ".venv*", "runs", "prepared", "build", "*_cache", "*.egg-info", "tests", "benchmarks", "docs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the repository, in an environment of its own."""
    root = tmp_path_factory.mktemp("wheel")
    shutil.copytree(REPOSITORY, root / "source", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", root, root / "source"], check=True)
    (found,) = root.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def frugalmoe(wheel, tmp_path_factory):
    """Runs `frugalmoe ARGS` of the wheel in an empty folder."""
    site, empty = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("empty")
    zipfile.ZipFile(wheel).extractall(site)

    def run(*args: str) -> str:
        command = [sys.executable, "-m", "frugalmoe", *args]
        environment = os.environ | {"PYTHONPATH": str(site)}
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not list(empty.iterdir())
        return done.stdout

    return run


def test_a_wheel_holds_what_is_shipped_and_its_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for folder, pattern in (("configs", "*.py"), ("experiments", "*.py"), ("launch", "*")):
        ours = {p.name for p in (REPOSITORY / folder).glob(pattern) if p.is_file()}
        assert {Path(n).name for n in names if n.startswith(f"frugalmoe/shipped_files/{folder}/")} == ours
    (metadata,) = (zipfile.ZipFile(wheel).read(n).decode() for n in names if n.endswith("dist-info/METADATA"))
    assert "\nLicense-Expression: Apache-2.0\n" in metadata and "\nLicense-File: LICENSE\n" in metadata
    assert any(n.endswith("dist-info/licenses/LICENSE") for n in names)


@pytest.mark.parametrize("spec", ["quickstart:laptop", "quickstart.py:laptop", "configs/quickstart.py:laptop"])
def test_its_configs_are_found_by_name(frugalmoe, spec):
    fields = json.loads(frugalmoe("config", f"--config={spec}", "--format=json"))
    assert fields[0]["value"] == "quickstart-laptop"


def test_its_studies_and_templates_are_found_by_name(frugalmoe, tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"The moon calls the {i} rivers.\n")
    data = (f"--config.data.path={tmp_path}", f"--config.data.cache_dir={tmp_path / 'cache'}")
    assert "loss_global (baseline)" in frugalmoe("ablate", "balance", "--dry-run", *data)
    job = frugalmoe("launch", "slurm", "--config=quickstart", "--devices-per-node=2", "--dry-run", *data)
    assert "frugalmoe train --config=quickstart " in job
    assert f'export PATH={Path(sys.executable).parent}:"$PATH"' in job


def test_it_says_its_version(frugalmoe, wheel):
    assert frugalmoe("--version").split()[1] == wheel.name.split("-")[1]


def test_its_laws_need_no_clone(frugalmoe, tmp_path):
    (tmp_path / "mine.py").write_text("from frugalmoe.routing.strategies.hash import ROUTER\n")
    for what in (tmp_path / "mine.py", "--executor=blocks"):
        assert "all hold" in frugalmoe("laws", str(what))
