"""The small routing problems that the laws run over: a strategy at a few shapes and options.

Letters: B batch, T time, N tokens (B*T), D model, E experts, K choices, R rows of any origin.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from frugalmoe.errors import UserError
from frugalmoe.routing import strategies
from frugalmoe.routing.contract import ExpertPlan, Inputs, Router, Routing, TokenPlan, arrays, combine_matrix
from frugalmoe.schema import MoE

B, T, D, VOCAB = 2, 8, 8, 16
N = B * T
SHAPES = ((8, 2), (8, 1))  # (E, K): a strategy runs at the first that its own check allows


class Case(NamedTuple):
    """A router and its config; hashable, so that its compiled functions are shared by all laws."""

    router: Router
    config: MoE

    def __str__(self) -> str:
        changed = {k: v for k, v in vars(self.config.options).items() if v != getattr(type(self.config.options)(), k)}
        name = f"{self.router.name}-{self.config.num_experts}x{self.config.num_experts_per_token}"
        return name + "".join(f"-{k}={v}" for k, v in changed.items())


def make_case(router: str | Router, num_experts: int = 8, k: int = 2, moe: dict | None = None, **options: Any) -> Case:
    router = strategies.get(router)
    config = MoE(num_experts=num_experts, num_experts_per_token=k, options=router.options(**options), **(moe or {}))
    return Case(router, config)


def all_cases() -> list[Case]:
    return [case for name in strategies.sound() for case in cases_of(name)]


def cases_of(router: str | Router) -> list[Case]:
    """The default options at the first of `SHAPES` that its check allows, and the cases that it names itself."""
    router = strategies.get(router)
    default = [make_case(router, *shape) for shape in SHAPES]
    cases = [case for case in default if router.check(case.config) is None][:1]
    cases += [make_case(router, 8, k, **options) for k, options in router.cases]
    if not cases:
        rule = "its check refuses 8 experts with 2 or 1 per token at the default options, which the laws run with"
        raise UserError(f"{router.name}: {rule}; name others: Router(cases=((K, {{option: value}}), ...))")
    return cases


@functools.cache
def make_inputs(seed: int = 0, *, padded: bool = True, train: bool = True) -> Inputs:
    """Random tokens. With `padded`, row 0 packs two documents and ends in padding."""
    rng = np.random.default_rng(seed)
    segment_ids, positions = np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    if padded:
        segment_ids[0], positions[0] = [1, 1, 1, 2, 2, 2, 0, 0], [0, 1, 2, 0, 1, 2, 0, 0]
    return Inputs(
        jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32),
        jnp.asarray(rng.integers(0, VOCAB, (B, T)), jnp.int32),
        jnp.asarray(segment_ids),
        jnp.asarray(positions),
        jax.random.split(jax.random.key(seed), B),
        jnp.int32(1000),  # in the middle of schedules that have a default length
        jnp.int32(0),
        train,
    )


def carry_into(case: Case, inputs: Inputs) -> dict | None:
    """What an earlier layer could have handed on: some function of each token, zeros at padding."""
    if inputs.carry is not None:
        return inputs.carry
    clean_BTD = np.where(np.asarray(inputs.valid_BT)[..., None], inputs.x_BTD, 0).astype(np.float32)

    def fill(zeros: jax.Array) -> jax.Array:
        mix = np.random.default_rng(3).normal(size=(D, *zeros.shape[2:])) / D**0.5
        return jnp.asarray(np.tanh(np.tensordot(clean_BTD, mix, 1)), zeros.dtype)

    return jax.tree.map(fill, case.router.init_carry(case.config, *inputs.token_ids_BT.shape))


def run_linear_experts(num_experts: int, plan: Any, x_RD: jax.Array) -> jax.Array:
    """y[R, D] = sum_e G[r, e] * x_r @ M_e, with fixed matrices M."""
    expert_EDD = jax.random.normal(jax.random.key(7), (num_experts, D, D)) / D**0.5
    return jnp.einsum("re,rd,edf->rf", combine_matrix(plan, x_RD.shape[0], num_experts), x_RD, expert_EDD)


def with_experts(inputs: Inputs, config: MoE) -> Inputs:
    def run_experts(plan: ExpertPlan, x_RD: jax.Array) -> jax.Array:
        return run_linear_experts(config.num_experts, plan, x_RD)

    return inputs._replace(run_experts=run_experts)


@functools.cache
def make_params(case: Case, seed: int = 0) -> tuple[dict, dict]:
    """Parameters, the layer's own and the shared ones, and a state above its initial value.

    Above, because a state that is a strength or a rate is not negative.
    """
    own = case.router.init(jax.random.key(seed), D, case.config)
    shared = case.router.init_shared(jax.random.key(seed + 2), D, case.config)
    assert not own.keys() & shared.keys()
    noise = jnp.abs(jax.random.normal(jax.random.key(seed + 1), (16,)))
    state = jax.tree.map(lambda s: s + 0.1 * jnp.resize(noise, s.shape), case.router.init_state(D, case.config))
    return arrays({**own, **shared}), state


def direction_like(params: dict, seed: int) -> dict:
    """A random direction in the space of parameters like these, of length 1 in each array."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, [n / jnp.linalg.norm(n) for n in noise])


