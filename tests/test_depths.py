"""Mixture of depths against its definition, token by token, and the claims of `depths.ABOUT`.

Letters: B sequences, T tokens, C slots of the tokens that pass, D model, L layers, E experts.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runs import rows, tiny, write_text
from test_train_step import DEPTHS, EVERY_LOSS, batch, config_of, largest_difference, mesh_of, trained

from frugalmoe import sharding
from frugalmoe.ablate.results import final_metrics, known_metrics
from frugalmoe.analysis import load_run
from frugalmoe.analysis.pages.table import headline_rows
from frugalmoe.data import Batch
from frugalmoe.generate import Sampling, sample_text, stream
from frugalmoe.model import depths, pattern
from frugalmoe.model.block import Block, Place, Stream, prepare
from frugalmoe.model.moe import Context
from frugalmoe.model.transformer import Transformer
from frugalmoe.schema import Model
from frugalmoe.train.loop import train
from frugalmoe.train.objective import knobs, without_knobs
from frugalmoe.train.placing import put_batch
from frugalmoe.train.step import init, make_eval_step, make_train_step
from frugalmoe.train.weights import load_model

B, T, D = 3, 12, 32
CAPACITY = {"model.mixture_of_depths.capacity": 0.3}
PADDED_BT = np.array([[1] * 12, [1] * 5 + [2] * 7, [1] * 4 + [2] * 3 + [0] * 5])


def model_of(**fields) -> Model:
    return config_of(CAPACITY | {f"model.{k}": v for k, v in fields.items()}).model


def context_of(seed: int, segment_ids_BT: np.ndarray = PADDED_BT, train: bool = True) -> Context:
    """Random tokens; positions count from the start of each document."""
    tokens = np.random.default_rng(seed).integers(0, 64, segment_ids_BT.shape)
    same = segment_ids_BT[:, :, None] == segment_ids_BT[:, None]
    position_BT = np.tril(same, -1).sum(-1)
    arrays = [sharding.put(mesh_of(), a.astype(np.int32), "BT") for a in (tokens, segment_ids_BT, position_BT)]
    keys_B = sharding.put(mesh_of(), jax.random.split(jax.random.key(0), len(tokens)), "B")
    return Context(*arrays, keys_B, jnp.int32(0), train)


class OneBlock:
    """A routed MoE block with random weights, and what goes into it."""

    def __init__(self):
        self.config = config = model_of()
        self.kind = pattern.BlockKind("grouped", "moe", pattern.DEPTHS)
        self.block = Block(jax.random.key(0), config, self.kind)
        self.depth = depths.Depth(jax.random.key(1), config)
        self.x_BTD = np.random.default_rng(2).normal(size=(B, T, D)).astype(np.float32)

    def through(self, depth: depths.Depth, x_BTD: jax.Array, train: bool) -> tuple:
        context, branches = context_of(0, train=train), functools.partial(self.block.parts.branches, self.kind)
        return depth(branches, Stream(x_BTD), context, self.prepared(context), Place(jnp.int32(0)))

    def prepared(self, context: Context):
        return prepare(context.positions_BT, self.config, ("grouped",))

    def passes(self, train: bool) -> np.ndarray:
        """bool [B, T], by sorting in numpy."""
        if not train:
            return (np.asarray(self.depth.scores(self.x_BTD)[1]) > 0) & (PADDED_BT > 0)
        passes_BT = np.zeros((B, T), bool)
        for row, r_T in enumerate(self.x_BTD @ np.asarray(self.depth.router_D)):
            real = np.flatnonzero(PADDED_BT[row])
            best = real[np.argsort(-r_T[real])][: int(np.ceil(0.3 * len(real)))]
            passes_BT[row, best] = True
        return passes_BT


@pytest.fixture(scope="module")
def one():
    with jax.set_mesh(mesh_of()):
        yield OneBlock()


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def test_a_block_equals_its_definition_sequence_by_sequence(one, train):
    """y = x + r * (block(x) - x), where the block saw the tokens that pass as if the others did not exist."""
    run = jax.jit(functools.partial(one.through, one.depth, train=train))
    (y_BTD, _), routed, _, report = jax.device_get(run(sharding.put(mesh_of(), one.x_BTD, "BTD")))
    passes_BT = one.passes(train)
    whole = context_of(0)
    expected_BTD, counts = one.x_BTD.copy(), 0

    @jax.jit
    def alone(x_BTD, *seen):
        context = Context(*seen, whole.keys_B[:1], whole.step, train)
        passed = one.block(Stream(x_BTD), context, one.prepared(context), Place(jnp.int32(0)))
        return passed.stream.x_BTD, passed.routed

    for row in range(B):
        at = np.flatnonzero(passes_BT[row])
        slots = np.zeros(T, int)
        slots[: len(at)] = at
        real = np.arange(T) < len(at)  # so that one program does for all rows
        seen = [np.where(real, np.asarray(a)[row, slots], 0)[None] for a in whole[:3]]
        x_1TD = one.x_BTD[row, slots][None]
        added_TD, of_row = jax.device_get(alone(*(sharding.put(mesh_of(), a, "BT") for a in (x_1TD, *seen))))
        r_T = one.x_BTD[row] @ np.asarray(one.depth.router_D)
        expected_BTD[row, at] += (r_T[slots, None] * (added_TD[0] - x_1TD[0]))[: len(at)]
        counts = counts + of_row.stats["counts"]
    assert 0 < passes_BT.sum() < (PADDED_BT > 0).sum()
    np.testing.assert_allclose(y_BTD, expected_BTD, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(y_BTD[~passes_BT], one.x_BTD[~passes_BT])
    np.testing.assert_array_equal(routed.stats["counts"], counts)
    assert report.stats["passed"] == routed.stats["tokens"] == passes_BT.sum()


def test_exactly_the_best_pass_in_order_and_padding_never():
    r_BT = jnp.array([[0.1, 0.9, 0.3, 0.8, -0.2, 0.7, 0.0, 0.2], [0.5, 0.1, 0.4, 9.0, 9.0, 9.0, 9.0, 9.0]])
    valid_BT = jnp.array([[True] * 8, [True] * 3 + [False] * 5])
    logit_BT = jnp.array([[-1.0, 2.0, 1.0, -1.0, -1.0, -1.0, -1.0, -1.0], [-1.0, -1.0, 1.0, 5.0, 5.0, 5.0, 5.0, 5.0]])
    token_BC, count_B, report = depths.choose(r_BT, logit_BT, valid_BT, 0.3, train=True)
    # ceil(0.3 * 8) = 3 of the first row: 0.9, 0.8, 0.7; ceil(0.3 * 3) = 1 of the second: 0.5. 8 is no token.
    np.testing.assert_array_equal(token_BC, [[1, 3, 5], [0, 8, 8]])
    np.testing.assert_array_equal(count_B, [3, 1])
    # The predictor says 1, 2 | 2. It is wrong about 2, 3, 5 | 0, 2: right about 6 of 11.
    assert report.stats == {"tokens": 11, "passed": 4, "told": 6}
    wrong, right = np.log1p(np.exp([1.0, 1.0, 1.0, 1.0, 1.0])).sum(), np.log1p(np.exp([-1.0] * 5 + [-2.0])).sum()
    np.testing.assert_allclose(report.losses["depth_predictor"].sum, wrong + right, rtol=1e-6)
    token_BT, count_B, report = depths.choose(r_BT, logit_BT, valid_BT, 0.3, train=False)
    np.testing.assert_array_equal(token_BT[:, :3], [[1, 2, 8], [2, 8, 8]])
    assert (count_B.tolist(), report.stats["told"]) == ([2, 1], 6)


def test_all_pass_at_capacity_one():
    valid_BT = jnp.arange(7) < jnp.array([[7], [5]])
    r_BT = jax.random.normal(jax.random.key(0), (2, 7))
    token_BC, count_B, _ = depths.choose(r_BT, r_BT, valid_BT, 1.0, train=True)
    np.testing.assert_array_equal(token_BC, [range(7), [0, 1, 2, 3, 4, 7, 7]])
    np.testing.assert_array_equal(count_B, [7, 5])


def test_the_output_trains_the_router_and_the_cross_entropy_the_predictor_alone(one):
    """For one block d(sum g y)/dw = sum over passing t of (g_t . f_t) x_t, where f = (y - x) / r is what it adds."""
    g_BTD = jax.random.normal(jax.random.key(5), (B, T, D))
    graphdef, depth = nnx.split(one.depth)

    def of_output(depth, x_BTD):
        y_BTD = one.through(nnx.merge(graphdef, depth), x_BTD, train=True).stream.x_BTD
        return jnp.sum(y_BTD * g_BTD), y_BTD

    def of_predictor(depth, x_BTD):
        report = one.through(nnx.merge(graphdef, depth), x_BTD, train=True).report
        return report.losses["depth_predictor"].sum

    x_BTD = sharding.put(mesh_of(), one.x_BTD, "BTD")
    (_, y_BTD), (gradient, _) = jax.jit(jax.value_and_grad(of_output, (0, 1), has_aux=True))(depth, x_BTD)
    gradient = nnx.to_pure_dict(gradient)
    passes_BT = one.passes(train=True)
    r_BT = one.x_BTD @ np.asarray(one.depth.router_D)
    slope_BT = np.sum(np.asarray(g_BTD) * (np.asarray(y_BTD) - one.x_BTD), axis=-1) / r_BT * passes_BT
    np.testing.assert_allclose(gradient["router_D"], np.einsum("bt,btd->d", slope_BT, one.x_BTD), rtol=1e-3, atol=1e-3)
    assert np.abs(gradient["router_D"]).max() > 0.1
    assert all(np.all(gradient[name] == 0) for name in ("up_DP", "out_P", "bias"))

    gradient, x_gradient = jax.jit(jax.grad(of_predictor, (0, 1)))(depth, x_BTD)
    gradient = nnx.to_pure_dict(gradient)
    assert np.all(x_gradient == 0) and np.all(gradient["router_D"] == 0)
    assert all(np.abs(gradient[name]).max() > 1e-3 for name in ("up_DP", "out_P", "bias"))


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def test_later_tokens_change_earlier_ones_where_a_leak_is_declared_and_nowhere_else(train):
    config = model_of(init_std=0.2)
    claim = depths.ABOUT.causal if train else depths.ABOUT.causal_in_evaluation
    with jax.set_mesh(mesh_of()):
        model = Transformer(config, jax.random.key(0))
        whole = context_of(0, np.ones((B, T), int), train)
        hidden = jax.jit(lambda tokens_BT: model(whole._replace(token_ids_BT=tokens_BT)).hidden_BTD)
        changes = []
        for seed in range(4):
            here, there = (context_of(s).token_ids_BT for s in (seed, seed + 100))
            for cut in (3, 7):
                moved = jnp.where(jnp.arange(T) >= cut, there, here)
                before, after = (np.asarray(hidden(tokens_BT))[:, :cut] for tokens_BT in (here, moved))
                changes.append(np.abs(before - after).max())
        assert (max(changes) > 1e-2) == (claim == "leak")
        assert claim == "leak" or max(changes) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "every, moe_every, routed",
    [(2, 1, [1, 4, 6]), (4, 1, [6]), (1, 1, [0, 1, 2, 3, 4, 5, 6]), (2, 2, [1, 3, 6]), (1, 3, [0, 1, 2, 3, 4, 5, 6])],
)
def test_scanned_layers_equal_one_after_the_other(every, moe_every, routed):
    """3 dense blocks, 4 of which some are MoE: groups, and what is left over; statistics in the order of the layers."""
    config = model_of(num_layers=7, num_dense_layers=3, moe_every=moe_every, **{"mixture_of_depths.every": every})
    assert pattern.wrapped_layers(config) == routed
    with jax.set_mesh(mesh_of()):
        model, context = Transformer(config, jax.random.key(0)), context_of(1)
        out = jax.jit(lambda: model(context))()

        @jax.jit
        def one_by_one():
            stream = Stream(model.embed_VD.at[context.token_ids_BT].get(out_sharding=sharding.spec("BTD")))
            prepared = prepare(context.positions_BT, config, ("grouped",))
            counts, reports, before = [], [], collections.Counter()
            for layer, kind in enumerate(pattern.layers(config)):
                index = before[kind.feed_forward]
                before[kind.feed_forward] += 1
                blocks = getattr(model, f"{kind.feed_forward}_blocks")
                block = jax.tree.map(lambda a, i=index: a[i], blocks)
                rest = (context, prepared, Place(jnp.int32(index)))
                if layer in routed:
                    depths_of = getattr(model, f"{kind.feed_forward}_depths")
                    depth = jax.tree.map(lambda a, i=index: a[i // every], depths_of)
                    passed = depth(functools.partial(block.parts.branches, kind), stream, *rest)
                    reports.append(passed.report)
                else:
                    passed = block(stream, *rest)
                stream = passed.stream
                counts += [passed.routed.stats["counts"]] if passed.routed else []
            return model.final_norm(stream.x_BTD), jnp.stack(counts), jax.tree.map(lambda *a: jnp.stack(a), *reports)

        hidden_BTD, counts_LE, reports = one_by_one()
    np.testing.assert_allclose(out.hidden_BTD, hidden_BTD, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out.routed.stats["counts"], counts_LE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), out.depths, reports)


@pytest.mark.slow
def test_a_trace_says_that_tokens_that_skip_have_no_expert():
    config = config_of(CAPACITY | {"model.init_std": 0.2})
    with jax.set_mesh(mesh_of()):
        state, evaluate = init(config), jax.jit(make_eval_step(config, trace=True))
        out = jax.device_get(evaluate(state.params, state.router_state, put_batch(mesh_of(), batch(0), "BT")))
    valid_BT = batch(0).segment_ids_BT > 0
    experts_LBT = out.selected_LBTE.sum(-1)
    assert (experts_LBT[0] == 2 * valid_BT).all(), "the block before lets all pass"
    assert np.unique(experts_LBT[1]).tolist() == [0, 2] and (experts_LBT[1][~valid_BT] == 0).all()
    assert (experts_LBT[1] > 0).sum() == out.depths["passed"][0] == out.stats["tokens"][1] < valid_BT.sum()
    np.testing.assert_array_equal((out.plan.expert_NK < 8).sum(-1), experts_LBT)
    np.testing.assert_array_equal(out.plan.weight_NK.sum(-1) > 0, experts_LBT > 0)


@pytest.mark.slow
def test_a_run_logs_saves_samples_and_is_compared(tmp_path):
    config = tiny(write_text(tmp_path / "text"), tmp_path / "cache", CAPACITY | {"checkpoint.every_steps": 8})
    summary, run = train(config, tmp_path / "run", sample=sample_text), tmp_path / "run"
    shares = [row["depth/share/layer_02"] for row in rows(run) if "loss/ce" in row]
    assert len(shares) == 12 and min(shares) == max(shares) == pytest.approx(10 / 32)  # ceil(0.3 * 32)
    said = summary["mixture_of_depths"]
    assert (said["causal"], said["causal_in_evaluation"]) == ("leak", "safe") and said["layers"].keys() == {"layer_02"}
    assert "leak; safe in evaluation" in dict(headline_rows(load_run(run)))["mixture of depths"]
    described = {"forward_flops": {"arm": {"routed experts": 1.0}}, "experts_per_token": {"arm": 2}}
    found = final_metrics(summary, [], described | {"tokens_per_step": 256}, "arm")
    assert {f"depth/{name}": v for name, v in said["layers"]["layer_02"].items()}.items() <= found.items()
    assert found.keys() <= set(known_metrics(summary["domains"]))
    restored, weights, tokenizer, mesh = load_model(run)
    with jax.set_mesh(mesh):
        assert "".join(stream(restored, weights, tokenizer, "The ", Sampling())) == summary["sample"]["text"]


@pytest.mark.slow
def test_runs_trained_at_once_are_the_runs():
    """Two seeds under `jax.vmap`, as a study trains them on an accelerator; the first is that of the other laws."""
    fields = DEPTHS | EVERY_LOSS
    configs = [config_of(fields | {"train.seed": seed}) for seed in (0, 1)]
    stacked = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    with jax.set_mesh(mesh_of()):
        step = jax.jit(jax.vmap(make_train_step(without_knobs(configs[0]))))
        state, of_runs = stacked(map(init, configs)), stacked(map(knobs, configs))
        for i in range(2):
            data = put_batch(mesh_of(), Batch(*(np.stack([a[None]] * 2) for a in batch(i))), ".ABT")
            state, metrics = step(state, data, of_runs)
    alone, alone_metrics = trained(fields)
    together, together_metrics = jax.tree.map(lambda a: a[0], jax.device_get((state, metrics)))
    assert largest_difference(alone.params, together.params) < 1e-4
    assert largest_difference(alone_metrics[1], together_metrics) < 2e-4
    assert largest_difference(*(np.asarray(a) for a in metrics.depths["depth/predictor_accuracy"])) > 0


@pytest.mark.slow
def test_other_parameters_start_as_without_it():
    """So that arms with and without it are paired."""
    with_it, without = (structure_of(fields) for fields in (CAPACITY, {"model.mixture_of_depths.capacity": 0.0}))
    assert with_it.keys() - without.keys() == {"moe_depths"}
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, ({k: with_it[k] for k in without}, without))))


def structure_of(fields: dict) -> dict:
    return init(config_of(fields)).params
