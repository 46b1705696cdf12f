"""Expert, tensor and context parallelism: the plan of one device's sequences, executed by all that hold its experts.

All functions here but `causality` run inside `sharding.local`: a device of the `expert` axis holds E/M experts, one of
the `tensor` axis a part of their hidden width, one of the `context` axis a part of the tokens.

| plan | exchange | rows of D that a device sends, in each direction |
|---|---|---|
| token-major | all_gather | (M - 1) N: every token goes to every device, partial sums come back |
| token-major | all_to_all | about K N (M - 1) / M, one for each choice of a token; padded without a ragged collective |
| expert-major, or capacity | slots | E C (M - 1) / M: all slots, full or empty (GShard, Lepikhin et al. 2006.16668) |

The first two drop nothing unless `model.moe.exchange_room` says so, and then they leak (see `causality`). The work of
shared experts depends on none of these, so that a compiler may do it while rows travel.

Letters: B batch, T time, N tokens, D model, E experts, F expert hidden, K choices, C slots per expert (or from
one device for another), Q slots of all devices for an expert, R rows, M devices of the expert axis; 2 = (gate, up).
"""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from frugalmoe.experts.contract import Biases
from frugalmoe.experts.executors import pick
from frugalmoe.experts.here import execute_here
from frugalmoe.experts.rows import sort_rows
from frugalmoe.routing.contract import ExpertPlan, Plan, TokenPlan
from frugalmoe.schema import MoE
from frugalmoe.sharding import axis_size, has_ragged_all_to_all, own_part, platform

EXCHANGES = ("auto", "all_gather", "all_to_all")  # choices of model.moe.exchange


def execute(
    plan: Plan, x_BTD: Array, gate_up_ED2F: Array, down_EFD: Array, config: MoE, biases: Biases | None = None
) -> tuple[Array, Array]:
    """What all devices make of a plan with their experts. Plan and x are of whole sequences.

    -> (y [B, T, D] of this device's tokens in x's dtype, int32 [] dropped rows).
    """
    batch, time, dim = x_BTD.shape
    x_ND, weights, biases = x_BTD.reshape(-1, dim), (gate_up_ED2F, down_EFD), _once(biases)
    if axis_size("expert", "tensor", "context") == 1:
        y_ND, dropped = execute_here(plan, x_ND, *weights, config, batch, biases=biases)
        return y_ND.reshape(x_BTD.shape), dropped
    dropped = jnp.int32(0)
    drops = pick(config, platform()).drops
    if isinstance(plan, TokenPlan) and drops is not None:
        plan, dropped = drops.slots(plan, config, batch)
    if isinstance(plan, ExpertPlan):
        # Each device of the context axis executes a part of the slots, whose tokens may be of any device of the axis.
        y_BTD = execute_slots(_share(plan, x_ND.shape[0]), x_ND, *weights, config, biases).reshape(x_BTD.shape)
        return lax.psum_scatter(y_BTD, "context", scatter_dimension=1, tiled=True), dropped
    own = lambda a: own_part(a.reshape(batch, time, -1), "context", 1)
    plan = TokenPlan(*(own(a).reshape(-1, a.shape[-1]) for a in plan))
    y_ND, lost = _execute_tokens(plan, own(x_ND).reshape(-1, dim), *weights, config, biases)
    return lax.psum(y_ND, "tensor").reshape(batch, -1, dim), dropped + lax.psum(lost, "context")


def execute_slots(
    plan: ExpertPlan, x_RD: Array, gate_up_ED2F: Array, down_EFD: Array, config: MoE, biases: Biases | None = None
) -> Array:
    """y[R, D] in x's dtype of a plan that names this device's rows: the slots travel, their weights do not."""
    devices, dim = axis_size("expert"), x_RD.shape[1]
    here = functools.partial(execute_here, biases=_once(biases))
    if devices == 1:
        return lax.psum(here(plan, x_RD, gate_up_ED2F, down_EFD, config, 1)[0], "tensor")
    x_ECD = x_RD.at[plan.token_EC].get(mode="fill", fill_value=0)
    x_EQD = lax.all_to_all(x_ECD, "expert", 0, 1, tiled=True)
    row_EQ = jnp.arange(math.prod(x_EQD.shape[:2]), dtype=jnp.int32).reshape(x_EQD.shape[:2])
    each = ExpertPlan(row_EQ, jnp.ones(row_EQ.shape, jnp.float32))
    rows_RD, _ = here(each, x_EQD.reshape(-1, dim), gate_up_ED2F, down_EFD, config, 1)
    y_ECD = lax.all_to_all(rows_RD.reshape(x_EQD.shape), "expert", 1, 0, tiled=True)
    y_RD = jnp.zeros(x_RD.shape, jnp.float32)
    y_RD = y_RD.at[plan.token_EC].add(y_ECD * plan.weight_EC[..., None], mode="drop")
    return lax.psum(y_RD.astype(x_RD.dtype), "tensor")