def arrays_of(inputs: Inputs) -> dict[str, jax.Array]:
    """The arrays of the inputs by name, all but the carry's."""
    static = ("train", "carry", "axis_names", "run_experts", "logit_map")
    return {name: array for name, array in inputs._asdict().items() if name not in static}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # not by case: routers that differ in claims alone share it
def compiled_route(function: Callable, config: MoE, train: bool, params: dict, state: dict, arrays: dict) -> Routing:
    return function(params, state, with_experts(Inputs(**arrays, train=train), config), config)


def route(case: Case, inputs: Inputs, params: dict | None = None, state: dict | None = None) -> Routing:
    """The compiled route, with the default parameters and state where none are given."""
    default_params, default_state = make_params(case)
    params, state = default_params if params is None else params, default_state if state is None else state
    arrays = arrays_of(inputs) | {"carry": carry_into(case, inputs)}
    return compiled_route(case.router.route, case.config, inputs.train, params, state, arrays)


def eager_route(case: Case, inputs: Inputs) -> Routing:
    """The route, operation by operation."""
    inputs = with_experts(inputs._replace(carry=carry_into(case, inputs)), case.config)
    return case.router.route(*make_params(case), inputs, case.config)


class Extreme(NamedTuple):
    """Inputs, parameters and state that drive a gate to where float32 ends."""

    inputs: Inputs
    params: dict
    state: dict


def extremes(case: Case) -> dict[str, Extreme]:
    """By name: all logits of a token at a level, spread over both signs, one token far out, ties, a bias beyond all.

    The level comes in by channel 0 of the input, which every kernel reads with weight 1 (for a gate of another kind it
    is just a large input). Levels: where a sigmoid's sum is lost to 1e-20, where float32 has no sigmoid, and far out.
    """
    inputs, (params, state) = make_inputs(), make_params(case)
    x_BTD, kernels = np.asarray(inputs.x_BTD), ("kernel_DE", "kernel_DX", "projection_DP", "encoder_DP", "proj_DP")
    reading = {name: p.at[0].set(1.0) if name in kernels else p for name, p in params.items()}
    self_routed = not any(name in kernels for name in params)
    far = {name: s + 1e3 * jnp.arange(8) if name.endswith("_E") else s for name, s in state.items()}

    def at(level: float | np.ndarray) -> Inputs:
        changed = x_BTD.copy()
        changed[..., slice(None) if self_routed else 0] += level
        return inputs._replace(x_BTD=jnp.asarray(changed, jnp.float32))

    one = np.zeros((B, T, 1) if self_routed else (B, T), np.float32)
    one[0, 1] = -100
    found = {f"level {level:g}": Extreme(at(level), reading, state) for level in (-1e4, -100, -50, -46, 100, 1e4)}
    found |= {f"times {f:g}": Extreme(inputs._replace(x_BTD=inputs.x_BTD * f), params, state) for f in (100, 1e4)}
    found["one token"] = Extreme(at(one), reading, state)
    found["ties"] = Extreme(inputs._replace(x_BTD=jnp.zeros_like(inputs.x_BTD)), params, state)
    found["bias"] = Extreme(inputs, params, far)
    found["bias and level"] = Extreme(at(-100), reading, far)
    return found


def combine(case: Case, routing: Routing, time: int = T) -> np.ndarray:
    """G as [B, T, E]."""
    return _dense(case, routing.plan, routing.plan.weights, time)


