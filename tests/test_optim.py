"""Schedules by their corner values, what weight decay touches, and Muon: by hand, and on which arrays."""

import functools
import itertools

import jax
import numpy as np
import optax
import pytest

from frugalmoe.config import default, override, resolve
from frugalmoe.errors import UserError
from frugalmoe.model.transformer import declarations, structure
from frugalmoe.optimizers import OPTIMIZERS, decay_mask
from frugalmoe.schema import Config, Optim, Train
from frugalmoe.sharding import AXES, ROLES, make_mesh
from frugalmoe.train.optim import bytes_of, numbers, optimizer, schedule, without_numbers

STEPS, WARMUP, PEAK = 100, 10, 0.5
BASE = {
    "train.steps": STEPS,
    "optim.warmup_steps": WARMUP,
    "optim.learning_rate": PEAK,
    "optim.final_fraction": 0.1,
    "optim.decay_fraction": 0.2,
    "model.vocab_size": 64,
}
# (step, rate): warmup rises by a tenth of the peak; wsd falls over the last 18 of the 90 steps after the warmup, from
# the peak at update 81 to a tenth of it at update 99; cosine from the peak at update 9, half way at update 54.
CORNERS = {
    "wsd": [(0, 0.05), (4, 0.25), (9, 0.5), (50, 0.5), (81, 0.5), (90, 0.275), (99, 0.05)],
    "cosine": [(0, 0.05), (9, 0.5), (54, 0.275), (99, 0.05)],
    "constant": [(0, 0.05), (9, 0.5), (99, 0.5)],
}


@pytest.mark.parametrize("name, step, rate", [(n, *c) for n, corners in CORNERS.items() for c in corners])
def test_schedule(name, step, rate):
    config = resolve(override(default(), BASE | {"optim.schedule": name}))
    assert float(schedule(config)(step)) == pytest.approx(rate, rel=1e-5)


