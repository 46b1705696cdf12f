"""Schedules by their corner values, and what weight decay touches."""

import itertools

import jax
import numpy as np
import pytest

from frugalmoe.config import default, override, resolve
from frugalmoe.errors import UserError
from frugalmoe.model.transformer import declarations, structure
from frugalmoe.schema import Config, Optim, Train
from frugalmoe.train.optim import decay_mask, optimizer, schedule

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
