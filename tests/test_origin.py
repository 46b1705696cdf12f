"""A run that begins with the weights of another: which bits it has, what it says of them, and what is refused."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import config_file, tiny, write_text

from frugalmoe import sharding
from frugalmoe.cli import main
from frugalmoe.config.checks import check_devices
from frugalmoe.errors import UserError
from frugalmoe.train import checkpoint, checksums, memory, rundir
from frugalmoe.train.loop import opened, train
from frugalmoe.train.origin import SHOWN, Origin
from frugalmoe.train.step import init
from frugalmoe.train.weights import load_checkpoint

pytestmark = pytest.mark.whole

FIELDS = {
    "train.steps": 2,
    "train.batch_size": 4,
    "train.eval_rows": 4,
    "checkpoint.every_steps": 1,
    "optim.warmup_steps": 1,
    "model.num_layers": 2,
    "model.moe.router": "sigmoid_bias",
}
BIAS = "moe_blocks/moe/router_state/bias_E"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("origin")
    write_text(root / "text")
    write_text(root / "other", documents=20)
    (root / "other" / "more.txt").write_text("The king and the sea.\n" * 40)
    return root


@pytest.fixture(scope="module")
def make(place):
    """A config on other data, with another schedule and seed than the origin's."""
    new = {"name": "new", "optim.schedule": "cosine", "train.seed": 5, "data.path": str(place / "other")}

    def make(**changes):
        changes = {name.replace("__", "."): value for name, value in changes.items()}
        return tiny(place / "text", place / "cache", FIELDS | new | changes)

    return make


@pytest.fixture(scope="module")
def source(place):
    """A complete run of 2 steps, with checkpoints of both."""
    train(tiny(place / "text", place / "cache", FIELDS), place / "source")
    return place / "source"


def test_a_state_that_does_not_fit_into_memory_is_refused_before_it_is_read(source, make, tmp_path, monkeypatch):
    config, read = make(), []
    monkeypatch.setattr(checkpoint, "restore_arrays", lambda *args: read.append(args))
    monkeypatch.setattr(memory, "of_device", lambda: 10**5)
    rule = rf"^--from={source}: the model needs [\d.]+ GB of memory, and this machine has 0\.0001$"
    begun = opened(config, tmp_path / "run", origin=Origin(source))
    with on_mesh(config), pytest.raises(UserError, match=rule), begun:
        pass
    assert not read and not (tmp_path / "run" / "config.json").exists()


def on_mesh(config):
    return jax.set_mesh(sharding.make_mesh(check_devices(config, 1)))


def by_path(*trees) -> dict[str, np.ndarray]:
    leaves = [leaf for tree in trees for leaf in jax.tree_util.tree_leaves_with_path(tree)]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(a) for path, a in leaves}


def weights_of(run, step=None) -> dict[str, np.ndarray]:
    return by_path(*load_checkpoint(run, step).weights)


def started(config, workdir, origin=None, save: bool = False, **how):
    """The state with which a run begins, by path; its directory is as if it were interrupted then."""
    with on_mesh(config), opened(config, workdir, origin=origin, **how) as run:
        if save:
            run.save()
        assert (run.start, int(run.state.position)) == (0, 0)
        assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(run.state.opt_state))
        return by_path(run.state.params, run.state.router_state)


def fresh(config) -> dict[str, np.ndarray]:
    with on_mesh(config):
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=320))
        return by_path(*(getattr(init(config), part) for part in ("params", "router_state")))


def same(a: dict, b: dict, but: tuple[str, ...] = ()) -> None:
    assert a.keys() == b.keys()
    differing = [path for path in a if not np.array_equal(a[path], b[path])]
    assert sorted(differing) == sorted(but)


def test_it_begins_with_the_bits_of_the_other_and_says_so(source, make, tmp_path):
    config = make()
    found = started(config, tmp_path / "run", Origin(source))
    same(found, weights_of(source))
    assert np.any(found[BIAS])
    record = rundir.origin_of(tmp_path / "run")
    assert record["run"] == str(source.resolve()) and record["step"] == 2 and record["router_state"]
    assert record["sha256"] == checkpoint.digest(source, 2, ("params", "router_state")) and record["new"] == []
    same(started(config, tmp_path / "first", Origin(source, 1)), weights_of(source, 1))
    assert rundir.origin_of(tmp_path / "first")["sha256"] != record["sha256"]