@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_last_update_has_the_final_rate_and_rates_never_rise_again(name, steps):
    """Every warmup that the checks allow, every length of the decay, final rates from none to the peak."""
    for warmup, fraction, final in itertools.product(
        {0, 1, steps // 2, steps - 1} - {steps}, (0, 1e-6, 0.5, 1), (0, 0.1)
    ):
        optim = Optim(
            learning_rate=PEAK, schedule=name, warmup_steps=warmup, decay_fraction=fraction, final_fraction=final
        )
        rate = schedule(Config(optim=optim, train=Train(steps=steps)))
        rates = np.asarray([rate(np.int32(i)) for i in range(steps)])
        case, top = str(optim), max(warmup - 1, 0)
        decays = name == "cosine" or (name == "wsd" and fraction)
        assert rates[-1] == pytest.approx(PEAK * final if decays else PEAK, rel=1e-6), case
        assert np.allclose(rates[:warmup], PEAK * np.arange(1, warmup + 1) / max(warmup, 1)), case
        if steps > 1:
            assert rates[top] == pytest.approx(PEAK) and np.all(np.diff(rates[top:]) <= 0), case
        else:
            assert rates[0] == pytest.approx(PEAK * final if decays else PEAK), case


def test_a_warmup_as_long_as_the_run_is_refused():
    with pytest.raises(UserError, match=r"optim.warmup_steps=100: must be less than train.steps=100"):
        resolve(override(default(), BASE | {"optim.warmup_steps": STEPS}))


def test_no_warmup_starts_at_the_peak():
    config = resolve(override(default(), BASE | {"optim.warmup_steps": 0}))
    assert float(schedule(config)(0)) == pytest.approx(PEAK)


def test_decay_touches_matrices_and_nothing_else():
    fields = {"model.qk_norm": "head", "model.qkv_bias": True, "model.num_dense_layers": 1, "model.dense_dim": 8}
    model = resolve(override(default(), BASE | fields)).model
    _, params, _ = structure(model)
    mask = decay_mask(params, declarations(model))
    decayed = {jax.tree_util.keystr(path) for path, decays in jax.tree_util.tree_leaves_with_path(mask) if decays}
    everything = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    kept = everything - decayed
    assert all("norm" in name or "bias" in name for name in kept) and kept
    assert not any("norm" in name or "bias" in name for name in decayed)
    assert any("embed" in n for n in decayed) and any("router" in n for n in decayed)


def test_decay_is_decoupled_from_the_gradient_and_gradients_are_clipped():
    """A zero gradient shrinks a matrix by rate * decay, never a norm scale; a huge gradient acts as a unit one."""
    config = resolve(override(default(), BASE | {"optim.warmup_steps": 0, "optim.weight_decay": 0.1}))
    params = {"embed_VD": np.ones((4, 4), np.float32), "final_norm": {"scale": np.ones(4, np.float32)}}
    tx = optimizer(config)
    updates, _ = tx.update(jax.tree.map(np.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["embed_VD"], -PEAK * 0.1, rtol=1e-6)
    np.testing.assert_array_equal(updates["final_norm"]["scale"], 0)
    huge = jax.tree.map(lambda p: np.full_like(p, 1e6), params)
    _, state = tx.update(huge, tx.init(params), params)
    (mu,) = (s.mu for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    assert float(np.sqrt(sum(np.square(m).sum() for m in jax.tree.leaves(mu)))) == pytest.approx(0.1, rel=1e-5)


# ---------------------------------------------------------------- Muon, and rates of roles

SMALL = {
    "train.steps": 5,
    "optim.warmup_steps": 0,
    "optim.learning_rate": 0.01,
    "optim.schedule": "constant",
    "optim.clip_norm": 0.0,
    "model.vocab_size": 64,
    "model.dim": 12,
    "model.num_layers": 3,
    "model.num_dense_layers": 1,
    "model.dense_dim": 20,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 8,
    "model.qk_norm": "head",
    "model.qkv_bias": True,
    "model.moe.num_experts": 3,
    "model.moe.expert_dim": 5,
    "model.moe.num_shared_experts": 1,
    "model.mixture_of_depths.capacity": 0.5,
}


def config_of(**fields) -> Config:
    return resolve(override(default(), SMALL | {name.replace("__", "."): value for name, value in fields.items()}))


@functools.cache
def arrays_of(config: Config) -> tuple[dict, dict]:
    """Parameters and gradients of a model, at random."""
    _, shapes, _ = structure(config.model)
    rng = np.random.default_rng(0)
    draw = lambda: jax.tree.map(lambda a: rng.standard_normal(a.shape, np.float32), shapes)
    return draw(), draw()


def on_one_device():
    return jax.set_mesh(make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1]))


def compiled(tx: optax.GradientTransformation):
    return jax.jit(tx.update, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def update_of(config: Config) -> dict:
    """The first update, by path."""
    params, gradients = arrays_of(config_of())
    with on_one_device():
        tx = optimizer(config)
        updates, _ = compiled(tx)(gradients, tx.init(params), params)
    return by_path(jax.device_get(updates))


def by_path(tree: dict) -> dict[tuple[str, ...], np.ndarray]:
    return {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# The matrices of each array, by hand: einsum-like letters, inputs and outputs as one axis each.
MATRICES = {
    "query_DHd": lambda a: a.reshape(-1, 12, 32),  # one matrix for all 4 heads of 8 channels
    "out_HdD": lambda a: a.reshape(-1, 32, 12),
    "gate_up_D2F": lambda a: np.moveaxis(a, 2, 1).reshape(-1, 12, a.shape[-1]),  # gate and up apart
    "down_FD": lambda a: a.reshape(-1, a.shape[-2], 12),
    "gate_up_ED2F": lambda a: np.moveaxis(a, 3, 2).reshape(-1, 12, 5),  # each expert's
    "down_EFD": lambda a: a.reshape(-1, 5, 12),
}


def matrices_of(name: str, array: np.ndarray) -> np.ndarray:
    """Of an array of stacked layers: [matrices, inputs, outputs]."""
    if name.startswith(("key_D", "value_D")):
        return array.reshape(-1, 12, 16)
    return MATRICES[name](array)


def test_muon_makes_each_matrix_orthogonal_by_itself_and_adamw_keeps_the_rest():
    """Singular values near 1 before the scale 0.2 sqrt(max(inputs, outputs)), as far as five steps bring them."""
    muon, adamw = (update_of(config_of(optim__name=name, optim__weight_decay=0.0)) for name in ("muon", "adamw"))
    declared, orthogonal = declarations(config_of().model), set()
    for path, update in muon.items():
        if declared[path].role != "matrix":
            np.testing.assert_array_equal(update, adamw[path], err_msg=str(path))
            continue
        matrices = matrices_of(path[-1], update / -0.01)
        layers = 1 if path[0] == "dense_blocks" else 2
        experts, pair = ("E" in declared[path].axes) * 2 + 1, ("2" in declared[path].axes) + 1
        assert len(matrices) == layers * experts * pair, path
        values = np.linalg.svd(matrices / (0.2 * max(matrices.shape[1:]) ** 0.5), compute_uv=False)
        assert values.min() > 0.5 and values.max() < 1.3, (path, values.min(), values.max())
        assert np.abs(update / adamw[path]).max() > 1.01 or np.abs(update / adamw[path]).min() < 0.99
        orthogonal.add(path[-1])
    assert len(orthogonal) == 8 and {d.role for d in declared.values()} == set(ROLES)


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Five steps of a X + (b A + c A A) X with A = X X', from X of Frobenius norm 1 (Jordan et al. 2024), float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / np.linalg.norm(wide)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide is matrix else x.T


def test_muon_by_hand():
    """Two steps of one matrix: momentum with Nesterov's look ahead, five iterations, scale, decay."""
    config = config_of(optim__name="muon", optim__momentum=0.9, optim__weight_decay=0.5)
    params, gradients = arrays_of(config_of())
    path = ("moe_blocks", "moe", "gate_up_ED2F")
    take = lambda tree: np.asarray(by_path(tree)[path])[1, 2, :, 0].astype(np.float64)  # layer 1, expert 2, gate
    weight, gradient, mean = take(params), take(gradients), 0.0
    with on_one_device():
        tx = optimizer(config)
        state, update = tx.init(params), compiled(tx)
        for step, sign in enumerate((1.0, -2.0), 1):
            updates, state = update(jax.tree.map(lambda g, sign=sign: sign * g, gradients), state, params)
            mean = 0.9 * mean + 0.1 * sign * gradient
            ahead = 0.9 * mean / (1 - 0.9 ** (step + 1)) + 0.1 * sign * gradient / (1 - 0.9**step)
            expected = -0.01 * (0.2 * 12**0.5 * newton_schulz(ahead) + 0.5 * weight)
            np.testing.assert_allclose(take(updates), expected, atol=2e-5 * np.abs(expected).max())


def test_a_matrix_without_a_gradient_is_left_where_it_is():
    """An expert that no token reaches in the first step: no NaN, no update."""
    params, gradients = arrays_of(config_of())
    gradients["moe_blocks"]["moe"]["down_EFD"] = gradients["moe_blocks"]["moe"]["down_EFD"].copy()
    gradients["moe_blocks"]["moe"]["down_EFD"][0, 1] = 0
    with on_one_device():
        tx = optimizer(config_of(optim__name="muon", optim__weight_decay=0.0))
        updates, state = compiled(tx)(gradients, tx.init(params), params)
    update = np.asarray(updates["moe_blocks"]["moe"]["down_EFD"])
    assert np.all(update[0, 1] == 0) and np.all(update[0, 0] != 0) and np.all(np.isfinite(update))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rates_of_roles_are_factors_on_the_updates_of_their_arrays_alone(name):
    """Decay too, for it is times the learning rate. XLA orders the sums of two programs differently."""
    rates = {"router": 0.5, "vector": 0.0, "head": 4}
    plain, rated = (update_of(config_of(optim__name=name, optim__rates=r)) for r in ({}, rates))
    declared = declarations(config_of().model)
    for path, update in plain.items():
        expected = update * np.float32(rates.get(declared[path].role, 1))
        np.testing.assert_allclose(rated[path], expected, rtol=1e-5, atol=1e-4 * np.abs(expected).max(), err_msg=path)


@pytest.mark.parametrize("name, of_matrices, of_the_rest", [("adamw", 2, 2), ("muon", 1, 2), ("sgd", 0, 0)])
def test_bytes_of_the_optimizer_by_hand(name, of_matrices, of_the_rest):
    """AdamW keeps two moments, Muon one for a matrix, plain SGD none. Beside them stand counters and coefficients."""
    config = config_of(optim__name=name)
    params, _ = arrays_of(config_of())
    declared = declarations(config.model)
    sizes = {True: 0, False: 0}
    for path, leaf in by_path(params).items():
        sizes[declared[path].role == "matrix"] += 4 * leaf.size
    found = bytes_of(config)
    assert found.parameters == sum(sizes.values())
    assert 0 < found.optimizer - (of_matrices * sizes[True] + of_the_rest * sizes[False]) < 64


def test_sgd_by_hand():
    """Without momentum; decay of matrices alone, decoupled from the gradient's size."""
    params, gradients = arrays_of(config_of())
    update, declared = update_of(config_of(optim__name="sgd", optim__weight_decay=0.5)), declarations(config_of().model)
    for path, gradient in by_path(gradients).items():
        decay = 0.5 * by_path(params)[path] if declared[path].is_matrix else 0
        np.testing.assert_allclose(update[path], -0.01 * (gradient + decay), rtol=1e-5, atol=1e-8, err_msg=path)


WRONG = [
    ("optim.name=moun", "optim.name='moun': unknown; did you mean 'muon'?"),
    ("optim.rates.rooter=1", "optim.rates.rooter: unknown role of parameters; did you mean 'router'?"),
    ("optim.rates.router=-1", "optim.rates.router=-1.0: must not be negative or infinite"),
    ("optim.rates.router=fast", "optim.rates.router='fast': expected float, got str"),
    ("optim.rates=0.5", "optim.rates=0.5: is a section"),
    ("optim.momentum=1", "optim.momentum=1.0: must be in [0, 1)"),
    ("optim.nmae=muon", "optim.nmae: unknown config field; did you mean 'name'?"),
]


@pytest.mark.parametrize("flag, line", WRONG, ids=[flag for flag, _ in WRONG])
def test_what_is_wrong_is_said(flag, line):
    with pytest.raises(UserError) as refused:
        resolve(override(default(), [flag]))
    assert line in str(refused.value)


def test_the_numbers_of_a_step_are_those_of_its_config_to_the_last_bit():
    """The table of rates is the schedule; an optimizer that is given the numbers makes the update of one that holds
    them. Of cosine the table is computed many at a time, which rounds some rates otherwise.
    """
    fields = {"optim__warmup_steps": 3, "train__steps": 11, "optim__weight_decay": 0.03, "optim__drop_after": 0.5}
    cosine = config_of(optim__schedule="cosine", train__steps=11, optim__warmup_steps=3)
    each = jax.jit(schedule(cosine))
    np.testing.assert_allclose(numbers(cosine).rates_S[:11], [each(np.int32(i)) for i in range(11)], rtol=3e-7)
    config = config_of(**fields, optim__clip_norm=0.3, optim__rates={"router": 0.7}, optim__learning_rate=2.7e-3)
    found, each = numbers(config), jax.jit(schedule(config))
    np.testing.assert_array_equal(found.rates_S[:11], [each(np.int32(i)) for i in range(11)])
    assert len(found.rates_S) == 1024 and set(np.asarray(found.rates_S[11:]).tolist()) == {float(found.rates_S[10])}
    assert len(numbers(config_of(train__steps=1025)).rates_S) == 2048
    params = jax.tree.map(lambda a: np.full(a.shape, 0.5, np.float32), structure(config.model)[1])
    grads = jax.tree.map(lambda a: np.linspace(-1, 1, a.size, dtype=np.float32).reshape(a.shape), params)
    held, given = optimizer(config), lambda numbers: optimizer(without_numbers(config), numbers)
    state = held.init(params)
    one = jax.jit(held.update)(grads, state, params)
    other = jax.jit(lambda numbers, *arrays: given(numbers).update(*arrays))(found, grads, state, params)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_only_what_no_program_depends_on_is_a_number():
    same = without_numbers(config_of(optim__clip_norm=1.0))
    for field, value in {"learning_rate": 1.0, "schedule": "constant", "weight_decay": 0.0, "clip_norm": 0.5}.items():
        assert without_numbers(config_of(**{"optim__clip_norm": 1.0, f"optim__{field}": value})) == same, field
    for field, value in {"clip_norm": 0.0, "b1": 0.8, "name": "sgd", "rates": {"router": 0.5}}.items():
        assert without_numbers(config_of(**{"optim__clip_norm": 1.0, f"optim__{field}": value})) != same, field
