"""Merge rules: laws of all of them by enumeration, the formulas of each against vectors, what is bad is left out."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalmoe import found
from frugalmoe.config import default, override, resolve
from frugalmoe.errors import UserError
from frugalmoe.islands import merges, outer
from frugalmoe.islands.contract import Merge, Merged, Offered, Options
from frugalmoe.islands.tensors import Tensor
from frugalmoe.islands.training import advice, rules_of

TENSORS = (
    Tensor("embed_VD", 40, "embedding", "embedding", (8, 5)),
    Tensor("head_DV", 40, "head", "head", (5, 8)),
    Tensor("moe_blocks/ffn_norm/scale/00", 5, "vector", "moe_blocks/00", (5,)),
    Tensor("moe_blocks/moe/down_FD/00", 600, "matrix", "moe_blocks/00", (30, 20)),
    Tensor("moe_blocks/moe/down_FD/01", 600, "matrix", "moe_blocks/01", (30, 20)),
)
NAMES = tuple(t.name for t in TENSORS)
LAYERS = ("embedding", "head", "moe_blocks/00", "moe_blocks/01")
HALF = """
import numpy as np
from frugalmoe.islands.contract import Merge, Merged, weights

def merge(offered, history, options):
    weight_M = weights(offered, options, np.ones(len(offered.islands)))
    return Merged(weight_M[:, None] * np.ones(len(offered.tensors)), history={"rounds": history.get("rounds", 0) + 1})

