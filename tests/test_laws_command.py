"""`frugalmoe laws`: one line for each law, and an exit code; whatever is wrong with a file is one line."""

import os
import subprocess
import sys

import pytest

from frugalmoe import found
from frugalmoe.cli import main
from frugalmoe.laws import run
from frugalmoe.laws.attention import LAWS as ATTENTION
from frugalmoe.laws.executors import LAWS as EXECUTORS
from frugalmoe.laws.routing import LAWS

LEAK = """
import jax
from frugalmoe.routing import gate, losses, select
from frugalmoe.routing.contract import About, Router, linear_init, linear_logits

def route(params, state, inputs, config):
    logits_BTE = linear_logits(params, inputs)
    logits_BTE = logits_BTE - logits_BTE.mean(1, keepdims=True)
    choice = select.top_k(logits_BTE, config.num_experts_per_token)
    weight_BTK = jax.nn.softmax(select.at(logits_BTE, choice.expert_BTK))
    return gate.routing(logits_BTE, jax.nn.softmax(logits_BTE), choice, weight_BTK, inputs, config)

ABOUT = About(year=0, paper="", score="softmax", selection="", weights="", balance="", weight_sum=1.0,
              losses=losses.GATE_LOSSES)
ROUTER = Router(about=ABOUT, route=route, init=linear_init)
"""
NO_WEIGHTS = """
import jax.numpy as jnp
from frugalmoe.experts.contract import Executor
EXECUTOR = Executor(run=lambda plan, x, gate_up, down, call: (x, jnp.int32(0)), work="", purpose="")
"""

SEES_ALL = """
import dataclasses
from frugalmoe.model.attention.kinds import grouped, window
ATTENTION = dataclasses.replace(window.ATTENTION, seen=grouped.ATTENTION.seen)
"""
LOOSE = SEES_ALL.replace("seen=", "options=dataclasses.make_dataclass('Loose', []), seen=")
TABLES = (LAWS, EXECUTORS, ATTENTION)


@pytest.fixture(autouse=True)
def nothing_read(monkeypatch, tmp_path):
    monkeypatch.setattr(found, "_READ", {})
    monkeypatch.chdir(tmp_path)


def test_a_broken_law_is_named_with_what_it_says(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(LEAK)
    laws = ["--law=causal_by_perturbation", "--law=counts"]
    assert main(["laws", "mine.py", *laws]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "2 laws, 1 case"
    assert out[1].split()[:2] == ["BROKEN", "causal_by_perturbation"]
    assert out[2].strip().startswith("Other later tokens change no earlier decision")
    assert out[3].strip().startswith("mine.py-8x2: 221 earlier values change in training; it claims 'safe'")
    assert out[4].split()[:2] == ["holds", "counts"]
    assert out[5].startswith("1 broken: causal_by_perturbation (")


def test_a_shipped_strategy_by_name(capsys):
    assert main(["laws", "hash", "--law=counts", "--law=merge"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("all hold (")


def test_an_executor(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(NO_WEIGHTS)
    assert main(["laws", "--executor=mine.py", "--law=oracle"]) == 1
    assert "mine.py: plan 'even': y: " in capsys.readouterr().out
    assert main(["laws", "--executor=blocks", "--law=room"]) == 0


def test_a_kind_of_attention(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(SEES_ALL)
    assert main(["laws", "--attention=mine.py", "--law=flops", "--law=parameters"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "2 laws, 2 cases"
    assert out[4].strip().startswith("mine.py-sinks=True-window=5: seen=6.5 of 12 tokens; outputs depend on 4.16667 in")


def test_a_router_that_raises_breaks_the_law_with_its_place(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(LEAK.replace("inputs, config)\n\nABOUT", "inputs, confg)\n\nABOUT"))
    assert main(["laws", "mine.py", "--law=counts"]) == 1
    out = capsys.readouterr().out
    assert "NameError: name 'confg' is not defined" in out and "mine.py, line 11)" in out


def test_the_list_says_what_each_law_means(capsys):
    assert main(["laws", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out and run.meaning(law) in out for table in TABLES for name, law in table.items())
    assert all(len(run.meaning(law)) > 20 for table in TABLES for law in table.values())


@pytest.mark.parametrize(
    ("argv", "text", "message"),
    [
        ([], "", "name one strategy"),
        (["hash", "--executor=blocks"], "", "name one strategy"),
        (["--attention=grouped", "--executor=blocks"], "", "name one strategy"),
        (["absent.py"], "", "no such file"),
        (["hsah"], "", "did you mean 'hash'"),
        (["hash", "--law=cuonts"], "", "did you mean 'counts'"),
        (["mine.py"], "ROUTER = 3", "ends without ROUTER"),
        (["mine.py"], "def f(", "SyntaxError"),
        (["mine.py"], LEAK.replace("init=linear_init)", "init=linear_init, check=lambda c: 1 / 0)"), "ZeroDivisionErr"),
        (["mine.py"], LEAK.replace("init=linear_init)", "check=lambda c: 'never')"), "name others: Router(cases=("),
        (["--executor=mine.py"], LEAK, "ends without EXECUTOR"),
        (["--executor="], "", "no such executor"),
        (["--attention=windw"], "", "did you mean 'window'"),
        (["--attention=mine.py"], SEES_ALL + "ATTENTION = 3", "ends without ATTENTION"),
        (["--attention=mine.py"], SEES_ALL.replace("seen=", "cases=({'size': 1},), seen="), "argument 'size'"),
        (["--attention=mine.py"], SEES_ALL.replace("seen=", "check=lambda c, o: 1 / 0, seen="), "line 4: ZeroDivi"),
        (["--attention=mine.py"], SEES_ALL.replace("seen=", "check=lambda c, o: 'no', seen="), "check refuses"),
        (["--attention=mine.py"], LOOSE, "options=Loose: must be a frozen dataclass"),
        ([""], "", "names no strategy"),
    ],
)
def test_what_cannot_be_checked_is_one_line(tmp_path, capsys, argv, text, message):
    (tmp_path / "mine.py").write_text(text)
    assert main(["laws", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1


@pytest.mark.slow
def test_it_refuses_to_run_without_assertions():
    """Every law would hold."""
    command = [sys.executable, "-O", "-m", "frugalmoe", "laws", "hash", "--law=counts"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 2 and "PYTHONOPTIMIZE" in done.stderr
