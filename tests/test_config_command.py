"""`frugalmoe config` prints every field with its meaning, and the TAB key knows them."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from frugalmoe import schema
from frugalmoe.cli import main
from frugalmoe.commands import names
from frugalmoe.config import Config, default, load, resolve
from frugalmoe.config.describe import describe, meanings
from frugalmoe.config.load import typed
from frugalmoe.fields import to_dict
from frugalmoe.routing import strategies

SECTIONS = [cls for cls in vars(schema).values() if dataclasses.is_dataclass(cls)]


def leaves(section: dict, prefix: str = "") -> dict:
    found = {}
    for name, value in section.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
    return found


@pytest.mark.parametrize("section", SECTIONS, ids=lambda cls: cls.__name__)
def test_every_field_says_what_it_means(section):
    for field in dataclasses.fields(section):
        assert meanings(section)[field.name] or dataclasses.is_dataclass(field.default), field.name


@pytest.mark.parametrize("router", strategies.names())
def test_every_option_says_what_it_means_and_is_listed(router):
    options = strategies.get(router).options
    listed = {field.name: field.meaning for field in describe(typed({"model": {"moe": {"router": router}}}))}
    for field in dataclasses.fields(options):
        name = f"model.moe.options.{field.name}"
        assert meanings(options)[field.name] and listed[name] == meanings(options)[field.name], name


@pytest.mark.parametrize("spec", ["quickstart:laptop", "ling_2:mini"])
def test_json_holds_every_field_with_value_and_default(spec, capsys):
    overrides = ["--config.data.sources.a.path=x", "--config.data.sources.b.path=y", "--config.data.sources.b.weight=0"]
    assert main(["config", f"--config={spec}", "--format=json", *overrides]) == 0
    rows = {row.pop("name"): row for row in json.loads(capsys.readouterr().out)}
    config = load(spec, [o.removeprefix("--config.") for o in overrides])
    expected = leaves(to_dict(config))
    assert {name: row["value"] for name, row in rows.items() if row["value"] is not None} == expected
    usual = leaves(to_dict(Config()))
    for name, row in rows.items():
        assert name not in usual or row["default"] == usual[name]
        assert row["meaning"]
    assert rows["data.sources.b.path"] == {
        "value": "y",
        "default": "",
        "meaning": rows["data.sources.a.path"]["meaning"],
    }


def test_changed_shows_only_what_is(capsys):
    assert main(["config", "--changed", "--config.model.moe.losses.z=0", "--config.train.steps=7"]) == 2
    assert "optim.warmup_steps=100: must be less than train.steps=7" in capsys.readouterr().err
    assert main(["config", "--changed", "--config.model.moe.losses.z=0", "--config.train.steps=700"]) == 0
    lines = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [["model.moe.losses.z", "0.0", "0.001"], ["train.steps", "700", "1000"]]


def test_without_a_config_it_shows_the_defaults_and_refuses_what_is_wrong(capsys):
    assert main(["config", "--changed", "--format=json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert resolve(default()) == resolve(Config())
    assert main(["config", "--config.model.dmi=3"]) == 2
    assert "did you mean 'dim'" in capsys.readouterr().err


def tab(line: str) -> set[str]:
    """What argcomplete offers a shell at the end of a line."""
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_SHELL": "bash",
        "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:",
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "COMP_TYPE": "9",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    # The answer goes to descriptor 8.
    shell = f'"{sys.executable}" -m frugalmoe 8>&1 9>/dev/null 1>/dev/null 2>/dev/null'
    done = subprocess.run(["bash", "-c", shell], env=os.environ | asked, capture_output=True, text=True)
    return set(done.stdout.splitlines())


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("frugalmoe ", {"train", "ablate", "config", "--version"}),
        ("frugalmoe train --", {"--workdir", "--dry-run", "--config"}),
        ("frugalmoe train --config=qu", {"quickstart"}),
        ("frugalmoe data show --config=ling_", {"ling_1", "ling_1:plus", "ling_2:1t", "ling_2:mini"}),
        ("frugalmoe train --config=ling_2:m", {"mini"}),  # a shell's word begins behind a colon
        ("frugalmoe train --config=ling_2:mini:l", {"laptop"}),
        ("frugalmoe train --config=quickstart --config.optim.lea", {"--config.optim.learning_rate"}),
        ("frugalmoe ablate balance --config.train.st", {"--config.train.steps"}),
        ("frugalmoe train --config.model.moe.router=sig", {"sigmoid_bias"}),
        ("frugalmoe ablate le", {"league"}),
        ("frugalmoe launch sk", {"skypilot"}),
        ("frugalmoe islands runs --format=", {"table", "json"}),
        ("frugalmoe train --config=small --config.islands.merge=", {"edit", "mean", "radial", "tokens"}),
    ],
)
def test_the_tab_key_offers(line, offered):
    assert offered <= tab(line)


def test_commands_without_a_config_offer_no_fields():
    assert tab("frugalmoe report --config.") == set()
    assert set(names()) <= tab("frugalmoe ")
