"""What a study may declare, what its statistics say, and its table: all without training."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from runs import TINY

from frugalmoe import metrics
from frugalmoe.ablate import Study, load_study, results, shrunk, statistics
from frugalmoe.ablate.plan import Pair, Plan
from frugalmoe.ablate.study import arms_of, choose
from frugalmoe.ablate.together import bytes_of_run, groups
from frugalmoe.config import default, override, resolve
from frugalmoe.cost import forward_flops
from frugalmoe.errors import UserError
from frugalmoe.fields import to_dict
from frugalmoe.files import check_name, write_json
from frugalmoe.model import depths
from frugalmoe.model.transformer import count_parameters, structure
from frugalmoe.routing import stats, strategies
from frugalmoe.train.program import Program


def base():
    return override(default(), TINY)


STUDY = Study(
    name="balance",
    question="Which?",
    expectation="The same.",
    base=base,
    arms={"aux": {}, "bias": {"model.moe.router": "sigmoid_bias"}, "none": {"model.moe.losses.load_balance": 0.0}},
    baseline="aux",
    varies=("model.moe.router", "model.moe.losses"),
)


def changed(**fields) -> Study:
    return dataclasses.replace(STUDY, **fields)


# ---------------------------------------------------------------- declarations


def test_arms_are_the_base_with_their_changes():
    arms = {arm.name: arm.config for arm in arms_of(STUDY, ["train.steps=7"])}
    assert [c.model.moe.router for c in arms.values()] == ["topk_softmax", "sigmoid_bias", "topk_softmax"]
    assert arms["none"].model.moe.losses["load_balance"] == 0.0
    assert {c.train.steps for c in arms.values()} == {7}


def test_a_seed_changes_the_seed_and_the_name_only():
    arm = arms_of(STUDY)[1]
    a, b = (to_dict(arm.with_seed(STUDY, seed)) for seed in (0, 1))
    assert (a["name"], b["name"], a["train"]["seed"], b["train"]["seed"]) == ("balance/bias/0", "balance/bias/1", 0, 1)
    a["name"] = b["name"] = a["train"]["seed"] = b["train"]["seed"] = None
    assert a == b


WRONG = [
    (
        dict(varies=("model.moe.router",)),
        "arm 'none': model.moe.losses.load_balance=0.0 where the baseline 'aux' has 0.01",
    ),
    (dict(varies=("model.moe.losses",)), "arm 'bias': model.moe.router='sigmoid_bias' where"),
    (dict(arms={"aux": {}, "b": {"optim.learning_rate": 1.0}}), "arm 'b': optim.learning_rate=1.0 where the baseline"),
    (
        dict(arms={"aux": {}, "b": {"model.moe.rooter": "hash"}}),
        "arm 'b': model.moe.rooter: unknown config field; did you",
    ),
    (dict(arms={"aux": {}, "b": {"model.moe.router": "hush"}}), "did you mean 'hash'"),
    (dict(baseline="axu"), "baseline='axu': no such arm; did you mean 'aux'"),
    (dict(varies=("train.steps",)), "varies='train.steps': arms share data, batches, steps and seeds"),
    (dict(varies=("data",)), "varies='data'"),
    (dict(seeds=()), "seeds=()"),
    (dict(seeds=(1, 1)), "seeds=(1, 1)"),
    (dict(arms={"aux": {}, "../x": {}}), "balance: arm='../x': a name holds letters, digits and _ . + -"),
    (dict(name=""), "name=''"),
]


@pytest.mark.parametrize("fields, message", WRONG, ids=[message[:40] for _, message in WRONG])
def test_a_wrong_declaration_is_named_in_one_line(fields, message):
    with pytest.raises(UserError) as error:
        arms_of(changed(**fields))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_options_of_another_router_need_no_declaration_but_those_of_the_same_do():
    options = {"model.moe.options.num_groups": 2, "model.moe.options.groups_per_token": 1}
    grouped = {"bias": {"model.moe.router": "sigmoid_bias"}, "grouped": {"model.moe.router": "sigmoid_bias", **options}}
    with pytest.raises(UserError, match=r"arm 'grouped': model\.moe\.options"):
        arms_of(changed(arms=grouped, baseline="bias", varies=("model.moe.router",)))
    arms_of(changed(arms={"aux": {}, **grouped}, varies=("model.moe.router",)))


def test_a_study_in_small_is_another_study():
    """Whatever counts steps shrinks with them: 4 of 12 warmup steps are 1 of 3. Its name says what it is."""
    short = shrunk(STUDY, steps=3)
    config = arms_of(short)[0].config
    assert short.name == "balance-3-steps" and short.seeds == STUDY.seeds
    assert (config.train.steps, config.optim.warmup_steps, config.model.dim) == (3, 1, TINY["model.dim"])
    assert shrunk(STUDY) is STUDY
    one = arms_of(shrunk(STUDY, steps=1))[0].config
    assert one.train.steps == 1 and one.optim.warmup_steps == 0
    with pytest.raises(UserError, match=r"--steps=0: must be at least 1"):
        shrunk(STUDY, steps=0)


def test_laptop_mode_of_a_study():
    """The base's laptop mode and two seeds; a study that sets sizes of the model keeps its model."""
    big = changed(base=lambda: override(default(), {"model.dim": 4096, "model.num_layers": 40, "model.num_heads": 32}))
    small = shrunk(big, laptop=True)
    arms = {arm.name: arm.config for arm in arms_of(small)}
    assert small.name == "balance-laptop" and small.seeds == (0, 1)
    assert {(c.model.dim, c.model.num_layers, c.train.steps) for c in arms.values()} == {(64, 3, 100)}
    assert arms["bias"].model.moe.router == "sigmoid_bias" and arms["none"].model.moe.losses["load_balance"] == 0.0
    arms = {"aux": {}, "wide": {"model.moe.expert_dim": 32}}
    sized = shrunk(changed(arms=arms, varies=("model.moe.expert_dim",)), laptop=True, steps=5)
    assert sized.name == "balance-laptop-5-steps"
    configs = [arm.config for arm in arms_of(sized)]
    assert [c.model.moe.expert_dim for c in configs] == [16, 32] and {c.train.steps for c in configs} == {5}


