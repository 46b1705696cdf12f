"""Laws of the executors: each equals the dense oracle in value and in every gradient, on every kind of plan."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from frugalmoe.config import default, override, resolve
from frugalmoe.errors import UserError
from frugalmoe.experts import ACTIVATIONS, activations, execute_here, executors, grouped, pick, triton_interpreter
from frugalmoe.experts.contract import Call, Executor
from frugalmoe.experts.executors import blocks, gpu
from frugalmoe.experts.executors.blocks import block_sizes, cover
from frugalmoe.laws.executors import (
    LAWS,
    D,
    F,
    assert_close,
    check_plan,
    plans,
    random_plan,
    run_dense,
    run_whole,
    value_and_gradients,
    weights,
)
from frugalmoe.routing.contract import TokenPlan
from frugalmoe.schema import MoE

PLANS = plans()


def test_every_file_of_the_folder_is_an_executor():
    assert executors.names() == executors.sound() != ()


@pytest.mark.parametrize("executor", executors.names())
@pytest.mark.parametrize("name", PLANS)
def test_equals_the_oracle(name, executor):
    check_plan(executors.get(executor), name)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_pulls_gradients_as_autodiff_does(name):
    """At its bounds too, of which autodiff and PyTorch say that the gradient passes."""
    value, pull = ACTIVATIONS[name]
    edge = activations.LIMIT
    gates, ups = [-30.0, -edge, -1.0, 0.0, 0.5, edge, 8.0, 90.0], [-9.0, -edge, 0.0, 3.0, edge, 9.0]
    gate, up = np.float32(np.meshgrid(gates, ups))
    _, transpose = jax.vjp(value, gate, up)
    dhidden = np.cos(np.arange(gate.size, dtype=np.float32)).reshape(gate.shape)
    for ours, theirs in zip(pull(gate, up, dhidden), transpose(dhidden), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("executor", executors.names())
@pytest.mark.parametrize("law", [name for name in LAWS if name != "oracle"])
def test_law(law, executor):
    LAWS[law](executors.get(executor))


# Executors that break a law; each is `blocks` but for what it breaks.


def without_weights(plan, x_ND, gate_up, down, call):
    return blocks.run(plan.with_weights(jnp.ones_like(plan.weights)), x_ND, gate_up, down, call)


def without_gradient(plan, x_ND, gate_up, down, call):
    return blocks.run(plan, x_ND, gate_up, jax.lax.stop_gradient(down), call)


def in_float32(plan, x_ND, gate_up, down, call):
    y, dropped = blocks.run(plan, x_ND, gate_up, down, call)
    return y.astype(jnp.float32), dropped


def in_any_room(plan, x_ND, gate_up, down, call):
    return blocks.run(plan, x_ND, gate_up, down, call._replace(room=None))


def forgets_its_drops(plan, x_ND, gate_up, down, call):
    return executors.get("capacity").run(plan, x_ND, gate_up, down, call)[0], jnp.int32(0)


def without_biases(plan, x_ND, gate_up, down, call):
    return blocks.run(plan, x_ND, gate_up, down, call._replace(biases=None))


def with_swiglu(plan, x_ND, gate_up, down, call):
    return blocks.run(plan, x_ND, gate_up, down, call._replace(config=MoE()))


def twice_the_bias(plan, x_ND, gate_up, down, call):
    once = call.biases
    return blocks.run(plan, x_ND, gate_up, down, call._replace(biases=once._replace(down_ED=2 * once.down_ED)))


def without_what_comes_back(plan, x_ND, stack, call):
    return blocks.in_stack(plan, x_ND, stack._replace(sums=jax.lax.stop_gradient(stack.sums)), call)


def of_the_layer_behind(plan, x_ND, stack, call):
    return blocks.in_stack(plan, x_ND, stack._replace(layer=stack.layer + 1), call)


CAPACITY = {"keeps_room": False, "drops": executors.get("capacity").drops}
BROKEN = [
    ("oracle", without_weights, {}),
    ("oracle", without_gradient, {}),
    ("bfloat16", in_float32, {}),
    ("room", in_any_room, {}),
    ("drops", executors.get("capacity").run, {"keeps_room": False}),
    ("drops", forgets_its_drops, CAPACITY),
    ("drops", blocks.run, CAPACITY),
    ("oracle", blocks.run, {"platforms": ("an NPU",)}),
    ("forms", without_biases, {"every_form": True}),
    ("forms", with_swiglu, {"every_form": True}),
    ("forms", twice_the_bias, {"every_form": True}),
    ("stack", blocks.run, {"in_stack": without_what_comes_back}),
    ("stack", blocks.run, {"in_stack": of_the_layer_behind}),
]


IDS = [f"{law}-{claims.get('in_stack', run).__name__}" for law, run, claims in BROKEN]


@pytest.mark.parametrize(("law", "run", "claims"), BROKEN, ids=IDS)
def test_a_law_catches(law, run, claims):
    with pytest.raises(AssertionError):
        LAWS[law](Executor(run=run, work="", purpose="", name="broken", **claims))


def test_a_new_file_is_found_and_held_to_the_laws(tmp_path, monkeypatch):
    """Nothing else is edited; and one that ignores its weights fails."""
    (tmp_path / "mine.py").write_text(
        "import jax.numpy as jnp\n"
        "from frugalmoe.experts.contract import Executor\n"
        "def run(plan, x_ND, gate_up_ED2F, down_EFD, call):\n"
        "    return x_ND, jnp.int32(0)\n"
        "EXECUTOR = Executor(run=run, work='0', purpose='none')\n"
    )
    monkeypatch.setattr(executors, "__path__", [*executors.__path__, str(tmp_path)])
    assert "mine" in executors.names() and pick(MoE(executor="mine"), "cpu").name == "mine"
    with pytest.raises(AssertionError, match="plan 'even': y: "):
        LAWS["oracle"](executors.get("mine"))
    sys.modules.pop("frugalmoe.experts.executors.mine")


def test_an_executor_that_declares_no_form_is_refused_where_experts_have_one(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text(
        "from frugalmoe.experts.contract import Executor\n"
        "EXECUTOR = Executor(run=lambda *arguments: None, work='0', purpose='none')\n"
    )
    fields = {"model.moe.executor": str(path), "model.moe.expert_bias": True, "model.moe.activation": "clamped_swiglu"}
    resolve(override(default(), {"model.moe.executor": str(path)}))
    both = r"not model.moe.activation='clamped_swiglu', model.moe.expert_bias=True"
    with pytest.raises(UserError, match=rf"executor='{path}': computes SwiGLU without biases alone .*, {both}"):
        resolve(override(default(), fields))


def run_blocks(plan, x, gate_up, down):
    return run_whole(executors.get("blocks"))(plan, x, gate_up, down)


def run_kernels(kernels, plan, x, gate_up, down):
    return grouped.run(lambda num_rows: kernels, plan, x, gate_up, down, Call(MoE()))[0]


def test_blocks_of_every_size_are_used_and_agree():
    """The last expert has a block of the largest size too, whose gradients are added to those of the smallest."""
    groups = [20, 60, 75, 120, 140]
    rows, num_experts = sum(groups), len(groups)
    expert = np.random.default_rng(0).permutation(np.repeat(np.arange(num_experts, dtype=np.int32), groups))
    plan = TokenPlan(jnp.array(expert)[:, None], random_plan(8, num_experts, 1, rows).weight_NK)
    blocks_of = [np.asarray(count) for _, count, _ in cover(jnp.array(groups), block_sizes(rows, num_experts, F))]
    np.testing.assert_array_equal(blocks_of, [[1, 0, 0, 0, 1], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 1]])
    _, gate_up, down = weights(num_experts)
    arrays = jax.random.normal(jax.random.key(3), (rows, D)), gate_up, down
    assert_close(value_and_gradients(run_blocks, plan, *arrays), value_and_gradients(run_dense, plan, *arrays), 1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 9, 31])
def test_few_rows_are_computed_in_short_blocks(tokens):
    """Half of the tokens share two experts; blocks have room for twice the mean group, and never fewer than 4 rows."""
    plan = random_plan(9, 8, 2, tokens)
    plan = plan._replace(expert_NK=plan.expert_NK.at[: tokens // 2].set(jnp.array([5, 1])))
    (size,) = block_sizes(2 * tokens, 8, F)
    assert max(4, tokens // 4) <= size <= max(4, tokens)
    _, gate_up, down = weights(8)
    arrays = jax.random.normal(jax.random.key(3), (tokens, D)), gate_up, down
    assert_close(value_and_gradients(run_blocks, plan, *arrays), value_and_gradients(run_dense, plan, *arrays), 1e-5)


GROUPS = {
    "even": [512] * 8,
    "odd": [1, 0, 31, 32, 33, 97, 383, 384, 385, 2000],
    "one": [0, 0, 5000, 0],
    "few rows": [3, 1, 0, 2],
    "few rows, many of one expert": [1, 0, 29, 4, 5, 0, 0, 1],
    "none": [0, 0, 0],
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("sizes", [(64, 128, 256, 384, 512), (32, 128, 256), (32, 64), (8,), (4,)])
def test_blocks_cover_each_row_once_with_bounded_waste(name, sizes):
    groups = np.array(GROUPS[name], np.int32)
    end = np.cumsum(groups)
    covered, computed = np.zeros(groups.sum(), int), 0
    for size, counts, starts in cover(jnp.array(groups), sizes):
        for e, (count, start) in enumerate(zip(np.asarray(counts), np.asarray(starts))):
            computed += size * count
            for block in range(count):
                covered[start + block * size : min(start + (block + 1) * size, end[e])] += 1
    assert (covered == 1).all()
    assert computed <= groups.sum() + (max(np.diff(sizes, prepend=0)) - 1) * np.count_nonzero(groups)


def blocks_loss(weight, x, gate_up, down, expert):
    return jnp.sum(jnp.sin(run_blocks(TokenPlan(expert, weight), x, gate_up, down)))


@pytest.mark.slow
def test_blocks_under_checkpoint_scan_vmap_and_shard_map():
    num_experts, plan = PLANS["null slots"]
    args = (plan.weight_NK, *weights(num_experts), plan.expert_NK)
    gradient = jax.grad(blocks_loss, (0, 1, 2, 3))
    expected = jax.jit(gradient)(*args)

    checkpointed = jax.jit(jax.grad(jax.checkpoint(blocks_loss), (0, 1, 2, 3)))(*args)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.jit(
        jax.shard_map(
            gradient,
            mesh=mesh,
            in_specs=(P("data"), P("data"), P(), P(), P("data")),
            out_specs=(P("data"), P("data"), P(), P()),
            check_vma=False,
        )
    )(*args)
    for got in (checkpointed, sharded):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, expected)

    # Lanes with different plans, so that their loops end at different times.
    stacked = jax.tree.map(lambda *a: jnp.stack(a), args, (*args[:4], jnp.zeros_like(plan.expert_NK)))
    lanes = jax.jit(jax.vmap(gradient))(*stacked)
    scanned = jax.jit(lambda s: jax.lax.scan(lambda c, a: (c, gradient(*a)), 0, s)[1])(stacked)
    apart = jax.tree.map(
        lambda *a: jnp.stack(a), expected, jax.jit(gradient)(*args[:4], jnp.zeros_like(plan.expert_NK))
    )
    for got in (lanes, scanned):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, apart)


def test_two_layers_in_a_scan_differentiate_through_each_other():
    num_experts, plan = PLANS["even"]
    x, gate_up, down = weights(num_experts)
    stack = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), (gate_up, down))

    def loss(run, x, stack):
        return jnp.sum(jnp.sin(jax.lax.scan(lambda h, w: (h + run(plan, h, *w), None), x, stack)[0]))

    got = jax.jit(jax.grad(partial(loss, run_blocks), (0, 1)))(x, stack)
    expected = jax.jit(jax.grad(partial(loss, run_dense), (0, 1)))(x, stack)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, expected)


@pytest.mark.parametrize(
    "executor,platform,expected",
    [
        *[(e, "cpu", "blocks") for e in ("auto", "grouped")],
        *[(e, "tpu", "tpu") for e in ("auto", "grouped")],
        *[(e, p, "gpu") for e in ("auto", "grouped") for p in ("gpu", "cuda")],
        *[(e, p, e) for e in executors.names() for p in ("cpu", "tpu", "gpu")],
    ],
)
def test_pick(executor, platform, expected):
    assert pick(MoE(executor=executor), platform).name == expected


def test_each_platform_has_one_executor_of_its_own():
    claims = [platform for name in executors.names() for platform in executors.get(name).default_on]
    assert len(claims) == len(set(claims)) and "*" in claims


def test_execute_runs_what_pick_names_here():
    num_experts, plan = PLANS["even"]
    arrays = weights(num_experts)
    for executor in (*executors.BY_PLATFORM, *(e for e in executors.names() if not executors.get(e).platforms)):
        config = MoE(num_experts=num_experts, executor=executor, capacity_factor=100.0)
        y, dropped = jax.jit(partial(execute_here, config=config, num_sequences=2))(plan, *arrays)
        np.testing.assert_allclose(y, run_dense(plan, *arrays), rtol=1e-4, atol=1e-5)
        assert dropped.dtype == jnp.int32 and dropped.shape == () and dropped == 0


def test_unknown_executor_names_the_choices():
    with pytest.raises(UserError, match=r"group.*did you mean 'grouped'") as error:
        pick(MoE(executor="group"), "cpu")
    valid = *executors.BY_PLATFORM, *executors.names()
    assert all(name in str(error.value) for name in valid) and "\n" not in str(error.value)


def test_an_executor_of_another_platform_is_refused_with_what_runs_here():
    num_experts, plan = PLANS["even"]
    with pytest.raises(UserError, match="runs on tpu, and this is cpu; model"):
        execute_here(plan, *weights(num_experts), MoE(num_experts=num_experts, executor="tpu"), 1)


LOWERED = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from frugalmoe.experts.executors import gpu, tpu
from frugalmoe.laws.executors import random_plan, weights
from test_experts import run_kernels

kinds = {"tpu": "TPU v5 lite", "a100": "NVIDIA A100-SXM4-80GB", "h100": "NVIDIA H100 80GB HBM3"}
for device, dtype in ((device, dtype) for device in sys.argv[1:] for dtype in (jnp.float32, jnp.bfloat16)):
    platform = "tpu" if device == "tpu" else "cuda"
    kernels = tpu.kernels(2 * 96) if device == "tpu" else gpu.kernels()
    plan, arrays = random_plan(0, 8, 2), weights(8, dtype, dim=128, hidden=128)
    def loss(weight, *arrays):
        return jnp.sum(run_kernels(kernels, plan._replace(weight_NK=weight), *arrays).astype(jnp.float32))
    absent = AbstractDevice(kinds[device], 1, "tpu" if device == "tpu" else "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=absent)):
        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3))).trace(plan.weight_NK, *arrays)
        text = step.lower(lowering_platforms=(platform,)).as_text()
    called = "tpu_custom_call" if device == "tpu" else "@triton_kernel_call"
    assert text.count(called) == 6, (device, dtype, text.count(called))
"""
WITH_COMPILERS = os.pathsep.join([*filter(None, sys.path), str(Path(sys.prefix) / "aot")])


