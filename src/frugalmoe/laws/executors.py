"""Laws of the executors: each equals the dense oracle in value and in every gradient, on every kind of plan.

A law takes an `Executor` and asserts. One that runs on few platforms is interpreted on the others.

Letters: N tokens, D model, E experts, F expert hidden, K choices, C slots per expert; 2 = (gate, up).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from frugalmoe.experts import executors
from frugalmoe.experts.activations import ACTIVATIONS
from frugalmoe.experts.contract import Biases, Call, Executor, Run, Stack
from frugalmoe.routing.contract import ExpertPlan, Plan, TokenPlan, combine_matrix
from frugalmoe.schema import MoE
from frugalmoe.sharding import platform

N, D, F = 96, 32, 16
SEQUENCES = 3


def random_plan(seed: int, num_experts: int, k: int, tokens: int = N, null: float = 0.0) -> TokenPlan:
    """Distinct experts per token; a share of null slots."""
    rng = np.random.default_rng(seed)
    expert = rng.permuted(np.tile(np.arange(num_experts), (tokens, 1)), axis=1)[:, :k]
    empty = rng.random((tokens, k)) < null
    weight = np.where(empty, 0, rng.uniform(0.1, 1.0, (tokens, k)))
    return TokenPlan(jnp.array(np.where(empty, num_experts, expert), jnp.int32), jnp.array(weight, jnp.float32))


def _expert_plan(seed: int, num_experts: int, slots: int, empty: float) -> ExpertPlan:
    rng = np.random.default_rng(seed)
    token = np.stack([rng.permutation(N)[:slots] for _ in range(num_experts)])
    dead = rng.random(token.shape) < empty
    weight = np.where(dead, 0, rng.uniform(0.1, 1.0, token.shape))
    return ExpertPlan(jnp.array(np.where(dead, N, token), jnp.int32), jnp.array(weight, jnp.float32))


def _only(expert: int, num_experts: int) -> tuple[int, TokenPlan]:
    """All tokens to one expert."""
    return num_experts, TokenPlan(jnp.full((N, 1), expert, jnp.int32), jnp.linspace(0.2, 1.0, N).reshape(N, 1))


@functools.cache
def plans() -> dict[str, tuple[int, Plan]]:
    """By name: the number of experts, and a plan of N tokens."""
    uneven = random_plan(1, 6, 3)
    return {
        "even": (8, random_plan(0, 8, 2)),
        "uneven, two experts empty": (8, TokenPlan(uneven.expert_NK**2 // 5, uneven.weight_NK)),
        "all tokens to the last expert": _only(3, 4),
        "all tokens to the first expert": _only(0, 4),
        "null slots": (8, random_plan(2, 8, 4, null=0.4)),
        "all null": (4, TokenPlan(jnp.full((N, 2), 4, jnp.int32), jnp.zeros((N, 2)))),
        "equal weights": (8, random_plan(3, 8, 2)._replace(weight_NK=jnp.full((N, 2), 0.5))),
        "one expert": _only(0, 1),
        "every expert": (4, random_plan(4, 4, 4)),
        "expert-major, full": (4, _expert_plan(5, 4, 24, 0.0)),
        "expert-major, empty slots": (4, _expert_plan(6, 4, 40, 0.3)),
        "expert-major, all empty": (2, _expert_plan(7, 2, 8, 1.1)),
    }


def weights(num_experts: int, dtype: jnp.dtype = jnp.float32, dim: int = D, hidden: int = F) -> tuple[Array, ...]:
    """x[N, D] and the experts' gate_up[E, D, 2, F] and down[E, F, D]."""
    keys = jax.random.split(jax.random.key(1), 3)
    x_ND = jax.random.normal(keys[0], (N, dim))
    gate_up = jax.random.normal(keys[1], (num_experts, dim, 2, hidden)) * dim**-0.5
    down = jax.random.normal(keys[2], (num_experts, hidden, dim)) * hidden**-0.5
    return tuple(a.astype(dtype) for a in (x_ND, gate_up, down))


def runnable(executor: Executor) -> Run:
    """What this process can run of an executor: itself, or its interpreted twin."""
    if not executor.platforms or platform() in executor.platforms:
        return executor.run
    assert executor.interpreted, f"it runs on {', '.join(executor.platforms)} alone and has no `interpreted` twin"
    return executor.interpreted


def _call(executor: Executor, num_experts: int, capacity_factor: float = 1e6, room: int | None = None) -> Call:
    """By default one in which no row is dropped."""
    factor = {"num_experts_per_token": 1, "capacity_factor": capacity_factor}
    return Call(MoE(num_experts=num_experts, executor=executor.name, **factor), SEQUENCES, room)