MERGE = Merge(about="the mean, written elsewhere", rule=merge)
"""


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> str:
    """A rule in a file of its own: it is found by its path and held to the same laws."""
    path = tmp_path_factory.mktemp("rules") / "half.py"
    path.write_text(HALF)
    return str(path)


@pytest.fixture(params=[*merges.names(), "a file outside"])
def merge(request, outside) -> Merge:
    return merges.get(outside if request.param == "a file outside" else request.param)


def drawn(count: int, common: float = 1.0, seed: int = 0) -> list[dict]:
    """Deltas of `count` islands: `common` times what they share, and noise of size 1 in each value."""
    rng = np.random.default_rng(seed)
    shared = {t.name: rng.standard_normal(t.shape) for t in TENSORS}
    noisy = lambda: {
        t.name: np.float32(0.05 * (common * shared[t.name] + rng.standard_normal(t.shape))) for t in TENSORS
    }
    return [noisy() for _ in range(count)]


def offered(deltas: list[dict], tokens=None, steps=None, staleness=None, islands=None) -> Offered:
    count = len(deltas)
    whole = lambda given, default: np.asarray([default] * count if given is None else given, np.int64)
    names = tuple(islands or (f"island-{m:02}" for m in range(count)))
    few = whole(tokens, 1000), whole(steps, 10), whole(staleness, 0)
    return Offered(names, outer.gram(deltas, NAMES), TENSORS, *few)


def times(factor: float, delta: dict) -> dict:
    return {name: np.float32(factor) * a for name, a in delta.items()}


def result(merged: Merged, deltas: list[dict]) -> dict:
    """What is merged, as whole vectors in float64."""
    return {
        name: sum(np.float64(merged.coefficients_MQ[m, q]) * deltas[m][name] for m in range(len(deltas)))
        for q, name in enumerate(NAMES)
    }


# ---------------------------------------------------------------- laws of all rules


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 8), data=st.data())
def test_permuting_islands_permutes_coefficients(seed, count, data):
    order = data.draw(st.permutations(range(count)))
    rng, deltas = np.random.default_rng(seed), drawn(count, seed=seed)
    tokens, steps, late = rng.integers(1, 9999, count), rng.integers(1, 99, count), rng.integers(0, 3, count)
    islands = [f"i{m}" for m in range(count)]
    pick = lambda values: [values[i] for i in order]
    for name in merges.names():
        merge = merges.get(name)
        first = merge.merge(offered(deltas, tokens, steps, late, islands))
        second = merge.merge(offered(*map(pick, (deltas, tokens, steps, late, islands))))
        np.testing.assert_allclose(second.coefficients_MQ, first.coefficients_MQ[list(order)], rtol=1e-5, atol=1e-12)
        assert second.left_out.keys() == first.left_out.keys()


@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_equal_contributions_merge_to_themselves_and_one_island_gets_all(merge, count):
    deltas = drawn(1) * count
    got = result(merge.merge(offered(deltas)), deltas)
    for name in NAMES:
        np.testing.assert_allclose(got[name], deltas[0][name], rtol=1e-6)


def test_deltas_that_are_larger_merge_to_what_is_larger(merge):
    if not merge.scales:
        assert merge.name == "edit"  # softmax and clip go by norms as they are
        return
    deltas = drawn(5)
    small = merge.merge(offered(deltas)).coefficients_MQ
    large = merge.merge(offered([times(1024, d) for d in deltas])).coefficients_MQ
    np.testing.assert_allclose(large, small, rtol=1e-6)


def test_what_is_late_weighs_less_by_the_one_formula(merge):
    """Equal contributions, so that nothing but the weights shows: 1, 1 / (1 + 0.5), 1 / (1 + 1.5)."""
    deltas = drawn(1) * 3
    got = merge.merge(offered(deltas, staleness=[0, 1, 3]), options={"staleness": 0.5}).coefficients_MQ
    wanted = np.array([1, 1 / 1.5, 1 / 2.5])
    np.testing.assert_allclose(got, np.repeat((wanted / wanted.sum())[:, None], len(TENSORS), 1), rtol=1e-6)
    alike = merge.merge(offered(deltas, staleness=[0, 1, 3]), options={"staleness": 0}).coefficients_MQ
    np.testing.assert_allclose(alike, 1 / 3, rtol=1e-6)


def extremes(count: int) -> dict[str, list[dict]]:
    deltas = drawn(count)
    zero = times(0, deltas[0])
    huge = {name: np.full_like(a, 3e38) for name, a in deltas[0].items()}
    return {
        "all zero": [zero] * count,
        "one zero": [zero, *deltas[1:]],
        "all but one zero": [deltas[0], *[zero] * (count - 1)],
        "cancelling": [times((-1) ** m, deltas[0]) for m in range(count)],
        "nearly cancelling": [times((-1) ** m * (1 + 1e-7 * m), deltas[0]) for m in range(count)],
        "tiny": [times(1e-38, d) for d in deltas],
        "huge": [huge] * count,
        "huge ratio": [huge, *[times(1e-38, d) for d in deltas[1:]]],
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [1, 2, 16])
@pytest.mark.parametrize("case", extremes(1))
def test_coefficients_are_finite(merge, case, count):
    deltas = extremes(count)[case]
    merged = merge.merge(offered(deltas, tokens=[0] * count, steps=[0] * count, staleness=[10**6] * count))
    assert merged.coefficients_MQ.dtype == np.float32 and np.isfinite(merged.coefficients_MQ).all()
    state = outer.Outer({name: np.zeros_like(a) for name, a in deltas[0].items()}, {})
    with np.errstate(over="ignore"):
        largest = max(float(np.abs(a).max()) for d in deltas for a in d.values())
    if largest < 1e37:
        stepped = outer.step(state, deltas, merged.coefficients_MQ, NAMES, 0.7, 0.9)
        assert all(np.isfinite(a).all() for a in stepped.params.values())
    json.dumps(dict(merged.history), allow_nan=False)


def test_histories_go_through_json_and_change_no_bit(merge):
    ours, theirs = {}, {}
    for seed in range(8):
        deltas = drawn(4, seed=seed)
        first, second = merge.merge(offered(deltas), ours), merge.merge(offered(deltas), theirs)
        np.testing.assert_array_equal(first.coefficients_MQ, second.coefficients_MQ)
        ours, theirs = first.history, json.loads(json.dumps(second.history, allow_nan=False))
        assert json.loads(json.dumps(ours)) == theirs


def test_a_rule_does_not_change_what_it_is_given(merge):
    given, history = offered(drawn(3)), merge.merge(offered(drawn(3))).history
    before, gram = json.dumps(history), given.gram_QMM.copy()
    again = [merge.merge(given, history) for _ in range(2)]
    assert json.dumps(history) == before and np.array_equal(given.gram_QMM, gram)
    np.testing.assert_array_equal(again[0].coefficients_MQ, again[1].coefficients_MQ)


def test_no_contributions_merge_to_nothing(merge):
    none = Offered((), np.zeros((len(TENSORS), 0, 0)), TENSORS, *[np.zeros(0, np.int64)] * 3)
    merged = merge.merge(none, {"a": 1})
    assert merged.coefficients_MQ.shape == (0, len(TENSORS)) and merged.history == {"a": 1}


def test_every_rule_says_what_it_is(merge):
    assert merge.about and "\n" not in merge.about
    assert merge.options_of() == merge.options_of({}) == merge.options()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mean", {"stalenes": 1}, "islands.merge_options.stalenes: unknown config field; did you mean 'staleness'?"),
        ("mean", {"staleness": -1.0}, "islands.merge_options.staleness=-1.0: must not be negative"),
        ("mean", {"staleness": float("nan")}, "islands.merge_options.staleness=nan: must be"),
        ("tokens", {"per_step": 1}, "islands.merge_options.per_step=1: expected bool"),
        ("edit", {"alpha": 1.0}, "islands.merge_options.alpha=1.0: must be in (0, 1)"),
        ("edit", {"absurd": 0.5}, "islands.merge_options.absurd=0.5: must be at least 1"),
        ("edit", {"step_ratio": 1.5}, "islands.merge_options.step_ratio=1.5: must be in [0, 1]"),
        ("edit", {"warmup": -1}, "islands.merge_options.warmup=-1: must not be negative"),
        *(
            ("edit", {n: 0.0}, f"{n}=0.0: must be positive")
            for n in ("threshold", "temperature", "clip", "margin", "agreement")
        ),
        ("edit", 3, "islands.merge_options=3: expected a section"),
    ],
)
def test_options_that_are_none_are_one_line(name, options, message):
    with pytest.raises(UserError) as error:
        merges.get(name).merge(offered(drawn(2)), options=options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_options_are_set_as_all_fields_are():
    """In a config file and on the command line; those of another rule go with it."""
    file = default()
    file.islands.merge = "edit"
    file.islands.merge_options.step_ratio = 0.25
    found = resolve(override(file, ["islands.merge_options.clip=3.0"]))
    assert dict(rules_of(found).section.merge_options) == {"step_ratio": 0.25, "clip": 3.0}
    assert not resolve(override(file, ["islands.merge=mean"])).islands.merge_options
    for wrong, message in (
        ("clip=0.0", r"islands\.merge_options\.clip=0\.0: must be positive"),
        ("clp=1.0", "did you mean 'clip'"),
        ("clip.more=1", "islands.merge_options.clip"),
    ):
        with pytest.raises(UserError, match=message):
            rules_of(resolve(override(file, [f"islands.merge_options.{wrong}"])))


def test_what_is_evaluated_between_rounds_is_not_kept():
    """It is of one island, and a checkpoint in the midst of a round is none that an island can go on from."""
    given = resolve(override(default(), ["checkpoint.keep_best=eval/loss/mean", "train.eval_every=5"]))
    with pytest.raises(UserError, match=r"checkpoint\.keep_best='eval/loss/mean': must be empty: islands save"):
        rules_of(given)


def test_edit_advises_weights_by_steps_for_rounds_of_time():
    fields = ["islands.merge=edit", "islands.round_seconds=60.0"]
    (said,) = advice(resolve(override(default(), fields)))
    assert said.startswith("islands.merge_options.step_ratio=0.0 with islands.round_seconds=60.0: ") and "0.5" in said
    for more in (["islands.merge_options.step_ratio=0.5"], ["islands.round_seconds=0.0"], ["islands.merge=mean"]):
        assert not advice(resolve(override(default(), [*fields, *more])))


def test_a_rule_that_is_none_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(found, "_READ", {})
    with pytest.raises(UserError, match=r"islands\.merge='man': no such merge rule; did you mean 'mean'"):
        merges.get("man")
    (tmp_path / "mine.py").write_text("MERGE = 3\n")
    with pytest.raises(UserError, match=r"ends without MERGE = Merge\(\.\.\.\)"):
        merges.get(str(tmp_path / "mine.py"))
    shape = lambda o, h, options: Merged(np.ones((1, 1)))
    infinite = lambda o, h, options: Merged(np.full((2, len(TENSORS)), 1e39))
    ghost = lambda o, h, options: Merged(np.ones((2, len(TENSORS))), {"nobody": "why"})
    for rule, message in ((shape, "not (2, 5)"), (infinite, "not finite"), (ghost, "speaks of 'nobody'")):
        with pytest.raises(UserError) as error:
            Merge(about="wrong", rule=rule, name="wrong").merge(offered(drawn(2)))
        assert message in str(error.value)
    assert not merges.broken() and Path(outer.__file__).parent.joinpath("merges").is_dir()


# ---------------------------------------------------------------- each rule's own formula


def test_tokens_weigh_by_tokens_or_by_tokens_of_a_step_too():
    deltas = drawn(3)
    given = offered(deltas, tokens=[100, 300, 600], steps=[10, 10, 60])
    np.testing.assert_allclose(merges.get("tokens").merge(given).coefficients_MQ[:, 0], [0.1, 0.3, 0.6], rtol=1e-6)
    # 100 * 10, 300 * 30, 600 * 10 over their sum, 16,000
    per_step = merges.get("tokens").merge(given, options={"per_step": True}).coefficients_MQ[:, 0]
    np.testing.assert_allclose(per_step, np.array([1, 9, 6]) / 16, rtol=1e-6)


@pytest.mark.parametrize("count", [2, 5, 16])
def test_radial_is_the_formula_on_whole_vectors(count):
    """(sum of w |v|) phi(sum of w phi(v)), formed here from the vectors themselves."""
    deltas = [times(1 + m, d) for m, d in enumerate(drawn(count, common=0.2))]
    tokens, steps = np.arange(1, count + 1) * 100, np.arange(count, 0, -1)
    got = result(merges.get("radial").merge(offered(deltas, tokens, steps)), deltas)
    w = tokens * tokens / steps / sum(tokens * tokens / steps)
    for t in TENSORS:
        v = [np.float64(d[t.name]).ravel() for d in deltas]
        if t.role in ("embedding", "head"):
            wanted = sum(w[m] * v[m] for m in range(count))
        else:
            mean = sum(w[m] * v[m] / np.linalg.norm(v[m]) for m in range(count))
            wanted = sum(w[m] * np.linalg.norm(v[m]) for m in range(count)) * mean / np.linalg.norm(mean)
        np.testing.assert_allclose(got[t.name].ravel(), wanted, rtol=2e-5, atol=1e-7)


def test_radial_is_as_long_as_contributions_at_right_angles_are_and_the_mean_is_not():
    """Published: the plain mean of M deltas at right angles is shorter by sqrt(M)."""
    q, deltas = NAMES.index("moe_blocks/moe/down_FD/01"), drawn(16, common=0)
    deltas = [{name: a / np.linalg.norm(a) for name, a in d.items()} for d in deltas]
    length = lambda rule: np.linalg.norm(result(merges.get(rule).merge(offered(deltas)), deltas)[NAMES[q]])
    assert length("radial") == pytest.approx(1, rel=1e-5)
    assert length("mean") == pytest.approx(1 / 4, rel=0.1)


def test_radial_of_what_cancels_is_nothing_and_of_what_nearly_does_is_finite():
    (delta,) = drawn(1)
    for rest, wanted in ((0.0, 0.0), (1e-6, 0.0), (0.1, 1.0)):
        other = {name: np.float32(-a + rest * np.roll(a, 1)) for name, a in delta.items()}
        deltas = [delta, other]
        got = result(merges.get("radial").merge(offered(deltas)), deltas)[NAMES[3]]
        assert np.linalg.norm(got) == pytest.approx(wanted * np.linalg.norm(delta[NAMES[3]]), rel=0.02)


class Reference:
    """The notes on EDiT's code, norm by norm: mean += alpha d; M2 = (1 - alpha) (M2 + alpha d d'); z after the change,
    0 while it decides nothing; the threshold is 3 max(1, deviation of the recent z).
    """

    def __init__(self, decides_from: int):
        self.mean = self.m2 = 0.0
        self.count, self.decides_from, self.recent = 0, decides_from, []

    def z(self, norm: float) -> float:
        return (norm - self.mean) / np.sqrt(self.m2)

    def add(self, norm: float) -> None:
        before = norm - self.mean
        self.mean += 0.02 * before
        self.m2 = 0.98 * (self.m2 + 0.02 * before * (norm - self.mean))
        self.count += 1
        self.recent = [*self.recent, self.z(norm) if self.count > self.decides_from else 0.0][-30:]

    def limit(self) -> float:
        """The largest norm that is none too large."""
        return self.mean + 3 * max(1.0, np.std(self.recent, ddof=1)) * np.sqrt(self.m2)


def test_edit_keeps_the_moments_of_norms_and_weighs_by_their_softmax_and_clips():
    edit, history, reference = merges.get("edit"), {}, Reference(10**6)
    key = "moe_blocks/ffn_norm/scale/00"
    for seed in range(12):
        deltas = drawn(4, seed=seed)
        merged = edit.merge(offered(deltas), history, {"clip": 0.5})
        history = merged.history
        flat = [np.concatenate([np.float64(d[n]).ravel() for n in NAMES[2:4]]) for d in deltas]
        n = np.array([np.linalg.norm(v) for v in flat])
        for norm in n:
            reference.add(norm)
        w = np.exp(-n) / np.exp(-n).sum()
        length = np.linalg.norm(sum(w[m] * flat[m] for m in range(4)))
        np.testing.assert_allclose(merged.coefficients_MQ[:, 2], w * min(1, 0.5 / (length + 1e-6)), rtol=1e-5)
        np.testing.assert_array_equal(merged.coefficients_MQ[:, 2], merged.coefficients_MQ[:, 3])
        assert length > 0.5 and not merged.left_out and not merged.notes
    assert (history[key]["mean"], history[key]["m2"]) == pytest.approx((reference.mean, reference.m2), rel=1e-6)
    assert (history[key]["rounds"], history[key]["count"]) == (12, 48)
    assert set(history) == {NAMES[0], NAMES[1], NAMES[2], NAMES[4]}  # by the first tensor of each layer


@pytest.mark.parametrize("spread, dips", [(0.01, False), (0.5, False), (0.01, True)])
def test_edit_leaves_out_what_is_above_the_limit_and_nothing_below_it(spread, dips):
    """Norms of one layer that are drawn at will, and then one that is a hair below the limit, or above it.

    Where the last norms dip, which makes no outliers, z deviates by more than 1, which raises the limit.
    """
    edit, history, reference = merges.get("edit"), {}, Reference(4 * 9)  # warmup of 10 rounds: from the 37th norm on
    rng, tensors = np.random.default_rng(0), TENSORS[:1]
    of_norms = lambda n: offered(drawn(4))._replace(gram_QMM=np.diag(np.square(n))[None], tensors=tensors)
    options = {"warmup": 10, "direction": False}
    for n in range(60):
        norms = np.abs(1 + spread * rng.standard_normal(4)) * (0.1 if dips and n > 57 else 1)
        norms = np.minimum(norms, 0.999 * reference.limit() if reference.count > 36 else 9)
        history = edit.merge(of_norms(norms), history, options).history
        for norm in norms:
            reference.add(norm)
    assert history["embed_VD"]["count"] == 240 and (np.std(reference.recent, ddof=1) > 1.2) == dips
    assert history["embed_VD"]["recent"] == pytest.approx(reference.recent, rel=1e-6, abs=1e-9)
    for factor, out in ((1 - 1e-6, []), (1 + 1e-6, ["island-02"])):
        norms = np.array([reference.mean] * 4)
        norms[2] = reference.limit() * factor
        assert list(edit.merge(of_norms(norms), history, options).left_out) == out


def test_edits_temperature_divides_norms():
    (delta,) = drawn(1)
    deltas = [delta, times(2, delta)]
    got = merges.get("edit").merge(offered(deltas), options={"temperature": 2.0, "clip": 1e9}).coefficients_MQ[:, 3]
    n = np.linalg.norm([np.linalg.norm(delta[name]) for name in NAMES[2:4]])
    assert got[1] / got[0] == pytest.approx(np.exp(-n / 2), rel=1e-5)


def test_edit_may_weigh_by_steps_too():
    """(1 - r) softmax(-n) + r steps / (sum of steps), over those that are kept."""
    deltas = drawn(3)
    deltas[1] = times(1e4, deltas[1])
    given = offered(deltas, steps=[30, 1, 10])
    merged = lambda ratio: merges.get("edit").merge(given, options={"step_ratio": ratio, "clip": 1e9}).coefficients_MQ
    soft, half, whole = (merged(ratio)[[0, 2]] for ratio in (0, 0.5, 1))
    np.testing.assert_allclose(whole, np.repeat([[0.75], [0.25]], len(TENSORS), 1), rtol=1e-6)
    np.testing.assert_allclose(half, (soft + whole) / 2, rtol=1e-6)


# ---------------------------------------------------------------- what is bad is left out by edit


def after_rounds(rounds: int, count: int = 4, common: float = 1.0, **options) -> dict:
    """The history of honest islands. Three deviations are passed by one normal value of 740, in a layer: no more."""
    history, alarms = {}, 0
    for seed in range(rounds):
        merged = merges.get("edit").merge(offered(drawn(count, common, seed)), history, options)
        assert not merged.left_out, "honest islands were left out"
        history, alarms = merged.history, alarms + len(merged.notes)
    assert alarms <= max(1, 0.01 * rounds * count * len(LAYERS))
    return history


@pytest.mark.parametrize("common", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("count", [3, 4, 8])
def test_honest_islands_are_not_left_out(count, common):
    """Of deltas that are noise alone, at right angles, as of those that agree; before the history decides and after."""
    after_rounds(40, count, common, warmup=10)


@pytest.mark.parametrize("count", [2, 3, 4, 16])
@pytest.mark.parametrize("rounds", [0, 3, 40])
def test_a_contribution_times_1000_is_left_out(count, rounds):
    history = after_rounds(rounds, count, warmup=10)
    deltas = drawn(count, seed=99)
    deltas[1] = times(1000, deltas[1])
    merged = merges.get("edit").merge(offered(deltas), history, {"warmup": 10})
    assert merged.left_out == {"island-01": "its norms are outliers in all of 4 layers"}
    assert not merged.coefficients_MQ[1].any()
    np.testing.assert_allclose(np.delete(merged.coefficients_MQ, 1, 0).sum(0), 1, rtol=1e-6)
    for key, entry in merged.history.items():  # the outlier did not go into it
        assert entry["count"] == (history[key]["count"] if rounds else 0) + count - 1


@pytest.mark.parametrize("rounds", [0, 40])
@pytest.mark.parametrize("count", [4, 8])
@pytest.mark.parametrize("common", [0.6, 2.0])
def test_a_flipped_sign_is_left_out(count, rounds, common):
    history = after_rounds(rounds, count, common, warmup=10)
    deltas = drawn(count, common, seed=99)
    deltas[2] = times(-1, deltas[2])
    merged = merges.get("edit").merge(offered(deltas), history, {"warmup": 10})
    assert list(merged.left_out) == ["island-02"] and "points against the others" in merged.left_out["island-02"]
    kept = merges.get("edit").merge(offered(deltas), history, {"warmup": 10, "direction": False})
    assert not kept.left_out and kept.coefficients_MQ[2].any()


@pytest.mark.parametrize("rounds", [0, 40])
@pytest.mark.parametrize("count", [4, 8])
def test_noise_as_long_as_the_others_is_left_out_where_they_agree(count, rounds):
    history = after_rounds(rounds, count, common=1.0, warmup=10)
    deltas, (noise,) = drawn(count, seed=99), drawn(1, common=0.0, seed=5)
    longer = {name: np.float32(np.linalg.norm(deltas[0][name]) / np.linalg.norm(noise[name])) for name in NAMES}
    deltas[2] = {name: longer[name] * noise[name] for name in NAMES}
    merged = merges.get("edit").merge(offered(deltas), history, {"warmup": 10})
    assert list(merged.left_out) == ["island-02"] and "points nowhere" in merged.left_out["island-02"]


def test_a_contribution_that_is_noisier_than_the_others_is_kept():
    """A tenth of it is what the others agree on: their cosines with each other are near 1, its own are near 0.3."""
    deltas = drawn(4, common=5.0)
    rng = np.random.default_rng(1)
    for name in NAMES:
        scale = 3 * np.linalg.norm(deltas[1][name]) / np.sqrt(deltas[1][name].size)
        deltas[2][name] = np.float32(deltas[1][name] + scale * rng.standard_normal(deltas[1][name].shape))
    merged = merges.get("edit").merge(offered(deltas))
    assert not merged.left_out and not merged.notes


def test_of_two_nobody_can_say_whose_sign_is_flipped():
    deltas = drawn(2)
    deltas[1] = times(-1, deltas[1])
    assert not merges.get("edit").merge(offered(deltas)).left_out


@pytest.mark.parametrize("rounds", [0, 40])
def test_a_flipped_bit_leaves_out_one_layer(rounds):
    history = after_rounds(rounds, warmup=10)
    deltas = drawn(4, seed=99)
    deltas[3][NAMES[4]] = deltas[3][NAMES[4]].copy()
    deltas[3][NAMES[4]].view(np.uint32)[0, 0] ^= 1 << 30  # the highest bit of the exponent
    merged = merges.get("edit").merge(offered(deltas), history, {"warmup": 10})
    assert np.abs(deltas[3][NAMES[4]]).max() > 1e30
    assert not merged.left_out
    assert merged.notes == {"island-03": "its norms are outliers in 1 of 4 layers: moe_blocks/01"}
    assert merged.coefficients_MQ[3].astype(bool).tolist() == [True] * 4 + [False]


def test_small_norms_are_no_outliers_and_do_not_make_others_absurd():
    """An island that joined late made one step of fifty: a fiftieth of the norm, and no less for a step."""
    deltas = drawn(2)
    deltas[0] = times(1 / 50, deltas[0])
    merged = merges.get("edit").merge(offered(deltas, steps=[1, 50], tokens=[100, 5000]))
    assert not merged.left_out and not merged.notes
    deltas = [times(1000, deltas[1]), times(1 / 50, deltas[1])]
    assert set(merges.get("edit").merge(offered(deltas, steps=[50, 1])).left_out) == {"island-00"}


def test_a_contribution_of_zeros_does_not_get_all_the_weight():
    deltas = drawn(3)
    deltas[0] = times(0, deltas[0])
    merged = merges.get("edit").merge(offered(deltas, steps=[0, 10, 10]))
    assert merged.left_out == {"island-00": "it changes nothing"}
    assert not merged.coefficients_MQ[0].any() and merged.coefficients_MQ[1:].sum(0) == pytest.approx(1)


def test_norms_that_have_changed_for_good_are_learned_anew():
    """Else every island would be an outlier for ever, and the outer parameters would never change again."""
    history, left = after_rounds(40, warmup=10), []
    for seed in range(5):
        deltas = [times(50, d) for d in drawn(4, seed=seed)]
        merged = merges.get("edit").merge(offered(deltas), history, {"warmup": 10})
        history = merged.history
        left.append(len(merged.left_out))
    assert left == [4, 4, 4, 0, 0]


def test_rounds_of_outliers_alone_leave_the_outer_parameters_as_they_are():
    history = after_rounds(40, warmup=10)
    merged = merges.get("edit").merge(offered([times(50, d) for d in drawn(4)]), history, {"warmup": 10})
    assert not merged.coefficients_MQ.any()


def test_parts_of_a_layer_in_different_fragments_have_histories_of_their_own():
    deltas, history = drawn(4), {}
    for indices in ([0, 2], [1, 3, 4]):
        whole = offered(deltas)
        part = whole._replace(gram_QMM=whole.gram_QMM[indices], tensors=tuple(TENSORS[q] for q in indices))
        history = merges.get("edit").merge(part, history).history
    assert set(history) == {NAMES[q] for q in (0, 2, 1, 3, 4)}
    assert {entry["rounds"] for entry in history.values()} == {1}


def test_the_options_of_all_rules_begin_with_staleness():
    assert all(issubclass(merges.get(name).options, Options) for name in merges.names())
