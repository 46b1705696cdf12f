"""Every attention implementation that this platform runs against one naive oracle, in value and gradient; causality."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_train_step import mesh_of

from frugalmoe.model.attention.heads import write
from frugalmoe.model.attention.kernels import Form, cache_attention, causal_attention, choose_implementation

# B, T, H, K, d and the lengths of a sequence's documents; what remains of T is padding.
SHAPES = {
    "one_token": (2, 1, 2, 1, 8, [1]),
    "shorter_than_chunk": (2, 17, 4, 2, 8, [17]),
    "multi_head": (2, 64, 4, 4, 16, [64]),
    "multi_query": (1, 96, 4, 1, 8, [96]),
    "odd_time": (3, 131, 6, 2, 8, [131]),
    "documents": (2, 160, 4, 2, 8, [1, 70, 89]),
    "padding": (2, 130, 4, 2, 8, [40, 60]),
    "all_padding": (2, 66, 2, 1, 8, []),
    "many_rows": (12, 256, 8, 4, 32, [100, 156]),
    "large_chunk": (1, 640, 2, 1, 8, [300, 340]),
}
CASES = [*itertools.product(SHAPES, ("chunked", "xla")), ("documents", "auto")]
CASES += [("splash", "splash")]  # interpreted where there is no TPU
SHAPES["splash"] = (1, 128, 2, 1, 64, [50, 60])


def segment_ids(shape) -> jax.Array:
    batch, time, documents = shape[0], shape[1], shape[-1]
    row = np.zeros(time, np.int32)
    row[: sum(documents)] = np.repeat(np.arange(1, len(documents) + 1), documents)
    return jnp.array(np.tile(row, (batch, 1)))


def in_chunks(shape, size: int) -> jax.Array:
    """Segment ids where each chunk of a document is one of its own."""
    first_of_chunk = [t % size == 0 for length in shape[-1] for t in range(length)]
    row = np.pad(np.cumsum(first_of_chunk), (0, shape[1] - len(first_of_chunk))).astype(np.int32)
    return jnp.array(np.tile(row, (shape[0], 1)))


def inputs(shape, dtype=jnp.float32) -> list[jax.Array]:
    B, T, H, K, d, _ = shape
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(k, (B, T, n, d), dtype) for k, n in zip(keys, (H, K, K, H))]


def oracle(q_BTHd, k_BThd, v_BThd, segment_ids_BT, sink_H=None, window=0):
    """The definition, with keys and values repeated for their groups and every document masked by equality of ids.

    A sink is one more key of each head, whose value is zero.
    """
    T, group = q_BTHd.shape[1], q_BTHd.shape[2] // k_BThd.shape[2]
    k, v = (jnp.repeat(a, group, axis=2) for a in (k_BThd, v_BThd))
    score = jnp.einsum("bthd,bshd->bhts", q_BTHd, k, precision="highest") / np.sqrt(q_BTHd.shape[-1])
    same = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    near = jnp.arange(T)[:, None] - jnp.arange(T) < (window or T)
    score = jnp.where((same & near & jnp.tril(jnp.ones((T, T), bool)))[:, None], score, -jnp.inf)
    if sink_H is not None:
        sinks = jnp.broadcast_to(sink_H[:, None, None], (*score.shape[:3], 1))
        score, v = jnp.concatenate([score, sinks], -1), jnp.pad(v, ((0, 0), (0, 1), (0, 0), (0, 0)))
    o = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(score), v, precision="highest")
    return jnp.where((segment_ids_BT > 0)[:, :, None, None], o, 0)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(fn, q, k, v, do, segment_ids_BT):
    o, pull = jax.vjp(lambda q, k, v: fn(q, k, v, segment_ids_BT), q, k, v)
    return o, *pull(do.astype(o.dtype))


@functools.cache
def with_implementation(name):
    return functools.partial(causal_attention, implementation=name)


@pytest.mark.parametrize("shape,implementation", CASES)
def test_values_and_gradients_equal_the_oracle(shape, implementation):
    shape = SHAPES[shape]
    arguments = (*inputs(shape), segment_ids(shape))
    got = value_and_gradients(with_implementation(implementation), *arguments)
    expected = value_and_gradients(oracle, *arguments)
    for name, a, b in zip(("o", "dq", "dk", "dv"), got, expected):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=name)


# window, whether there are sinks, channels of a value (0: those of a key).
WIDER = {"window": (20, False, 0), "sinks": (0, True, 0), "values": (0, False, 12), "all": (70, True, 20)}
WIDER_CASES = [
    *itertools.product(WIDER, ("documents", "padding"), ("chunked", "xla")),
    ("window", "large_chunk", "chunked"),
    ("all", "splash", "splash"),
]


@pytest.mark.parametrize("form,shape,implementation", WIDER_CASES)
def test_windows_sinks_and_other_channels_of_values_equal_the_oracle(form, shape, implementation):
    window, with_sinks, width = WIDER[form]
    H, d = SHAPES[shape][2], SHAPES[shape][4]
    q, k, v, do = inputs(SHAPES[shape])
    if width:
        v, do = (jax.random.normal(jax.random.key(9), (*a.shape[:3], width)) for a in (v, do))
    sinks = 2 * jax.random.normal(jax.random.key(8), (H,)) if with_sinks else None
    segments, form = segment_ids(SHAPES[shape]), Form(d**-0.5, window)

    def both(fn):
        o, pull = jax.vjp(fn, q, k, v, sinks)
        return o, *(gradient for gradient in pull(do) if gradient is not None)

    ours = lambda q, k, v, sinks: causal_attention(
        q, k, v, segments, form=form, sink_H=sinks, implementation=implementation
    )
    got = jax.jit(lambda: both(ours))()
    expected = jax.jit(lambda: both(lambda q, k, v, sinks: oracle(q, k, v, segments, sinks, window)))()
    for name, a, b in zip(("o", "dq", "dk", "dv", "dsink"), got, expected, strict=False):
        np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-5, err_msg=name)
    assert len(got) == len(expected) == 4 + with_sinks


@pytest.mark.parametrize("shape, implementation", [*CASES[8:16], ("large_chunk", "chunked"), ("splash", "splash")])
def test_chunks_are_documents(shape, implementation):
    shape = SHAPES[shape]
    fn = functools.partial(causal_attention, form=Form(shape[4] ** -0.5, 20, True), implementation=implementation)
    got = value_and_gradients(fn, *inputs(shape), segment_ids(shape))
    expected = value_and_gradients(oracle, *inputs(shape), in_chunks(shape, 20))
    for name, a, b in zip(("o", "dq", "dk", "dv"), got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=name)


def test_no_work_before_the_window_beyond_a_chunk():
    """Multiplications of the compiled gradient, which grow with the window and not with the square of the length."""
    shape = (1, 2048, 1, 1, 8, [2048])
    arguments = (*inputs(shape), segment_ids(shape))

    def cost(window):
        fn = functools.partial(causal_attention, form=Form(8**-0.5, window), implementation="chunked")
        return value_and_gradients.lower(fn, *arguments).compile().cost_analysis()["flops"]

    # 16 chunks of 128 queries: on average 8.5 chunks of keys each; with a window of 128 at most 2.
    assert cost(128) < 0.3 * cost(0)


@pytest.mark.parametrize("implementation", ["chunked", "xla"])
def test_padding_gives_zeros_and_takes_no_gradient(implementation):
    shape = SHAPES["padding"]
    got = value_and_gradients(with_implementation(implementation), *inputs(shape), segment_ids(shape))
    for a in got:
        assert np.all(np.asarray(a[:, 100:]) == 0)
        assert np.any(np.asarray(a[:, 99]) != 0)


@pytest.mark.parametrize("implementation", ["chunked", "xla"])
def test_a_query_depends_on_the_earlier_tokens_of_its_document_only(implementation):
    """d o[t] / d v[s] is nonzero exactly where s <= t and both are in one document."""
    shape = (1, 80, 1, 1, 4, [30, 50])
    q, k, v, _ = inputs(shape)
    segments = segment_ids(shape)
    fn = with_implementation(implementation)
    jacobian = jax.jacrev(lambda v: fn(q, k, v, segments)[0, :, 0].sum(-1))(v)[:, 0, :, 0]
    depends = np.any(np.asarray(jacobian) != 0, axis=-1)
    t, s = np.indices((80, 80))
    np.testing.assert_array_equal(depends, (s <= t) & ((s >= 30) | (t < 30)))


def test_gradients_of_keys_are_causal_too():
    """Only the last query is asked: every key of its document has a gradient, no other has; keys get it by softmax."""
    shape = (1, 70, 2, 1, 4, [20, 50])
    q, k, v, _ = inputs(shape)
    dk = jax.grad(lambda k: causal_attention(q, k, v, segment_ids(shape))[:, 40].sum())(k)
    np.testing.assert_array_equal(
        np.any(np.asarray(dk) != 0, axis=(0, 2, 3)), (np.arange(70) >= 20) & (np.arange(70) <= 40)
    )


def test_large_scores_stay_finite():
    shape = SHAPES["documents"]
    q, k, v, do = inputs(shape)
    for a in value_and_gradients(causal_attention, 1e4 * q, k, v, do, segment_ids(shape)):
        assert np.isfinite(np.asarray(a)).all()


def test_bfloat16_is_as_near_to_the_oracle_as_rounding_allows():
    """Inputs, probabilities and results are rounded to 8 bits (2^-8 each), sums are float32."""
    shape = SHAPES["documents"]
    low = inputs(shape, jnp.bfloat16)
    got = value_and_gradients(with_implementation("chunked"), *low, segment_ids(shape))
    expected = value_and_gradients(oracle, *(a.astype(jnp.float32) for a in low), segment_ids(shape))
    for a, b in zip(got, expected):
        assert a.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)
        assert error < 2 * 2**-8, error


@pytest.mark.slow
def test_result_is_the_same_under_checkpoint_vmap_and_shard_map():
    shape = SHAPES["documents"]
    q, k, v, do = inputs(shape)
    segments = segment_ids(shape)
    plain = value_and_gradients(causal_attention, q, k, v, do, segments)
    remat = value_and_gradients(jax.checkpoint(causal_attention), q, k, v, do, segments)
    rows = jax.vmap(lambda *a: [x[0] for x in value_and_gradients(causal_attention, *(x[None] for x in a))])(
        q, k, v, do, segments
    )
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        spec = P("data")
        sharded_fn = jax.shard_map(causal_attention, in_specs=(spec,) * 4, out_specs=spec, check_vma=False)
        placed = [jax.device_put(a, jax.NamedSharding(mesh, spec)) for a in (q, k, v, do, segments)]
        sharded = value_and_gradients(sharded_fn, *placed)
    for other in (remat, rows, sharded):
        for a, b in zip(plain, other):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_memory_of_the_gradient_grows_with_time_not_with_its_square():
    """One float32 [B, H, T, T] is 268 MB here and the plain gradient holds several; ours at most a quarter."""
    shape = (2, 2048, 8, 4, 8, [2048])
    arguments = (*inputs(shape), segment_ids(shape))
    lowered = value_and_gradients.lower(with_implementation("chunked"), *arguments)
    temporary = lowered.compile().memory_analysis().temp_size_in_bytes
    assert temporary < 2 * 8 * 2048**2 * 4 / 4


@pytest.mark.parametrize(
    "platform,dtype,time,channels,expected",
    [
        ("cpu", jnp.float32, 256, 32, "chunked"),
        ("cpu", jnp.bfloat16, 7, 32, "chunked"),
        ("gpu", jnp.bfloat16, 256, 64, "cudnn"),
        ("gpu", jnp.float32, 256, 64, "xla"),
        ("gpu", jnp.bfloat16, 255, 64, "xla"),
        ("gpu", jnp.bfloat16, 256, 60, "xla"),
        ("gpu", jnp.bfloat16, 256, 256, "xla"),
        ("tpu", jnp.bfloat16, 256, 128, "splash"),
        ("tpu", jnp.bfloat16, 200, 128, "xla"),
    ],
)
def test_the_choice_follows_platform_and_limits(platform, dtype, time, channels, expected):
    choose = functools.partial(choose_implementation, (1, time, 8, channels), jnp.dtype(dtype), platform)
    assert choose() == expected
    assert choose(plain=False) == ("xla" if expected == "cudnn" else expected), "cuDNN has no sinks"


def test_attention_to_a_cache_equals_attention_to_the_whole_sequence():
    """Row b is asked about its own position; slots beyond it hold rubbish."""
    shape = (3, 40, 4, 2, 8, [40])
    q, k, v, _ = inputs(shape)
    whole = oracle(q, k, v, segment_ids(shape))
    for start, new in ((jnp.array([5, 0, 36]), 1), (jnp.array([0, 7, 30]), 9), (jnp.int32(11), 4)):
        start_B = jnp.broadcast_to(start, (3,))
        place_BT = start_B[:, None] + jnp.arange(new)
        filled_BS = (jnp.arange(40) < start_B[:, None] + new)[:, :, None, None]
        query = jnp.take_along_axis(q, place_BT[:, :, None, None], axis=1)
        held = (jnp.where(filled_BS, a, 99.0).swapaxes(1, 2) for a in (k, v))
        got = cache_attention(query, *held, start)
        expected = jnp.take_along_axis(whole, place_BT[:, :, None, None], axis=1)
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("slots", [24, 44])
def test_a_ring_of_slots_holds_the_window(slots, chunked):
    """Tokens come in pieces of 9, of which 2 are padding and come again as they are; 24 slots are fewer than 44."""
    shape, sinks = (2, 44, 4, 2, 8, [44]), jnp.array([0.5, -1.0, 2.0, 0.0])
    q, k, v, _ = inputs(shape)
    form, segments = Form(8**-0.5, 12, chunked), in_chunks(shape, 12) if chunked else segment_ids(shape)
    whole = oracle(q, k, v, segments, sinks, 12)

    @jax.jit
    def step(cache, q, k, v, start):
        cache = [write(old, new.swapaxes(1, 2), start) for old, new in zip(cache, (k, v))]
        return cache, cache_attention(q, *cache, start, form=form, sink_H=sinks)

    with jax.set_mesh(mesh_of()):
        cache = [jnp.zeros((2, 2, slots, 8))] * 2
        for at in range(0, 44 - 8, 7):
            real = (jnp.arange(at, at + 9) < (at + 7 if at < 35 else 44))[:, None, None]
            piece = [jnp.where(real, a[:, at : at + 9], 99.0) for a in (q, k, v)]
            cache, got = step(cache, *piece, jnp.int32(at))
            count = int(real.sum())
            np.testing.assert_allclose(got[:, :count], whole[:, at : at + count], rtol=2e-5, atol=2e-5)
