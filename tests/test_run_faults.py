"""Runs that break, are started in the wrong place or with what cannot be: nothing is lost, and one line says why."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import command, config_file, rows, tiny, without_times, write_text

from frugalmoe import sharding
from frugalmoe.analysis import load_run
from frugalmoe.cli import main
from frugalmoe.config import load
from frugalmoe.config.checks import check_devices
from frugalmoe.data import open_data
from frugalmoe.errors import UserError
from frugalmoe.fields import to_dict
from frugalmoe.files import read_json, to_json
from frugalmoe.train import checkpoint, rundir
from frugalmoe.train.evaluate import evaluate
from frugalmoe.train.guard import NotFinite
from frugalmoe.train.loop import opened, train
from frugalmoe.train.program import compiled_eval_step
from frugalmoe.train.progress import Progress
from frugalmoe.train.step import abstract, init, make_train_step

FIELDS = {
    "train.steps": 4,
    "checkpoint.every_steps": 2,
    "optim.warmup_steps": 1,
    "optim.schedule": "constant",  # a run that is lengthened has the rates of a longer one
    "model.num_layers": 2,
    "model.moe.router": "sigmoid_bias",
    "train.eval_rows": 8,
    "model.vocab_size": 320,
}


class Quiet:
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
    root = tmp_path_factory.mktemp("faults")
    write_text(root / "text")
    return root


@pytest.fixture(scope="module")
def make(place):
    """A config of the tiny run, with changes."""
    return lambda **changes: tiny(
        place / "text", place / "cache", FIELDS | {k.replace("__", "."): v for k, v in changes.items()}
    )


@pytest.fixture(scope="module")
def good(place, make):
    """A complete run of 4 steps, with the checkpoints of steps 2 and 4."""
    train(make(), place / "good", progress=Quiet)
    return place / "good"


@pytest.fixture
def run(good, tmp_path):
    """A copy of it, to be harmed."""
    shutil.copytree(good, tmp_path / "run")
    return tmp_path / "run"


def contents(directory) -> dict:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def strict(path) -> list:
    """The JSON of a file or of its lines; NaN and Infinity, which are no JSON, are refused."""

    def refuse(token):
        raise AssertionError(f"{path}: {token}")

    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    return [json.loads(line, parse_constant=refuse) for line in lines]


def saved(workdir) -> list[int]:
    return checkpoint.saved_steps(workdir)


# ---------------------------------------------------------------- what is not finite


@pytest.mark.slow
@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_that_breaks_keeps_its_last_good_checkpoint_and_goes_on_from_it(run, make, keep):
    change = {"train__steps": 6, "checkpoint__keep_last": keep}
    with pytest.raises(NotFinite, match=r"optim/parameter_norm=inf at step 5: not finite; the last checkpoint is 4; "):
        train(make(optim__learning_rate=1e38, **change), run, resume="force", progress=Quiet)
    assert max(saved(run)) == 4
    assert strict(run / "metrics.jsonl")[-1]["optim/parameter_norm"] is None
    assert train(make(**change), run, resume="force", progress=Quiet)["status"] == "complete"
    assert [row["step"] for row in strict(run / "metrics.jsonl") if "loss/ce" in row] == [1, 2, 3, 4, 5, 6]
    assert np.isfinite(load_run(run).summary["eval"]["loss"]["mean"])


@pytest.mark.slow
def test_a_run_whose_last_update_breaks_it_is_not_complete(make, tmp_path):
    """The parameters are finite, 1e15, and so was the loss before; the model's products are not."""
    change = {"optim__schedule": "constant", "optim__warmup_steps": 0, "train__steps": 1}
    with pytest.raises(NotFinite, match=r"held-out loss of text, mean after step 1: not finite; nothing is saved yet"):
        train(make(optim__learning_rate=1e15, **change), tmp_path / "run", progress=Quiet)
    assert not (tmp_path / "run" / "summary.json").exists() and not saved(tmp_path / "run")


