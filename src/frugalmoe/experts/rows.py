"""A plan as rows sorted by expert: what every grouped executor computes on.

Letters: N tokens, E experts, K choices, C slots per expert, R rows (N*K or E*C, static).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.routing.contract import Plan, TokenPlan


class Rows(NamedTuple):
    """Rows of expert 0, then of expert 1, ...; rows past `sum(group_sizes_E)` are null slots, not computed."""

    token_R: Array  # int32; N is an empty slot inside a group: it reads zeros and writes nowhere
    weight_R: Array  # float32
    group_sizes_E: Array  # int32


def sort_rows(plan: Plan, num_experts: int, room: int | None = None) -> Rows:
    """One stable sort of the expert ids. An expert-major plan is sorted already.

    room: of a token-major plan at most this many rows are kept, the first ones.
    """
    if not isinstance(plan, TokenPlan):
        sizes_E = jnp.full((num_experts,), plan.token_EC.shape[1], jnp.int32)
        return Rows(plan.token_EC.reshape(-1), plan.weight_EC.reshape(-1), sizes_E)
    expert_R, order_R = plan.expert_NK.reshape(-1), _order(plan)
    sizes_E = jnp.zeros((num_experts,), jnp.int32).at[expert_R].add(1, mode="drop")  # the null id E falls outside
    if room is not None and room < order_R.size:
        order_R = order_R[:room]
        sizes_E = jnp.diff(jnp.minimum(jnp.cumsum(sizes_E), room), prepend=0).astype(jnp.int32)
    return Rows(order_R // plan.expert_NK.shape[1], plan.weight_NK.reshape(-1)[order_R], sizes_E)


def _order(plan: TokenPlan) -> Array:
    """The choice, of all N*K, that each row is."""
    return _argsort(plan.expert_NK.reshape(-1))


def _argsort(key_R: Array) -> Array:
    iota_R = jax.lax.iota(jnp.int32, key_R.size)
    return jax.lax.sort((key_R, iota_R), num_keys=1, is_stable=True)[1]


def places(plan: TokenPlan) -> Array:
    """int32 [N, K]: the row of each choice among all N*K, as many as there are without a room.

    A sort, the inverse of `sort_rows`' own, which a program that needs both sorts once.
    """
    return _argsort(_order(plan)).reshape(plan.expert_NK.shape)


def held_rows(plan: Plan, num_experts: int, room: int | None) -> tuple[Rows, Array]:
    """`sort_rows`, and how many rows of a token-major plan find no room: int32 []."""
    rows = sort_rows(plan, num_experts, room)
    if room is None:
        return rows, jnp.int32(0)
    wanted = jnp.sum(plan.expert_NK < num_experts, dtype=jnp.int32)
    return rows, wanted - rows.group_sizes_E.sum(dtype=jnp.int32)
