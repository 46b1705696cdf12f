"""What starts fast: `import frugalmoe`, `--help` and typing errors load nothing that takes time."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import frugalmoe
from frugalmoe import commands

COMMANDS = Path(commands.__file__).parent
HEAVY = ("jax", "numpy", "ml_collections", "rich", "yaml", "tensorboardX", "matplotlib", "tokenizers")
CPU_SECONDS = 0.5  # 0.13 on the machine where it was written; 2.7 with JAX

# Runs a command in a process whose modules, CPU time and exit code it reports.
PROBE = """
import os, sys
from frugalmoe.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as e:
    code = e.code
loaded = sorted({name.partition(".")[0] for name in sys.modules})
seconds = sum(os.times()[:2])
print(code, seconds, ",".join(loaded), sep="|", file=open(os.environ["FOUND"], "w"))
"""


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        ("--help", 0),
        ("--version", 0),
        ("", 2),
        ("tarin --config=configs/quickstart.py", 2),
        ("--hlep", 2),
        *((f"{name} --help", 0) for name in commands.names()),
        *((f"{name} --no-such-flag", 2) for name in commands.names()),
        ("data prepare --help", 0),
        ("train --resume=sometimes --config=x", 2),
        ("train --num-processes=two --config=x", 2),
        ("train --num_processes=two --config=x", 2),
        ("routers --config.model.dim=3", 2),
    ],
    ids=lambda value: str(value),
)
def test_help_and_typing_errors_load_nothing_that_takes_time(argv, code, tmp_path):
    environment = os.environ | {"FOUND": str(tmp_path / "found")}
    done = subprocess.run([sys.executable, "-c", PROBE, *argv.split()], capture_output=True, text=True, env=environment)
    found, seconds, loaded = (tmp_path / "found").read_text().strip().split("|")
    assert int(found) == code, done.stderr
    assert not set(HEAVY) & set(loaded.split(","))
    assert float(seconds) < CPU_SECONDS
    assert "Traceback" not in done.stderr and (done.stdout or done.stderr)


def test_flags_have_hyphens_and_those_of_older_launch_scripts_still_work(capsys):
    from frugalmoe.cli import _parser, main

    commands_of = next(a for a in _parser()._actions if a.dest == "command").choices
    flags = [flag for parser in commands_of.values() for a in parser._actions for flag in a.option_strings]
    assert "--num-processes" in flags and not [flag for flag in flags if "_" in flag]
    shown = []
    for spelling in ("process_id", "process-id"):
        assert main(["train", "--config=quickstart:laptop", f"--{spelling}=1"]) == 2
        shown.append(capsys.readouterr().err)
    assert shown[0] == shown[1] and "--process-id=1: needs --coordinator, --num-processes too" in shown[0]


@pytest.mark.parametrize("path", sorted(COMMANDS.glob("*.py")), ids=lambda path: path.stem)
def test_a_command_imports_only_the_standard_library_at_its_top(path):
    for node in ast.parse(path.read_text()).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            ours = name.startswith("frugalmoe.")  # of which the probe above knows whether they are light
            assert ours or name.partition(".")[0] in sys.stdlib_module_names, name


def test_the_package_gives_what_it_names_and_only_when_asked():
    code = (
        "import sys, frugalmoe\n"
        "assert not {'jax', 'numpy', 'ml_collections'} & set(sys.modules), sorted(sys.modules)\n"
        "assert set(frugalmoe.__all__) <= set(dir(frugalmoe))\n"
        "from frugalmoe import Config, Study, load_config, load_run, train\n"
        "import frugalmoe.train.loop\n"  # sets the attribute `train` to the package
        "assert callable(frugalmoe.train) and frugalmoe.train.loop.train\n"
        "assert Config is type(load_config('quickstart:laptop'))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        frugalmoe.trian  # noqa: B018
