"""Batches that grow, and a rate that is lowered, on the way: as schedules of the config, exact when interrupted."""

import itertools
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import rows, tiny, without_times, write_text

from frugalmoe.analysis.pages.table import tokens_seen
from frugalmoe.analysis.stored.runs import load_run
from frugalmoe.config import default, load, override, resolve
from frugalmoe.data import open_data
from frugalmoe.data.ramp import Ramp, of
from frugalmoe.errors import UserError
from frugalmoe.fields import to_dict
from frugalmoe.islands import virtual
from frugalmoe.train import optim, saved
from frugalmoe.train.loop import train
from frugalmoe.train.weights import load_model

pytestmark = pytest.mark.whole

FIELDS = {
    "model.num_layers": 1, "model.num_dense_layers": 0, "train.steps": 6, "train.batch_size": 16,
    "train.accumulate_steps": 4, "checkpoint.every_steps": 1, "checkpoint.keep_last": 9, "optim.schedule": "constant",
    "optim.warmup_steps": 1, "train.eval_rows": 4, "model.vocab_size": 320,
}  # fmt: skip
RAMP = {"train.ramp_from": 8, "train.ramp_batches": 4}  # 8 8 12 12, then 16


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(0, 40), st.integers(0, 60))
def test_batches_grow_evenly_and_follow_each_other(unit, first, stages, more, position):
    ramp = Ramp(first * unit, (first + stages) * unit, stages + more, unit)
    sizes = [ramp.size(p) for p in range(position + 1)]
    assert ramp.before(position) == sum(sizes[:-1])
    assert sizes[0] == ramp.first and all(size % unit == 0 for size in sizes)
    assert all(b - a in (0, unit) for a, b in itertools.pairwise(sizes))
    assert ramp.size(ramp.batches) == ramp.last > ramp.size(ramp.batches - 1)
    numbers = range(sum(sizes[position // 2 :]))
    assert [len(rows) for rows in ramp.cut(position // 2, numbers)] == sizes[position // 2 :]
    assert list(itertools.chain(*ramp.cut(position // 2, numbers))) == list(numbers)


def test_without_a_ramp_all_batches_have_one_size():
    ramp = of({"batch_size": 6})
    assert [(ramp.before(p), ramp.size(p)) for p in (0, 1, 10**9)] == [(0, 6), (6, 6), (6 * 10**9, 6)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("ramp")
    write_text(root / "text")
    return root


@pytest.fixture(scope="module")
def make(place):
    return lambda fields: tiny(place / "text", place / "cache", FIELDS | fields)


@pytest.fixture(scope="module")
def grown(place, make):
    train(make(RAMP), place / "grown")
    return place / "grown"


def test_batches_take_each_row_once_and_processes_their_own(make):
    config = make(RAMP)
    ramp, data = of(to_dict(config.train)), open_data(config.data, batch_size=16, seed=0, progress=False)
    all_rows = data.rows(range(8 + 8 + 12 + 12 + 16)).tokens_BT
    taken = [data.batch(position, None, ramp).tokens_BT for position in range(5)]
    assert [len(tokens) for tokens in taken] == [8, 8, 12, 12, 16]
    assert np.array_equal(np.concatenate(taken), all_rows)
    own = [4 * a + b for a in range(4) for b in (1, 3)]  # of a process, in four micro-batches of four
    assert np.array_equal(data.batch(2, own, ramp).tokens_BT, taken[2][[1, 3, 5, 7, 9, 11]])


def test_a_run_begins_as_one_of_small_batches_and_counts_its_tokens(grown, make, tmp_path):
    train(make({"train.batch_size": 8, "train.accumulate_steps": 2, "train.steps": 3}), tmp_path / "small")
    begun = [[row["loss/ce"] for row in rows(run) if "loss/ce" in row] for run in (grown, tmp_path / "small")]
    assert len(begun[0]) == 6 and begun[0][:2] == begun[1][:2] and begun[0][2] != begun[1][2]
    loads = [np.array(row["counts"]).sum() for row in rows(grown, "expert_load.jsonl")]
    assert loads == [2 * 32 * size for size in (8, 8, 12, 12, 16, 16)]  # two experts for each of 32 tokens in a row
    assert tokens_seen(load_run(grown)) == 32 * (8 + 8 + 12 + 12 + 16 + 16)


@pytest.mark.parametrize("step", [2, 3])
def test_it_goes_on_bit_for_bit_wherever_it_was_killed(grown, make, tmp_path, step):
    shutil.copytree(grown, tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    for later in range(step + 1, 7):
        saved.delete(tmp_path / "run", later)
    train(make(RAMP), tmp_path / "run")
    assert without_times(rows(tmp_path / "run")) == without_times(rows(grown))
    assert rows(tmp_path / "run", "expert_load.jsonl") == rows(grown, "expert_load.jsonl")
    ends = [load_model(run)[1] for run in (grown, tmp_path / "run")]
    leaves = [[np.asarray(leaf).tobytes() for leaf in jax_leaves(end)] for end in ends]
    assert leaves[0] == leaves[1]


def jax_leaves(tree) -> list:
    import jax

    return jax.tree.leaves(tree)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"train.ramp_from": 6}, r"train\.ramp_from=6: must be a multiple of a micro-batch of 4"),
        ({"train.ramp_from": 16}, r"train\.ramp_from=16: must be .* below train\.batch_size=16"),
        ({"train.ramp_from": -4}, "must not be negative"),
        ({"train.ramp_from": 0}, r"train\.ramp_from=0: needs train\.ramp_batches"),
        ({"train.ramp_batches": 0}, r"train\.ramp_from=8: needs train\.ramp_batches"),
        (
            {"train.ramp_batches": 1},
            r"train\.ramp_batches=1: must not be above train\.steps, and give each size a batch",
        ),
        ({"train.ramp_batches": 7}, r"train\.ramp_batches=7"),
        ({"train.accumulate_steps": 1}, r"train\.ramp_from=8: must be a multiple of a micro-batch of 16"),
    ],
)
def test_a_ramp_that_cannot_be_is_one_line(make, fields, said):
    with pytest.raises(UserError, match=said):
        make(RAMP | fields)


def test_islands_share_batches_that_grow(make, tmp_path):
    """Each has half of each: `test_islands_runs` compares them with real ones."""
    config = make(RAMP | {"islands.virtual": 2, "islands.round_steps": 4, "train.accumulate_steps": 2})
    summary = train(config, tmp_path / "run", drive=virtual.drive)
    assert summary["islands"]["tokens"] == 32 * (8 + 8 + 8 + 8 + 16 + 16)
    loads = [np.array(row["counts"]).sum() for row in rows(tmp_path / "run", "expert_load.jsonl")]
    assert loads == [32 * size for size in (8, 8, 8, 8, 16, 16)]  # two experts for each token of a half


@pytest.mark.parametrize("size", ["lite", "plus"])
def test_ling_grows_and_halves_its_rate_as_its_report_says(size):
    """9T tokens, the rate halved after 60% of them; 500B in the ramp, as the report of Ling 2.0 has it."""
    config = load(f"ling_1:{size}")
    ramp, tokens = of(to_dict(config.train)), config.data.sequence_length
    assert ramp.before(config.train.steps) * tokens == pytest.approx(9e12, rel=1e-3)
    assert ramp.before(ramp.batches) * tokens == pytest.approx(5e11, rel=1e-2)
    halved = round(config.optim.drop_after * config.train.steps)
    assert ramp.before(halved) * tokens == pytest.approx(0.6 * 9e12, rel=1e-3)
    rate = optim.schedule(config)
    assert float(rate(halved)) == pytest.approx(0.5 * float(rate(halved - 1))) == 0.5 * config.optim.learning_rate
    assert (ramp.first, ramp.last) == (2560, 8960) or size == "lite"


def rates(**fields) -> list[float]:
    names = {"steps": "train.steps"}
    fields = {"steps": 20, "learning_rate": 1.0, "warmup_steps": 4, "final_fraction": 0.1} | fields
    config = resolve(override(default(), {names.get(k, f"optim.{k}"): v for k, v in fields.items()}))
    return [float(optim.schedule(config)(i)) for i in range(config.train.steps)]


def test_the_rate_is_halved_on_the_way():
    """Update 12 of 20 is the first after 0.6 of them."""
    found = rates(schedule="constant", drop_after=0.6)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0] + [1.0] * 8 + [0.5] * 8)


def test_a_decay_begins_at_the_lower_rate():
    """A quarter of the 16 updates after the warmup decay, from 0.5 to 0.1 in four equal steps."""
    found = rates(schedule="wsd", decay_fraction=0.25, drop_after=0.5)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0] + [1.0] * 6 + [0.5] * 6 + [0.4, 0.3, 0.2, 0.1])
    assert rates(schedule="wsd", decay_fraction=0.25) == rates(schedule="wsd", decay_fraction=0.25, drop_factor=0.3)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"drop_after": 1.0}, r"optim\.drop_after=1\.0: must be in \[0, 1\)"),
        ({"drop_factor": 0.0}, r"optim\.drop_factor=0\.0: must be in \(0, 1\]"),
        ({"drop_factor": 2.0}, r"must be in \(0, 1\]"),
        ({"drop_after": 0.2}, r"is update 4, which must be after the 4 of the warmup"),
        ({"drop_after": 0.9, "schedule": "wsd"}, "before the decay at 17"),
        ({"drop_after": 0.6, "schedule": "cosine"}, "cosine has no rate that stays"),
        ({"drop_after": 0.6, "schedule": "wsd", "final_fraction": 0.7}, r"must not be above optim\.drop_factor=0\.5"),
    ],
)
def test_a_drop_that_cannot_be_is_one_line(fields, said):
    with pytest.raises(UserError, match=said):
        rates(**{"schedule": "constant", "drop_after": 0.6} | fields)
