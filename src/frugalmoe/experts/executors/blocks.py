"""The grouped executor in plain XLA, made for CPUs: a loop over blocks of rows that share an expert.

Each block gathers its tokens, runs gate, up and down while they are in cache, and adds its weighted outputs to the
tokens' rows: no array of R rows by D or F columns ever exists (on CPUs such arrays cost more in page faults than the
backward pass spends on computing the hidden layer again, which it therefore does). The number of blocks is a run-time
value: experts without tokens cost nothing, no token is dropped, nothing is padded in memory.

An expert's rows are one block of a few sizes where one is large enough, else full blocks of the largest and one more
(`cover`): with many experts a step takes as long as reading their weights and writing their gradients, which every
block does.
The first block of an expert writes its gradients, and only further ones read and add. They go where those of all layers
are, and weights are read from there (`contract.Stack`): nothing of the size of a layer's experts is copied.

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
from frugalmoe.experts.contract import Biases, Call, Executor, Stack
from frugalmoe.experts.rows import Rows, held_rows
from frugalmoe.routing.contract import Plan

SMALLEST, LARGEST = 32, 512  # rows of a block
FEW, FEWEST = 8, 4  # below a mean group of FEW, as in generation, blocks are shorter, down to FEWEST rows
CACHED = 2**17  # a block's hidden activations per half (g*F): 1 MiB for gate and up in float32, one core's L2 cache
NOWHERE = 2**31 - 1  # a token id out of every range: gathers zeros, scatters nothing


def block_sizes(num_rows: int, num_experts: int, hidden: int) -> tuple[int, ...]:
    """Rows of the blocks, ascending, from the mean group and the cache (tuned by benchmarks/experts_bench.py).

    The largest has room for the mean group and a quarter more, where the cache has: then an expert is one block. Means
    are often a power of two, and half of the groups a little larger: for these there is five quarters of one.
    Few rows take as long as reading their experts' weights: one size, that most groups fit (benchmarks/DECODING.md).
    """
    mean = max(num_rows // num_experts, 1)
    if mean < FEW:
        return (max(1 << (2 * mean - 1).bit_length(), FEWEST),)
    limit = min(max(CACHED // hidden, 2 * SMALLEST), LARGEST)
    top = min(max(1 << (5 * mean // 4 - 1).bit_length(), 2 * SMALLEST), limit)
    top = 1 << (top.bit_length() - 1)
    above = 5 * top // 8 if top > 2 * SMALLEST else top
    return tuple(sorted({max(top // 8, SMALLEST), max(top // 4, SMALLEST), top // 2, above, top}))


def cover(group_sizes_E: Array, sizes: tuple[int, ...]) -> list[tuple[int, Array, Array]]:
    """[(block size, number of blocks of each expert, first row of them)]: every row of every group in one block.

    As many of an expert's blocks as can be are of the largest size, and full. What is left, at its end, is one block of
    the smallest size that has room.
    """
    end_E, below = jnp.cumsum(group_sizes_E), 0
    *smaller, largest = sizes
    left_E = jnp.where(group_sizes_E > 0, (group_sizes_E - 1) % largest + 1, 0)
    table = []
    for size in smaller:
        table.append((size, jnp.int32((left_E > below) & (left_E <= size)), end_E - left_E))
        below = size
    count_E = (group_sizes_E - left_E) // largest + jnp.int32(left_E > below)
    return [*table, (largest, count_E, end_E - group_sizes_E)]


def for_blocks(rows: Rows, sizes: tuple[int, ...], body: Callable[..., Any], carry: Any) -> Any:
    """Fold `body(carry, expert, start, token_g, weight_g, first)` over all blocks; first: none of the expert's came
    before, for certain. An unused row: token NOWHERE, weight 0.
    """
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
            return i + 1, body(carry, e, start, token_g, weight_g, size < sizes[-1])

        _, carry = lax.while_loop(lambda s, last_E=last_E: s[0] < last_E[-1], step, (jnp.int32(0), carry))
    return carry


def _pad(rows: Rows, size: int) -> Rows:
    """Room for the last block to read past the end."""
    return rows._replace(
        token_R=jnp.pad(rows.token_R, (0, size), constant_values=NOWHERE), weight_R=jnp.pad(rows.weight_R, (0, size))
    )


def _of_expert(w_LEIJ: Array, layer: Array | int, e: Array, dtype: jnp.dtype) -> Array:
    """The matrix [I, J] of one expert of one layer.

    XLA for CPUs slices no bfloat16: it turns an array into float32, and that of all experts in front of the loop. What
    depends on the expert it cannot move there, and it converts the slice alone.
    """
    if w_LEIJ.dtype != jnp.float32:
        w_LEIJ, e = lax.optimization_barrier((w_LEIJ, e))
    return w_LEIJ[layer, e].astype(dtype)


def _take(x_ND: Array, token_g: Array) -> Array:
    return x_ND.at[token_g].get(mode="fill", fill_value=0)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """Contract one axis of each matrix, in the dtype of `b`, summed in float32."""
    dims = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(a.astype(b.dtype), b, dims, preferred_element_type=jnp.float32)


def run(plan: Plan, x_ND: Array, gate_up_ED2F: Array, down_EFD: Array, call: Call) -> tuple[Array, Array]:
    """-> (y[N, D] in x's dtype, dropped rows). Gradients for x, both weights and the plan's weights."""
    weights = gate_up_ED2F, down_EFD
    return _run(plan, x_ND, _Read(*weights), weights, call)[:2]


def in_stack(plan: Plan, x_ND: Array, stack: Stack, call: Call) -> tuple[Array, Array, tuple[Array, Array]]:
    """The same of weights of all layers, and their `sums`, whose gradient has the layer's own from here on."""
    return _run(plan, x_ND, _Read(stack.gate_up_LED2F, stack.down_LEFD, stack.layer), stack.sums, call)


def _run(plan, x_ND, read, sums, call):
    num_experts, hidden, _ = read.down.shape[-3:]
    rows, dropped = held_rows(plan, num_experts, call.room)
    form = _Form(block_sizes(rows.token_R.size, num_experts, hidden), call.activation)
    y_ND, sums = _blocks(form, call.biases, rows, x_ND, read, sums)
    return y_ND, dropped, sums


class _Read(NamedTuple):
    """The weights that are read: those of one layer, or of all layers and which of them."""

    gate_up: Array  # [E, D, 2, F] or [L, E, D, 2, F]
    down: Array  # [E, F, D] or [L, E, F, D]
    layer: Array | None = None


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
# of all layers' weights in another shape. Weights that are read have no gradient. That of `sums` is what comes back for
# them, of other layers, and the gradient of these; without a `layer` nothing comes back.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(form: _Form, biases: Biases | None, rows: Rows, x_ND, read: _Read, sums):
    sizes, dtype = form.sizes, _dtype(read, x_ND)
    (gate_up_LEDJ, down_LEFD), layer = _stacked(read[:2], read.layer)

    def body(y_ND, e, start, token_g, weight_g, first):
        a_gF = form.activation.value(
            *_hidden(_take(x_ND, token_g), _of_expert(gate_up_LEDJ, layer, e, dtype), biases, e)
        )
        y_gD = _dot(a_gF, _of_expert(down_LEFD, layer, e, dtype), 1, 0)
        if biases is not None:
            y_gD = y_gD + biases.down_ED[e].astype(jnp.float32)
        return y_ND.at[token_g].add(y_gD * weight_g[:, None], mode="drop")

    y_ND = for_blocks(_pad(rows, sizes[-1]), sizes, body, jnp.zeros(x_ND.shape, jnp.float32))
    return y_ND.astype(x_ND.dtype), sums


def _forward(form, *args):
    return _blocks(form, *args), args[:-1]


def _backward(form, args, gradients):
    """For y = w * (a @ down): da_raw = dy @ down', dw = sum(da_raw * a), da = w * da_raw; no output is needed."""
    (biases, given, x_ND, read), (dy_ND, behind) = args, gradients
    sizes, dtype = form.sizes, _dtype(read, x_ND)
    (gate_up_LEDJ, down_LEFD), layer = _stacked(read[:2], read.layer)

    def body(carry, e, start, token_g, weight_g, first):
        (dbiases, dweight_R, dx_ND), (dgate_up_LEDJ, ddown_LEFD) = carry
        gate_up_DJ, down_FD = _of_expert(gate_up_LEDJ, layer, e, dtype), _of_expert(down_LEFD, layer, e, dtype)
        x_gD, dy_gD = _take(x_ND, token_g), _take(dy_ND, token_g)
        gate_gF, up_gF = _hidden(x_gD, gate_up_DJ, biases, e)
        a_gF = form.activation.value(gate_gF, up_gF)
        da_raw_gF = _dot(dy_gD, down_FD, 1, 1)
        dh_gJ = jnp.concatenate(form.activation.pull(gate_gF, up_gF, da_raw_gF * weight_g[:, None]), axis=1)
        weighted_gF = (a_gF * weight_g[:, None]).astype(x_ND.dtype)

        dweight_g = jnp.sum(da_raw_gF * a_gF, axis=1)
        if biases is not None:
            dweight_g = dweight_g + jnp.sum(dy_gD.astype(jnp.float32) * biases.down_ED[e], axis=1)
            of_expert = Biases(dh_gJ.sum(0).reshape(2, -1), jnp.sum(dy_gD * weight_g[:, None], axis=0))
            dbiases = jax.tree.map(lambda total, value: _add_at(total, (e,), value, first), dbiases, of_expert)
        dh_gJ = dh_gJ.astype(x_ND.dtype)
        others_g = lax.dynamic_slice_in_dim(dweight_R, start, token_g.size)
        dweight_g = jnp.where(token_g == NOWHERE, others_g, dweight_g)  # past the end of the group: others' rows
        dweight_R = lax.dynamic_update_slice_in_dim(dweight_R, dweight_g, start, 0)
        dx_ND = dx_ND.at[token_g].add(_dot(dh_gJ, gate_up_DJ, 1, 1), mode="drop")
        dgate_up_LEDJ = _add_at(dgate_up_LEDJ, (layer, e), _dot(x_gD, dh_gJ, 0, 0), first)
        ddown_LEFD = _add_at(ddown_LEFD, (layer, e), _dot(weighted_gF, dy_gD, 0, 0), first)
        return (dbiases, dweight_R, dx_ND), (dgate_up_LEDJ, ddown_LEFD)

    rows = _pad(given, sizes[-1])
    wanted = (biases, rows.weight_R, x_ND)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), wanted)
    sums = [a.astype(jnp.float32) for a in _stacked(behind, read.layer)[0]]
    grads, sums = for_blocks(rows, sizes, body, (zeros, tuple(sums)))
    dbiases, dweight_R, dx_ND = jax.tree.map(lambda gradient, a: gradient.astype(a.dtype), grads, wanted)
    dsums = tuple(a.reshape(w.shape).astype(w.dtype) for a, w in zip(sums, behind))
    return dbiases, Rows(None, dweight_R[: given.weight_R.size], None), dx_ND, None, dsums


