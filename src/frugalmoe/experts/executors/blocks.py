"""The grouped executor in plain XLA, made for CPUs: a loop over blocks of rows that share an expert.

Each block gathers its tokens, runs gate, up and down while they are in cache, and adds its weighted outputs to the
tokens' rows: no array of R rows by D or F columns ever exists (on CPUs such arrays cost more in page faults than the
backward pass spends on computing the hidden layer again, which it therefore does). The number of blocks is a run-time
value: experts without tokens cost nothing, no token is dropped, nothing is padded in memory.

An expert's rows are covered greedily by a few block sizes: few large blocks, because the product for the weight
gradient is slow on short blocks, and a small last one, because its unused rows are wasted work (`cover`).

Letters: N tokens, D model, E experts, F expert hidden, R sorted rows, g rows of one block,
I and J any two axes of a matrix (J is 2F: gate, then up).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from frugalmoe.experts.activations import Activation
from frugalmoe.experts.contract import Biases, Call, Executor
from frugalmoe.experts.rows import Rows, held_rows
from frugalmoe.routing.contract import Plan

SMALLEST, LARGEST = 32, 512  # rows of a block
FEW, FEWEST = 8, 4  # below a mean group of FEW, as in generation, blocks are shorter, down to FEWEST rows
CACHED = 2**17  # a block's hidden activations per half (g*F): 1 MiB for gate and up in float32, one core's L2 cache
NOWHERE = 2**31 - 1  # a token id out of every range: gathers zeros, scatters nothing


def block_sizes(num_rows: int, num_experts: int, hidden: int) -> tuple[int, ...]:
    """Rows of the blocks, descending, from the mean group and the cache (tuned by benchmarks/experts_bench.py).

    Few rows take as long as reading their experts' weights: one size, that most groups fit (benchmarks/DECODING.md).
    """
    mean = max(num_rows // num_experts, 1)
    if mean < FEW:
        return (max(1 << (2 * mean - 1).bit_length(), FEWEST),)
    limit = min(max(CACHED // hidden, 2 * SMALLEST), LARGEST)
    top = 1 << (min(max(mean, 2 * SMALLEST), limit).bit_length() - 1)
    return tuple(sorted({top, top // 2, max(top // 8, SMALLEST)}, reverse=True))


def cover(group_sizes_E: Array, sizes: tuple[int, ...]) -> list[tuple[int, Array, Array]]:
    """[(block size, number of blocks of each expert, first row of them)]: every row of every group in one block.

    A block is at least three quarters full, except each expert's last one of the smallest size. So the rows computed
    are at most 4/3 of the rows routed, plus (smallest size - 1) for each expert that has any.
    """
    end_E = jnp.cumsum(group_sizes_E)
    start_E = end_E - group_sizes_E
    table = []
    for size in sizes:
        spare = size - 1 if size == sizes[-1] else size // 4
        count_E = (end_E - start_E + spare) // size
        table.append((size, count_E, start_E))
        start_E = jnp.minimum(start_E + count_E * size, end_E)
    return table


def for_blocks(rows: Rows, sizes: tuple[int, ...], body: Callable[..., Any], carry: Any) -> Any:
    """Fold `body(carry, expert, start, token_g, weight_g)` over all blocks. An unused row: token NOWHERE, weight 0."""
    end_E = jnp.cumsum(rows.group_sizes_E)
    for size, count_E, start_E in cover(rows.group_sizes_E, sizes):
        last_E = jnp.cumsum(count_E)

        def step(state, size=size, count_E=count_E, start_E=start_E, last_E=last_E):
            i, carry = state
            e = jnp.minimum(jnp.sum(last_E <= i), last_E.size - 1)  # the bound is for lanes of a vmap that are done
            start = start_E[e] + (i - last_E[e] + count_E[e]) * size
            live_g = start + lax.iota(jnp.int32, size) < end_E[e]
            token_g = jnp.where(live_g, lax.dynamic_slice_in_dim(rows.token_R, start, size), NOWHERE)
            weight_g = jnp.where(live_g, lax.dynamic_slice_in_dim(rows.weight_R, start, size), 0)
            return i + 1, body(carry, e, start, token_g, weight_g)

        _, carry = lax.while_loop(lambda s, last_E=last_E: s[0] < last_E[-1], step, (jnp.int32(0), carry))
    return carry


def _pad(rows: Rows, size: int) -> Rows:
    """Room for the last block to read past the end."""
    return rows._replace(
        token_R=jnp.pad(rows.token_R, (0, size), constant_values=NOWHERE), weight_R=jnp.pad(rows.weight_R, (0, size))
    )


def _of_expert(w_EIJ: Array, e: Array) -> Array:
    """The matrix [I, J] of one expert.

    XLA for CPUs slices no bfloat16: it turns an array into float32, and that of all experts in front of the loop. What
    depends on the expert it cannot move there, and it converts the slice alone.
    """
    if w_EIJ.dtype != jnp.float32:
        w_EIJ, e = lax.optimization_barrier((w_EIJ, e))
    return w_EIJ[e]


def _take(x_ND: Array, token_g: Array) -> Array:
    return x_ND.at[token_g].get(mode="fill", fill_value=0)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """Contract one axis of each matrix, in the dtype of `b`, summed in float32."""
    dims = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(a.astype(b.dtype), b, dims, preferred_element_type=jnp.float32)


def run(plan: Plan, x_ND: Array, gate_up_ED2F: Array, down_EFD: Array, call: Call) -> tuple[Array, Array]:
    """-> (y[N, D] in x's dtype, dropped rows). Gradients for x, both weights and the plan's weights."""
    num_experts, hidden, _ = down_EFD.shape
    rows, dropped = held_rows(plan, num_experts, call.room)
    sizes = block_sizes(rows.token_R.size, num_experts, hidden)
    form = _Form(sizes, call.activation)
    return _blocks(form, call.biases, rows, x_ND, gate_up_ED2F, down_EFD), dropped


class _Form(NamedTuple):
    """What is static."""

    sizes: tuple[int, ...]  # rows of the blocks
    activation: Activation


def _hidden(x_gD: Array, gate_up_DJ: Array, biases: Biases | None, e: Array) -> list[Array]:
    """[gate[g, F], up[g, F]] of an expert, float32."""
    h_gJ = _dot(x_gD, gate_up_DJ, 1, 0)
    if biases is not None:
        h_gJ = h_gJ + biases.gate_up_E2F[e].reshape(-1).astype(jnp.float32)
    return jnp.split(h_gJ, 2, axis=1)


# It takes the weights as they are: what the backward pass keeps of a layer is then the scan's own input, and not a copy
# of all layers' weights in another shape.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(form: _Form, biases: Biases | None, rows: Rows, x_ND, gate_up_ED2F, down_EFD):
    sizes, gate_up_EDJ = form.sizes, _joined(gate_up_ED2F)

    def body(y_ND, e, start, token_g, weight_g):
        a_gF = form.activation.value(*_hidden(_take(x_ND, token_g), _of_expert(gate_up_EDJ, e), biases, e))
        y_gD = _dot(a_gF, _of_expert(down_EFD, e), 1, 0)
        if biases is not None:
            y_gD = y_gD + biases.down_ED[e].astype(jnp.float32)
        return y_ND.at[token_g].add(y_gD * weight_g[:, None], mode="drop")

    return for_blocks(_pad(rows, sizes[0]), sizes, body, jnp.zeros(x_ND.shape, jnp.float32)).astype(x_ND.dtype)


def _forward(form, *args):
    return _blocks(form, *args), args


def _backward(form, args, dy_ND):
    """For y = w * (a @ down): da_raw = dy @ down', dw = sum(da_raw * a), da = w * da_raw; no output is needed."""
    biases, given, x_ND, gate_up_ED2F, down_EFD = args
    sizes, dtype, gate_up_EDJ = form.sizes, x_ND.dtype, _joined(gate_up_ED2F)

    def body(carry, e, start, token_g, weight_g):
        dbiases, dweight_R, dx_ND, dgate_up_EDJ, ddown_EFD = carry
        gate_up_DJ, down_FD = _of_expert(gate_up_EDJ, e), _of_expert(down_EFD, e)
        x_gD, dy_gD = _take(x_ND, token_g), _take(dy_ND, token_g)
        gate_gF, up_gF = _hidden(x_gD, gate_up_DJ, biases, e)
        a_gF = form.activation.value(gate_gF, up_gF)
        da_raw_gF = _dot(dy_gD, down_FD, 1, 1)
        dh_gJ = jnp.concatenate(form.activation.pull(gate_gF, up_gF, da_raw_gF * weight_g[:, None]), axis=1)
        weighted_gF = (a_gF * weight_g[:, None]).astype(dtype)

        dweight_g = jnp.sum(da_raw_gF * a_gF, axis=1)
        if biases is not None:
            dweight_g = dweight_g + jnp.sum(dy_gD.astype(jnp.float32) * biases.down_ED[e], axis=1)
            of_expert = Biases(dh_gJ.sum(0).reshape(2, -1), jnp.sum(dy_gD * weight_g[:, None], axis=0))
            dbiases = jax.tree.map(lambda total, value: _add_at(total, e, value), dbiases, of_expert)
        dh_gJ = dh_gJ.astype(dtype)
        others_g = lax.dynamic_slice_in_dim(dweight_R, start, token_g.size)
        dweight_g = jnp.where(token_g == NOWHERE, others_g, dweight_g)  # past the end of the group: others' rows
        return (
            dbiases,
            lax.dynamic_update_slice_in_dim(dweight_R, dweight_g, start, 0),
            dx_ND.at[token_g].add(_dot(dh_gJ, gate_up_DJ, 1, 1), mode="drop"),
            _add_at(dgate_up_EDJ, e, _dot(x_gD, dh_gJ, 0, 0)),
            _add_at(ddown_EFD, e, _dot(weighted_gF, dy_gD, 0, 0)),
        )

    rows = _pad(given, sizes[0])
    wanted = (biases, rows.weight_R, x_ND, gate_up_EDJ, down_EFD)
    grads = for_blocks(rows, sizes, body, jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), wanted))
    grads = jax.tree.map(lambda gradient, a: gradient.astype(a.dtype), grads, wanted)
    dbiases, dweight_R, dx_ND, dgate_up_EDJ, ddown_EFD = grads
    dweights = dgate_up_EDJ.reshape(gate_up_ED2F.shape), ddown_EFD
    return dbiases, Rows(None, dweight_R[: given.weight_R.size], None), dx_ND, *dweights


def _joined(gate_up_ED2F: Array) -> Array:
    return gate_up_ED2F.reshape(*gate_up_ED2F.shape[:2], -1)


def _add_at(total_EIJ: Array, e: Array, value_IJ: Array) -> Array:
    """In place inside the loop: only one expert's matrix, or bias, is read and written."""
    old_IJ = lax.dynamic_index_in_dim(total_EIJ, e, 0, keepdims=False)
    return lax.dynamic_update_index_in_dim(total_EIJ, old_IJ + value_IJ, e, 0)


_blocks.defvjp(_forward, _backward)

EXECUTOR = Executor(
    run=run,
    work="1 (at most 4/3, plus a partial block per expert)",
    purpose="plain XLA on any platform, made for CPUs",
    default_on=("*",),
    every_form=True,
)
