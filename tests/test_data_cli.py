"""`frugalmoe data prepare|show`."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from frugalmoe.cli import main
from frugalmoe.fields import to_dict
from frugalmoe.schema import Config, Data


@pytest.fixture
def config(tmp_path):
    lines = [{"text": f"document {n} says hello number {n}. " * 5, "domain": "ab"[n % 2]} for n in range(40)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = Data(path=str(tmp_path / "d.jsonl"), cache_dir=str(tmp_path / "cache"), sequence_length=64)
    return Config(data=data)


def run(config, *argv) -> int:
    """The command line on a config file with this data section."""
    path = Path(config.data.cache_dir) / "config.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {f"data.{k}": v for k, v in to_dict(config.data).items() if k not in ("sources", "validation")}
    path.write_text(
        "from frugalmoe.config import default, override\n\n\n"
        f"def get_config(arg=None):\n    return override(default(), {fields!r})\n"
    )
    return main(["data", *argv, f"--config={path}"])


def changed(config, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def test_prepare_prints_the_counts_and_the_place(config, tmp_path, capsys):
    output = tmp_path / "out"
    assert run(config, "prepare", "--output", str(output), "--workers", "2") == 0
    printed = capsys.readouterr().out
    counts = json.loads((output / "manifest.json").read_text())["counts"]
    assert f"prepared in {output}" in printed
    for domain, sides in counts.items():
        for side, count in sides.items():
            row = next(line for line in printed.splitlines() if f" {domain} " in line and f" {side} " in line)
            assert f"{count['tokens']:,}" in row and f"{count['documents']:,}" in row


def test_show_prints_training_rows(config, capsys):
    assert run(config, "show", "--count", "3") == 0
    printed = capsys.readouterr().out
    assert printed.count("─ row ") == 3 and "says hello number" in printed.replace("\n", " ")


def test_show_prints_validation_rows_of_each_domain(config, capsys):
    assert run(changed(config, validation_fraction=0.3), "show", "--split", "validation", "--count", "2") == 0
    printed = capsys.readouterr().out
    assert printed.count("─ row ") == 4 and "[1 a, " in printed and "[1 b, " in printed


def test_a_prepared_directory_can_be_shown(config, tmp_path, capsys):
    run(config, "prepare", "--output", str(tmp_path / "out"))
    prepared = changed(config, path=str(tmp_path / "out"))
    assert run(prepared, "show", "--count", "1") == 0
    assert run(changed(prepared, tokenizer="bpe:300"), "show") == 2
    assert re.match(r"frugalmoe: data\.tokenizer='bpe:300': .*prepared with 'bytes'", capsys.readouterr().err)


@pytest.mark.parametrize("flags", [("show", "--count", "0"), ("prepare", "--workers", "0")])
def test_counts_must_be_positive(flags, config, capsys):
    assert run(config, *flags) == 2
    assert re.match(r"frugalmoe: --(count|workers)=0: must be at least 1\n$", capsys.readouterr().err)


def test_overrides_reach_the_data(config, capsys):
    assert run(config, "show", "--count", "1", "--config.data.sequence_length=32") == 0
    assert "32 tokens]" in capsys.readouterr().out
    assert run(config, "show", "--config.data.tokeniser=bytes") == 2
    assert "data.tokeniser: unknown config field" in capsys.readouterr().err