def _once(biases: Biases | None) -> Biases | None:
    """Biases of which one device of the tensor axis adds what the sum over the axis is to have once."""
    if biases is None or axis_size("tensor") == 1:
        return biases
    return biases._replace(down_ED=jnp.where(lax.axis_index("tensor") == 0, biases.down_ED, 0))


def causality(plan: Plan, config: MoE, devices: int) -> str:
    """What the exchange adds to a router's claim; of the plan only its form and shape count.

    Rows beyond `model.moe.exchange_room` are lost in the order of experts, over all sequences of the devices that
    share them: a later token's row for expert 0 pushes out an earlier token's for expert 1.
    """
    if isinstance(plan, ExpertPlan) or devices == 1 or not config.exchange_room:
        return "safe"
    slots = plan.expert_NK.shape[1]
    worst = devices * min(slots, config.num_experts // devices)
    return "leak" if config.exchange_room * slots < worst else "safe"


def load_of_devices(plan: Plan, valid_BT: Array, config: MoE) -> dict[str, Array]:
    """`busiest`: see routing/stats.py; nothing where experts are not spread over devices."""
    devices = axis_size("expert")
    if devices == 1:
        return {}
    valid_N = jnp.append(valid_BT.reshape(-1), False)
    if isinstance(plan, TokenPlan):
        expert_R, live_R = plan.expert_NK.reshape(-1), jnp.repeat(valid_N[:-1], plan.expert_NK.shape[1])
    else:
        expert_R = jnp.repeat(jnp.arange(config.num_experts), plan.token_EC.shape[1])
        live_R = valid_N[plan.token_EC.reshape(-1)]
    device_R = jnp.where(live_R, expert_R // (config.num_experts // devices), devices)
    load_M = lax.psum(jnp.zeros(devices, jnp.int32).at[device_R].add(1, mode="drop"), "expert")
    return {"busiest": load_M.max()}


def _share(plan: ExpertPlan, nowhere: int) -> ExpertPlan:
    """This device's part of the slots of every expert."""
    spare = ((0, 0), (0, -plan.token_EC.shape[1] % axis_size("context")))
    return ExpertPlan(
        own_part(jnp.pad(plan.token_EC, spare, constant_values=nowhere), "context", 1),
        own_part(jnp.pad(plan.weight_EC, spare), "context", 1),
    )


def _execute_tokens(
    plan: TokenPlan, x_ND: Array, gate_up_ED2F: Array, down_EFD: Array, config: MoE, biases: Biases | None
) -> tuple[Array, Array]:
    """-> (y[N, D], this device's part of a sum over the tensor axis; int32 [] rows that found no room)."""
    devices, num_choices = axis_size("expert"), plan.expert_NK.shape[1]
    weights = gate_up_ED2F, down_EFD
    if devices == 1:
        return execute_here(plan, x_ND, *weights, config, 1, biases=biases)
    exchange = config.exchange
    if exchange == "auto":  # the one that sends less; without a ragged collective, rows are padded to the worst case
        exchange = "all_to_all" if devices > num_choices and has_ragged_all_to_all() else "all_gather"
    run = _by_all_gather if exchange == "all_gather" else _by_all_to_all
    return run(plan, x_ND, *weights, config, biases)


def _room(plan: TokenPlan, num_experts: int, config: MoE) -> int:
    """Rows that a device has room for: those of the worst case, or `exchange_room` times its fair share."""
    num_tokens, num_choices = plan.expert_NK.shape
    worst = axis_size("expert") * num_tokens * min(num_choices, num_experts)
    fair = num_tokens * num_choices
    return min(worst, math.ceil(config.exchange_room * fair)) if config.exchange_room else worst


def _by_all_gather(plan, x_ND, gate_up_ED2F, down_EFD, config, biases):
    """Every device of the axis runs its own experts on the tokens of all; the results are summed where they belong."""
    num_experts = down_EFD.shape[0]
    all_ND, all_expert_NK, all_weight_NK = (lax.all_gather(a, "expert", tiled=True) for a in (x_ND, *plan))
    own_NK = all_expert_NK - lax.axis_index("expert") * num_experts
    held_NK = (own_NK >= 0) & (own_NK < num_experts)
    own = TokenPlan(jnp.where(held_NK, own_NK, num_experts), jnp.where(held_NK, all_weight_NK, 0))
    room = _room(plan, num_experts, config)
    y_ND, lost = execute_here(own, all_ND, gate_up_ED2F, down_EFD, config, 1, room=room, biases=biases)
    return lax.psum_scatter(y_ND, "expert", scatter_dimension=0, tiled=True), lost


def _by_all_to_all(plan, x_ND, gate_up_ED2F, down_EFD, config, biases):
    """A row for each choice of a token travels to the device of its expert, and its result back."""
    num_experts, room = down_EFD.shape[0], _room(plan, down_EFD.shape[0], config)
    me, most = lax.axis_index("expert"), x_ND.shape[0] * min(plan.expert_NK.shape[1], num_experts)
    rows = sort_rows(plan, config.num_experts)
    size_MME = lax.all_gather(rows.group_sizes_E, "expert").reshape(-1, axis_size("expert"), num_experts)
    there, back = _moves(size_MME.sum(-1, dtype=jnp.int32), me, room)
    x_RD = x_ND.at[rows.token_R].get(mode="fill", fill_value=0)
    moved_RD = _move(x_RD, there, room, most)
    end_ME = there.landing_M[:, None] + jnp.cumsum(size_MME[:, me], axis=1, dtype=jnp.int32)
    row_R = jnp.arange(room, dtype=jnp.int32)
    expert_R = jnp.searchsorted(end_ME.reshape(-1), row_R, side="right").astype(jnp.int32) % num_experts
    expert_R = jnp.where(row_R < there.taken_M.sum(), expert_R, num_experts)
    each = TokenPlan(expert_R[:, None], jnp.ones((room, 1), jnp.float32))
    moved_RD, _ = execute_here(each, moved_RD, gate_up_ED2F, down_EFD, config, 1, biases=biases)
    y_RD = _move(moved_RD, back, rows.token_R.size, most).astype(jnp.float32) * rows.weight_R[:, None]
    y_ND = jnp.zeros(x_ND.shape, jnp.float32).at[rows.token_R].add(y_RD, mode="drop")
    return y_ND.astype(x_ND.dtype), rows.group_sizes_E.sum(dtype=jnp.int32) - there.count_M.sum()


class _Move(NamedTuple):
    """One device's part in an exchange of consecutive rows with each device; int32 [M]."""

    start_M: Array  # its first row for that device
    count_M: Array  # how many it sends there
    place_M: Array  # where they begin in that device's result
    taken_M: Array  # how many come from that device
    landing_M: Array  # where they begin in its own result


def _moves(wanted_MM: Array, me: Array, room: int) -> tuple[_Move, _Move]:
    """There and back, from the rows that each device (first axis) has for each other; those beyond the room stay."""
    landing_MM = jnp.cumsum(wanted_MM, axis=0) - wanted_MM
    start_MM = jnp.cumsum(wanted_MM, axis=1) - wanted_MM
    count_MM = jnp.clip(room - landing_MM, 0, wanted_MM)
    there = _Move(start_MM[me], count_MM[me], landing_MM[me], count_MM[:, me], landing_MM[:, me])
    back = _Move(landing_MM[:, me], count_MM[:, me], start_MM[:, me], count_MM[me], start_MM[me])
    return there, back


def _move(x_RD: Array, move: _Move, num_rows: int, most: int) -> Array:
    """-> [num_rows, D], zeros where nothing lands. Without a ragged collective, `most` rows go to each device."""
    result = jnp.zeros((num_rows, x_RD.shape[1]), x_RD.dtype)
    if has_ragged_all_to_all():
        sizes = (move.start_M, move.count_M, move.place_M, move.taken_M)
        return lax.ragged_all_to_all(x_RD, result, *sizes, axis_name="expert")
    slot_C = jnp.arange(most, dtype=jnp.int32)
    from_MC = jnp.where(slot_C < move.count_M[:, None], move.start_M[:, None] + slot_C, x_RD.shape[0])
    x_MCD = lax.all_to_all(x_RD.at[from_MC].get(mode="fill", fill_value=0), "expert", 0, 0, tiled=True)
    to_MC = jnp.where(slot_C < move.taken_M[:, None], move.landing_M[:, None] + slot_C, num_rows)
    return result.at[to_MC].set(x_MCD, mode="drop")
