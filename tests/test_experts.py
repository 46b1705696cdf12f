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
import triton_interpreter
from jax.sharding import PartitionSpec as P

from frugalmoe.errors import UserError
from frugalmoe.experts import EXECUTORS, blocks, dense, execute, gpu, grouped, pick, tpu
from frugalmoe.experts.blocks import block_sizes, cover
from frugalmoe.experts.rows import sort_rows
from frugalmoe.routing.contract import ExpertPlan, TokenPlan
from frugalmoe.schema import MoE

N, D, F = 96, 32, 16


def random_plan(seed, num_experts, k, tokens=N, null=0.0):
    """Distinct experts per token; a share of null slots."""
    rng = np.random.default_rng(seed)
    expert = rng.permuted(np.tile(np.arange(num_experts), (tokens, 1)), axis=1)[:, :k]
    empty = rng.random((tokens, k)) < null
    weight = np.where(empty, 0, rng.uniform(0.1, 1.0, (tokens, k)))
    return TokenPlan(jnp.array(np.where(empty, num_experts, expert), jnp.int32), jnp.array(weight, jnp.float32))


def expert_plan(seed, num_experts, slots, empty):
    rng = np.random.default_rng(seed)
    token = np.stack([rng.permutation(N)[:slots] for _ in range(num_experts)])
    dead = rng.random(token.shape) < empty
    weight = np.where(dead, 0, rng.uniform(0.1, 1.0, token.shape))
    return ExpertPlan(jnp.array(np.where(dead, N, token), jnp.int32), jnp.array(weight, jnp.float32))


def only(expert, num_experts, k=1):
    """All tokens to the experts expert, expert+1, ..."""
    ids = jnp.broadcast_to(expert + jnp.arange(k, dtype=jnp.int32), (N, k))
    return num_experts, TokenPlan(ids, jnp.linspace(0.2, 1.0, N * k).reshape(N, k))


