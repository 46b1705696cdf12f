"""Laws of the train step: accumulation, remat, scan-free evaluation, router state, one compilation.

Letters: A micro-batches, B sequences, T tokens, L layers, E experts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import TINY

from frugalmoe import sharding
from frugalmoe.config import default, override, resolve
from frugalmoe.data import Batch
from frugalmoe.errors import UserError
from frugalmoe.model import pattern
from frugalmoe.routing import strategies
from frugalmoe.schema import MoE
from frugalmoe.train import objective
from frugalmoe.train.objective import knobs, without_knobs
from frugalmoe.train.placing import put_batch
from frugalmoe.train.program import compiled_train_step
from frugalmoe.train.step import abstract, init, make_eval_step, make_gradient, make_train_step

# Adam with a small eps forgets the gradient's size and blows rounding up where a gradient is near zero. With eps near a
# typical gradient the new parameters show both a wrong scale and nothing else.
SMALL = TINY | {"model.vocab_size": 64, "train.steps": 8, "optim.warmup_steps": 2, "optim.eps": 1e-2}
STATEFUL = {
    "model.moe.router": "sigmoid_bias",
    "model.moe.options.num_groups": 4,
    "model.moe.options.groups_per_token": 2,
}


def config_of(overrides=()):
    return resolve(override(default(), SMALL | dict(overrides)))


def batch(seed: int, B: int = 8, T: int = 32, V: int = 64) -> Batch:
    """Rows of two documents, the last row with padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    cut = rng.integers(4, T - 4, B)
    index = np.arange(T)
    second = index[None] >= cut[:, None]
    segments = np.where(second, 2, 1).astype(np.int32)
    segments[-1, T // 2 :] = 0
    positions = np.where(second, index - cut[:, None], index).astype(np.int32)
    following = np.concatenate([segments[:, 1:], np.zeros((B, 1), np.int32)], axis=1)
    mask = (segments > 0) & (segments == following)
    return Batch(tokens[:, :-1], tokens[:, 1:], segments, positions, mask, np.zeros((B, T), np.int32))


def mesh_of(devices: int = 1):
    return sharding.make_mesh({"data": devices, "fsdp": 1, "expert": 1, "tensor": 1, "context": 1})


@functools.cache
def run(steps: int, **overrides):
    """State after some steps and the metrics of each; the same run is made once."""
    config = config_of({name.replace("__", "."): value for name, value in overrides.items()})
    mesh, a = mesh_of(), config.train.accumulate_steps
    with jax.set_mesh(mesh):
        state, step, metrics = init(config), jax.jit(make_train_step(config), donate_argnums=0), []
        for i in range(steps):
            split = Batch(*(x.reshape(a, -1, *x.shape[1:]) for x in batch(i)))
            state, m = step(state, put_batch(mesh, split, "ABT"))
            metrics.append(jax.device_get(m))
        assert step._cache_size() == 1, "compiled once"
    return jax.device_get(state), metrics


def trained(overrides, steps: int = 2):
    return run(steps, **{name.replace(".", "__"): value for name, value in overrides.items()})


def largest_difference(a, b) -> float:
    """Largest absolute difference of any leaf, as a share of that leaf's largest value; equal infinities have none."""
    a, b = (jax.tree.map(lambda x: np.asarray(x, np.float64), tree) for tree in (a, b))  # booleans have no difference

    def relative(x, y) -> float:
        return 0.0 if np.array_equal(x, y) else np.abs(x - y).max() / max(np.abs(x).max(), 1e-6)

    return float(max(jax.tree.leaves(jax.tree.map(relative, a, b))))


def router(name: str) -> dict:
    """The strategy with two experts per token, or with one where it allows no more, and what else it needs."""
    of_two = MoE(num_experts_per_token=2, options=strategies.get(name).options())
    one = {"model.moe.num_experts_per_token": 1} if strategies.get(name).check(of_two) else {}
    needs = {"sigmoid_bias": STATEFUL, "relu": {"model.moe.losses.l1": 1.0}}
    return {"model.moe.router": name} | one | needs.get(name, {})


def of(*names: str) -> list:
    """Parameters of a test: the first strategy belongs to the fast tests, the others to the whole suite."""
    return [pytest.param(router(n), id=n, marks=pytest.mark.slow if i else ()) for i, n in enumerate(names)]


EVERY = of("sigmoid_bias", *(n for n in strategies.names() if n != "sigmoid_bias"))
KINDS = of("sigmoid_bias", "topk_softmax", "expert_choice", "random")  # with state, without, expert-major, noisy
# Every block routed around, a router whose carry crosses them.
DEPTHS = {
    "model.moe.router": "recurrent",
    "model.moe.options.hidden": 8,
    "model.mixture_of_depths.capacity": 0.4,
    "model.mixture_of_depths.every": 1,
}
WITH_DEPTHS = pytest.param(DEPTHS, id="mixture_of_depths", marks=pytest.mark.slow)
FED_BY_COUNTS = ("sigmoid_bias",)  # their state is a function of integers: equal to the bit
# As many experts per token as reach a threshold, have room, or are experts at all.
VARIABLE = ("adamoe", "expert_threshold", "longcat", "moe_plus_plus", "recycle", "relu", "top_p")
EVERY_LOSS = {"model.moe.losses.sequence_balance": 0.01, "optim.logit_z_loss": 1e-3}


def assert_same_state(a, b, router: dict) -> None:
    """One token counted twice moves a state by more than 1e-3 of its size; float32 sums round by 1e-7."""
    rounding = 0 if router["model.moe.router"] in FED_BY_COUNTS else 1e-5
    assert not a.router_state or largest_difference(a.router_state, b.router_state) <= rounding


@pytest.mark.parametrize("router", [*KINDS, WITH_DEPTHS])
def test_micro_batches_equal_one_batch(router):
    """Loss, every metric, parameters and router state, whatever the number of micro-batches."""
    assert_same_run(router, {"train.accumulate_steps": 4})


@pytest.mark.parametrize("router", [*EVERY, WITH_DEPTHS])
def test_recomputed_micro_batches_equal_one_batch(router):
    """The same with every layer computed again in the backward pass: nothing is counted or updated twice."""
    assert_same_run(router, {"train.accumulate_steps": 4, "model.remat": "full"})


def assert_same_run(router: dict, otherwise: dict) -> None:
    # An auction ends within its tolerance of the best assignment: after one step, rounding decides between two of them.
    steps = 1 if router["model.moe.router"] == "base" else 2
    whole, whole_metrics = trained(router | EVERY_LOSS, steps)
    parts, parts_metrics = trained(router | EVERY_LOSS | otherwise, steps)
    np.testing.assert_array_equal(whole_metrics[0].counts_LE, parts_metrics[0].counts_LE)
    assert largest_difference(whole_metrics, parts_metrics) < 2e-4
    assert largest_difference(whole.params, parts.params) < 1e-4
    assert_same_state(whole, parts, router)


@pytest.mark.slow
def test_muon_trains_several_runs_at_once_as_one_by_one():
    """Two seeds under `jax.vmap`, as a study trains them on an accelerator."""
    configs = [config_of({"optim.name": "muon", "train.seed": seed}) for seed in (0, 1)]
    stack = lambda trees: jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *trees)
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        step = make_train_step(without_knobs(configs[0]))
        data = put_batch(mesh, Batch(*(a[None] for a in batch(0))), "ABT")
        states, of_run = [init(config) for config in configs], [knobs(config) for config in configs]
        alone = [jax.jit(step)(state, data, k)[0] for state, k in zip(states, of_run)]
        both, _ = jax.jit(jax.vmap(step, in_axes=(0, None, 0)))(stack(states), data, stack(of_run))
    assert largest_difference(stack(alone), both) < 1e-4


