"""What the device of this process can do: operators of a config's shapes, measured, as a row of the device catalogue.

Each operator is run forward and backward, as a training step has it, on one micro-batch of one layer. From its time
follows the share of the peak with which `cost.formulas` gives that time back, whatever else the formula adds: the
formula is A / share + B, and A and B are asked of it.

Letters: B batch, T time, N tokens, D model, F expert hidden, E experts, K choices, H query heads, h heads of keys and
values, d channels of a head; 2 = (gate, up).
"""

import datetime
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from frugalmoe import sharding
from frugalmoe.cost import formulas
from frugalmoe.cost.formulas import ASSUMED, TRAIN_FACTOR, Device, Layout
from frugalmoe.experts.here import execute_here
from frugalmoe.model import pattern
from frugalmoe.model.attention.kernels import causal_attention
from frugalmoe.routing.contract import TokenPlan
from frugalmoe.schema import Config
from frugalmoe.train.memory import of_device

SECONDS, ROUNDS = 5.0, 7  # that the measurements take at least
LARGE = 1024  # sides of the product that stands for the peak
_VIRTUAL = "--xla_force_host_platform_device_count"


class Measured(NamedTuple):
    """Cells of the catalogue, and what each was made of."""

    cells: Mapping[str, float]  # in the units of the catalogue
    seconds: Mapping[str, float]  # of a layer's micro-batch, forward and backward


class Operator(NamedTuple):
    """What is measured: a function and what it is given."""

    run: Callable
    arguments: tuple[Any, ...]


def calibrate(config: Config, told: Callable[[str], None] = lambda line: None) -> Measured:
    """Returns what this process's first device does with a config's shapes. The config must know its vocabulary.

    A step's other parts are counted with what was measured: those of the router and the norms by the memory's speed,
    the head as a product.
    """
    link = collective()
    told(f"sum over devices: {link / 1e9:.3g} GB/s" if link else "one device: links are not measured")
    with jax.set_mesh(sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])):
        seconds = measure(operators(config))
    for name, value in seconds.items():
        told(f"{name}: {value * 1e3:.3g} ms")
    return Measured(cells(config, seconds, link), seconds)


def operators(config: Config) -> dict[str, Operator]:
    """Returns what is measured of a config, by name; to be run on the mesh in context."""
    dtype = jnp.dtype(config.model.compute_dtype)
    large, x_BTD = jnp.ones((LARGE, LARGE), dtype), jnp.ones(_shape(config), dtype)
    found = {
        "large product": Operator(lambda a: a @ a, (large,)),
        "norms and residual": Operator(_gradient(_norms), (x_BTD,)),
        "products": _products(config, x_BTD),
        "attention": _attention(config, x_BTD),
    }
    return found | ({"experts": _experts(config, x_BTD)} if pattern.has_experts(config.model) else {})


