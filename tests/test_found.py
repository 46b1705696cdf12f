"""What a name in a config stands for: a shipped file, a path, a dotted module; every fault is one line."""

import sys
from pathlib import Path

import pytest

from frugalmoe import found
from frugalmoe.errors import UserError
from frugalmoe.experts import executors
from frugalmoe.found import defines, is_outside
from frugalmoe.routing import strategies

ROUTER = "from frugalmoe.routing.strategies.topk_softmax import ROUTER\n"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(found, "_READ", {})
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_path_is_found_from_the_directory_of_the_command(here):
    (here / "mine.py").write_text(ROUTER)
    (here / "deep").mkdir()
    (here / "deep/er.py").write_text(ROUTER)
    for spec in ("mine.py", "./mine.py", str(here / "mine.py"), "deep/er.py"):
        assert strategies.get(spec).name == spec and strategies.get(spec).route is strategies.get("topk_softmax").route


def test_a_dotted_module_is_found_below_the_directory_of_the_command(here):
    (here / "lab_of_mine/routers").mkdir(parents=True)
    (here / "lab_of_mine/routers/first.py").write_text("from lab_of_mine.shared import ROUTER\n")
    (here / "lab_of_mine/shared.py").write_text(ROUTER)
    path = list(sys.path)
    assert strategies.get("lab_of_mine.routers.first").name == "lab_of_mine.routers.first"
    assert sys.path == path
    assert strategies.get("frugalmoe.routing.strategies.hash").route is strategies.get("hash").route


def test_options_of_a_file_outside_may_have_annotations_as_text(here):
    (here / "mine.py").write_text(
        "from __future__ import annotations\nimport dataclasses\n"
        "from frugalmoe.routing.strategies import topk_softmax\n"
        "@dataclasses.dataclass(frozen=True, kw_only=True)\n"
        "class Options:\n    sharpness: float = 1.0  # how sharp\n"
        "ROUTER = dataclasses.replace(topk_softmax.ROUTER, options=Options, check=lambda c: None)\n"
    )
    from frugalmoe.config import default, override, resolve
    from frugalmoe.config.describe import describe

    config = resolve(override(default(), {"model.moe.router": "mine.py", "model.moe.options.sharpness": 2}))
    assert config.model.moe.options.sharpness == 2.0
    (row,) = (row for row in describe(config) if row.name == "model.moe.options.sharpness")
    assert (row.value, row.default, row.meaning) == (2.0, 1.0, "how sharp")


def test_a_file_is_read_once_in_a_process_and_again_where_it_failed(here):
    (here / "mine.py").write_text("ROUTER = 3\n")
    with pytest.raises(UserError, match=r"ends without ROUTER = Router\(\.\.\.\)"):
        strategies.get("mine.py")
    (here / "mine.py").write_text("raise ValueError\n")
    with pytest.raises(UserError, match=r"mine\.py, line 1: ValueError"):
        strategies.get("mine.py")
    (here / "mine.py").write_text(ROUTER)
    first = strategies.get("mine.py")
    (here / "mine.py").write_text(ROUTER.replace("topk_softmax", "hash"))
    assert strategies.get("./mine.py").route is first.route


FAULTS = {
    "absent.py": (None, "model.moe.router='absent.py': no such file in "),
    "/absent/mine.py": (None, "model.moe.router='/absent/mine.py': no such file"),
    "dir/mine.txt": ("", "model.moe.router='dir/mine.txt': must be a Python file"),
    "empty.py": ("", "ends without ROUTER = Router(...)"),
    "cut.py": ("def route(\n", "cut.py, line 1: SyntaxError: '(' was never closed"),
    "leaves.py": ("import sys\nsys.exit()\n", "leaves.py, line 2: SystemExit"),
    "needs.py": (
        "import no_such_package\n",
        "line 1: ModuleNotFoundError: No module named 'no_such_package'",
    ),
    "bytes.py": ("x = '\xe9'\n", "SyntaxError"),
    "no.such.module": (None, "model.moe.router='no.such.module': no module of this name"),
    "os.path": (None, "model.moe.router='os.path': "),
    "sys.nothing": (None, "no module of this name"),
    "a..b": (None, "model.moe.router='a..b': "),
    "tpok_softmax": (None, "no such routing strategy; did you mean 'topk_softmax'?"),
    "": (None, "model.moe.router='': no such routing strategy"),
    ".": (None, "model.moe.router='.': no such routing strategy"),
    "\0.py": (None, "model.moe.router='\\x00.py': "),
    "x" * 300 + ".py": (None, "model.moe.router='xxx"),
}


@pytest.mark.parametrize("spec", FAULTS, ids=lambda spec: ascii(spec)[:20])
def test_a_fault_is_one_line(here, spec):
    text, message = FAULTS[spec]
    if text is not None:
        (here / spec).parent.mkdir(exist_ok=True)
        (here / spec).write_text(text, encoding="latin-1")
    with pytest.raises(UserError) as error:
        strategies.get(spec)
    assert message in str(error.value) and "\n" not in str(error.value) and "model.moe.router=" in str(error.value)


def test_what_is_outside():
    assert all(map(is_outside, ("a.py", "./a", "a/b.py", "package.module", "/x/y.py")))
    assert not any(map(is_outside, ("topk_softmax", "auto", "", ".", "..", None, 3)))


def test_executors_come_in_by_the_same_door(here):
    (here / "mine.py").write_text("from frugalmoe.experts.executors.dense import EXECUTOR\n")
    assert executors.get("mine.py").name == "mine.py"


def test_defines_reads_and_does_not_run(here):
    (here / "a.py").write_text("import no_such_package\nCORPUS: int = 3\n")
    (here / "b.py").write_text("def f():\n    CORPUS = 3\n")
    (here / "c.py").write_text("CORPUS = (\n")
    assert defines("a.py", "CORPUS")
    assert not any(defines(spec, "CORPUS") for spec in ("b.py", "c.py", "absent.py", "a.txt", "quickstart", "x.y"))
