"""`frugalmoe data prepare|show`: the parsers and handlers that the command line uses."""

import argparse
import dataclasses
import json

import pytest

from frugalmoe.config.schema import Config, Data
from frugalmoe.data.cli import add_parsers, main
from frugalmoe.errors import UserError


@pytest.fixture
def config(tmp_path):
    lines = [{"text": f"document {n} says hello number {n}. " * 5, "domain": "ab"[n % 2]} for n in range(40)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = Data(path=str(tmp_path / "d.jsonl"), cache_dir=str(tmp_path / "cache"), sequence_length=64)
    return Config(data=data)


def run(config, *argv):
    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers())
    args = parser.parse_args(["data", *argv])
    return args.handler(args, config)


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
    with pytest.raises(UserError, match=r"^data\.tokenizer='bpe:300': .*prepared with 'bytes'"):
        run(changed(prepared, tokenizer="bpe:300"), "show")


@pytest.mark.parametrize("flags", [("show", "--count", "0"), ("prepare", "--workers", "0")])
def test_counts_must_be_positive(flags, config):
    with pytest.raises(UserError, match=r"^--(count|workers)=0: must be at least 1"):
        run(config, *flags)


def test_main_reads_the_config_file_and_its_overrides(config, tmp_path, capsys):
    path = tmp_path / "config.py"
    path.write_text(
        "from frugalmoe.config import default\n\n\ndef get_config(arg=None):\n    config = default()\n"
        f"    config.data.path = {config.data.path!r}\n    config.data.cache_dir = {config.data.cache_dir!r}\n"
        "    return config\n"
    )
    argv = ["data", "show", f"--config={path}", "--config.data.sequence_length=32", "--count", "1"]
    assert main(argv) == 0
    assert "32 tokens]" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"data\.tokeniser: unknown config field"):
        main(["data", "show", f"--config={path}", "--config.data.tokeniser=bytes"])