def _shape(config: Config) -> tuple[int, int, int]:
    """B, T, D of a micro-batch."""
    sequences = max(1, config.train.batch_size // config.train.accumulate_steps)
    return sequences, config.data.sequence_length, config.model.dim


def measure(of: Mapping[str, Operator]) -> dict[str, float]:
    """Returns seconds of one call of each: the median of rounds in which each is called once.

    In rounds, because a machine that others use is slow for all of them at one time, and not for the last one alone.
    """
    compiled = {name: (jax.jit(operator.run), operator.arguments) for name, operator in of.items()}
    for run, arguments in compiled.values():
        jax.block_until_ready(run(*arguments))
    taken: dict[str, list[float]] = {name: [] for name in of}
    began = time.perf_counter()
    while len(next(iter(taken.values()))) < ROUNDS or time.perf_counter() - began < SECONDS:
        for name, (run, arguments) in compiled.items():
            before = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            taken[name].append(time.perf_counter() - before)
    return {name: statistics.median(values) for name, values in taken.items()}


def cells(config: Config, seconds: Mapping[str, float], link: float | None) -> dict[str, float]:
    """Returns the cells of the catalogue that give the measured times back. Without a link it has no cell."""
    dtype = jnp.dtype(config.model.compute_dtype)
    peak = 2 * LARGE**3 / seconds["large product"]
    precision = {"bfloat16": "bf16", "float32": "fp32"}[dtype.name]
    # Two norms and two additions are 10 numbers of each token's D, forward and twice as many backward.
    moved = 10 * TRAIN_FACTOR * math.prod(_shape(config)) * dtype.itemsize
    bandwidth = moved / seconds["norms and residual"] / ASSUMED.memory
    ones = dict.fromkeys(("matmul", "grouped", "attention"), 1.0)
    device = Device("here", "cpu", {precision: peak}, of_device(), bandwidth, link or 0.0, link or 0.0, 1, **ones)
    of_operator = {"matmul": "products", "attention": "attention", "grouped": "experts"}
    shares = {
        share: _share(config, device, share, seconds[name]) for share, name in of_operator.items() if name in seconds
    }
    return {
        f"{precision}_tflops": peak / 1e12,
        "memory_gb": of_device() / 1e9,
        "bandwidth_gb_s": bandwidth / 1e9,
        **({"link_gb_s": link / 1e9, "network_gb_s": link / 1e9} if link else {}),
        "node": max(1, jax.device_count()),
        **shares,
    }


def _gradient(fn: Callable) -> Callable:
    """The value and all gradients of the sum of squares of what a function makes: nothing of it can be left out."""
    total = lambda *arguments: jnp.sum(jnp.square(fn(*arguments).astype(jnp.float32)))
    return lambda *arguments: jax.value_and_grad(total, argnums=tuple(range(len(arguments))))(*arguments)


def _norms(x_BTD: jax.Array) -> jax.Array:
    """What a block does beside its products: two norms, two additions."""
    for _ in range(2):
        x32_BTD = x_BTD.astype(jnp.float32)
        rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BTD), axis=-1, keepdims=True) + 1e-6)
        x_BTD = x_BTD + jax.lax.optimization_barrier((x32_BTD * rms).astype(x_BTD.dtype))
    return x_BTD


def _products(config: Config, x_BTD: jax.Array) -> Operator:
    """The projections of attention, and of a dense or shared feed-forward if there is one, of one layer each."""
    model, dtype = config.model, x_BTD.dtype
    queries, keys = formulas._widths(model, pattern.layers(model)[0].attention)
    hidden = _hidden(model)
    shapes = [(model.dim, int(queries + keys)), (int(queries), model.dim)]
    shapes += [(model.dim, 2 * hidden), (hidden, model.dim)] if hidden else []
    inputs = [x_BTD.reshape(-1, model.dim), jnp.ones((x_BTD.shape[0] * x_BTD.shape[1], int(queries)), dtype)]
    inputs += [inputs[0], jnp.ones((inputs[0].shape[0], hidden), dtype)] if hidden else []
    weights = [jnp.ones(shape, dtype) for shape in shapes]

    def products(*both: jax.Array) -> jax.Array:
        half = len(both) // 2
        return jnp.concatenate([a @ w for a, w in zip(both[:half], both[half:])], axis=1)

    return Operator(_gradient(products), (*inputs, *weights))


def _hidden(model) -> int:
    """Width of one dense feed-forward or of the shared experts: what more of the layers have."""
    shared = model.moe.num_shared_experts * model.moe.expert_dim
    moe_layers = len(pattern.moe_layers(model))
    return shared if moe_layers and shared else model.dense_dim if pattern.has_dense(model) else 0


def _attention(config: Config, x_BTD: jax.Array) -> Operator:
    model, (batch, length, _) = config.model, x_BTD.shape
    key, width = jax.random.key(0), model.head_dim
    q_BTHd = jax.random.normal(key, (batch, length, model.num_heads, width), x_BTD.dtype)
    k_BThd = jax.random.normal(key, (batch, length, model.num_kv_heads, width), x_BTD.dtype)
    segments_BT = jnp.ones((batch, length), jnp.int32)
    return Operator(_gradient(lambda q, k, v: causal_attention(q, k, v, segments_BT)), (q_BTHd, k_BThd, k_BThd))


