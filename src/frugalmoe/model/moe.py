"""The mixture-of-experts layer: it routes, executes the plan and adds shared experts. It does not know its router.

Letters: B batch, T time, N tokens (B*T), D model, F expert hidden, E experts.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from frugalmoe.experts import parallel
from frugalmoe.model.layers import FeedForward, normal
from frugalmoe.routing import strategies
from frugalmoe.routing.contract import (
    ExpertPlan,
    Inputs,
    Loss,
    Plan,
    Routing,
    TokenPlan,
    selection_matrix,
    token_major,
)
from frugalmoe.schema import FrozenDict, Model, MoE
from frugalmoe.sharding import BATCH_AXES, local, own_tokens, whole_sequences


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
    trace: bool = False  # also return which expert got which token, and the plan
    # A pytree, for evaluation: (plan, inputs, num_experts, whether the router adds) -> the plan to execute instead.
    intervention: Callable[[Plan, Inputs, int, bool], Plan] | None = None
    shared_router: Mapping[str, Array] = FrozenDict()  # the router's parameters that all layers share


class Routed(NamedTuple):
    """What a layer reports about its routing; stacked over layers by the scan."""

    losses: Mapping[str, Loss]
    stats: Mapping[str, Array]
    selected_BTE: Array | None  # bool, with `trace`
    plan: TokenPlan | None  # token-major [B, T, K], with `trace`


def execute(
    routing: Routing, x_BTD: Array, valid_BT: Array, gate_up_ED2F: Array, down_EFD: Array, config: MoE
) -> tuple[Array, Array]:
    """-> (y_n = sum_e G[n, e] * expert_e(s_n * x_n) + a_n in x's dtype, int32 [] rows that were dropped).

    Arguments are of whole sequences, the result is of this device's tokens.
    """
    scaled_BTD = x_BTD
    if routing.input_scale_BT is not None:
        scale_BT1 = routing.input_scale_BT[..., None].astype(x_BTD.dtype)
        scaled_BTD = jnp.where(valid_BT[..., None], x_BTD, 0) * scale_BT1
    y_BTD, dropped = parallel.execute(routing.plan, scaled_BTD, gate_up_ED2F, down_EFD, config)
    added_BTD = own_tokens(routing.added_BTD)
    return y_BTD if added_BTD is None else y_BTD + added_BTD.astype(y_BTD.dtype), dropped


class MoELayer(nnx.Module):
    """y = shared(x) + what `execute` makes of the routing strategy's decisions."""

    def __init__(self, key: Array, config: Model, out_std: float):
        self.config = moe = config.moe
        router = strategies.get(moe.router)
        router_key, up_key, down_key, shared_key = jax.random.split(key, 4)
        self.router = nnx.Dict(dict(router.init(router_key, config.dim, moe)))
        self.router_state = nnx.Dict({k: RouterState(v) for k, v in router.init_state(config.dim, moe).items()})
        self.gate_up_ED2F = normal(up_key, "ED->2F", (moe.num_experts, config.dim, 2, moe.expert_dim), config.init_std)
        self.down_EFD = normal(down_key, "EF->D", (moe.num_experts, moe.expert_dim, config.dim), out_std)
        if moe.num_shared_experts:
            hidden = moe.num_shared_experts * moe.expert_dim
            self.shared = FeedForward(shared_key, config.dim, hidden, config.init_std, out_std)

    def __call__(self, x_BTD: Array, context: Context, layer: Array, carry: object) -> tuple[Array, Routed, object]:
        router = strategies.get(self.config.router)
        moe = self.config

        def route_and_execute(
            params, state, gate_up, down, layer, step, intervention, x, token_ids, segment_ids, positions, keys, carry
        ):
            def run_experts(plan: ExpertPlan, x_RD: Array) -> Array:
                detached = jax.lax.stop_gradient((gate_up, down))
                return parallel.execute_slots(plan, x_RD.astype(x.dtype), *detached, moe)

            x, token_ids, segment_ids, positions, carry = whole_sequences((x, token_ids, segment_ids, positions, carry))
            inputs = Inputs(
                x, token_ids, segment_ids, positions, keys, step, layer, context.train, carry, BATCH_AXES, run_experts
            )
            routing = router.route(params, jax.lax.stop_gradient(state), inputs, moe)
            # A recomputed backward pass takes the saved plan, so that near-ties cannot be routed twice differently.
            plan = jax.tree.map(lambda a: checkpoint_name(a, "routing_plan"), routing.plan)
            if intervention is not None:
                plan = intervention(plan, inputs, moe.num_experts, routing.added_BTD is not None)
            y, dropped = execute(routing._replace(plan=plan), x, inputs.valid_BT, gate_up, down, moe)
            stats = {**routing.stats, "dropped": dropped, **parallel.load_of_devices(plan, inputs.valid_BT, moe)}
            losses, stats = jax.lax.psum((routing.losses, stats), BATCH_AXES)
            traced = (None, None)
            if context.trace:
                traced = (f(plan, token_ids.size, moe.num_experts) for f in (selection_matrix, token_major))
                traced = own_tokens(jax.tree.map(lambda a: a.reshape(*x.shape[:2], -1), tuple(traced)))
            return y, losses, stats, traced, own_tokens(routing.carry)

        apply = local(
            route_and_execute,
            in_letters=("", "", "ED2F", "EFD", "", "", "", "BTD", "BT", "BT", "BT", "B", "BT"),
            out_letters=("BTD", "", "", "BTE", "BT"),
        )
        y_BTD, losses, stats, traced, carry = apply(
            {k: v[...] for k, v in self.router.items()} | dict(context.shared_router),
            {k: v[...] for k, v in self.router_state.items()},
            self.gate_up_ED2F.astype(x_BTD.dtype),
            self.down_EFD.astype(x_BTD.dtype),
            layer,
            context.step,
            context.intervention,
            x_BTD,
            context.token_ids_BT,
            context.segment_ids_BT,
            context.positions_BT,
            context.keys_B,
            carry,
        )
        if moe.num_shared_experts:
            y_BTD = y_BTD + self.shared(x_BTD)
        return y_BTD, Routed(losses, stats, *traced), carry
