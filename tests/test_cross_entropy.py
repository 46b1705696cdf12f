"""The chunked cross-entropy against its definition over whole logits: values, gradients, weights, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from frugalmoe.model.cross_entropy import cross_entropy


def inputs(tokens: int, dim: int, vocabulary: int, dtype=jnp.float32):
    """h, head, targets, weights; every third weight is 0."""
    keys = jax.random.split(jax.random.key(tokens), 4)
    h = jax.random.normal(keys[0], (tokens, dim), dtype)
    head = jax.random.normal(keys[1], (dim, vocabulary), dtype)
    weights = jax.random.uniform(keys[3], (tokens,)) * (jnp.arange(tokens) % 3 != 1)
    return h, head, jax.random.randint(keys[2], (tokens,), 0, vocabulary), weights


def oracle(h, head, targets, weights, bias=0, *, z):
    logits = jnp.dot(h.astype(jnp.float32), head.astype(jnp.float32), precision="highest") + bias
    ce = -jax.nn.log_softmax(logits)[jnp.arange(len(h)), targets]
    lse_sq = jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.sum(weights * (ce + z * lse_sq)), (ce, jnp.sum(weights * lse_sq))


def chunked(h, head, targets, weights, bias=None, *, z, chunk):
    out = cross_entropy(h, head, targets, weights, bias_V=bias, z_coefficient=z, chunk=chunk)
    return out.loss, (out.ce_N, out.lse_sq_sum)


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("z, biased", [(0.0, False), (1e-2, False), (1e-2, True)])
@pytest.mark.parametrize(
    "tokens,dim,vocabulary,chunk", [(64, 16, 33, 16), (50, 8, 100, 16), (7, 8, 5, 512), (1, 4, 3, 1)]
)
def test_values_and_gradients_equal_the_definition(tokens, dim, vocabulary, chunk, z, biased):
    arguments = inputs(tokens, dim, vocabulary)
    arguments += (jax.random.normal(jax.random.key(5), (vocabulary,)),) if biased else ()
    grad = functools.partial(jax.value_and_grad, argnums=(0, 1, 4) if biased else (0, 1), has_aux=True)
    expected = jax.jit(grad(functools.partial(oracle, z=z)))(*arguments)
    got = jax.jit(grad(functools.partial(chunked, z=z, chunk=chunk)))(*arguments)
    without_gradient = jax.jit(functools.partial(chunked, z=z, chunk=chunk))(*arguments)
    for a, b in zip(jax.tree.leaves((got, without_gradient)), jax.tree.leaves((expected, expected[0]))):
        assert a.shape == b.shape and a.dtype == jnp.float32
        assert relative(a, b) < 1e-5


def test_the_gradient_scales_with_the_cotangent():
    h, head, targets, weights = inputs(20, 8, 30)

    def loss(h, head, scale):
        return scale * cross_entropy(h, head, targets, weights, chunk=8).loss

    for a, b in zip(jax.grad(loss, (0, 1))(h, head, -3.0), jax.grad(loss, (0, 1))(h, head, 1.0)):
        assert relative(a, -3.0 * b) < 1e-6


def test_tokens_of_weight_zero_have_no_part_whatever_their_target():
    h, head, targets, weights = inputs(30, 8, 20)
    strange = jnp.where(weights == 0, -1, targets), weights

    def loss(h, head, targets, weights):
        return cross_entropy(h, head, targets, weights, z_coefficient=0.1, chunk=7).loss

    expected = jax.value_and_grad(loss, (0, 1))(h, head, targets, weights)
    got = jax.value_and_grad(loss, (0, 1))(100 * (weights == 0)[:, None] + h, head, *strange)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    assert np.all(np.asarray(got[1][0])[np.asarray(weights) == 0] == 0)
    for a, b in zip(got[1], expected[1]):
        assert relative(a, b) < 1e-6


def test_the_reported_sums_carry_no_gradient():
    h, head, targets, weights = inputs(12, 4, 9)

    def reports(h):
        out = cross_entropy(h, head, targets, weights, chunk=4)
        return out.ce_N.sum() + out.lse_sq_sum

    assert np.all(np.asarray(jax.grad(reports)(h)) == 0)


def test_bfloat16_inputs_keep_float32_sums():
    """Products of bfloat16 are exact in float32; only dlogits (2^-9) and the results (2^-9) are rounded."""
    arguments = inputs(96, 32, 200, jnp.bfloat16)
    grad = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    expected = grad(functools.partial(oracle, z=1e-3))(*arguments)
    got = grad(functools.partial(chunked, z=1e-3, chunk=32))(*arguments)
    assert relative(got[0][0], expected[0][0]) < 1e-5
    for a, b in zip(got[1], expected[1]):
        assert a.dtype == jnp.bfloat16
        assert relative(a, b) < 2**-7


def test_large_logits_stay_finite_and_exact():
    h, head, targets, weights = inputs(16, 8, 12)
    got = chunked(1e3 * h, head, targets, weights, z=0.0, chunk=8)
    assert relative(got[0], oracle(1e3 * h, head, targets, weights, z=0.0)[0]) < 1e-5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_never_holds_all_logits(dtype):
    """Logits of all tokens would be N*V floats = 537 MB; a chunk of 256 rows is a sixteenth, and three may coexist."""
    N, D, V, chunk = 4096, 16, 32768, 256
    shapes = [((N, D), dtype), ((D, V), dtype), ((N,), jnp.int32), ((N,), jnp.float32)]
    fn = jax.grad(lambda *a: cross_entropy(*a, chunk=chunk).loss, (0, 1))
    compiled = jax.jit(fn).lower(*(jax.ShapeDtypeStruct(*s) for s in shapes)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3.5 * chunk * V * 4


def test_result_is_the_same_inside_shard_map():
    arguments = inputs(40, 8, 30)

    def loss(*a):
        return cross_entropy(*a, chunk=16).loss

    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    specs = (P("data"), P(), P("data"), P("data"))
    with jax.set_mesh(mesh):
        on_mesh = jax.shard_map(
            lambda *a: jax.lax.psum(loss(*a), "data"), in_specs=specs, out_specs=P(), check_vma=False
        )
        placed = [jax.device_put(a, jax.NamedSharding(mesh, s)) for a, s in zip(arguments, specs)]
        got = jax.jit(jax.value_and_grad(on_mesh, (0, 1)))(*placed)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(jax.value_and_grad(loss, (0, 1))(*arguments))):
        assert relative(a, b) < 1e-6