def value_and_gradients(run: Callable[..., Array], plan: Plan, *arrays: Array) -> tuple[Array, ...]:
    """y and the gradients of a generic scalar of it for (plan weights, x, gate_up, down, and any biases)."""

    def loss(weight: Array, *arrays: Array) -> tuple[Array, Array]:
        y = run(plan.with_weights(weight), *arrays)
        return jnp.sum(y.astype(jnp.float32) * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

    every = tuple(range(len(arrays) + 1))
    (_, y), grads = jax.jit(jax.value_and_grad(loss, every, has_aux=True))(plan.weights, *arrays)
    # The weight of an empty slot is no variable: the oracle sees another value of it than executors that skip the slot.
    live = plan.ids < (arrays[2].shape[0] if isinstance(plan, TokenPlan) else y.shape[0])
    return y, jnp.where(live, grads[0], 0), *grads[1:]


@functools.cache
def oracle(name: str) -> tuple[Array, ...]:
    """`value_and_gradients` of the dense executor in float32 for one of the plans."""
    num_experts, plan = plans()[name]
    return value_and_gradients(run_dense, plan, *weights(num_experts))


def run_dense(plan: Plan, *arrays: Array) -> Array:
    """y by the dense executor."""
    return executors.get("dense").run(plan, *arrays, Call(MoE(num_experts=arrays[2].shape[0])))[0]


def run_whole(executor: Executor) -> Callable[..., Array]:
    """(plan, x, gate_up, down) -> y of a call in which no row may be dropped; NaN where one is."""

    def run(plan: Plan, *arrays: Array) -> Array:
        y, dropped = runnable(executor)(plan, *arrays, _call(executor, arrays[2].shape[0]))
        return jnp.where(dropped == 0, y, jnp.nan)

    return run


def assert_close(got: tuple[Array, ...], expected: tuple[Array, ...], tolerance: float) -> None:
    """Both are `value_and_gradients`; the distance of each pair is held against its length."""
    assert len(got) == len(expected)
    for name, a, b in zip(("y", "plan weights", "x", "gate_up", "down", "biases", "down_bias"), got, expected):
        assert a.dtype == b.dtype and a.shape == b.shape, f"{name}: {a.dtype}{a.shape}, expected {b.dtype}{b.shape}"
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        apart, length = np.linalg.norm(a - b), np.linalg.norm(b)
        assert apart <= tolerance * length, f"{name}: {apart:.3g} apart, the oracle's length is {length:.3g}"


def check_plan(executor: Executor, name: str) -> None:
    """The executor against the oracle on one of the plans, in float32."""
    num_experts, plan = plans()[name]
    try:
        assert_close(value_and_gradients(run_whole(executor), plan, *weights(num_experts)), oracle(name), 1e-5)
    except AssertionError as e:
        raise AssertionError(f"plan {name!r}: {e}") from e


def law_oracle(executor: Executor) -> None:
    """Output and all gradients equal those of the dense oracle, on every kind of plan, and no row is dropped."""
    for name in plans():
        check_plan(executor, name)


def law_bfloat16(executor: Executor) -> None:
    """In bfloat16, output and gradients are within rounding of the oracle's in float32, and of that type."""
    num_experts, plan = plans()["null slots"]
    got = value_and_gradients(run_whole(executor), plan, *weights(num_experts, jnp.bfloat16))
    full = oracle("null slots")
    expected = (full[0].astype(jnp.bfloat16), full[1], *(g.astype(jnp.bfloat16) for g in full[2:]))
    assert_close(got, expected, 2e-2)


def law_forms(executor: Executor) -> None:
    """With biases and every activation, output and all gradients equal the oracle's; `every_form` may deny it."""
    if not executor.every_form:
        return
    for activation, plan in zip(ACTIVATIONS, itertools.cycle(("expert-major, empty slots", "null slots"))):
        try:
            assert_close(form(executor, activation, plan), form(executors.get("dense"), activation, plan), 1e-5)
        except AssertionError as e:
            raise AssertionError(f"activation {activation!r}, with biases, plan {plan!r}: {e}") from e


@functools.cache
def form(executor: Executor, activation: str, name: str) -> tuple[Array, ...]:
    """`value_and_gradients` of experts with an activation and biases, for one of the plans."""
    num_experts, plan = plans()[name]
    run = form_of(executor, activation, num_experts)
    return value_and_gradients(run, plan, *weights(num_experts), *biases(num_experts))


def form_of(executor: Executor, activation: str, num_experts: int) -> Callable[..., Array]:
    """(plan, x, gate_up, down, biases of gate_up and of down) -> y; NaN where a row is dropped."""
    call = _call(executor, num_experts)
    call = call._replace(config=dataclasses.replace(call.config, activation=activation, expert_bias=True))

    def run(plan: Plan, x_ND: Array, gate_up_ED2F: Array, down_EFD: Array, *of_both: Array) -> Array:
        own = call._replace(biases=Biases(*of_both))
        y_ND, dropped = runnable(executor)(plan, x_ND, gate_up_ED2F, down_EFD, own)
        return jnp.where(dropped == 0, y_ND, jnp.nan)

    return run


def biases(num_experts: int) -> Biases:
    """As long as what they are added to; some gates and ups lie beyond every bound."""
    keys = jax.random.split(jax.random.key(2), 2)
    return Biases(5 * jax.random.normal(keys[0], (num_experts, 2, F)), jax.random.normal(keys[1], (num_experts, D)))


def law_stack(executor: Executor) -> None:
    """Two layers one after the other, whose weights are among those of all layers, equal the oracle's in output and in
    every gradient; that of other layers is zero. `in_stack` may deny it.
    """
    if executor.in_stack is None:
        return
    num_experts, plan = plans()["uneven, two experts empty"]
    x_ND, *of_layer = weights(num_experts)
    stacks = [jnp.stack([w * scale for scale in jnp.linspace(-1.0, 1.0, num_experts)]) for w in of_layer]
    call = _call(executor, num_experts)

    def run(plan: Plan, x_ND: Array, *stacks: Array) -> Array:
        fixed, sums = jax.lax.stop_gradient(stacks), stacks
        for layer in (6, 0):
            x_ND, dropped, sums = executor.in_stack(plan, x_ND, Stack(*fixed, sums, jnp.int32(layer)), call)
            x_ND = jnp.where(dropped == 0, x_ND, jnp.nan)
        return x_ND

    def expected(plan: Plan, x_ND: Array, *stacks: Array) -> Array:
        return run_dense(plan, run_dense(plan, x_ND, *(w[6] for w in stacks)), *(w[0] for w in stacks))

    assert_close(*(value_and_gradients(f, plan, x_ND, *stacks) for f in (run, expected)), 1e-5)


def law_room(executor: Executor) -> None:
    """With little room the rows of the first experts are computed, and those beyond are counted as dropped."""
    if not executor.keeps_room:
        return
    num_experts, plan = plans()["null slots"]
    expert_R, arrays = np.asarray(plan.expert_NK).reshape(-1), weights(num_experts)
    order_R = np.argsort(expert_R, kind="stable")
    named = int(np.sum(expert_R < num_experts))
    room = named // 2
    kept_R = np.isin(np.arange(expert_R.size), order_R[:room]).reshape(plan.expert_NK.shape)
    kept = TokenPlan(jnp.where(kept_R, plan.expert_NK, num_experts), jnp.where(kept_R, plan.weight_NK, 0))
    call = _call(executor, num_experts, room=room)
    y, dropped = jax.jit(lambda *arrays: runnable(executor)(plan, *arrays, call))(*arrays)
    assert int(dropped) == named - room, f"{dropped} rows are said to be dropped, {named - room} found no room"
    np.testing.assert_allclose(y, run_dense(kept, *arrays), rtol=1e-4, atol=1e-5)


def law_drops(executor: Executor) -> None:
    """Rows are dropped only if that is declared, as `limit` says, as many as are counted; `slots` means the same."""
    num_experts, plan = plans()["uneven, two experts empty"]
    arrays, call = weights(num_experts), _call(executor, num_experts, capacity_factor=0.5)
    y, dropped = jax.jit(lambda *arrays: runnable(executor)(plan, *arrays, call))(*arrays)
    assert dropped.dtype == jnp.int32 and dropped.shape == ()
    if executor.drops is None:
        assert int(dropped) == 0, f"{dropped} rows are dropped; Executor(drops=...) declares none"
        return
    assert executor.drops.may(call.config) and not executor.drops.may(_call(executor, num_experts).config)
    limited, count = executor.drops.limit(plan, call.config, SEQUENCES)
    slots, count_of_slots = executor.drops.slots(plan, call.config, SEQUENCES)
    assert 0 < int(dropped) == int(count) == int(count_of_slots)
    np.testing.assert_allclose(y, run_dense(limited, *arrays), rtol=1e-4, atol=1e-5)
    matrices = (combine_matrix(p, N, num_experts) for p in (slots, limited))
    np.testing.assert_allclose(*matrices, rtol=1e-6)


LAWS = {name.removeprefix("law_"): law for name, law in list(globals().items()) if name.startswith("law_")}