@pytest.mark.newest
@pytest.mark.slow
@pytest.mark.parametrize("devices", [("tpu",), ("a100", "h100")], ids=["tpu", "gpu"])
def test_kernels_compile_for_devices_that_are_not_there(devices):
    """Two products forward, two and two backward, in both types, are kernel calls in what the platform's compiler is
    given; those of GPUs are compiled by then.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": WITH_COMPILERS}
    done = subprocess.run([sys.executable, "-c", LOWERED, *devices], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_that_gpus_need_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    gpu._triton.cache_clear()
    with pytest.raises(UserError, match=r"executor=gpu: needs a package .*: pip install 'jax-triton>=0.3.1'"):
        run_kernels(gpu.kernels(), random_plan(0, 2, 1), *weights(2))


def test_gpu_kernels_run_in_several_lanes():
    """Runs that train in one program are lanes of a `vmap`."""
    both, run = [random_plan(seed, 4, 2) for seed in (0, 1)], run_whole(executors.get("gpu"))
    stacked = TokenPlan(*map(jnp.stack, zip(*both)))
    lanes = jax.jit(jax.vmap(lambda plan: run(plan, *weights(4))))(stacked)
    for y, plan in zip(lanes, both, strict=True):
        np.testing.assert_allclose(y, run_dense(plan, *weights(4)), rtol=1e-4, atol=1e-5)


def test_gpu_kernels_refuse_widths_that_tensor_cores_cannot_tile():
    plan = random_plan(0, 2, 1)
    with pytest.raises(UserError, match="multiples of 16"):
        run_kernels(gpu.kernels(triton_interpreter.launch), plan, *weights(2, dim=24))


@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_weights_that_an_executor_casts_itself_are_those_that_come_cast(name):
    """Bit for bit, in value and in gradients, which are float32 for float32 weights."""
    executor, plan = executors.get(name), random_plan(4, 4, 2)
    x, *matrices = weights(4)
    x, call = x.astype(jnp.bfloat16), Call(MoE(num_experts=4))

    def gradients(cast):
        loss = lambda *given: jnp.sum(
            jnp.sin(executor.interpreted(plan, x, *(cast(w) for w in given), call)[0].astype(jnp.float32))
        )
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(*matrices)

    assert executor.casts
    own, given = gradients(lambda w: w), gradients(lambda w: w.astype(jnp.bfloat16))
    jax.tree.map(np.testing.assert_array_equal, own, given)
    assert own[1][0].dtype == jnp.float32


@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_what_an_executor_keeps_for_its_gradient(name):
    """The rows that came and the products of gate and up; nothing else of R rows has the width of a model or an expert,
    and nothing of that size is float32.
    """
    executor, plan = executors.get(name), random_plan(4, 4, 2)
    arrays = [a.astype(jnp.bfloat16) for a in weights(4)]
    _, pull = jax.vjp(lambda *given: executor.interpreted(plan, *given, Call(MoE(num_experts=4)))[0], *arrays)
    rows = plan.expert_NK.size
    wide = [a for a in jax.tree.leaves(pull) if a.ndim == 2 and a.shape[0] >= rows and a.shape[1] >= min(D, F)]
    assert [(a.dtype, a.shape[1]) for a in wide] == [(jnp.bfloat16, 2 * F)]