@pytest.mark.newest
@pytest.mark.slow
@pytest.mark.slow
def test_steps_in_bfloat16_are_near_those_in_float32():
    """XLA's CPU has not all products of bfloat16 with a float32 result, and finds out when the step runs."""
    low, high = (trained({"model.compute_dtype": dtype})[1] for dtype in ("bfloat16", "float32"))
    for a, b in zip(low, high):
        assert a.metrics["loss/ce"] == pytest.approx(b.metrics["loss/ce"], rel=5e-3)


def test_accumulation_needs_no_second_copy_of_the_gradients():
    """Temporaries are those of a layer and of its activations, 0.57 times the parameters: a backward pass adds in place
    to the sums. A tree of each micro-batch's own gradients is 0.87 times the parameters more; a copy of all layers'
    weights, in the shape in which experts multiply, was 0.58.
    """
    fields = {"model.num_layers": 8, "model.dim": 64, "model.moe.expert_dim": 256, "train.accumulate_steps": 2}
    config, mesh = config_of(fields), mesh_of()
    with jax.set_mesh(mesh):
        state, step = abstract(config), jax.jit(make_gradient(config))
        micro = put_batch(mesh, Batch(*(a[:, None] for a in batch(0, B=2))), "ABT")
        arguments = (state.params, state.router_state, micro, state.step, knobs(config))
        temporaries = step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert temporaries / sum(4 * leaf.size for leaf in jax.tree.leaves(state.params)) < 0.8