@pytest.mark.parametrize("seeds", [(-1,), (2**31,), (2**32,), (1.5,), (True,), (0, 0), ()])
def test_seeds_that_no_run_can_have_are_refused(seeds):
    with pytest.raises(UserError, match=r"seeds=.*must be (different integers|an integer|from 0 to 2147483647)"):
        arms_of(changed(seeds=seeds))


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/b", "..", ".", "", ".x", "-x", "a b", "a\nb", "a\x00", "é" * 65, None, 3]
)
def test_a_name_that_is_no_folder_of_its_own_is_refused(name):
    with pytest.raises(UserError, match=r"name=.*a name h") as error:
        check_name("name", name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a", "_a", "4_blocks", "loss-free+bias.v2", "größe", "名", "x" * 128])
def test_a_name_that_is_a_folder_is_taken(name):
    check_name("name", name)


# ---------------------------------------------------------------- metrics


def test_every_statistic_of_routing_has_a_row():
    """Whatever `stats.metrics` derives has a label, and may be asked of a study."""
    counts = {"counts": np.ones(4), "tokens": 1, "assigned": 4}
    others = ("dropped", "entropy_sum", "lse_sum", "overflow", "ties", "busiest")
    found = stats.metrics({**counts, **dict.fromkeys(others, np.zeros(()))})
    assert {f"router/{name}" for name in found} == {m.name for m in metrics.prefixed("router/")}
    found = depths.metrics({"tokens": 1, "passed": 1.0, "told": 1.0})
    assert {f"depth/{name}" for name in found} == {m.name for m in metrics.prefixed("depth/")}
    assert {*(f"router/{name}" for name in ("device_load", "overflow_rate"))} < set(results.known_metrics(["code"]))


def test_what_a_metric_is_called():
    assert metrics.titled("eval/loss/mean") == "loss (nats per token)"
    assert metrics.titled("eval/loss/code") == "loss of code (nats per token)"
    assert metrics.titled("router/entropy/layer_03") == "router entropy (nats)"
    assert metrics.titled("loss/prototype_alignment") == "prototype alignment loss"
    assert metrics.titled("mine/own") == "mine/own" and metrics.find("mine/own") is None
    assert {m.better for m in metrics.ROWS} <= {"less", "more", ""} and len({m.name for m in metrics.ROWS}) == len(
        metrics.ROWS
    )


def test_a_router_object_is_an_override_and_is_stored_by_name():
    mine = dataclasses.replace(strategies.get("sigmoid_bias"), name="mine")
    arms = arms_of(changed(arms={"aux": {}, "mine": {"model.moe.router": mine}}))
    assert arms[1].config.model.moe.router is mine
    assert to_dict(arms[1].config)["model"]["moe"]["router"] == "mine"
    assert hash(arms[1].config) != hash(arms[0].config)
    with pytest.raises(UserError, match="passed as an object needs one"):
        arms_of(changed(arms={"aux": {}, "mine": {"model.moe.router": dataclasses.replace(mine, name="")}}))


def test_choose_keeps_the_declared_order():
    assert choose("--arms", ["c", "a"], ["a", "b", "c"]) == ["a", "c"]
    assert choose("--arms", None, ["a", "b"]) == ["a", "b"]
    with pytest.raises(UserError, match="--arms=nine: no such arm; did you mean 'none'"):
        choose("--arms", ["nine"], ["aux", "none"])


def test_runs_that_share_a_program_are_grouped():
    """`aux` and `none` differ in a loss coefficient only, an argument of the step; `bias` has another router."""
    pairs = tuple(Pair(arm, seed) for seed in (0, 1) for arm in STUDY.arms)
    plan = Plan(STUDY, (), {arm.name: arm for arm in arms_of(STUDY)}, pairs, flops={}, parameters={}, vocabulary=64)
    named = lambda size: [" ".join(f"{p.arm}{p.seed}" for p in group) for group in groups(plan, size)]
    assert named(8) == ["aux0 none0 aux1 none1", "bias0 bias1"]
    assert named(3) == ["aux0 none0 aux1", "bias0 bias1", "none1"]
    assert named(1) == ["aux0", "bias0", "none0", "aux1", "bias1", "none1"]
    assert named(None) == named(1), "one after the other on CPUs"


def test_arms_of_different_optimizers_are_never_one_program():
    arms = {"adamw": {}, "muon": {"optim.name": "muon"}, "rated": {"optim.rates": {"router": 0.5}}}
    study = changed(arms=arms, baseline="adamw", varies=("optim.name", "optim.rates"))
    of_study = {arm.name: arm for arm in arms_of(study)}
    pairs = tuple(Pair(arm, seed) for seed in (0, 1) for arm in arms)
    plan = Plan(study, (), of_study, pairs, flops={}, parameters={}, vocabulary=64)
    assert [{pair.arm for pair in group} for group in groups(plan, 8)] == [{"adamw"}, {"muon"}, {"rated"}]
    runs = [SimpleNamespace(config=plan.config(Pair(arm, 0))) for arm in arms]
    with pytest.raises(ValueError, match="runs of several programs cannot be trained as one"):
        Program(runs)


def test_memory_of_a_run_by_hand():
    """3 layers x (16 x 32 + 6 x 64) = 2,688 numbers per token; 8 x 32 tokens more in a batch of twice the size."""
    once, twice = (bytes_of_run(arms_of(STUDY, {"train.batch_size": size})[0].config) for size in (8, 16))
    assert twice - once == 4 * 2688 * 256
    muon = bytes_of_run(arms_of(STUDY, {"train.batch_size": 8, "optim.name": "muon"})[0].config)
    assert 0.5 * once < muon < once, "one moment of a matrix in place of two"


FILES = [
    ("STUDY = 3", "STUDY=3: a study's file ends with STUDY = Study"),
    ("import nothing_of_that_name", "ModuleNotFoundError: No module named"),
    ("raise ValueError('a\\nb')", "ValueError: a b"),
]


@pytest.mark.parametrize("text, message", FILES, ids=[text[:10] for text, _ in FILES])
def test_a_file_that_is_no_study(tmp_path, text, message):
    (tmp_path / "x.py").write_text(text)
    with pytest.raises(UserError) as error:
        load_study(tmp_path / "x.py")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such study"):
        load_study(tmp_path / "x.py")


# ---------------------------------------------------------------- statistics


def test_paired_t_interval_by_hand():
    """d = 1, 2, 3: mean 2, s = 1, standard error 1/sqrt(3); t(0.975, 2) = 4.3027; p of t = 3.4641 at 2 df: 0.0742."""
    found = statistics.paired(np.array([1.0, 2.0, 3.0]))
    assert (found.n, found.mean) == (3, 2.0)
    assert found.half_width == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    # F(t) of 2 df is 1/2 + t / (2 sqrt(2 + t^2)), so p = 1 - t / sqrt(2 + t^2) with t^2 = 12
    assert found.p == pytest.approx(1 - (12 / 14) ** 0.5, rel=1e-9)


def test_holm_by_hand():
    """Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.04, then made monotone; NaN is left out."""
    assert statistics.holm([0.03, 0.01, np.nan, 0.04, 0.02])[:2] == pytest.approx([0.06, 0.04])
    assert statistics.holm([0.03, 0.01, np.nan, 0.04, 0.02])[3:] == pytest.approx([0.06, 0.06])
    assert np.isnan(statistics.holm([0.03, np.nan])[1])


def test_arms_are_compared_on_common_seeds_only():
    values = {"base": {0: 1.0, 1: 2.0, 2: 9.0}, "arm": {0: 0.5, 1: 1.5}, "other": {7: 1.0}}
    found = statistics.compare(values, "base")
    assert found.keys() == {"arm"} and found["arm"].n == 2
    assert found["arm"].mean == -0.5 and found["arm"].half_width == 0


@pytest.mark.whole
def test_verdicts_hold_their_error_rate():
    """Arms that do not differ are called different in about 5% of studies in all, however many arms there are."""
    rng = np.random.default_rng(0)
    studies, wrong = 200, 0
    for _ in range(studies):
        values = {arm: dict(enumerate(rng.normal(size=3))) for arm in ("base", "a", "b", "c")}
        found = statistics.compare(values, "base")
        wrong += any("not distinguishable" not in statistics.verdict(f) for f in found.values())
    assert 0.005 < wrong / studies < 0.11  # at most 0.05 and four standard errors of 0.015


def test_verdict_lines():
    better = statistics.compare({"b": {0: 1.0, 1: 1.0, 2: 1.0}, "a": {0: 0.9, 1: 0.91, 2: 0.89}}, "b")["a"]
    # s = 0.01, 4.3027 * 0.01 / sqrt(3) = 0.0248
    assert statistics.verdict(better) == "better by 0.1000 ± 0.0248 nats (n=3)"
    same = statistics.compare({"b": {0: 1.0, 1: 1.0}, "a": {0: 1.0, 1: 1.0}}, "b")["a"]
    assert statistics.verdict(same) == "identical at n=2"
    noise = statistics.compare({"b": {0: 1.0, 1: 1.0, 2: 1.0}, "a": {0: 0.9, 1: 1.2, 2: 1.0}}, "b")["a"]
    assert statistics.verdict(noise).startswith("not distinguishable at n=3 (+0.0333 ± ")
    assert statistics.verdict(statistics.paired(np.array([0.2]))) == "one seed: 0.2000 nats worse, no interval"


NAN, INF = float("nan"), float("inf")
# baseline, arm -> what the verdict says, and the seeds of pairs that diverged
ODD = {
    "one value of the baseline is NaN": ([NAN, 2.0, 3.0], [1.0, 1.9, 2.8], "better|not disting", (0,)),
    "the whole baseline is NaN": ([NAN] * 3, [1.0, 1.1, 1.2], "no complete pair of runs: 3 of 3 diverged", (0, 1, 2)),
    "the arm is infinite": ([1.0, 1.1, 1.2], [INF, -INF, INF], "no complete pair of runs: 3 of 3 diverged", (0, 1, 2)),
    "both are infinite": (
        [INF, 1.0, 1.0],
        [INF, 1.1, 1.3],
        "not distinguishable at n=2 .*; 1 of 3 pairs diverged",
        (0,),
    ),
    "one seed is left": ([NAN, NAN, 1.0], [1.0, 1.0, 1.5], "one seed: 0.5000 nats worse, no interval; 2 of 3", (0, 1)),
    "one seed at all": ([1.0], [1.5], "one seed: 0.5000 nats worse, no interval$", ()),
    "one seed, and it diverged": ([NAN], [1.5], "no complete pair of runs: 1 of 1 diverged", (0,)),
    "equal values": ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "identical at n=3$", ()),
    "equal but for the order of a sum": ([0.3, 0.6], [0.1 + 0.2, 0.4 + 0.2], "identical at n=2$", ()),
    "the same difference in each seed": ([1.0, 2.0, 3.0], [1.5, 2.5, 3.5], r"worse by 0.5000 ± 0.0000 nats \(n=3", ()),
    "opposite differences": ([1.0, 1.0], [0.5, 1.5], "not distinguishable at n=2 .*more than 100 seeds", ()),
    "overflown but finite": ([1e308, 1.0, 1.0], [-1e308, 1.0, 1.0], "identical at n=2; 1 of 3 pairs diverged", (0,)),
    "hardly anything": ([1.0, 1.0, 1.0], [1 + 1e-6, 1 + 1.1e-6, 1 + 0.9e-6], r"worse by 1.0e-06 ± 2.5e-07 nats", ()),
}