def effects(case: Case, routing: Routing, time: int = T) -> np.ndarray:
    """All that a token gets and hands on, [B, T, ...]: its row of G, what is added, its scale, its carry."""
    others = (routing.added_BTD, routing.input_scale_BT, routing.carry)
    flat = [np.asarray(leaf).reshape(B, time, -1) for leaf in jax.tree.leaves(others)]
    return np.concatenate([combine(case, routing, time), *flat], axis=-1)


def selections(case: Case, routing: Routing, time: int = T) -> np.ndarray:
    """How often each token names each expert [B, T, E], whatever the weights."""
    return _dense(case, routing.plan, np.ones(routing.plan.weights.shape), time).astype(int)


def _dense(case: Case, plan: Any, weights: Any, time: int) -> np.ndarray:
    """The combine matrix in numpy, so that the laws do not lean on the code under test."""
    num_tokens, num_experts = B * time, case.config.num_experts
    g_NE = np.zeros((num_tokens + 1, num_experts + 1), np.float32)
    ids, weights = np.asarray(plan.ids), np.asarray(weights)
    for (row, column), weight in np.ndenumerate(weights):
        token, expert = (row, ids[row, column]) if isinstance(plan, TokenPlan) else (ids[row, column], row)
        g_NE[token, expert] += weight
    return g_NE[:num_tokens, :num_experts].reshape(B, time, num_experts)


class Probe(NamedTuple):
    """A layer's objective, its gradients, and the routing that made it."""

    value: jax.Array
    params: dict  # gradients
    state: dict
    x_BTD: jax.Array
    routing: Routing


def objective(
    function: Callable,
    config: MoE,
    params: dict,
    state: dict,
    inputs: Inputs,
    *,
    weight_BTD: jax.Array,
    coefficients: dict,
) -> tuple[jax.Array, Routing]:
    """sum(weight * y) of a layer with linear experts, as a language-model loss sees it, plus auxiliary losses."""
    routing = function(params, state, with_experts(inputs, config), config)
    x_BTD = jnp.where(inputs.valid_BT[..., None], inputs.x_BTD, 0)
    if routing.input_scale_BT is not None:
        x_BTD = x_BTD * routing.input_scale_BT[..., None]
    y_BTD = run_linear_experts(config.num_experts, routing.plan, x_BTD.reshape(-1, D)).reshape(x_BTD.shape)
    if routing.added_BTD is not None:
        y_BTD = y_BTD + routing.added_BTD
    extra = sum((coefficients.get(name, 0.0) * loss.sum for name, loss in routing.losses.items()), jnp.float32(0))
    return jnp.sum(y_BTD * weight_BTD) + extra, routing


@functools.partial(jax.jit, static_argnums=(0, 1))
def _probe(
    function: Callable, config: MoE, weight: Any, coefficients: dict, held: tuple[dict, dict], arrays: dict
) -> Probe:
    """`held`: parameters and state."""

    @jax.checkpoint  # so that every law about gradients is also one about recomputed layers
    def value(params: dict, state: dict, x: jax.Array) -> tuple[jax.Array, Routing]:
        inputs = Inputs(**arrays | {"x_BTD": x}, train=True)
        return objective(function, config, params, state, inputs, weight_BTD=weight, coefficients=coefficients)

    (loss, routing), gradients = jax.value_and_grad(value, (0, 1, 2), has_aux=True)(*held, arrays["x_BTD"])
    return Probe(loss, *gradients, routing)


WEIGHT = np.random.default_rng(9).normal(size=(B, T, D)).astype(np.float32)


def probe(
    case: Case,
    inputs: Inputs,
    weight: Any = WEIGHT,
    *,
    params: dict | None = None,
    state: dict | None = None,
    **coefficients: float,
) -> Probe:
    """The objective and its gradients in training; losses that are not given a coefficient have 0."""
    own_params, own_state = make_params(case)
    coefficients = {name: jnp.float32(coefficients.get(name, 0)) for name in case.router.about.losses}
    params, state = own_params if params is None else params, own_state if state is None else state
    function, config = case.router.route, case.config
    arrays = arrays_of(inputs) | {"carry": carry_into(case, inputs)}
    return _probe(function, config, jnp.asarray(weight), coefficients, (params, state), arrays)


def assert_same(a: object, b: object, tolerance: float = 0.0) -> None:
    """Two trees of arrays are equal: bit for bit, or to a relative and absolute tolerance."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
