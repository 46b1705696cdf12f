"""A run that goes on in another environment says so, and its numbers never change their type in silence."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import pytest
from runs import config_file, figures, run, tiny, write_text

from frugalmoe import sharding
from frugalmoe.config.checks import check_devices
from frugalmoe.errors import UserError
from frugalmoe.train import checkpoint
from frugalmoe.train.loop import train
from frugalmoe.train.step import abstract, init

pytestmark = pytest.mark.whole

FIELDS = {
    "train.steps": 2, "checkpoint.every_steps": 1, "optim.warmup_steps": 1, "optim.schedule": "constant",
    "model.num_layers": 1, "model.num_dense_layers": 0, "train.eval_rows": 4, "model.vocab_size": 320,
}  # fmt: skip


class Heard:
    """What a run says, kept."""

    def __init__(self, *ignored):
        self.said = []

    def __enter__(self):
        return self

    def __exit__(self, *error): ...

    def say(self, text):
        self.said.append(text)

    def update(self, *numbers): ...


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("resumed")
    write_text(root / "text", 12)
    return root


@pytest.fixture(scope="module")
def config(place):
    return lambda **more: tiny(
        place / "text", place / "cache", FIELDS | {k.replace("__", "."): v for k, v in more.items()}
    )


@pytest.fixture(scope="module")
def good(place, config):
    train(config(), place / "good")
    return place / "good"


def resumed(config, run) -> list[str]:
    heard = Heard()
    train(config(train__steps=3), run, resume="force", progress=lambda *_: heard)
    return [line for line in heard.said if "another environment" in line]


def test_what_changed_since_is_said_once_and_kept(good, config, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(good, run)
    written = json.loads((run / "environment.json").read_text())
    flags = os.environ.get("XLA_FLAGS", "")
    changed = {
        "versions": written["versions"] | {"jax": "0.9.9"}, "python": "3.10.1",
        "xla_flags": flags + " --xla_other\n\x1b[2J",
        "jax_options": written["jax_options"] | {"jax_enable_x64": "True"}, "devices": ["TPU v5e"],
    }  # fmt: skip
    (run / "environment.json").write_text(json.dumps(written | changed))
    (line,) = resumed(config, run)
    assert line.isprintable() and len(line) < 1500
    for part in (
        "versions.jax: '0.9.9' before",
        "python: '3.10.1' before",
        "jax_enable_x64: 'True' before",
        "xla_flags",
    ):
        assert part in line
    rows = [json.loads(text) for text in (run / "history.jsonl").read_text().splitlines()]
    assert rows[-1]["xla_flags"] == flags and rows[-1]["versions"]["jax"] == jax.__version__
    assert json.loads((run / "environment.json").read_text())["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize(
    "content", [None, "{}", "[]", '{"command": ["other"], "git_commit": "other", "cpu_count": 999}']
)
def test_the_same_environment_is_not_spoken_of(good, config, tmp_path, content):
    """What a start did not record is not compared, and of what it did the command changes no bit."""
    shutil.copytree(good, tmp_path / "run")
    if content is not None:
        (tmp_path / "run/environment.json").write_text(content)
    assert resumed(config, tmp_path / "run") == []


@pytest.mark.slow
def test_the_command_says_what_changed_and_refuses_another_type_of_numbers(place, tmp_path):
    """Real commands: other flags of XLA are told, another dtype of the arithmetic is refused unless it is forced."""
    config = config_file(tmp_path, place / "text", place / "cache", FIELDS)
    flags = os.environ.get("XLA_FLAGS", "")
    begin = ("train", f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert run(*begin).returncode == 0
    more = (*begin, "--resume=force", "--config.train.steps=3")
    told = run(*more, XLA_FLAGS=f"{flags} --xla_cpu_enable_fast_math=true", JAX_ENABLE_CHECKS="1")
    assert told.returncode == 0, told.stderr
    (line,) = (line for line in told.stdout.splitlines() if "another environment" in line)
    assert "xla_flags" in line
    refused = run(*begin, "--config.train.steps=3", "--config.model.compute_dtype=bfloat16")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "model.compute_dtype" in refused.stderr
    figures("F20 other flags, and another dtype of the arithmetic, at resume", 2, 2)


@pytest.mark.parametrize("item", ["params", "opt_state"])
def test_a_checkpoint_in_another_dtype_is_refused(config, tmp_path, item):
    """Orbax reads bfloat16 into float32, and float32 into bfloat16, without a word."""
    settings = config()
    with jax.set_mesh(sharding.make_mesh(check_devices(settings, 1))):
        state = init(settings)
        half = lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a
        with checkpoint.open_manager(tmp_path, settings.checkpoint) as manager:
            checkpoint.save(manager, 1, state._replace(**{item: jax.tree.map(half, getattr(state, item))}))
            manager.wait_until_finished()
            with pytest.raises(UserError, match=rf"{item}\[.* has dtype bfloat16 there and float32 in this config"):
                checkpoint.restore(manager, 1, abstract(settings))
    figures("F20 a checkpoint in another dtype", 1, 1)