@pytest.mark.parametrize("name", ODD)
def test_no_verdict_comes_from_what_is_not_finite(name):
    base, arm, said, diverged = ODD[name]
    values = {"base": dict(enumerate(base)), "arm": dict(enumerate(arm)), "other": dict(enumerate(base))}
    found = statistics.compare({k: values[k] for k in ("base", "arm")}, "base")["arm"]
    line = statistics.verdict(found)
    assert re.match(said, line) and found.diverged == diverged, line
    assert not re.search(r"nan|inf", line)
    beside = statistics.compare(values, "base")["other"]  # the odd arm takes nothing from its neighbour
    assert statistics.judge(beside) in ("identical", "one seed", "diverged")


def test_arms_and_baselines_without_runs_are_left_out():
    assert statistics.compare({"base": {}, "arm": {0: 1.0}}, "base") == {}
    assert statistics.compare({"arm": {0: 1.0}}, "base") == {}
    assert statistics.compare({"base": {0: 1.0}, "arm": {}}, "base") == {}
    assert statistics.compare({"base": {0: 1.0, 1: 1.0}, "arm": {2: 1.0}}, "base") == {}


def test_an_interval_touches_zero_if_and_only_if_the_verdict_is_not_distinguishable():
    """Holm's verdicts at 5%, over studies of 2 to 30 arms with real and no differences, tied p values, few seeds."""
    rng = np.random.default_rng(1)
    verdicts = {"better": 0, "worse": 0, "not distinguishable": 0}
    for _ in range(150):
        seeds, arms = int(rng.integers(2, 7)), int(rng.integers(2, 31))
        effects = {"base": 0, **{f"a{i}": rng.choice([0, 0.3, -1, 5]) for i in range(arms)}}
        values = {arm: dict(enumerate(effect + 0.1 * rng.normal(size=seeds))) for arm, effect in effects.items()}
        values["twin"] = values["a0"]
        for arm, f in statistics.compare(values, "base").items():
            away = f.mean - f.half_width > 0 or f.mean + f.half_width < 0
            assert away == (f.adjusted_p < 0.05), (arm, f)
            assert away == (statistics.judge(f) != "not distinguishable")
            verdicts[statistics.judge(f)] += 1
    assert min(verdicts.values()) > 50, verdicts


