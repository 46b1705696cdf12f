"""Executor with a fixed number of slots per expert and sequence: batched matrix products, and tokens that are dropped.

Letters: N tokens, D model, E experts, F expert hidden, K choices, B sequences, T tokens of a sequence,
C slots per expert and sequence, Q slots per expert (B*C), G groups of slots (E*B queues), R rows of one sequence (T*K).
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from frugalmoe.experts.contract import Call, Drops, Executor
from frugalmoe.experts.rows import sort_rows
from frugalmoe.routing.contract import ExpertPlan, TokenPlan
from frugalmoe.schema import MoE

# Who keeps a slot when an expert's queue overflows -> whether a token's fate depends on later tokens of its sequence.
ORDERS = {
    "token": "safe",  # first come, first served
    "choice": "leak",  # all first choices, then all second choices, ... (GShard, V-MoE); of one choice: as `token`
    "weight": "leak",  # largest weight first (batch-prioritised routing, Riquelme et al. 2106.05974)
}


def capacity(num_tokens: int, num_rows: int, config: MoE) -> int:
    """Slots per expert and sequence of `num_tokens` tokens and `num_rows` token-expert pairs."""
    fair = num_tokens * config.num_experts_per_token / config.num_experts
    return min(max(math.ceil(config.capacity_factor * fair), 1), num_rows)


def causality(plan: TokenPlan | ExpertPlan, config: MoE) -> str:
    """What this executor adds to a router's claim; of the plan only its form and shape count."""
    if isinstance(plan, ExpertPlan):  # it has its capacity already
        return "safe"
    by_token = config.drop_order == "choice" and plan.expert_NK.shape[1] == 1
    return "safe" if drops_nothing(config) or by_token else ORDERS[config.drop_order]


def drops_nothing(config: MoE) -> bool:
    """Whether each expert has a slot for every token of a sequence."""
    return config.capacity_factor * config.num_experts_per_token >= config.num_experts


