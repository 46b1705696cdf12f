"""The oracle: every expert on every token, weighted by the combine matrix. E/K times the useful work, for tests only.

Letters: N tokens, D model, E experts, F expert hidden; 2 = (gate, up).
"""

import jax.numpy as jnp
from jax import Array

from frugalmoe.experts.contract import Call, Executor
from frugalmoe.routing.contract import Plan, combine_matrix


def run(plan: Plan, x_ND: Array, gate_up_ED2F: Array, down_EFD: Array, call: Call) -> tuple[Array, Array]:
    """y_n = sum_e G[n, e] * expert_e(x_n), by definition. Holds an [N, E, 2F] array."""
    g_NE = combine_matrix(plan, x_ND.shape[0], down_EFD.shape[0])
    full = lambda a: a.astype(jnp.float32)  # exact; not every backend multiplies bfloat16 into float32
    h_NE2F = jnp.einsum("nd,edgf->negf", full(x_ND), full(gate_up_ED2F))
    if call.biases is not None:
        h_NE2F = h_NE2F + full(call.biases.gate_up_E2F)
    a_NEF = call.activation.value(h_NE2F[..., 0, :], h_NE2F[..., 1, :]).astype(x_ND.dtype)
    y_NED = jnp.einsum("nef,efd->ned", full(a_NEF), full(down_EFD))
    if call.biases is not None:
        y_NED = y_NED + full(call.biases.down_ED)
    return jnp.einsum("ned,ne->nd", y_NED, g_NE).astype(x_ND.dtype), jnp.int32(0)


EXECUTOR = Executor(run=run, work="E / K", purpose="the oracle of the tests", keeps_room=False, every_form=True)