def test_a_step_on_one_cpu_moves_no_layer_of_experts_and_sums_no_gradients_of_them_over_devices():
    """Weights are read where those of all layers are, and gradients written there: of one layer no array is made."""
    config, mesh = config_of({"model.num_layers": 3, "model.moe.num_experts": 5, "model.moe.expert_dim": 24}), mesh_of()
    with jax.set_mesh(mesh):
        on_mesh = put_batch(mesh, Batch(*(a[None] for a in batch(0, B=2))), "ABT")
        program = compiled_train_step(config).lower(abstract(config), on_mesh, knobs(config)).compile().as_text()
    dim = config.model.dim
    of_layer = (f"[5,{dim},2,24]", f"[5,{dim},48]", f"[5,24,{dim}]")
    layers = len(pattern.moe_layers(config.model))
    of_all_layers = [dims.replace("[", f"[{layers},") for dims in of_layer]
    lines = [line.split("metadata=")[0] for line in program.splitlines()]
    assert any(dims in line for dims in of_all_layers for line in lines)
    assert not [line for line in lines for dims in of_layer if dims in line]
    summing = [line for line in lines if " all-reduce(" in line]
    assert summing
    assert not [line for line in summing for dims in of_all_layers if dims in line]


@pytest.mark.slow
def test_micro_batches_equal_one_batch_for_balance_in_groups_of_sequences():
    groups = {"model.moe.load_balance_scope": "micro_batch", "model.moe.load_balance_group": 2}
    whole, whole_metrics = trained(groups)
    parts, parts_metrics = trained(groups | {"train.accumulate_steps": 4})
    assert largest_difference(whole_metrics, parts_metrics) < 2e-4
    assert largest_difference(whole.params, parts.params) < 1e-4


@pytest.mark.parametrize("remat", [pytest.param("dots", marks=pytest.mark.slow), "full"])
@pytest.mark.parametrize("router", [*KINDS, WITH_DEPTHS])
def test_remat_changes_nothing(router, remat):
    """Recomputed layers count no token twice and update no state twice."""
    plain, plain_metrics = trained(router | EVERY_LOSS)
    again, again_metrics = trained(router | EVERY_LOSS | {"model.remat": remat})
    np.testing.assert_array_equal(plain_metrics[1].counts_LE, again_metrics[1].counts_LE)
    assert largest_difference(plain.params, again.params) < 1e-5
    assert_same_state(plain, again, router)