@pytest.mark.slow
def test_each_part_of_the_state_is_looked_at(make):
    """Parameters and routers' state after every step; the optimizer's state, which follows from them, at a save."""
    config = make(train__batch_size=2)
    number = lambda a: jnp.issubdtype(a.dtype, jnp.inexact)
    broken = lambda tree: jax.tree.map(lambda a: jnp.full_like(a, jnp.inf) if number(a) else a, tree)
    with jax.set_mesh(sharding.make_mesh(check_devices(config, 1))):
        data = open_data(config.data, batch_size=2, seed=0, progress=False)
        batch = jax.tree.map(lambda a: jnp.asarray(a)[None], data.batch(0))
        step = jax.jit(make_train_step(config))
        for part in ("params", "router_state", "opt_state"):
            state = init(config)
            assert checkpoint.is_finite(state)
            state = state._replace(**{part: broken(getattr(state, part))})
            assert not checkpoint.is_finite(state)
            if part == "opt_state":
                continue
            _, metrics = step(state, batch)
            found = metrics.finite | {"params": np.isfinite(metrics.metrics["optim/parameter_norm"])}
            assert not found[part], part


def save_state(config, workdir, step: int, change) -> None:
    """Saves the newest state, changed, as that of a later step, as versions did that did not look at it."""
    mesh = sharding.make_mesh(check_devices(config, 1))
    with jax.set_mesh(mesh), checkpoint.open_manager(workdir, config.checkpoint) as manager:
        state, _, _ = checkpoint.restore_newest(manager, abstract(config))
        checkpoint.save(manager, step, change(state)._replace(step=jnp.int32(step)))


@pytest.mark.slow
def test_a_checkpoint_that_is_not_finite_is_passed_over(run, place, make):
    broken = lambda state: state._replace(params=jax.tree.map(lambda a: a * jnp.nan, state.params))
    save_state(make(), run, 6, broken)
    assert saved(run) == [4, 6]
    heard = Quiet()
    summary = train(make(train__steps=6), run, resume="force", progress=lambda *_: heard)
    assert summary["status"] == "complete"
    assert f"{run}/checkpoints/6: a damaged checkpoint (not finite); step 4 is taken; is 6.damaged now" in heard.said
    undisturbed = train(make(train__steps=6), place / "six", progress=Quiet)
    assert summary["eval"] == undisturbed["eval"], "the last two steps were trained again"
    save_state(make(), run, 8, broken)
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / str(step), ignore_errors=True)
    with pytest.raises(NotFinite, match=r"checkpoints/8: a damaged checkpoint \(not finite\), so there is nothing"):
        train(make(train__steps=8), run, resume="force", progress=Quiet)
    assert main(["generate", str(run)]) == 2


def test_a_run_without_a_finite_result_is_not_complete(run):
    assert rundir.is_complete(run)
    summary = read_json(run / "summary.json")
    for value in ("NaN", "Infinity", "null"):
        summary["eval"]["loss"]["text"] = "VALUE"
        (run / "summary.json").write_text(json.dumps(summary).replace('"VALUE"', value))
        assert not rundir.is_complete(run), value


def test_json_is_strict():
    value = {"a": [1, float("nan"), (float("inf"), -0.0)], "b": {"c": np.float64("nan"), "d": None, "e": "NaN"}}
    assert to_json(value) == '{"a": [1, null, [null, -0.0]], "b": {"c": null, "d": null, "e": "NaN"}}'


# ---------------------------------------------------------------- the held-out set


