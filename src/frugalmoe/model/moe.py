"""The mixture-of-experts layer: it routes, executes the plan and adds shared experts. It does not know its router.

Letters: B batch, T time, N tokens (B*T), D model, F expert hidden, E experts.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from frugalmoe import experts
from frugalmoe.experts.exchange import load_of_devices
from frugalmoe.model.layers import FeedForward, normal
from frugalmoe.routing import strategies
from frugalmoe.routing.contract import Carry, Inputs, Loss, Plan, Routing, TokenPlan, selection_matrix, token_major
from frugalmoe.schema import FrozenDict, Model, MoE
from frugalmoe.sharding import (
    AXES,
    BATCH_AXES,
    EXPERTS_ALONE,
    axis_size,
    local,
    own_tokens,
    parameter,
    spec,
    whole_sequences,
)


class RouterState(nnx.Variable):
    """State of a routing strategy: float32, checkpointed, never touched by a gradient."""


class Context(NamedTuple):
    """What every layer may look at beside the activations."""

    token_ids_BT: Array
    segment_ids_BT: Array  # 0 = padding
    positions_BT: Array
    keys_B: Array
    step: Array
    train: bool = False
    accumulates: bool = False  # a gradient is added in place to that of other micro-batches
    together: bool = False  # under a `jax.vmap` over runs
    trace: bool = False  # also return which expert got which token, and the plan
    # A pytree, for evaluation: (plan, inputs, num_experts, whether the router adds) -> the plan to execute instead.
    intervention: Callable[[Plan, Inputs, int, bool], Plan] | None = None
    shared_router: Mapping[str, Array] = FrozenDict()  # the router's parameters that all layers share
    stack: tuple[Array, Array] | None = None  # gate and up, down of the experts of all layers; None: each has its own

    def inputs(self, x_BTD: Array, layer: Array, carry: Carry) -> Inputs:
        """What a layer's router may look at: the arrays of it; what is no array is added on the device."""
        of_tokens = (self.token_ids_BT, self.segment_ids_BT, self.positions_BT, self.keys_B)
        return Inputs(x_BTD, *of_tokens, self.step, layer, train=None, carry=carry)


class Routed(NamedTuple):
    """What a layer reports about its routing; stacked over layers by the scan."""

    losses: Mapping[str, Loss]
    stats: Mapping[str, Array]
    selected_BTE: Array | None  # bool, with `trace`
    plan: TokenPlan | None  # token-major [B, T, K], with `trace`


class Through(NamedTuple):
    """What goes from MoE layer to MoE layer where `Context.stack` is one."""

    carry: Carry  # of routers
    sums: tuple[Array, Array]  # see `experts.Stack`


class Shards(NamedTuple):
    """What a device has of a layer's parameters and of its inputs; `LETTERS` says how each is spread."""

    router: Mapping[str, Array]  # parameters, the layer's own and the shared ones
    state: Mapping[str, Array]  # of the router
    gate_up_ED2F: Array
    down_EFD: Array
    biases: experts.Biases | None  # of the experts
    inputs: Inputs
    intervention: Callable | None  # of `Context`
    stack: experts.Stack | None  # in place of the layer's own weights


_OF_INPUTS = Inputs("BTD", "BT", "BT", "BT", "B", "", "", train=None, carry="BT")
LETTERS = Shards("", "", "ED2F", "EFD", experts.Biases("E2F", "ED"), _OF_INPUTS, "", "")


def route_and_execute(shards: Shards, config: MoE, train: bool, trace: bool) -> tuple[Array, Routed, Carry, Any]:
    """One device's part of the layer -> (y[B, T, D] of its tokens, the layer's report, its tokens' carry, the stack's
    sums).
    """
    stack, weights = shards.stack, (shards.gate_up_ED2F, shards.down_EFD)
    biases, dtype = jax.lax.stop_gradient(shards.biases), shards.inputs.x_BTD.dtype

    def run_experts(plan: Plan, x_RD: Array) -> Array:
        fixed = jax.lax.stop_gradient(weights) if stack is None else stack.of_layer()
        return experts.execute_slots(plan, x_RD.astype(dtype), *fixed, config, biases)

    inputs = whole_sequences(shards.inputs, LETTERS.inputs)
    inputs = inputs._replace(train=train, axis_names=BATCH_AXES, run_experts=run_experts)
    with jax.named_scope("router"):
        route = strategies.get(config.router).route
        routing = route(shards.router, jax.lax.stop_gradient(shards.state), inputs, config)
    # A recomputed backward pass takes the saved plan, so that near-ties cannot be routed twice differently.
    plan = jax.tree.map(lambda a: checkpoint_name(a, "routing_plan"), routing.plan)
    if shards.intervention is not None:
        plan = shards.intervention(plan, inputs, config.num_experts, routing.added_BTD is not None)
    routing = routing._replace(plan=plan)
    execute = lambda x_BTD: experts.execute(plan, x_BTD, *weights, config, shards.biases)
    if stack is not None:
        execute = lambda x_BTD: experts.execute_in_stack(plan, x_BTD, stack, config, shards.biases)
    with jax.named_scope("experts"):
        y_BTD, dropped, *sums = _applied(routing, inputs.x_BTD, inputs.valid_BT, execute)
    with jax.named_scope("router"):
        stats = {**routing.stats, "dropped": dropped, **load_of_devices(plan, inputs.valid_BT, config)}
        losses, stats = jax.lax.psum((routing.losses, stats), BATCH_AXES)
    seen = _trace(plan, inputs, config) if trace else (None, None)
    return y_BTD, Routed(losses, stats, *seen), own_tokens(routing.carry), *(sums or [None])