PLANS = {
    "even": (8, random_plan(0, 8, 2)),
    "uneven, two experts empty": (
        8,
        TokenPlan(random_plan(1, 6, 3).expert_NK ** 2 // 5, random_plan(1, 6, 3).weight_NK),
    ),
    "all tokens to the last expert": only(3, 4),
    "all tokens to the first expert": only(0, 4),
    "null slots": (8, random_plan(2, 8, 4, null=0.4)),
    "all null": (4, TokenPlan(jnp.full((N, 2), 4, jnp.int32), jnp.zeros((N, 2)))),
    "equal weights": (8, random_plan(3, 8, 2)._replace(weight_NK=jnp.full((N, 2), 0.5))),
    "one expert": only(0, 1),
    "every expert": (4, random_plan(4, 4, 4)),
    "expert-major, full": (4, expert_plan(5, 4, 24, 0.0)),
    "expert-major, empty slots": (4, expert_plan(6, 4, 40, 0.3)),
    "expert-major, all empty": (2, expert_plan(7, 2, 8, 1.1)),
}


def weights(num_experts, dtype=jnp.float32, dim=D, hidden=F):
    keys = jax.random.split(jax.random.key(1), 3)
    x_ND = jax.random.normal(keys[0], (N, dim))
    gate_up = jax.random.normal(keys[1], (num_experts, dim, 2, hidden)) * dim**-0.5
    down = jax.random.normal(keys[2], (num_experts, hidden, dim)) * hidden**-0.5
    return tuple(a.astype(dtype) for a in (x_ND, gate_up, down))


def run_dense(plan, x, gate_up, down):
    return dense.run(plan, x, gate_up, down)


def run_blocks(plan, x, gate_up, down):
    return blocks.run(sort_rows(plan, down.shape[0]), x, gate_up, down)


def run_kernels(kernels, plan, x, gate_up, down):
    return grouped.run(kernels, sort_rows(plan, down.shape[0]), x, gate_up, down)


def run_capacity(plan, x, gate_up, down):
    config = MoE(num_experts=down.shape[0], num_experts_per_token=1, executor="capacity", capacity_factor=1e6)
    y, dropped = execute(plan, x, gate_up, down, config, num_sequences=3)
    return jnp.where(dropped == 0, y, jnp.nan)


RUN = {
    "blocks": run_blocks,
    "capacity": run_capacity,
    "tpu": partial(run_kernels, tpu.kernels(N, interpret=True)),
    "gpu": partial(run_kernels, gpu.kernels(triton_interpreter.launch)),
}


def value_and_gradients(run, plan, *arrays):
    """y and the gradients of a generic scalar of it for (plan weights, x, gate_up, down)."""

    def loss(weight, *arrays):
        y = run(plan.with_weights(weight), *arrays)
        return jnp.sum(y.astype(jnp.float32) * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(plan.weights, *arrays)
    # The weight of an empty slot is no variable: the oracle sees another value of it than executors that skip the slot.
    live = plan.ids < (arrays[2].shape[0] if isinstance(plan, TokenPlan) else y.shape[0])
    return y, jnp.where(live, grads[0], 0), *grads[1:]


def assert_close(got, expected, tolerance):
    for name, a, b in zip(("y", "plan weights", "x", "gate_up", "down"), got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), (name, np.linalg.norm(a - b), np.linalg.norm(b))


@pytest.mark.parametrize("executor", RUN)
@pytest.mark.parametrize("name", PLANS)
def test_equals_the_oracle(name, executor):
    num_experts, plan = PLANS[name]
    arrays = weights(num_experts)
    assert_close(value_and_gradients(RUN[executor], plan, *arrays), value_and_gradients(run_dense, plan, *arrays), 1e-5)


@pytest.mark.parametrize("executor", RUN)
def test_bfloat16_is_within_rounding_of_float32(executor):
    num_experts, plan = PLANS["null slots"]
    got = value_and_gradients(RUN[executor], plan, *weights(num_experts, jnp.bfloat16))
    full = value_and_gradients(run_dense, plan, *weights(num_experts))
    expected = (full[0].astype(jnp.bfloat16), full[1], *(g.astype(jnp.bfloat16) for g in full[2:]))
    assert_close(got, expected, 2e-2)


def test_blocks_of_every_size_are_used_and_agree():
    groups = [400, 300]
    expert = np.random.default_rng(0).permutation(np.repeat(np.arange(2, dtype=np.int32), groups))
    plan = TokenPlan(jnp.array(expert)[:, None], random_plan(8, 2, 1, 700).weight_NK)
    sizes = block_sizes(700, 2, F)
    assert all(jnp.sum(count) > 0 for _, count, _ in cover(jnp.array(groups), sizes)), sizes
    _, gate_up, down = weights(2)
    arrays = jax.random.normal(jax.random.key(3), (700, D)), gate_up, down
    assert_close(value_and_gradients(run_blocks, plan, *arrays), value_and_gradients(run_dense, plan, *arrays), 1e-5)


GROUPS = {
    "even": [512] * 8,
    "odd": [1, 0, 31, 32, 33, 97, 383, 384, 385, 2000],
    "one": [0, 0, 5000, 0],
    "few rows": [3, 1, 0, 2],
    "none": [0, 0, 0],
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("sizes", [(512, 256, 64), (256, 128, 32), (64, 32)])
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
    assert computed <= 4 / 3 * groups.sum() + (sizes[-1] - 1) * np.count_nonzero(groups)


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
        *[(e, p, e) for e in ("dense", "capacity", "blocks", "tpu", "gpu") for p in ("cpu", "tpu", "gpu")],
    ],
)
def test_pick(executor, platform, expected):
    assert pick(MoE(executor=executor), platform) == expected


def test_execute_runs_what_pick_names_here():
    num_experts, plan = PLANS["even"]
    arrays = weights(num_experts)
    for executor in ("auto", "dense", "grouped", "capacity", "blocks"):
        config = MoE(num_experts=num_experts, executor=executor, capacity_factor=100.0)
        y, dropped = jax.jit(partial(execute, config=config, num_sequences=2))(plan, *arrays)
        np.testing.assert_allclose(y, run_dense(plan, *arrays), rtol=1e-4, atol=1e-5)
        assert dropped.dtype == jnp.int32 and dropped.shape == () and dropped == 0


def test_unknown_executor_names_the_choices():
    with pytest.raises(UserError, match=r"group.*did you mean 'grouped'") as error:
        pick(MoE(executor="group"), "cpu")
    assert all(name in str(error.value) for name in EXECUTORS) and "\n" not in str(error.value)


LOWERED = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from test_experts import TokenPlan, gpu, random_plan, run_kernels, tpu, weights

kinds = {"tpu": "TPU v5 lite", "a100": "NVIDIA A100-SXM4-80GB", "h100": "NVIDIA H100 80GB HBM3"}
for device, dtype in ((device, dtype) for device in sys.argv[1:] for dtype in (jnp.float32, jnp.bfloat16)):
    platform = "tpu" if device == "tpu" else "cuda"
    kernels = tpu.kernels(2 * 96) if device == "tpu" else gpu.kernels()
    plan, arrays = random_plan(0, 8, 2), weights(8, dtype, dim=128, hidden=128)
    def loss(weight, *arrays):
        return jnp.sum(run_kernels(kernels, plan._replace(weight_NK=weight), *arrays).astype(jnp.float32))
    absent = AbstractDevice(kinds[device], 1, "tpu" if device == "tpu" else "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=absent)):
        step = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(plan.weight_NK, *arrays)
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
    plans, run = [random_plan(seed, 4, 2) for seed in (0, 1)], RUN["gpu"]
    stacked = TokenPlan(*map(jnp.stack, zip(*plans)))
    lanes = jax.jit(jax.vmap(lambda plan: run(plan, *weights(4))))(stacked)
    for y, plan in zip(lanes, plans, strict=True):
        np.testing.assert_allclose(y, run_dense(plan, *weights(4)), rtol=1e-4, atol=1e-5)


def test_gpu_kernels_refuse_widths_that_tensor_cores_cannot_tile():
    plan = random_plan(0, 2, 1)
    with pytest.raises(UserError, match="multiples of 16"):
        run_kernels(gpu.kernels(triton_interpreter.launch), plan, *weights(2, dim=24))