def test_levels_by_hand():
    """Four comparisons: 0.01 < 0.05 / 4 and 0.013 < 0.05 / 3 hold; 0.03 > 0.05 / 2 ends it for itself and for 0.04."""
    p = [0.03, 0.01, NAN, 0.04, 0.013]
    np.testing.assert_allclose(statistics.levels(p), [0.05 / 2, 0.05 / 4, NAN, 0.05 / 2, 0.05 / 3])
    assert statistics.levels([NAN]) != statistics.levels([0.2]) == [0.05] and statistics.levels([]) == []


def test_seeds_needed_are_those_of_the_tables():
    """Paired t test, two-sided 5%, power 80% (Cohen 1988, section 2.4): 199 pairs for 0.2, 34 for 0.5, 15 for 0.8."""
    assert statistics.seeds_needed(0.5, 0.05) == 34 and statistics.seeds_needed(-0.8, 0.05) == 15
    assert statistics.seeds_needed(0.2, 0.05) is None and statistics.seeds_needed(0.0, 0.05) is None
    assert statistics.seeds_needed(0.5, 0.05 / 30) > 34 and statistics.seeds_needed(1e9, 0.05) == 2


def test_the_seeds_that_a_verdict_asks_for_are_enough():
    """Simulated: an effect of one deviation, at the level that 10 comparisons leave."""
    n, rng = statistics.seeds_needed(1.0, 0.005), np.random.default_rng(0)
    draw = lambda n: np.array([statistics.paired(1 + rng.normal(size=n)).p < 0.005 for _ in range(2000)]).mean()
    assert draw(n) > 0.77 and draw(n - 2) < 0.80  # four standard errors of 0.009 beside 0.8