def limit(plan: TokenPlan, config: MoE, num_sequences: int) -> tuple[TokenPlan, Array]:
    """The plan without the rows that find no slot (null expert, weight 0), and how many these are, int32 []."""
    expert_BR = plan.expert_NK.reshape(num_sequences, -1)
    num_rows, num_choices = expert_BR.shape[1], plan.expert_NK.shape[1]
    iota_BR = jnp.broadcast_to(jax.lax.iota(jnp.int32, num_rows), expert_BR.shape)
    if config.drop_order == "weight":
        key_BR = -jax.lax.stop_gradient(plan.weight_NK).reshape(expert_BR.shape)
    elif config.drop_order == "choice":
        key_BR = iota_BR % num_choices  # the sort is stable: ties go to earlier tokens
    else:
        key_BR = iota_BR
    sorted_BR, _, order_BR = jax.lax.sort((expert_BR, key_BR, iota_BR), dimension=1, num_keys=2, is_stable=True)
    starts_BR = jnp.diff(sorted_BR, axis=1, prepend=-1) > 0
    place_BR = iota_BR - jax.lax.cummax(jnp.where(starts_BR, iota_BR, 0), axis=1)  # how many precede in the queue
    slots = capacity(num_rows // num_choices, num_rows, config)
    kept_BR = jax.vmap(lambda order_R, kept_R: jnp.zeros_like(kept_R).at[order_R].set(kept_R))(
        order_BR, place_BR < slots
    )
    kept_NK = kept_BR.reshape(plan.expert_NK.shape)
    dropped = jnp.sum(~kept_NK & (plan.expert_NK < config.num_experts), dtype=jnp.int32)
    expert_NK = jnp.where(kept_NK, plan.expert_NK, config.num_experts)
    return TokenPlan(expert_NK, jnp.where(kept_NK, plan.weight_NK, 0)), dropped


def to_slots(plan: TokenPlan, slots: int, num_sequences: int, num_experts: int) -> ExpertPlan:
    """A plan of at most `slots` rows per expert and sequence in expert-major form [E, B*slots]."""
    num_tokens, num_choices = plan.expert_NK.shape
    sequence_N1 = (jnp.arange(num_tokens, dtype=jnp.int32) // (num_tokens // num_sequences))[:, None]
    queues = num_experts * num_sequences
    queue_NK = jnp.where(plan.expert_NK < num_experts, plan.expert_NK * num_sequences + sequence_N1, queues)
    rows = sort_rows(TokenPlan(queue_NK, plan.weight_NK), queues)
    start_G = jnp.cumsum(rows.group_sizes_E) - rows.group_sizes_E
    slot_C = jnp.arange(slots, dtype=jnp.int32)
    live_GC = slot_C < rows.group_sizes_E[:, None]
    row_GC = jnp.minimum(start_G[:, None] + slot_C, num_tokens * num_choices - 1)
    token_GC = jnp.where(live_GC, rows.token_R[row_GC], num_tokens)
    weight_GC = jnp.where(live_GC, rows.weight_R[row_GC], 0)
    return ExpertPlan(token_GC.reshape(num_experts, -1), weight_GC.reshape(num_experts, -1))


def slots_of(plan: TokenPlan, config: MoE, num_sequences: int) -> tuple[ExpertPlan, Array]:
    """What the capacity leaves of a plan, in expert-major form, and how many rows it drops, int32 []."""
    num_tokens, num_rows = plan.expert_NK.shape[0], plan.expert_NK.size
    slots = capacity(num_tokens // num_sequences, num_rows // num_sequences, config)
    plan, dropped = limit(plan, config, num_sequences)
    return to_slots(plan, slots, num_sequences, config.num_experts), dropped


def padded(plan: ExpertPlan, x_ND: Array, gate_up_ED2F: Array, down_EFD: Array, call: Call) -> Array:
    """All slots, full or empty, as products batched over experts."""
    x_EQD = x_ND.at[plan.token_EC].get(mode="fill", fill_value=0)
    h_EQ2F = jnp.einsum("eqd,edgf->eqgf", x_EQD, gate_up_ED2F, preferred_element_type=jnp.float32)
    if call.biases is not None:
        h_EQ2F = h_EQ2F + call.biases.gate_up_E2F[:, None].astype(jnp.float32)
    a_EQF = call.activation.value(h_EQ2F[..., 0, :], h_EQ2F[..., 1, :]).astype(x_ND.dtype)
    y_EQD = jnp.einsum("eqf,efd->eqd", a_EQF, down_EFD, preferred_element_type=jnp.float32)
    if call.biases is not None:
        y_EQD = y_EQD + call.biases.down_ED[:, None].astype(jnp.float32)
    y_ND = jnp.zeros(x_ND.shape, jnp.float32)
    return y_ND.at[plan.token_EC].add(y_EQD * plan.weight_EC[..., None], mode="drop").astype(x_ND.dtype)


def run(
    plan: TokenPlan | ExpertPlan, x_ND: Array, gate_up_ED2F: Array, down_EFD: Array, call: Call
) -> tuple[Array, Array]:
    """-> (y[N, D], dropped rows int32 []). An expert-major plan has its capacity already and loses nothing."""
    dropped = jnp.int32(0)
    if isinstance(plan, TokenPlan):
        plan, dropped = slots_of(plan, call.config, call.num_sequences)
    return padded(plan, x_ND, gate_up_ED2F, down_EFD, call), dropped


def may_drop(config: MoE) -> str | None:
    """The field by which an expert's slots may run out, or None."""
    if drops_nothing(config):
        return None
    enough = config.num_experts / config.num_experts_per_token
    return f"model.moe.capacity_factor={config.capacity_factor}, below {enough:.4g}"


EXECUTOR = Executor(
    run=run,
    work="capacity_factor",
    purpose="comparison with systems of limited capacity",
    keeps_room=False,
    every_form=True,
    drops=Drops(limit=limit, slots=slots_of, may=may_drop, causality=causality, fields=("drop_order",)),
)
