"""Laws of how a router is run: compiled or not, in what precision, on how many shards, by which executor.

Letters: B batch, T time, N tokens (B*T), D model, E experts, F expert hidden; 2 = (gate, up).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from frugalmoe.experts import executors
from frugalmoe.laws.cases import (
    WEIGHT,
    B,
    Case,
    D,
    T,
    arrays_of,
    assert_same,
    carry_into,
    compiled_route,
    eager_route,
    make_inputs,
    make_params,
    objective,
    probe,
    route,
)
from frugalmoe.model.moe import apply_routing
from frugalmoe.routing.contract import ExpertPlan, Inputs, Routing, TokenPlan, combine_matrix
from frugalmoe.schema import MoE
from frugalmoe.sharding import platform


def law_pure(case: Case) -> None:
    """Eager, compiled or recomputed in the backward pass, the routing is the same; new data compile nothing."""
    inputs = make_inputs()
    compiled = route(case, inputs)
    assert_same(compiled, eager_route(case, inputs), 1e-5)
    assert_same(compiled, probe(case, inputs).routing, 1e-5)
    size = compiled_route._cache_size()
    route(case, make_inputs(1))
    assert compiled_route._cache_size() == size


def law_precision(case: Case) -> None:
    """bfloat16 activations change no dtype of the routing and lose nothing after the cast: scores are float32."""
    inputs = make_inputs()
    low = inputs._replace(x_BTD=inputs.x_BTD.astype(jnp.bfloat16))
    routing = eager_route(case, low)
    integers = {key for key in routing.stats if key in ("counts", "tokens", "assigned", "ties", "overflow")}
    assert routing.plan.ids.dtype == jnp.int32 and routing.plan.weights.dtype == jnp.float32
    assert all(routing.stats[key].dtype == jnp.int32 for key in integers)
    rest = {key: value for key, value in routing.stats.items() if key not in integers}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((rest, routing.losses, make_params(case))))
    assert_same(routing, eager_route(case, low._replace(x_BTD=low.x_BTD.astype(jnp.float32))))


def law_shards(case: Case) -> None:
    """One sequence per shard of the batch gives the value, counts and gradients of the whole batch."""
    params, state = make_params(case)
    inputs, coefficients = make_inputs(), dict.fromkeys(case.router.about.losses, 1.0)
    of_sequences = arrays_of(inputs)
    layer = {name: of_sequences.pop(name) for name in ("step", "layer")}

    def one_shard(params: dict, weight_TD: jax.Array, carry: dict, arrays: dict) -> tuple[jax.Array, jax.Array]:
        weight_BTD, carry, arrays = jax.tree.map(lambda a: a[None], (weight_TD, carry, arrays))
        shard = Inputs(**arrays, **layer, train=True, carry=carry, axis_names=("data",))
        named = {"weight_BTD": weight_BTD, "coefficients": coefficients}
        value, routing = objective(case.router.route, case.config, params, state, shard, **named)
        return jax.lax.psum((value, routing.stats["counts"]), "data")

    def all_shards(params: dict, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        in_axes = (None, *[0] * len(arrays))
        return jax.tree.map(lambda a: a[0], jax.vmap(one_shard, in_axes, axis_name="data")(params, *arrays))

    arrays = carry_into(case, inputs), of_sequences
    (value, counts), gradient = jax.jit(jax.value_and_grad(all_shards, has_aux=True))(params, WEIGHT, *arrays)
    whole = probe(case, inputs, **coefficients)
    assert_same((value, counts, gradient), (whole.value, whole.routing.stats["counts"], whole.params), 1e-4)


def law_executors(case: Case) -> None:
    """Every executor gives the output that a routing defines, and its gradients, for this router's decisions."""
    inputs, rng = make_inputs(), np.random.default_rng(0)
    gate_up_ED2F, down_EFD = (rng.normal(size=s).astype(np.float32) / 3 for s in ((8, D, 2, 4), (8, 4, D)))
    decided = route(case, inputs)._replace(losses={}, stats={}, carry=None)
    arguments = decided, inputs.valid_BT, inputs.x_BTD, gate_up_ED2F, down_EFD
    oracle = layer_output(None, *arguments)
    for name in executors.sound():
        if not executors.get(name).platforms or platform() in executors.get(name).platforms:
            assert_same(layer_output(name, *arguments), oracle, 1e-4)


@functools.partial(jax.jit, static_argnums=0)
def layer_output(executor: str | None, routing: Routing, valid_BT: jax.Array, *arrays: jax.Array) -> tuple:
    """Value, output and gradients of sum(WEIGHT * y) of SwiGLU experts; no executor: y by its definition."""
    ids, weights = routing.plan
    others = routing.added_BTD, routing.input_scale_BT

    def value(weights: jax.Array, others: tuple, x_BTD: jax.Array, gate_up_ED2F: jax.Array, down_EFD: jax.Array):
        num_experts, (added_BTD, scale_BT) = down_EFD.shape[0], others
        plan = (TokenPlan if ids.shape[0] == B * T else ExpertPlan)(ids, weights)
        if executor is None:
            g_NE = combine_matrix(plan, B * T, num_experts)
            x_ND = (x_BTD if scale_BT is None else x_BTD * scale_BT[..., None]).reshape(-1, D)
            h_NE2F = jnp.einsum("nd,edgf->negf", x_ND, gate_up_ED2F)
            y_ND = jnp.einsum("ne,nef,efd->nd", g_NE, jax.nn.silu(h_NE2F[:, :, 0]) * h_NE2F[:, :, 1], down_EFD)
            y_BTD, dropped = y_ND.reshape(B, T, D) + (0 if added_BTD is None else added_BTD), 0
        else:
            no_drop = float(num_experts)  # every expert has room for all tokens
            moe = MoE(num_experts=num_experts, num_experts_per_token=1, executor=executor, capacity_factor=no_drop)
            made = Routing(plan, {}, {}, added_BTD=added_BTD, input_scale_BT=scale_BT)
            y_BTD, dropped = apply_routing(made, x_BTD, valid_BT, gate_up_ED2F, down_EFD, moe)
        return jnp.sum(y_BTD * WEIGHT), (y_BTD, dropped)

    return jax.value_and_grad(value, argnums=(0, 1, 2, 3, 4), has_aux=True)(weights, others, *arrays)