@pytest.mark.parametrize("router", EVERY)
def test_counts_are_of_the_real_tokens_of_the_step(router):
    _, metrics = trained(router | EVERY_LOSS)
    valid = int((batch(0).segment_ids_BT > 0).sum())
    assert metrics[0].tokens == valid
    total_L = metrics[0].counts_LE.sum(axis=1)
    np.testing.assert_allclose(metrics[0].metrics["router/active_per_token"], total_L / valid, rtol=1e-6)
    name = router["model.moe.router"]
    if strategies.get(name).about.form == "token" and name not in VARIABLE:
        k = router.get("model.moe.num_experts_per_token", 2)
        np.testing.assert_array_equal(total_L, [valid * k] * 2)


def test_runs_share_a_program_only_with_the_losses_that_they_name():
    """Coefficients and seeds are arguments of the program; which losses exist in it is not."""
    named, other = {"model.moe.losses.importance": 0.1}, {"model.moe.losses.importance": 0.2, "train.seed": 7}
    assert without_knobs(config_of(named)) == without_knobs(config_of(other)) != without_knobs(config_of())
    config = without_knobs(config_of(named))
    with jax.set_mesh(mesh_of()) as _:
        on_mesh = put_batch(mesh_of(), Batch(*(a[None] for a in batch(0))), "ABT")
        _, report = jax.eval_shape(make_train_step(config), init(config), on_mesh)
    assert {"loss/importance", "loss/z"} <= report.metrics.keys()


def test_runs_that_differ_in_numbers_have_one_program():
    """No number of the schedule, the decay, the clipping, or a coefficient is a constant of the program that is
    compiled: so the persistent cache gives the program of one run to another, in whatever process.
    """
    numbers = {"optim.learning_rate": 0.02, "optim.schedule": "cosine", "optim.weight_decay": 0.03}
    numbers |= {"optim.clip_norm": 0.5, "optim.logit_z_loss": 0.1, "optim.warmup_steps": 1, "train.seed": 7}
    numbers |= {"train.steps": 77}
    numbers |= {"model.moe.losses.load_balance": 0.2, "guard.loss_deviations": 3.0}
    configs, mesh = (config_of(), config_of(numbers)), mesh_of()
    with jax.set_mesh(mesh):
        on_mesh = put_batch(mesh, Batch(*(a[None] for a in batch(0))), "ABT")
        lowered = [jax.jit(make_train_step(c)).lower(abstract(c), on_mesh, jax.device_get(knobs(c))) for c in configs]
    assert lowered[0].as_text() == lowered[1].as_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sigmoid_bias", "quantile_balance"])
def test_a_step_with_a_gate_far_out_leaves_all_parameters_finite(name: str) -> None:
    """Half of the tokens have all their logits near -300, where float32 has no sigmoid."""
    config, mesh = config_of({"model.moe.router": name}), mesh_of()
    with jax.set_mesh(mesh):
        state = init(config)
        gate = state.params["moe_blocks"]["moe"]["router"]
        gate["kernel_DE"] = gate["kernel_DE"].at[:, 0].set(300.0)
        state, report = jax.jit(make_train_step(config))(
            state, put_batch(mesh, Batch(*(x[None] for x in batch(0))), "ABT")
        )
    assert report.metrics["loss/logit_z"] > 0
    without_limits = report._replace(verdict=None)  # which are infinite where there are none
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((state, without_limits)))


@pytest.mark.slow
def test_evaluation_changes_no_state_and_is_not_touched_by_noise():
    config = config_of(STATEFUL)
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        state = init(config)
        before = jax.device_get(state)
        evaluate = jax.jit(make_eval_step(config, trace=True))
        first = jax.device_get(evaluate(state.params, state.router_state, put_batch(mesh, batch(0), "BT")))
        again = jax.device_get(evaluate(state.params, state.router_state, put_batch(mesh, batch(0), "BT")))
        assert largest_difference(before, jax.device_get(state)) == 0
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    assert (first.ce_BT[~batch(0).loss_mask_BT] == 0).all()