def _experts(config: Config, x_BTD: jax.Array) -> Operator:
    """Tokens choose at random: the imbalance of a plan is counted apart."""
    model, moe, dtype = config.model, config.model.moe, x_BTD.dtype
    x_ND = x_BTD.reshape(-1, model.dim)
    scores_NE = jax.random.uniform(jax.random.key(0), (x_ND.shape[0], moe.num_experts))
    _, expert_NK = jax.lax.top_k(scores_NE, moe.num_experts_per_token)
    weight_NK = jnp.full(expert_NK.shape, 1 / moe.num_experts_per_token)
    weights = [
        jnp.full((moe.num_experts, model.dim, 2, moe.expert_dim), 0.01, dtype),
        jnp.full((moe.num_experts, moe.expert_dim, model.dim), 0.01, dtype),
    ]

    def experts(expert_NK: jax.Array, *rest: jax.Array) -> Any:
        run = lambda weight_NK, x, up, down: execute_here(
            TokenPlan(expert_NK, weight_NK), x, up, down, moe, x_BTD.shape[0]
        )[0]
        return _gradient(run)(*rest)

    return Operator(experts, (expert_NK.astype(jnp.int32), weight_NK, x_ND, *weights))


def _share(config: Config, device: Device, field: str, seconds: float) -> float:
    """The share of the peak with which the model of a step has the measured time."""
    expected = lambda share: _expected(config, device._replace(**{field: share}), field)
    rest = expected(1e9)
    return (expected(1.0) - rest) / max(seconds - rest, 0.1 * seconds)


def _expected(config: Config, device: Device, field: str) -> float:
    """What `cost.formulas` says of the measured operators, forward and backward; those of one layer each."""
    sequences = max(1, config.train.batch_size // config.train.accumulate_steps)
    parts = formulas.forward_seconds(
        config, Layout(sequences=sequences, remat="none"), device, "fp32", ASSUMED._replace(imbalance=1.0)
    )
    layers, moe = config.model.num_layers, len(pattern.moe_layers(config.model))
    counts = {
        "matmul": {"attention projections": layers, "shared experts": moe, "dense feed-forward": layers - moe},
        "attention": {"attention products": layers},
        "grouped": {"routed experts": moe},
    }[field]
    if field == "matmul":  # of the two feed-forwards that which was measured
        shared = config.model.moe.num_shared_experts and moe
        counts.pop("dense feed-forward" if shared else "shared experts")
    # The reading and writing that an operator does itself was measured with it.
    both = field != "matmul"
    return TRAIN_FACTOR * sum((parts[n][0] + both * parts[n][1]) / count for n, count in counts.items() if n in parts)


def collective() -> float | None:
    """Returns bytes per second that a device sends in a sum over all of them; of one CPU, over two virtual devices.

    None where there is one accelerator, which has nobody to talk to: the catalogue then says what it assumes.
    """
    if jax.device_count() > 1:
        return all_reduce()
    if jax.default_backend() != "cpu":
        return None
    flags = f"{os.environ.get('XLA_FLAGS', '')} {_VIRTUAL}=2".strip()
    code = "from frugalmoe.cost import calibration; print(calibration.all_reduce())"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def all_reduce(size: int = 2**22) -> float:
    """Returns bytes per second that each of the devices here sends in a sum of so many float32 numbers, as a ring."""
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("all",))
    spread, whole = jax.sharding.PartitionSpec("all"), jax.sharding.PartitionSpec()
    a = jax.device_put(jnp.ones((devices, size), jnp.float32), jax.sharding.NamedSharding(mesh, spread))
    summed = jax.shard_map(lambda a: jax.lax.psum(a, "all"), mesh=mesh, in_specs=spread, out_specs=whole)
    seconds = measure({"sum": Operator(summed, (a,))})["sum"]
    return 2 * (devices - 1) / devices * 4 * size / seconds


def row(measured: Measured, config: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Returns the source of the cells, and the row of the catalogue: see `device_catalogue.add`."""
    kind = jax.devices()[0].device_kind
    here = f"measured by frugalmoe calibrate --config={config} on {kind}, {os.cpu_count()} cores"
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(jax.default_backend(), jax.default_backend())
    source = {"text": here, "date": datetime.date.today().isoformat()}
    return source, {"title": kind, "platform": platform, **measured.cells}