def apply_routing(
    routing: Routing,
    x_BTD: Array,
    valid_BT: Array,
    gate_up_ED2F: Array,
    down_EFD: Array,
    config: MoE,
    *,
    biases: experts.Biases | None = None,
) -> tuple[Array, Array]:
    """-> (y_n = sum_e G[n, e] * expert_e(s_n * x_n) + a_n in x's dtype, int32 [] rows that were dropped).

    Arguments are of whole sequences, the result is of this device's tokens.
    """
    execute = lambda x_BTD: experts.execute(routing.plan, x_BTD, gate_up_ED2F, down_EFD, config, biases)
    return _applied(routing, x_BTD, valid_BT, execute)


def _applied(routing: Routing, x_BTD: Array, valid_BT: Array, execute: Callable[[Array], tuple]) -> tuple:
    """What `execute` makes of the input as the routing scales it; its first result with what the routing adds."""
    scaled_BTD = x_BTD
    if routing.input_scale_BT is not None:
        scale_BT1 = routing.input_scale_BT[..., None].astype(x_BTD.dtype)
        scaled_BTD = jnp.where(valid_BT[..., None], x_BTD, 0) * scale_BT1
    y_BTD, *rest = execute(scaled_BTD)
    added_BTD = own_tokens(routing.added_BTD)
    return y_BTD if added_BTD is None else y_BTD + added_BTD.astype(y_BTD.dtype), *rest


def _trace(plan: Plan, inputs: Inputs, config: MoE) -> tuple[Array, TokenPlan]:
    """(which expert got which token, the plan by token), each [B, T, ...] of this device's tokens."""
    batch, time = inputs.token_ids_BT.shape
    found = tuple(f(plan, batch * time, config.num_experts) for f in (selection_matrix, token_major))
    return own_tokens(jax.tree.map(lambda a_Nx: a_Nx.reshape(batch, time, -1), found))


OF_EXPERTS = ("gate_up_ED2F", "down_EFD", "gate_up_bias_E2F", "down_bias_ED")  # parameters, of each routed expert


class MoELayer(nnx.Module):
    """y = shared(x) + what the experts make of the routing strategy's decisions."""

    def __init__(self, key: Array, config: Model, out_std: float):
        self.config = moe = config.moe
        router = strategies.get(moe.router)
        router_key, up_key, down_key, shared_key = jax.random.split(key, 4)
        self.router = nnx.Dict(dict(router.new_params(router_key, config.dim, moe)))
        self.router_state = nnx.Dict({k: RouterState(v) for k, v in router.init_state(config.dim, moe).items()})
        self.gate_up_ED2F = normal(up_key, "ED->2F", (moe.num_experts, config.dim, 2, moe.expert_dim), config.init_std)
        self.down_EFD = normal(down_key, "EF->D", (moe.num_experts, moe.expert_dim, config.dim), out_std)
        if moe.expert_bias:
            self.gate_up_bias_E2F = parameter(jnp.zeros((moe.num_experts, 2, moe.expert_dim)), "E2F", "vector")
            self.down_bias_ED = parameter(jnp.zeros((moe.num_experts, config.dim)), "ED", "vector")
        if moe.num_shared_experts:
            hidden = moe.num_shared_experts * moe.expert_dim
            self.shared = FeedForward(shared_key, config.dim, hidden, config.init_std, out_std)
        if moe.shared_gate:
            self.shared_gate_D = parameter(jnp.zeros(config.dim), "D", "vector")

    def __call__(self, x_BTD: Array, context: Context, layer: Array, carry: Any) -> tuple[Array, Routed, Any]:
        """carry: of routers, or `Through` where the context has a stack."""
        biases = None
        if self.config.expert_bias:
            biases = experts.Biases(*(b.astype(x_BTD.dtype) for b in (self.gate_up_bias_E2F, self.down_bias_ED)))
        letters = LETTERS if biases else LETTERS._replace(biases=None)
        weights = self.gate_up_ED2F[...], self.down_EFD[...]
        if axis_size(*AXES) > 1:  # what devices sum of gradients has the compute dtype
            weights = tuple(w.astype(x_BTD.dtype) for w in weights)
        stack = None
        if context.stack is not None:
            carry, sums = carry
            stack = experts.Stack(*context.stack, sums, layer)
        shards = Shards(
            router={k: v[...] for k, v in self.router.items()} | dict(context.shared_router),
            state={k: v[...] for k, v in self.router_state.items()},
            gate_up_ED2F=weights[0],
            down_EFD=weights[1],
            biases=biases,
            inputs=context.inputs(x_BTD, layer, carry),
            intervention=context.intervention,
            stack=stack,
        )
        on_device = functools.partial(route_and_execute, config=self.config, train=context.train, trace=context.trace)
        letters_out = ("BTD", Routed("", "", "BT", "BT"), "BT", EXPERTS_ALONE)
        y_BTD, routed, carry, sums = local(on_device, (letters,), letters_out)(shards)
        if stack is not None:
            carry = Through(carry, sums)
        if self.config.num_shared_experts:
            y_BTD = y_BTD + self._shared(x_BTD)
        return y_BTD, routed, carry

    def _shared(self, x_BTD: Array) -> Array:
        """What the shared experts add."""
        y_BTD = self.shared(x_BTD)
        if not self.config.shared_gate:
            return y_BTD
        score_BT = jnp.einsum("btd,d->bt", x_BTD, self.shared_gate_D.astype(x_BTD.dtype), out_sharding=spec("BT"))
        return y_BTD * jax.nn.sigmoid(score_BT)[..., None]