def test_cost_to_target_is_read_between_evaluations():
    steps, losses = np.array([10, 20, 30]), np.array([4.0, 3.0, 2.0])
    assert statistics.reaches(steps, losses, 2.5) == 25  # half of the way from 20 to 30
    assert statistics.reaches(steps, losses, 3.0) == 20
    assert statistics.reaches(steps, losses, 5.0) == 10
    assert np.isnan(statistics.reaches(steps, losses, 1.9))


# ---------------------------------------------------------------- FLOPs


def test_flops_by_hand():
    model = resolve(override(default(), TINY | {"model.vocab_size": 64})).model
    parts = forward_flops(model, sequence_length=32)
    # D=32, 3 layers (1 dense of width 64, 2 MoE), 4 heads and 2 key-value heads of 8, E=8, K=2, F=16, 1 shared, V=64
    assert parts == {
        "attention projections": 3 * 2 * 32 * 8 * (4 + 2 + 2 + 4),
        "attention products": 3 * 2 * (4 * 8) * 2 * 16.5,  # scores and values, over (32 + 1) / 2 earlier tokens
        "dense feed-forward": 1 * 2 * 3 * 32 * 64,
        "router": 2 * 2 * 32 * 8,
        "routed experts": 2 * 2 * 2 * 3 * 32 * 16,
        "shared experts": 2 * 1 * 2 * 3 * 32 * 16,
        "head": 2 * 32 * 64,
    }
    assert forward_flops(model, 32, active_experts=0.5)["routed experts"] == parts["routed experts"] / 4