def _dtype(read: _Read, x_ND: Array) -> jnp.dtype:
    """What products are of: weights of all layers are not cast before they are read."""
    return read.down.dtype if read.layer is None else x_ND.dtype


def _stacked(weights: tuple[Array, Array], layer: Array | None) -> tuple[tuple[Array, Array], Array | int]:
    """(gate and up [L, E, D, J], down [L, E, F, D]), and which layer; of weights without a layer one of one."""
    gate_up, down = weights if layer is not None else (w[None] for w in weights)
    return (gate_up.reshape(*gate_up.shape[:3], -1), down), 0 if layer is None else layer


def _add_at(total: Array, where: tuple, value: Array, first: bool) -> Array:
    """In place inside the loop: only one expert's matrix, or bias, is written. first: nothing is there yet."""
    value = lax.expand_dims(value, range(len(where)))
    start = (*where, *(0,) * (total.ndim - len(where)))
    if not first:
        value = lax.dynamic_slice(total, start, value.shape) + value
    return lax.dynamic_update_slice(total, value, start)


_blocks.defvjp(_forward, _backward)

EXECUTOR = Executor(
    run=run,
    in_stack=in_stack,
    work="1, plus a part of a block per expert",
    purpose="plain XLA on any platform, made for CPUs",
    default_on=("*",),
    every_form=True,
)
