"""Executors of a routing plan: y_n = sum_e G[n, e] * expert_e(x_n), with expert_e a SwiGLU feed-forward.

| executor | work / useful work | drops | for |
|---|---|---|---|
| dense | E / K | no | the oracle of the tests |
| grouped | 1 | no | the default: `blocks`, `tpu` or `gpu`, whichever this platform runs |
| capacity | capacity_factor | yes | comparison with capacity-limited systems; `capacity.causality` says when it leaks |
| blocks | 1 (at most 4/3, plus a partial block per expert) | no | plain XLA, any platform, made for CPUs |
| tpu, gpu | 1 (plus a partial tile per expert) | no | kernels: Pallas', Triton's |

`lax.ragged_dot` is not among them: on CPUs, on most TPUs and on GPUs it is a masked dense product, E times the work.
"""

import jax.numpy as jnp
from jax import Array

from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.experts import blocks, capacity, dense, grouped
from frugalmoe.experts.capacity import ORDERS
from frugalmoe.experts.rows import sort_rows
from frugalmoe.routing.contract import Plan
from frugalmoe.schema import MoE
from frugalmoe.sharding import GPUS, platform

EXECUTORS = ("auto", "dense", "grouped", "capacity", "blocks", "tpu", "gpu")  # choices of model.moe.executor
GROUPED = {"tpu": "tpu"} | dict.fromkeys(GPUS, "gpu")  # platform -> its kernels; others: `blocks`

__all__ = ["EXECUTORS", "ORDERS", "execute", "pick"]


def pick(config: MoE, platform: str) -> str:
    """The executor that a config means on a platform: `auto` and `grouped` become one of blocks, tpu, gpu."""
    if config.executor not in EXECUTORS:
        raise UserError(
            f"model.moe.executor={config.executor!r}: unknown executor; {did_you_mean(config.executor, EXECUTORS)}"
        )
    return GROUPED.get(platform, "blocks") if config.executor in ("auto", "grouped") else config.executor


def execute(
    plan: Plan,
    x_ND: Array,
    gate_up_ED2F: Array,
    down_EFD: Array,
    config: MoE,
    num_sequences: int,
    room: int | None = None,
) -> tuple[Array, Array]:
    """-> (y[N, D] in x's dtype, int32 [] dropped rows). Weights are float32 or of x's dtype.

    room: the most rows of a token-major plan that a grouped executor holds.
    """
    weights = gate_up_ED2F, down_EFD
    executor = pick(config, platform())
    if executor == "capacity":
        return capacity.run(plan, x_ND, *weights, config, num_sequences)
    if executor == "dense":
        return dense.run(plan, x_ND, *weights), jnp.int32(0)
    rows, dropped = sort_rows(plan, down_EFD.shape[0], room), jnp.int32(0)
    if room is not None:
        wanted = jnp.sum(plan.expert_NK < down_EFD.shape[0], dtype=jnp.int32)
        dropped = wanted - rows.group_sizes_E.sum(dtype=jnp.int32)
    if executor == "blocks":
        return blocks.run(rows, x_ND, *weights), dropped
    return grouped.run(_kernels(executor, rows.token_R.size), rows, x_ND, *weights), dropped


def _kernels(executor: str, num_rows: int):
    """Imported where used: each needs parts of JAX that the other platforms need not have."""
    if executor == "tpu":
        from frugalmoe.experts import tpu

        return tpu.kernels(num_rows)
    from frugalmoe.experts import gpu

    return gpu.kernels()