def test_what_is_dropped_is_new_and_nothing_else(source, make, tmp_path):
    config = make()
    own, theirs = fresh(config), weights_of(source)
    found = started(config, tmp_path / "head", Origin(source, drop=("head*",)))
    same(found, theirs, but=("head_DV",))
    assert np.array_equal(found["head_DV"], own["head_DV"])
    kernel = "moe_blocks/moe/router/kernel_DE"
    found = started(config, tmp_path / "router", Origin(source, drop=("*/router/*",)))
    same(found, theirs, but=(kernel, BIAS))  # the bias of a router that is new is new too
    assert np.array_equal(found[kernel], own[kernel]) and not np.any(found[BIAS])
    assert np.any(started(config, tmp_path / "kept", Origin(source, state="yes", drop=("*/router/*",)))[BIAS])
    same(started(config, tmp_path / "no", Origin(source, state="no")), theirs, but=(BIAS,))


@pytest.mark.slow
def test_another_router_has_no_state_of_the_old_one(source, make, tmp_path):
    config = make(model__moe__router="topk_softmax")
    found = started(config, tmp_path / "run", Origin(source))
    assert {**found, BIAS: None}.keys() == weights_of(source).keys()
    assert not rundir.origin_of(tmp_path / "run")["router_state"]
    with pytest.raises(UserError, match=rf"1 arrays do not fit: {BIAS} 1x8 there, none here"):
        started(config, tmp_path / "none", Origin(source, state="yes"))


