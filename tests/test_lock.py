"""uv.lock is of this pyproject.toml and of the versions that the tests run on; `uv lock` makes it anew."""

import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[1]
LOCK = tomllib.loads((REPOSITORY / "uv.lock").read_text())
PACKAGES = {name: [p for p in LOCK["package"] if p["name"] == name] for name in {p["name"] for p in LOCK["package"]}}
OWN = PACKAGES["frugalmoe"][0]


def written(requirement: Requirement, extra: str = "") -> tuple:
    extra = f"extra == '{extra}'" if extra else ""
    marker = " and ".join(filter(None, [f"{requirement.marker or ''}", extra]))
    specifier = sorted(filter(None, str(requirement.specifier).split(",")))
    return canonicalize_name(requirement.name), *sorted(requirement.extras), marker.replace('"', "'"), *specifier


def locked(entry: dict) -> tuple:
    specifier = sorted(filter(None, entry.get("specifier", "").split(",")))
    return entry["name"], *sorted(entry.get("extras", ())), entry.get("marker", ""), *specifier


def test_it_is_of_this_project():
    """Else: `uv lock`."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [written(Requirement(line)) for line in project["dependencies"]]
    wanted += [written(Requirement(line), extra) for extra, lines in extras.items() for line in lines]
    assert sorted(map(locked, OWN["metadata"]["requires-dist"])) == sorted(wanted), "stale: run `uv lock`"
    assert sorted(OWN["metadata"]["provides-extras"]) == sorted(extras), "stale: run `uv lock`"
    assert LOCK["requires-python"] == project["requires-python"]


def test_everything_comes_from_the_public_index():
    packages = [package for package in LOCK["package"] if package is not OWN]
    assert {package["source"].get("registry") for package in packages} == {"https://pypi.org/simple"}
    files = [file for package in packages for file in [*package.get("wheels", ()), package.get("sdist")] if file]
    assert len(files) > 1000
    for file in files:
        assert file["url"].startswith("https://files.pythonhosted.org/packages/") and file["hash"].startswith("sha256:")


@pytest.mark.parametrize(("name", "python"), [("requirements.txt", "3.11.7"), ("requirements-newest.txt", "3.12.1")])
def test_it_installs_what_the_tests_run_on(name, python):
    """Else: the pins of that file, or `uv lock --upgrade`."""
    environment = {"python_version": python[:4], "python_full_version": python, "sys_platform": "linux"}
    pins = [Requirement(line) for line in (REPOSITORY / name).read_text().splitlines() if line[:1] not in ("#", "")]
    dependencies = {entry["name"] for entry in OWN["dependencies"]} | {"jaxlib"}
    found = {}
    for pin in pins:
        package = canonicalize_name(pin.name)
        forks = [
            p
            for p in PACKAGES.get(package, ())
            if any(Marker(m).evaluate(environment) for m in p.get("resolution-markers", ["python_version > '3'"]))
        ]
        if package in dependencies:
            found[package] = [f"=={p['version']}" for p in forks] == [str(pin.specifier)]
    assert found.keys() == dependencies and all(found.values()), [k for k, equal in found.items() if not equal]
