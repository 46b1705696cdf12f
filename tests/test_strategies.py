"""What is particular to one strategy: its formula, its options, its state; and the list of all of them.

Letters: B batch, T time, D model, E experts, K choices, G groups of experts.
"""

import dataclasses
import io
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from frugalmoe.catalogue import catalogue, format_table
from frugalmoe.cli import main
from frugalmoe.config import default, override, resolve
from frugalmoe.errors import UserError
from frugalmoe.laws.cases import B, D, T, combine, make_case, make_inputs, make_params, route, selections
from frugalmoe.routing import strategies
from frugalmoe.routing.contract import Inputs, linear_logits
from frugalmoe.routing.strategies import hash as hash_strategy
from frugalmoe.schema import MoE


def logits_of(case, inputs: Inputs) -> np.ndarray:
    return np.asarray(linear_logits(make_params(case)[0], inputs))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# All strategies


def test_names_are_the_files_of_the_folder() -> None:
    files = {path.stem for path in Path(strategies.__file__).parent.glob("*.py")} - {"__init__"}
    assert strategies.names() == tuple(sorted(files))
    assert all(strategies.get(name).name == name for name in files)


def test_a_router_passed_directly_is_returned_as_it_is() -> None:
    router = dataclasses.replace(strategies.get("random"), name="mine")
    assert strategies.get(router) is router


def test_an_unknown_name_is_one_line_with_the_nearest_and_all_names() -> None:
    with pytest.raises(UserError) as error:
        strategies.get("topk_sofmax")
    message = str(error.value)
    assert "\n" not in message and "'topk_sofmax'" in message and "did you mean 'topk_softmax'" in message
    assert all(name in message for name in strategies.names())


def test_the_catalogue_lists_every_strategy_as_json_and_as_a_table() -> None:
    rows = json.loads(json.dumps(catalogue()))
    assert [row["name"] for row in rows] == list(strategies.names())
    assert all(row["paper"] and row["selection"] and row["weights"] and row["balance"] for row in rows)
    text = io.StringIO()
    Console(width=200, file=text).print(format_table(rows))
    assert all(name in text.getvalue() for name in strategies.names())


HALF_WRITTEN = {  # name -> (text, what is said after the file's path)
    "cut_off": ("import jax\n\ndef route(params,\n", ", line 3: SyntaxError: '(' was never closed"),
    "empty": ("", ": ends without ROUTER = Router(...)"),
    "no_router": ("ROUTER = 3\n", ": ends without ROUTER = Router(...)"),
    "wrong_name": ("\nfrom frugalmoe.routing import selekt\n", ", line 2: ImportError: cannot import name 'selekt'"),
    "fails": ("def f():\n    return {}['a']\nf()\n", ", line 2: KeyError: 'a'"),
    "no_utf8": ("x = '\xe9'\n", ", line 1: SyntaxError: (unicode error)"),
    "leaves": ("import sys\nsys.exit()\n", ", line 2: SystemExit"),
    "old_claim": (
        "from frugalmoe.routing.contract import About, Router\nROUTER = Router(about=About(color=1), route=None)\n",
        ", line 2: TypeError: About.__init__() got an unexpected keyword argument 'color'",
    ),
}


@pytest.fixture
def half_written(tmp_path, monkeypatch) -> Path:
    """A folder of strategies beside the package's, of which one leaves a mark when it is imported."""
    for name, (text, _) in HALF_WRITTEN.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="latin-1")
    sound = "from pathlib import Path\nPath(__file__ + '.mark').touch()\n"
    sound += "from frugalmoe.routing.strategies.topk_softmax import ROUTER\n"
    (tmp_path / "marked.py").write_text(sound)
    monkeypatch.setattr(strategies, "__path__", [*strategies.__path__, str(tmp_path)])
    yield tmp_path
    sys.modules.pop("frugalmoe.routing.strategies.marked", None)


def test_files_that_nobody_asks_for_stop_nobody(half_written: Path) -> None:
    """A config of another router, with every kind of loss and a wrapper, resolves; nothing is imported for it."""
    for fields in (
        {},
        {"model.moe.losses.importance": 0.1},
        {"model.moe.router": "relu", "model.moe.losses.l1": 1.0},
        {"model.moe.router": "stochastic_warmup", "model.moe.options.base": "sigmoid_bias"},
    ):
        resolve(override(default(), fields))
    assert not (half_written / "marked.py.mark").exists()
    resolve(override(default(), {"model.moe.router": "marked"}))
    assert (half_written / "marked.py.mark").exists()