@pytest.mark.slow
def test_it_goes_on_as_any_other_run_without_the_other(source, make, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    config, origin = make(), Origin(tmp_path / "source")
    summary = train(config, tmp_path / "whole", origin=origin)
    assert "sample" not in summary and summary["status"] == "complete"
    started(config, tmp_path / "run", origin, save=True)
    shutil.rmtree(tmp_path / "source")
    assert train(config, tmp_path / "run", origin=origin)["eval"] == summary["eval"]
    same(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"))
    rows = rundir.read_rows(tmp_path / "run" / "history.jsonl")
    assert [row["origin"]["step"] for row in rows] == [2, 2]
    with pytest.raises(UserError, match=r"did not begin with --from=.*step=2 there, 1 here"):
        train(config, tmp_path / "run", origin=origin._replace(step=1))
    with pytest.raises(UserError, match=r"drop=\[\] there, \['head\*'\] here"):
        train(config, tmp_path / "run", origin=origin._replace(drop=("head*",)))


def test_a_run_that_was_killed_before_it_saved_begins_with_the_same_weights(source, make, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    config = make()
    began = started(config, tmp_path / "run", Origin(tmp_path / "source"))
    same(started(config, tmp_path / "run"), began)
    file = next(p for p in (tmp_path / "source/checkpoints/2/params").rglob("*") if p.is_file() and p.name[0] == "_")
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(UserError, match=rf"source@2: .*a damaged checkpoint \(params/{file.name}: changed\)"):
        started(config, tmp_path / "run")
    checksums.write(tmp_path / "source/checkpoints/2")  # as if it had been trained anew
    with pytest.raises(UserError, match="has changed since the run began with it"):
        started(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "source")
    with pytest.raises(UserError, match=r"not a run directory"):
        started(config, tmp_path / "run")
    history = tmp_path / "run" / "history.jsonl"
    history.write_text(history.read_text().replace('"sha256"', '"md5"'))
    with pytest.raises(UserError, match="a damaged record of the run that this one began with"):
        started(config, tmp_path / "run")


MISMATCHES = [
    ({"model__moe__num_experts": 4}, ("4 arrays do not fit", "gate_up_ED2F 1x8x32x2x16 there, 1x4x32x2x16 here", BIAS)),
    ({"model__qk_norm": "head"}, ("4 arrays do not fit", "dense_blocks/attention/key_norm", "none there, 1x8 here")),
    ({"model__moe__num_shared_experts": 0}, ("2 arrays do not fit", "moe/shared/down_FD 1x16x32 there, none here")),
    ({"model__dim": 64}, ("arrays do not fit", " more. ")),
    ({"model__vocab_size": 512}, ("2 arrays do not fit: embed_VD 320x32 there, 512x32 here; head_DV",)),
]


@pytest.mark.parametrize("changes, said", MISMATCHES)
def test_what_does_not_fit_is_listed_and_nothing_is_written(source, make, tmp_path, changes, said):
    with pytest.raises(UserError) as refused:
        train(make(**changes), tmp_path / "run", origin=Origin(source))
    message = str(refused.value)
    assert all(text in message for text in said) and message.count(" there, ") <= SHOWN and "--from.drop" in message
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.fixture
def command(place, capsys):
    """`frugalmoe train` in this process, with the flags of the tiny config; returns (exit code, stderr, stdout)."""
    config = config_file(place, place / "other", place / "cache", FIELDS | {"name": "new"})

    def command(*flags: str):
        code = main(["train", f"--config={config}", *map(str, flags)])
        shown = capsys.readouterr()
        return code, shown.err, shown.out

    return command


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--from=SOURCE@7"], "no checkpoint of step 7; valid: [1, 2]"),
        (["--from=SOURCE@x"], "STEP of RUN@STEP must be a whole number"),
        (["--from=PLACE/text"], "not a run directory"),
        (["--from="], "not a run directory"),
        (["--from.drop=head*"], "--from.drop: needs --from=RUN[@STEP]"),
        (["--from.state=no"], "--from.state: needs --from=RUN[@STEP]"),
        (
            ["--from=SOURCE", "--from.drop=haed*"],
            "--from.drop=haed*: matches no parameter; valid: dense_blocks, embed_VD",
        ),
        (["--from=SOURCE", "--config.model.dim=64"], "arrays do not fit"),
        (["--from=SOURCE", "--config.data.tokenizer=PLACE/bpe"], "another tokenizer than that of --from=SOURCE"),
        (["--from=SOURCE", "--workdir=SOURCE"], "holds a run that did not begin with --from=SOURCE"),
        (["--from=SOURCE", "--workdir=SOURCE", "--fresh"], "is the run directory itself"),
        (["--from=NAN"], "NAN/checkpoints/3: a damaged checkpoint (not finite)"),
        (["--from=CUT"], "CUT/checkpoints: no checkpoint is whole and finite (2: opt_state/_METADATA: cut off, and 3"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_a_bad_origin_is_one_line(source, place, command, tmp_path, flags, said, dry):
    names = {"SOURCE": str(source), "PLACE": str(place), "NAN": f"{place}/nan", "CUT": f"{place}/cut"}
    if not (place / "bpe").is_dir():
        from frugalmoe.data.tokenizer import train_bpe

        (place / "bpe").mkdir()
        train_bpe(["The moon calls the river."] * 9, 300).save_into(place / "bpe")
    if "NAN" in str(flags) and not (place / "nan").is_dir():
        shutil.copytree(source, place / "nan")
        config, weights, _, mesh, _ = load_checkpoint(source)
        shutil.rmtree(place / "nan" / "checkpoints")
        with jax.set_mesh(mesh), checkpoint.open_manager(place / "nan", config.checkpoint) as manager:
            broken = jax.tree.map(lambda a: a * jnp.nan, weights.params)
            checkpoint.save(manager, 3, init(config)._replace(params=broken))
    if "CUT" in str(flags) and not (place / "cut").is_dir():
        shutil.copytree(source, place / "cut")
        for file in (place / "cut/checkpoints").rglob("_METADATA"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    put = lambda text: functools.reduce(lambda text, name: text.replace(*name), names.items(), text)
    workdir = [] if "--workdir" in str(flags) else [f"--workdir={tmp_path / 'run'}"]
    code, err, _ = command(*map(put, flags), *workdir, *["--dry-run"] * dry)
    assert code == 2 and err.count("\n") == 1 and put(said) in err
    assert not (tmp_path / "run" / "config.json").exists() and checkpoint.saved_steps(source) == [1, 2]


def test_a_dry_run_says_what_is_taken(source, command, tmp_path):
    code, _, out = command(f"--from={source}@1", "--from.drop=head*", f"--workdir={tmp_path / 'run'}", "--dry-run")
    assert code == 0 and "parameters of step 1, with routers' state; new: head_DV" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_embedding_and_a_head_that_are_new_may_know_other_tokens(source, place, make, tmp_path):
    from frugalmoe.data.tokenizer import train_bpe

    train_bpe(["The moon calls the river."] * 9, 300).save_into(tmp_path)
    found = started(make(data__tokenizer=str(tmp_path)), tmp_path / "run", Origin(source, drop=("head*", "embed*")))
    same(found, weights_of(source), but=("embed_VD", "head_DV"))