def test_router_state_moves_once_per_step_and_by_its_own_rule():
    state, metrics = trained(STATEFUL | {"model.moe.options.update_rate": 0.01}, steps=1)
    bias_LE = state.router_state["moe_blocks"]["moe"]["router_state"]["bias_E"]
    counts_LE = metrics[0].counts_LE
    np.testing.assert_allclose(bias_LE, 0.01 * np.sign(counts_LE.mean(1, keepdims=True) - counts_LE), rtol=1e-6)


def test_the_reported_cross_entropy_has_no_auxiliary_loss_in_it():
    """loss/total = ce + 2 layers * (0.01 load_balance + 0.001 z + 0.01 sequence_balance) + 0.001 logit_z."""
    _, reports = trained(router("sigmoid_bias") | EVERY_LOSS)
    for m in (report.metrics for report in reports):
        layer = 0.01 * m["loss/load_balance"] + 0.001 * m["loss/z"] + 0.01 * m["loss/sequence_balance"]
        np.testing.assert_allclose(m["loss/total"], m["loss/ce"] + 2 * layer + 0.001 * m["loss/logit_z"], rtol=1e-5)
        assert layer > 0.01  # an auxiliary loss in `ce` would have been seen


@pytest.mark.slow
def test_a_new_term_of_the_loss_is_one_entry(monkeypatch):
    """The mean square of the hidden states, times 0.5: reported, added to the total, and the gradient's business."""
    squares = lambda micro: jnp.sum(jnp.square(micro.out.hidden_BTD), where=micro.batch.segment_ids_BT[..., None] > 0)

    def share(micro: objective.Micro) -> tuple:
        return 0.5 * squares(micro) / micro.of_step.units["token"], squares(micro)

    def metrics(sums, of_step, config) -> dict:
        return {"loss/squares": sums / of_step.units["token"]}

    config = config_of({"train.accumulate_steps": 2})
    with jax.set_mesh(mesh_of()):
        state = init(config)
        data = put_batch(mesh_of(), Batch(*(x.reshape(2, -1, *x.shape[1:]) for x in batch(0))), "ABT")
        _, plain = jax.device_get(jax.jit(make_train_step(config))(state, data))
        term = objective.Term(share, metrics, lambda knobs: {"squares": 0.5})
        monkeypatch.setitem(objective.TERMS, "squares", term)
        _, more = jax.device_get(jax.jit(make_train_step(config))(state, data))
        assert objective.coefficients(config)["squares"] == 0.5  # what a report says of it
    assert more.metrics.keys() - plain.metrics.keys() == {"loss/squares"} and more.metrics["loss/squares"] > 0
    added = more.metrics["loss/total"] - plain.metrics["loss/total"]
    np.testing.assert_allclose(added, 0.5 * more.metrics["loss/squares"], rtol=1e-4)
    assert abs(more.metrics["optim/gradient_norm"] / plain.metrics["optim/gradient_norm"] - 1) > 1e-3


def test_a_global_scope_refuses_accumulation():
    with pytest.raises(UserError, match="accumulate_steps"):
        config_of({"model.moe.load_balance_scope": "global", "train.accumulate_steps": 2})


def test_documents_of_a_row_do_not_see_each_other():
    """Changing the first document changes no loss in the second: not through attention, positions or routing."""
    config = config_of()
    mesh = mesh_of()
    one = batch(0)
    changed = one.tokens_BT.copy()
    changed[one.segment_ids_BT == 1] = (changed[one.segment_ids_BT == 1] + 7) % 64
    with jax.set_mesh(mesh):
        state, evaluate = init(config), jax.jit(make_eval_step(config))
        losses = [
            np.asarray(evaluate(state.params, state.router_state, put_batch(mesh, b, "BT")).ce_BT)
            for b in (one, one._replace(tokens_BT=changed))
        ]
    second = one.segment_ids_BT == 2
    np.testing.assert_array_equal(losses[0][second], losses[1][second])
    assert (losses[0][one.segment_ids_BT == 1] != losses[1][one.segment_ids_BT == 1]).any()
