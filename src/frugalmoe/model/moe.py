"""The mixture-of-experts layer: it routes, executes the plan and adds shared experts. It does not know its router.

Letters: B batch, T time, N tokens (B*T), D model, F expert hidden, E experts.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

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
from frugalmoe.sharding import AXES, BATCH_AXES, axis_size, local, own_tokens, parameter, spec, whole_sequences


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
    trace: bool = False  # also return which expert got which token, and the plan
    # A pytree, for evaluation: (plan, inputs, num_experts, whether the router adds) -> the plan to execute instead.
    intervention: Callable[[Plan, Inputs, int, bool], Plan] | None = None
    shared_router: Mapping[str, Array] = FrozenDict()  # the router's parameters that all layers share

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


class Shards(NamedTuple):
    """What a device has of a layer's parameters and of its inputs; `LETTERS` says how each is spread."""

    router: Mapping[str, Array]  # parameters, the layer's own and the shared ones
    state: Mapping[str, Array]  # of the router
    gate_up_ED2F: Array
    down_EFD: Array
    biases: experts.Biases | None  # of the experts
    inputs: Inputs
    intervention: Callable | None  # of `Context`


_OF_INPUTS = Inputs("BTD", "BT", "BT", "BT", "B", "", "", train=None, carry="BT")
LETTERS = Shards("", "", "ED2F", "EFD", experts.Biases("E2F", "ED"), _OF_INPUTS, "")


def route_and_execute(shards: Shards, config: MoE, train: bool, trace: bool) -> tuple[Array, Routed, Carry]:
    """One device's part of the layer -> (y[B, T, D] of its tokens, the layer's report, its tokens' carry)."""
    weights = (shards.gate_up_ED2F, shards.down_EFD)
    (*fixed, biases), dtype = jax.lax.stop_gradient((*weights, shards.biases)), shards.inputs.x_BTD.dtype
    run_experts = lambda plan, x_RD: experts.execute_slots(plan, x_RD.astype(dtype), *fixed, config, biases)
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
    rest = {"config": config, "biases": shards.biases}
    with jax.named_scope("experts"):
        y_BTD, dropped = apply_routing(routing, inputs.x_BTD, inputs.valid_BT, *weights, **rest)
    with jax.named_scope("router"):
        stats = {**routing.stats, "dropped": dropped, **load_of_devices(plan, inputs.valid_BT, config)}
        losses, stats = jax.lax.psum((routing.losses, stats), BATCH_AXES)
    seen = _trace(plan, inputs, config) if trace else (None, None)
    return y_BTD, Routed(losses, stats, *seen), own_tokens(routing.carry)


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
    scaled_BTD = x_BTD
    if routing.input_scale_BT is not None:
        scale_BT1 = routing.input_scale_BT[..., None].astype(x_BTD.dtype)
        scaled_BTD = jnp.where(valid_BT[..., None], x_BTD, 0) * scale_BT1
    y_BTD, dropped = experts.execute(routing.plan, scaled_BTD, gate_up_ED2F, down_EFD, config, biases)
    added_BTD = own_tokens(routing.added_BTD)
    return y_BTD if added_BTD is None else y_BTD + added_BTD.astype(y_BTD.dtype), dropped


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

    def __call__(self, x_BTD: Array, context: Context, layer: Array, carry: Carry) -> tuple[Array, Routed, Carry]:
        biases = None
        if self.config.expert_bias:
            biases = experts.Biases(*(b.astype(x_BTD.dtype) for b in (self.gate_up_bias_E2F, self.down_bias_ED)))
        letters = LETTERS if biases else LETTERS._replace(biases=None)
        weights = self.gate_up_ED2F[...], self.down_EFD[...]
        if axis_size(*AXES) > 1:  # what devices sum of gradients has the compute dtype
            weights = tuple(w.astype(x_BTD.dtype) for w in weights)
        shards = Shards(
            router={k: v[...] for k, v in self.router.items()} | dict(context.shared_router),
            state={k: v[...] for k, v in self.router_state.items()},
            gate_up_ED2F=weights[0],
            down_EFD=weights[1],
            biases=biases,
            inputs=context.inputs(x_BTD, layer, carry),
            intervention=context.intervention,
        )
        on_device = functools.partial(route_and_execute, config=self.config, train=context.train, trace=context.trace)
        y_BTD, routed, carry = local(on_device, (letters,), ("BTD", Routed("", "", "BT", "BT"), "BT"))(shards)
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