def test_a_loss_of_no_sound_strategy_is_refused_with_the_names_of_all_sound_ones(half_written: Path) -> None:
    resolve(override(default(), {"model.moe.losses.orthogonality": 0.1}))  # another strategy's: valid, as ever
    with pytest.raises(UserError, match=r"losses\.orthogonalty: unknown loss; did you mean 'orthogonality'\?"):
        resolve(override(default(), {"model.moe.losses.orthogonalty": 0.1}))


@pytest.mark.parametrize("name", HALF_WRITTEN)
def test_a_half_written_file_is_named_in_one_line(half_written: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(override(default(), {"model.moe.router": name}))
    assert str(caught.value).startswith(f"model.moe.router={name!r}: {half_written / name}.py{HALF_WRITTEN[name][1]}")
    assert "\n" not in str(caught.value)


def test_the_command_lists_the_others_and_names_each_broken_file(half_written: Path, capsys) -> None:
    assert main(["routers", "--format=json"]) == 0
    out, err = capsys.readouterr()
    assert {row["name"] for row in json.loads(out)} == set(strategies.names()) - HALF_WRITTEN.keys()
    assert len(err.splitlines()) == len(HALF_WRITTEN)
    assert all(f"{half_written / name}.py" in err for name in HALF_WRITTEN)


def test_loss_names_are_those_that_some_strategy_returns() -> None:
    assert set(strategies.loss_names()) >= {"load_balance", "sequence_balance", "z"}


REFUSED = [
    ("topk_softmax", 1, {}, "no gradient"),
    ("topk_softmax", 1, {"softmax": "after"}, "no gradient"),
    ("topk_softmax", 2, {"softmax": "afer"}, "did you mean 'after'"),
    ("topk_softmax", 2, {"softmax": "after", "renormalize": False}, "renormalize=False"),
    ("topk_softmax", 2, {"scale": 0.0}, "scale=0.0"),
    ("switch_top1", 2, {}, "num_experts_per_token=2"),
    ("switch_top1", 1, {"jitter": -0.1}, "jitter=-0.1"),
    ("sigmoid_bias", 1, {}, "no gradient"),
    ("sigmoid_bias", 2, {"num_groups": 3}, "num_groups=3"),
    ("sigmoid_bias", 2, {"num_groups": 2, "groups_per_token": 3}, "groups_per_token=3"),
    ("sigmoid_bias", 3, {"num_groups": 4, "groups_per_token": 1}, "num_experts_per_token=3"),
    ("sigmoid_bias", 2, {"update": "signs"}, "did you mean 'sign'"),
    ("sigmoid_bias", 2, {"update_rate": float("nan")}, "update_rate=nan"),
    ("expert_choice", 2, {"capacity_factor": 0.0}, "capacity_factor=0.0"),
    ("hash", 2, {"gate": "unity"}, "did you mean 'unit'"),
    ("hash", 1, {"gate": "learned"}, "no gradient"),
]


@pytest.mark.parametrize(("name", "k", "options", "message"), REFUSED)
def test_a_bad_option_is_refused_in_one_line(name: str, k: int, options: dict, message: str) -> None:
    case = make_case(name, 8, k, **options)
    rule = case.router.check(case.config)
    assert message in rule and "\n" not in rule


# Limits


@pytest.mark.parametrize(
    ("name", "options"),
    [("topk_softmax", {}), ("topk_softmax", {"softmax": "after"}), ("topk_softmax", {"renormalize": False})],
)
def test_all_experts_selected_is_the_dense_softmax_mixture(name: str, options: dict) -> None:
    case = make_case(name, 4, 4, **options)
    inputs = make_inputs(padded=False)
    routing = route(case, inputs)
    np.testing.assert_allclose(combine(case, routing), softmax(logits_of(case, inputs)), rtol=1e-5)
    assert routing.stats["ties"] == 0


@pytest.mark.parametrize("name", ["switch_top1", "hash", "random", "expert_choice"])
def test_one_expert_takes_every_token_with_weight_one(name: str) -> None:
    case = make_case(name, 1, 1)
    np.testing.assert_array_equal(combine(case, route(case, make_inputs(padded=False))), np.ones((B, T, 1)))


def test_a_single_token_is_routed() -> None:
    inputs = make_inputs(padded=False)
    for name in ("topk_softmax", "sigmoid_bias", "expert_choice"):
        case = make_case(name)
        routing = route(case, inputs.of_tokens(lambda a: a[:, :1]))
        assert np.all(np.isfinite(routing.plan.weights)) and routing.stats["assigned"] > 0


# topk_softmax and switch_top1


def test_softmax_after_equals_before_and_renormalized() -> None:
    cases = make_case("topk_softmax", softmax="after"), make_case("topk_softmax", renormalize=True)
    np.testing.assert_allclose(*(combine(case, route(case, make_inputs())) for case in cases), rtol=1e-6)


def test_topk_weights_are_the_largest_probabilities() -> None:
    case, inputs = make_case("topk_softmax", renormalize=False, scale=2.0), make_inputs(padded=False)
    p_BTE = softmax(logits_of(case, inputs))
    cut_BT1 = np.sort(p_BTE, axis=-1)[..., -2:-1]
    np.testing.assert_allclose(combine(case, route(case, inputs)), np.where(p_BTE >= cut_BT1, 2 * p_BTE, 0), rtol=1e-5)


def test_switch_weights_are_the_largest_probability_and_jitter_is_for_training_alone() -> None:
    plain, jittered = make_case("switch_top1", 8, 1), make_case("switch_top1", 8, 1, jitter=0.5)
    inputs = make_inputs(padded=False, train=False)
    g_BTE = combine(plain, route(plain, inputs))
    np.testing.assert_allclose(g_BTE.sum(-1), softmax(logits_of(plain, inputs)).max(-1), rtol=1e-5)
    np.testing.assert_array_equal(combine(jittered, route(jittered, inputs)), g_BTE)
    assert np.any(combine(jittered, route(jittered, inputs._replace(train=True))) != g_BTE)


# sigmoid_bias


def test_bias_steers_the_selection_and_never_the_weights() -> None:
    """Weights are s / sum of s over the selected, whatever the bias; here by hand."""
    case, inputs = make_case("sigmoid_bias", scale=2.5), make_inputs(padded=False)
    bias_E = np.linspace(-0.4, 0.4, 8).astype(np.float32)
    s_BTE = 1 / (1 + np.exp(-logits_of(case, inputs)))
    cut_BT1 = np.sort(s_BTE + bias_E, axis=-1)[..., -2:-1]
    kept_BTE = np.where(s_BTE + bias_E >= cut_BT1, s_BTE, 0)
    routing = route(case, inputs, state={"bias_E": jnp.asarray(bias_E)})
    np.testing.assert_allclose(combine(case, routing), 2.5 * kept_BTE / kept_BTE.sum(-1, keepdims=True), rtol=1e-5)
    unsteered = route(case, inputs, state={"bias_E": jnp.zeros(8)})
    assert np.any(selections(case, routing) != selections(case, unsteered))
    same_bias = route(case, inputs, state={"bias_E": jnp.full(8, 0.3)})
    np.testing.assert_array_equal(combine(case, same_bias), combine(case, unsteered))


def test_probabilities_are_normalized_scores_not_a_softmax_of_scores() -> None:
    case, inputs = make_case("sigmoid_bias"), make_inputs(padded=False)
    s_BTE = 1 / (1 + np.exp(-logits_of(case, inputs)))
    expected = (s_BTE / s_BTE.sum(-1, keepdims=True)).sum((0, 1))
    np.testing.assert_allclose(route(case, inputs).stats["prob_sum"], expected, rtol=1e-5)


def test_groups_limit_the_selection_to_the_best_groups_by_their_two_best_experts() -> None:
    case = make_case("sigmoid_bias", num_groups=4, groups_per_token=1)
    inputs = make_inputs(padded=False)
    s_BTGe = (1 / (1 + np.exp(-logits_of(case, inputs)))).reshape(B, T, 4, 2)
    best_BT = s_BTGe.sum(-1).argmax(-1)  # groups of two: the sum of the top two is the sum
    chosen_BTGe = selections(case, route(case, inputs, state={"bias_E": jnp.zeros(8)})).reshape(B, T, 4, 2)
    np.testing.assert_array_equal(chosen_BTGe.sum(-1), 2 * np.eye(4, dtype=int)[best_BT])


def test_masked_groups_never_win_over_negative_biased_scores() -> None:
    """A mask by 0 would let masked experts win here: all biased scores are below 0."""
    case = make_case("sigmoid_bias", num_groups=4, groups_per_token=2)
    chosen = selections(case, route(case, make_inputs(padded=False), state={"bias_E": jnp.full(8, -3.0)}))
    plain = selections(case, route(case, make_inputs(padded=False), state={"bias_E": jnp.zeros(8)}))
    np.testing.assert_array_equal(chosen, plain)
    assert np.all(np.any(chosen.reshape(B, T, 4, 2), axis=-1).sum(-1) <= 2)


def test_all_groups_is_plain_top_k() -> None:
    grouped, plain = make_case("sigmoid_bias", num_groups=4, groups_per_token=4), make_case("sigmoid_bias")
    np.testing.assert_array_equal(*(combine(case, route(case, make_inputs())) for case in (grouped, plain)))


def test_a_tie_between_groups_is_counted() -> None:
    case = make_case("sigmoid_bias", num_groups=4, groups_per_token=1)
    state = {"bias_E": jnp.asarray([0.2, 0.1] * 4)}  # every group alike, no tie inside a group
    inputs = make_inputs()._replace(x_BTD=jnp.zeros((B, T, D)))
    assert route(case, inputs, state=state).stats["ties"] == 14


def test_sign_update_by_hand() -> None:
    case = make_case("sigmoid_bias", 4, 2, update_rate=0.5)
    state = {"bias_E": jnp.asarray([0.0, 1.0, 0.0, 0.0])}
    moved = case.router.update(state, {"counts": jnp.asarray([4, 10, 6, 0])}, case.config)["bias_E"]
    np.testing.assert_allclose(moved, [0.5, 0.5, -0.5, 0.5])  # mean 5: below +, above -
    still = case.router.update(state, {"counts": jnp.asarray([5, 5, 5, 5])}, case.config)["bias_E"]
    np.testing.assert_array_equal(still, state["bias_E"])


def test_zero_mean_update_keeps_the_mean_and_routes_as_the_sign_update() -> None:
    sign, centred = (make_case("sigmoid_bias", 4, 2, update=u, update_rate=0.1) for u in ("sign", "zero_mean"))
    a = b = {"bias_E": jnp.zeros(4)}
    for counts in ([4, 10, 6, 0], [9, 9, 1, 1], [0, 0, 0, 20]):
        a, b = (c.router.update(s, {"counts": jnp.asarray(counts)}, c.config) for c, s in ((sign, a), (centred, b)))
        np.testing.assert_allclose(b["bias_E"].mean(), 0, atol=1e-7)
        np.testing.assert_allclose(b["bias_E"], a["bias_E"] - a["bias_E"].mean(), atol=1e-6)


@pytest.mark.parametrize("update", ["sign", "zero_mean", "proportional", "momentum"])
def test_the_update_moves_a_skewed_load_to_uniform(update: str) -> None:
    """Logits with a different mean per expert: from a max violation of some units to near the rate's step."""
    case = make_case("sigmoid_bias", 8, 2, update=update, update_rate=1e-2)
    rng = np.random.default_rng(0)
    x_BTD = rng.normal(size=(4, 128, 8)) + np.linspace(-1.5, 1.5, 8)
    ones = jnp.ones((4, 128), jnp.int32)
    inputs = Inputs(jnp.asarray(x_BTD, jnp.float32), ones, ones, ones, None, None, None)

    @jax.jit
    def step(state: dict) -> tuple[dict, jax.Array]:
        counts = case.router.route({"kernel_DE": jnp.eye(8)}, state, inputs, case.config).stats["counts"]
        return case.router.update(state, {"counts": counts}, case.config), counts.max() / counts.mean() - 1

    state, violations = case.router.init_state(D, case.config), []
    for _ in range(100):
        state, violation = step(state)
        violations.append(float(violation))
    assert violations[0] > 1 and max(violations[-10:]) < 0.2


# expert_choice


@pytest.mark.parametrize(("k", "factor", "slots"), [(1, 1.0, 1), (2, 1.0, 2), (2, 1.3, 3), (8, 1.0, 8), (8, 2.0, 8)])
def test_every_expert_takes_its_c_best_tokens_of_each_sequence(k: int, factor: float, slots: int) -> None:
    """C = ceil(factor * T * K / E) with T = E = 8, at most T."""
    case, inputs = make_case("expert_choice", 8, k, capacity_factor=factor), make_inputs(padded=False)
    p_BTE = softmax(logits_of(case, inputs))
    cut_B1E = np.sort(p_BTE, axis=1)[:, -slots][:, None]
    np.testing.assert_allclose(combine(case, route(case, inputs)), np.where(p_BTE >= cut_B1E, p_BTE, 0), rtol=1e-5)


# hash and random


def test_hash_looks_at_the_token_id_the_layer_and_the_seed_alone() -> None:
    case, inputs = make_case("hash"), make_inputs(padded=False)
    chosen_BTE, ids_BT = selections(case, route(case, inputs)), np.asarray(inputs.token_ids_BT)
    for token in np.unique(ids_BT):
        assert len(np.unique(chosen_BTE[ids_BT == token], axis=0)) == 1
    elsewhere = inputs._replace(x_BTD=-inputs.x_BTD, positions_BT=inputs.positions_BT + 3, step=jnp.int32(5))
    assert np.array_equal(chosen_BTE, selections(case, route(case, elsewhere)))
    assert not np.array_equal(chosen_BTE, selections(case, route(case, inputs._replace(layer=jnp.int32(1)))))
    reseeded = make_case("hash", seed=1)
    assert not np.array_equal(chosen_BTE, selections(reseeded, route(reseeded, inputs)))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("seed", [0, 7])
def test_hash_is_balanced_and_independent_over_a_vocabulary(layer: int, seed: int) -> None:
    """Over 32,768 ids: each expert, and each pair of experts, has its share within 5 standard deviations."""
    ids, num_experts, k = jnp.arange(32768), 8, 2
    tickets = np.asarray(hash_strategy.tickets(ids, jnp.int32(layer), seed, num_experts))
    chosen = np.argsort(-tickets, axis=-1)[:, :k]
    counts = np.bincount(chosen.ravel(), minlength=num_experts)
    share = k / num_experts
    assert np.all(np.abs(counts - share * len(ids)) < 5 * np.sqrt(len(ids) * share * (1 - share)))
    pairs = np.bincount(chosen.min(-1) * num_experts + chosen.max(-1), minlength=num_experts**2)
    share = 1 / 28  # 8 choose 2
    assert np.count_nonzero(pairs) == 28
    assert np.all(np.abs(pairs[pairs > 0] - share * len(ids)) < 5 * np.sqrt(len(ids) * share * (1 - share)))


def test_hash_with_a_learned_gate_has_the_experts_of_the_unit_gate() -> None:
    unit, learned = make_case("hash"), make_case("hash", gate="learned")
    np.testing.assert_array_equal(*(selections(case, route(case, make_inputs())) for case in (unit, learned)))


def test_random_experts_are_uniform_and_distinct() -> None:
    """1,024 tokens of 2 experts out of 4: each expert within 5 standard deviations of half the tokens."""
    case, time = make_case("random", 4, 2), 1024
    ones, positions = jnp.ones((1, time), jnp.int32), jnp.arange(time, dtype=jnp.int32)[None]
    keys = jax.random.split(jax.random.key(0), 1)
    inputs = Inputs(jnp.zeros((1, time, D)), ones, ones, positions, keys, jnp.int32(0), jnp.int32(0), True)
    routing = route(case, inputs)
    counts, experts = np.asarray(routing.stats["counts"]), np.asarray(routing.plan.expert_NK)
    assert np.all(experts[:, 0] != experts[:, 1])
    assert np.all(np.abs(counts - time / 2) < 5 * np.sqrt(time / 4))
    assert np.all(np.asarray(routing.plan.weight_NK) == 0.5)


def test_packed_documents_at_equal_positions_draw_apart() -> None:
    case = make_case("random")
    inputs = make_inputs()  # row 0: positions 0, 1, 2 of document 1, then of document 2
    chosen = selections(case, route(case, inputs))[0]
    assert not np.array_equal(chosen[:3], chosen[3:6])


def test_options_are_hashable_so_that_a_config_is() -> None:
    for name in strategies.names():
        assert isinstance(hash(MoE(options=strategies.get(name).options())), int)