def test_a_block_that_mixture_of_depths_routes_costs_the_share_that_passes():
    """The last of the 3 blocks, an MoE one; ceil(0.3 * 32) = 10 of 32 tokens pass."""
    fields = TINY | {"model.vocab_size": 64}
    without = resolve(override(default(), fields)).model
    model = resolve(override(default(), fields | {"model.mixture_of_depths.capacity": 0.3})).model
    plain, parts, passing = forward_flops(without, 32), forward_flops(model, 32), 10 / 32
    assert parts == pytest.approx(
        {
            "attention projections": plain["attention projections"] * (2 + passing) / 3,
            # its tokens see (10 + 1) / 2 others on average
            "attention products": 2 * 2 * (4 * 8) * (2 * 16.5 + passing * 5.5),
            "dense feed-forward": plain["dense feed-forward"],
            "router": plain["router"] * (1 + passing) / 2,
            "routed experts": plain["routed experts"] * (1 + passing) / 2,
            "shared experts": plain["shared experts"] * (1 + passing) / 2,
            "head": plain["head"],
            "mixture of depths": 2 * (32 + 32 * 8 + 8),  # the router; the predictor, of 32 / 4 hidden units
        }
    )
    # Of the block's active weights 0.7 are idle on average: two norms; attention; router; 2 of 8 experts, 1 shared.
    active = 2 * 32 + 32 * 8 * (4 + 2 + 2 + 4) + 32 * 8 + 3 * (3 * 32 * 16)
    added = 32 + 32 * 8 + 8 + 1
    counts, before = count_parameters(model), count_parameters(without)
    assert counts["total"] - before["total"] == added
    assert counts["active"] - before["active"] == added - round(0.7 * active)