@pytest.mark.slow
def test_the_held_out_set_does_not_depend_on_how_it_is_computed(make):
    """Five rows in batches of 5, 2 and 1, the last one padded, under a router that draws for each row."""
    found = []
    for batch_size, accumulate in ((8, 1), (8, 4), (1, 1)):
        change = {
            "train__batch_size": batch_size,
            "train__accumulate_steps": accumulate,
            "model__moe__router": "random",
        }
        config = make(train__eval_rows=5, **change)
        data = open_data(config.data, batch_size=batch_size, seed=0, progress=False)
        seen = []
        with jax.set_mesh(mesh := sharding.make_mesh(check_devices(config, 1))):
            scores = evaluate(compiled_eval_step(config), init(config), data, config, mesh, seen)
        real = [t.batch.segment_ids_BT > 0 for t in seen]
        tokens = np.concatenate([t.batch.tokens_BT[r] for t, r in zip(seen, real)])
        ce = np.concatenate([t.out.ce_BT[r] for t, r in zip(seen, real)])
        assert [len(r) for r in real] == {8: [5], 2: [2, 2, 2], 1: [1] * 5}[batch_size // accumulate]
        assert sum(int(r.any(-1).sum()) for r in real) == 5
        found.append((tokens, ce, scores.loss["mean"]))
    for tokens, ce, loss in found[1:]:
        np.testing.assert_array_equal(tokens, found[0][0])
        np.testing.assert_allclose(ce, found[0][1], rtol=1e-5)
        assert loss == pytest.approx(found[0][2], rel=1e-6)


def test_a_domain_called_as_a_result_is_refused(place, tmp_path, make):
    for name, shown in (("mean", "'mean'"), ("all", "'all'"), ("a\nb", r"'a\\nb'"), (" ", "' '")):
        lines = [{"text": f"{name} {i} " * 20, "domain": d} for i in range(20) for d in (name, "other")]
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = make(data__path=str(tmp_path / "d.jsonl"))
        with pytest.raises(UserError, match=rf"data: domain {shown}: a label must be printable text, and not mean or"):
            open_data(config.data, batch_size=1, seed=0, progress=False)


# ---------------------------------------------------------------- --fresh


@pytest.fixture
def cli(place):
    """`frugalmoe train` in this process."""
    config = config_file(place, place / "text", place / "cache", FIELDS)
    return lambda workdir, *flags: main(["train", f"--config={config}", f"--workdir={workdir}", *flags])


def refused(capsys, code: int, *texts: str) -> None:
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("frugalmoe: ") and len(error.strip().splitlines()) == 1, error
    for text in texts:
        assert text in error, error


WRONG = [
    "--config.data.path=/nowhere",
    "--config.data.tokenizer=/nowhere.json",
    "--config.model.vocab_size=3",
    "--config.mesh.data=3",
    "--config.model.dim=-1",
    "--config.data.sequence_length=1000000",
]


@pytest.mark.parametrize("flag", WRONG)
def test_fresh_deletes_nothing_when_the_new_run_cannot_be(run, cli, capsys, flag):
    before = contents(run)
    refused(capsys, cli(run, "--fresh", flag))
    assert contents(run) == before


@pytest.mark.parametrize(
    "config", [{"model_type": "qwen3"}, {}, [], None, {"name": "x", "model": {}, "data": {}, "optim": {}, "train": {}}]
)
@pytest.mark.parametrize("flags", [["--fresh"], ["--resume=force"], []])
def test_a_directory_of_somebody_else_is_left_alone(tmp_path, cli, capsys, config, flags):
    (tmp_path / "tokenizer").mkdir()
    for name in ("model.safetensors", "tokenizer.json", "tokenizer/tokenizer.json", "summary.json", "data.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = contents(tmp_path)
    refused(capsys, cli(tmp_path, *flags), "not the config of a run")
    assert contents(tmp_path) == before


def test_fresh_leaves_a_run_that_is_training(run, make, cli, capsys):
    config = make()
    with jax.set_mesh(sharding.make_mesh(check_devices(config, 1))), opened(config, run):
        before = contents(run)
        refused(capsys, cli(run, "--fresh"), f"process {os.getpid()} is training here")
        assert contents(run) == before


@pytest.mark.slow
def test_fresh_deletes_its_own_files_only_and_follows_a_link(run, make, tmp_path):
    others = ["notes.txt", "checkpoints/mine.npz", "checkpoints/4_notes/x", "report/notes.md", "trace/a.txt", "t/y"]
    for name in others:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("mine")
    (tmp_path / "link").symlink_to(run)
    summary = train(make(train__seed=1), tmp_path / "link", fresh=True, progress=Quiet)
    assert summary["status"] == "complete" and (tmp_path / "link").is_symlink()
    assert all((run / name).read_text() == "mine" for name in others)
    assert [row["step"] for row in rows(run) if "loss/ce" in row] == [1, 2, 3, 4]
    assert read_json(run / "config.json")["train"]["seed"] == 1
    (start,) = load_run(run).history
    assert start["step"] == 0 and start["changes"] == {}


def test_what_a_kill_at_the_beginning_leaves_is_no_dead_end(tmp_path, make):
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    (tmp_path / "run" / "environment.json").write_text("{}")
    (tmp_path / "run" / "metrics.jsonl").write_text('5\n{"step": "x"}\n[[[\n{"step": 7}\n{"st')
    ours, gone = (f".other.json.{number}.tmp" for number in (os.getpid(), 2**31 - 1))
    for name in (ours, gone, ".data.json.x.tmp", "a.tmp"):
        (tmp_path / "run" / name).write_text("{")
    config = make()
    with pytest.raises(UserError, match=r"holds files but no config.json"):
        rundir.check_config(tmp_path / "run", config, force=False)
    (tmp_path / "run" / "a.tmp").unlink()
    with jax.set_mesh(sharding.make_mesh(check_devices(config, 1))), opened(config, tmp_path / "run") as run:
        assert run.start == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
    assert sorted(path.name for path in (tmp_path / "run").glob(".*.tmp")) == sorted([ours, ".data.json.x.tmp"])


def test_a_run_that_dies_between_its_last_save_and_its_summary_has_each_row_once(tmp_path, make):
    def die(*ignored):
        raise KeyboardInterrupt

    config = make(train__trackers="tensorboard")
    train(config, tmp_path / "calm", progress=Quiet)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", progress=Quiet, sample=die)
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir() and not (tmp_path / "run" / "summary.json").exists()
    train(config, tmp_path / "run", progress=Quiet)
    assert without_times(rows(tmp_path / "run")) == without_times(rows(tmp_path / "calm"))
    assert rows(tmp_path / "run", "expert_load.jsonl") == rows(tmp_path / "calm", "expert_load.jsonl")


def test_processes_may_look_at_a_lock_together(tmp_path):
    (tmp_path / ".lock").write_text("7")
    for kind in (fcntl.LOCK_SH, fcntl.LOCK_EX):
        with (tmp_path / ".lock").open("a+") as other:
            fcntl.flock(other, kind)
            if kind == fcntl.LOCK_SH:
                rundir.check_idle(tmp_path)
                continue
            with pytest.raises(rundir.Busy, match="process 7 is training here"):
                rundir.check_idle(tmp_path)


# ---------------------------------------------------------------- records, seeds


def test_a_run_is_repeated_from_its_own_record(good, make):
    for spec in (good, good / "config.json"):
        assert to_dict(load(str(spec))) == to_dict(make())
        assert load(str(spec), ["train.steps=7"]).train.steps == 7
        assert load(str(spec), ["model.moe.router=hash"]).model.moe.router == "hash"
        with pytest.raises(UserError, match=r"train\.step: unknown config field; did you mean 'steps'"):
            load(str(spec), ["train.step=7"])


def test_the_record_of_an_older_run_is_a_config(run, make, cli, capsys):
    """Held-out rows were counted in micro-batches, and some fields were not there yet."""
    saved = read_json(run / "config.json")
    del saved["train"]["eval_rows"], saved["model"]["mixture_of_depths"], saved["model"]["moe"]["exchange"]
    del saved["model"]["moe"]["options"]["scale"]
    saved["train"] |= {"eval_batches": 3, "batch_size": 8, "accumulate_steps": 2}
    (run / "config.json").write_text(json.dumps(saved))
    config = load(str(run))
    assert config.train.eval_rows == 12
    assert to_dict(config) == to_dict(make(train__eval_rows=12, train__accumulate_steps=2))
    assert cli(run, "--config.train.accumulate_steps=2") == 0, "the same command, whose rows have another default now"
    assert "this run is complete (4 steps)" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["[]", "null", "3", '{"train": 3}', "{", "[" * 100_000, '{"model": {"moe": {}}}'])
def test_a_file_that_is_no_record_is_one_line(tmp_path, cli, capsys, content):
    (tmp_path / "config.json").write_text(content)
    refused(capsys, main(["train", f"--config={tmp_path / 'config.json'}", "--dry-run"]), "config.json: not ")


@pytest.mark.slow
def test_every_start_is_kept_in_the_history(run, make):
    train(make(train__steps=5), run, resume="force", progress=Quiet)
    train(make(train__steps=6, optim__learning_rate=1e-3), run, resume="force", progress=Quiet)
    history = load_run(run).history
    assert [start["step"] for start in history] == [0, 4, 5]
    assert [start["changes"] for start in history] == [
        {},
        {"train.steps": [4, 5]},
        {"train.steps": [5, 6], "optim.learning_rate": [0.003, 0.001]},
    ]
    assert all(start["time"].endswith("+00:00") and start["command"] and start["versions"]["jax"] for start in history)
    assert read_json(run / "config.json")["train"]["steps"] == 6


def test_a_run_that_is_refused_keeps_its_record(run, make):
    before = contents(run)
    with pytest.raises(UserError, match="checkpoint of another model"):
        train(make(model__dim=64), run, resume="force", progress=Quiet)
    after = contents(run)
    assert {k: v for k, v in after.items() if k != ".lock"} == {k: v for k, v in before.items() if k != ".lock"}


def test_the_history_of_an_older_run_begins_with_what_is_known(run, make):
    (run / "history.jsonl").unlink()
    (run / "summary.json").unlink()
    config = make()
    with jax.set_mesh(sharding.make_mesh(check_devices(config, 1))), opened(config, run):
        pass
    first, second = load_run(run).history
    assert first["time"] is None and first["step"] == 0 and first["command"] == second["command"]
    assert second["step"] == 4 and second["changes"] == {}


SEEDS = [-1, 2**31, 2**32, 10**30]


@pytest.mark.parametrize("seed", [*SEEDS, "0x" + "f" * 5000])
def test_a_seed_that_cannot_be_held_is_refused_everywhere(place, good, tmp_path, cli, capsys, seed):
    refused(capsys, cli(tmp_path / "run", f"--config.train.seed={seed}"), "train.seed=", f"to {2**31 - 1}")
    assert not (tmp_path / "run").exists()
    if (seed := int(str(seed), 0)) > 10**100:
        return
    study = place / "study.py"
    study.write_text(STUDY.format(base=str(good), seeds=(0, seed)))
    refused(capsys, main(["ablate", str(study), f"--workdir={tmp_path / 's'}"]), "seeds=", f"to {2**31 - 1}")
    study.write_text(STUDY.format(base=str(good), seeds=(0, 1)))
    refused(capsys, main(["ablate", str(study), f"--workdir={tmp_path / 's'}", f"--seeds={seed}"]), "--seeds=")
    refused(capsys, main(["generate", str(good), f"--seed={seed}"]), "--seed=")
    assert not (tmp_path / "s").exists()


STUDY = """
from frugalmoe.ablate import Study

STUDY = Study(
    name="seeds", question="?", expectation="!", base={base!r}, baseline="a", varies=("model.moe.losses",),
    arms={{"a": {{}}, "b": {{"model.moe.losses.z": 0.5}}}}, seeds={seeds!r},
)
"""


def test_the_largest_seed_is_a_seed(make):
    config = make(train__seed=2**31 - 1)
    with jax.set_mesh(sharding.make_mesh(check_devices(config, 1))):
        assert checkpoint.is_finite(init(config))


def test_every_integer_of_a_config_fits_32_bits(make):
    for field in ("train__steps", "train__batch_size", "model__dense_dim", "train__log_every"):
        with pytest.raises(UserError, match=rf"{field.replace('__', '.')}=4294967296: must be from"):
            make(**{field: 2**32})
    with pytest.raises(UserError, match=r"train.steps=\(an integer of 20000 bits\): must be from"):
        make(train__steps=2**20000 - 1)
    with pytest.raises(UserError, match=r"optim.learning_rate=\(an integer of 20000 bits\): must be from"):
        make(optim__learning_rate=2**20000 - 1)
    assert make(model__rope_theta=10**10).model.rope_theta == 1e10
    for value in (float("inf"), float("nan")):
        with pytest.raises(UserError, match=rf"model.moe.losses.z={value}: must be"):
            make(model__moe__losses__z=value)


# ---------------------------------------------------------------- what is printed, and how a command ends


@pytest.mark.slow
def test_a_directory_may_be_called_as_markup(tmp_path, cli, capsys):
    for name in ("[/x]", "[red]", ":smile:"):
        assert cli(tmp_path / name, "--config.train.steps=2") == 0
        printed = capsys.readouterr().out
        assert f"report: {tmp_path / name / 'report' / 'index.html'}\n" in printed
        assert "compiling the training step\n" in printed and "nan" not in printed and " 0 tokens/s" not in printed


@pytest.fixture
def start(place, tmp_path):
    """`frugalmoe train` in a process of its own, with a model that compiles for a while."""
    config = config_file(place, place / "text", place / "cache2", FIELDS | {"train.steps": 100_000})

    def start(workdir, *flags):
        # Each gets an empty cache of compiled programs.
        flags = [f"--config={config}", f"--workdir={workdir}", f"--config.data.cache_dir={tmp_path / 'cache'}", *flags]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        return subprocess.Popen(command("train", *flags), env=os.environ | {"PYTHONUNBUFFERED": "1"}, **pipes)

    return start


def ended(process, code: int, text: str) -> None:
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert error.startswith("frugalmoe: ") and text in error and len(error.strip().splitlines()) == 1, error


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_before_the_first_step_ends_the_process_at_once(start, tmp_path, number, code):
    process = start(tmp_path / "run", "--config.model.num_layers=8", "--config.model.num_dense_layers=4")
    assert process.stdout.readline() == "compiling the training step\n"
    began = time.monotonic()
    process.send_signal(number)
    ended(process, code, "interrupted; there was nothing to save, and the same command goes on")
    assert time.monotonic() - began < 5
    assert not (tmp_path / "run" / "summary.json").exists()


def test_signals_are_asked_for_once(make, tmp_path):
    """A handler of each step's own would keep the one before it, for as long as the run trains."""
    handlers = []

    class Looking(Progress):
        def update(self, *numbers):
            handlers.append(signal.getsignal(signal.SIGTERM))

    train(make(train__steps=4), tmp_path / "run", progress=Looking)
    assert len(handlers) == 4 and len(set(handlers)) == 1 and handlers[0] is not signal.getsignal(signal.SIGTERM)


@pytest.mark.slow
def test_the_first_signal_saves_and_the_second_ends(start, tmp_path):
    process = start(tmp_path / "run")
    while '"loss/ce"' not in (log.read_text() if (log := tmp_path / "run" / "metrics.jsonl").is_file() else ""):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=120)
    assert process.returncode == 75 and "after saving" in output and not error, error
    process = start(tmp_path / "run")
    while "step" not in process.stdout.readline().replace("training step", "").replace("resuming at step", ""):
        pass
    os.kill(process.pid, signal.SIGSTOP)  # both arrive while it does nothing
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    ended(process, process.wait(60), "interrupted again: ended without saving; the last checkpoint is kept")
    assert process.returncode in (130, 143) and saved(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["routers", "--format=json"], ["routers"], ["train", "--help"]])
def test_a_reader_that_goes_is_no_error(flags):
    read, write = os.pipe()
    os.close(read)
    out = subprocess.run(command(*flags), stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert out.returncode in (0, 141) and not out.stderr, out.stderr


@pytest.mark.parametrize("argv", [["train", "--config=x.py", "--foo"], ["data", "show", "--config=x.py", "--foo=3"]])
def test_an_unknown_flag_shows_the_usage_of_its_command(capsys, argv):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2
    usage = capsys.readouterr().err
    assert usage.startswith(f"usage: frugalmoe {' '.join(a for a in argv if '-' not in a)} [-h]")
    assert "unrecognized arguments: --foo" in usage