def test_flops_are_two_per_weight_that_a_token_meets():
    model = resolve(override(default(), TINY | {"model.vocab_size": 64})).model
    _, params, _ = structure(model)
    matrices = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim >= 2)
    moe = params["moe_blocks"]["moe"]
    norms = sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "norm" in str(path[:-1]))
    idle = (moe["gate_up_ED2F"].size + moe["down_EFD"].size) * (8 - 2) / 8
    met = sum(leaf.size for leaf in jax.tree.leaves(params)) - norms - idle - params["embed_VD"].size
    assert matrices(params) >= met
    parts = forward_flops(model, 32)
    assert sum(parts.values()) - parts["attention products"] == 2 * met


# ---------------------------------------------------------------- the table


def described() -> dict:
    parts = {"routed experts": 100.0, "head": 50.0}
    return {
        "name": "balance",
        "arms": {"aux": {}},
        "tokens_per_step": 256,
        "forward_flops": {"aux": parts},
        "experts_per_token": {"aux": 2},
    }


SUMMARY = {
    "status": "complete",
    "step": 12,
    "eval": {"loss": {"code": 2.0, "mean": 3.0}, "bits_per_byte": {"code": 1.0, "mean": 1.5}},
    "router": {
        "layers": {
            "layer_01": {"max_violation": 1.0, "active_per_token": 1.0},
            "layer_02": {"max_violation": 2.0, "active_per_token": 2.0},
        }
    },
    "parameters": {"total": 10, "active": 5},
    "speed": {"tokens_per_second": 512.0},
}

LOGGED = [{"step": step, "loss/ce": 10.0 - step, "optim/gradient_norm": 1.0 * step} for step in range(1, 13)]


def test_final_metrics_by_hand():
    found = results.final_metrics(SUMMARY, LOGGED, described(), "aux")
    assert found["router/max_violation"] == 1.5 and "router/entropy" not in found
    assert found["train/loss"] == -1.5  # steps 11 and 12 of 12: (10 - 11 + 10 - 12) / 2
    assert found["optim/gradient_norm"] == 11.5
    assert found["speed/step_seconds"] == 256 / 512
    assert found["cost/active_flops"] == 100 * 1.5 / 2 + 50  # 1.5 of 2 experts on average


def test_the_table_is_made_from_run_directories_and_refuses_what_is_not_its_own(tmp_path):

    run = tmp_path / "aux" / "seed_3"
    run.mkdir(parents=True)
    write_json(run / "summary.json", SUMMARY)
    (run / "metrics.jsonl").write_text('{"step": 6, "loss/ce": 4.0, "eval/loss/mean": 3.5}\n')
    (tmp_path / "aux" / "seed_4").mkdir()  # has not finished
    table = results.gather(tmp_path, described())
    rows = results.read_table(tmp_path, "balance").to_pylist()
    assert rows == table.to_pylist()
    assert {"arm": "aux", "seed": 3, "metric": "eval/loss/mean", "step": 6, "final": False, "value": 3.5} in rows
    assert {"arm": "aux", "seed": 3, "metric": "eval/loss/mean", "step": 12, "final": True, "value": 3.0} in rows
    assert {row["seed"] for row in rows} == {3}
    with pytest.raises(UserError, match="holds the results of study 'balance', not 'other'"):
        results.check(tmp_path, "other")
    path = tmp_path / "results.parquet"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not parquet at all"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"not a readable table.*rebuilt from the run directories"):
            results.read_table(tmp_path, "balance")
        assert path.read_bytes() == damaged, "left as it was found"
    path.unlink()
    assert results.gather(tmp_path, described()).equals(table)
    pq.write_table(table.drop_columns(["seed"]).replace_schema_metadata({"study": "balance"}), path)
    with pytest.raises(UserError, match="has columns arm, metric"):
        results.check(tmp_path, "balance")
