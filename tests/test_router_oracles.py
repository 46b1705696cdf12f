"""Our strategies decide as the router modules of `transformers` do: experts and weights, at all sizes and with ties.

Letters: N tokens, X choices.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import routers
import torch
from routers import FORMS, PAIRS
from transformers.models.zaya.modeling_zaya import ZayaRouter

from frugalmoe.routing import strategies
from frugalmoe.routing.contract import Inputs, combine_matrix
from frugalmoe.schema import MoE

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own
HELD = [pair for pair in PAIRS if FORMS[pair[0]].strategy and not FORMS[pair[0]].in_layers]
WITH_BIAS = [(*pair, biased) for pair in HELD for biased in ((True, False) if FORMS[pair[0]].bias else (False,))]


def given(form: routers.Form, biased: bool) -> routers.Logits:
    """Ordinary logits, logits of +-100 among them and alone, rows full of ties, and levels where something counts that
    is added to the sum of scores. The bias makes many scores negative.
    """
    rng, choices = np.random.default_rng(0), form.experts + form.others
    ordinary = rng.normal(size=(24, choices)) * 2
    far = np.where(rng.random((24, choices)) < 0.4, rng.choice([-100.0, 100.0], (24, choices)), ordinary)
    signs = rng.choice([-100.0, 100.0], (8, choices))
    tied = rng.integers(-2, 3, (24, choices))
    level = np.repeat([[form.low], [-44.0], [-14.0], [1.0], [100.0]], choices, axis=1)
    logits_NX = np.concatenate([ordinary, far, signs, tied, level]).astype(np.float32)
    bias_X = (rng.normal(size=choices) * 0.3 - 0.2) * biased * (np.arange(choices) < form.experts)
    return routers.Logits(logits_NX, bias_X.astype(np.float32))


@pytest.mark.parametrize("key, name, biased", WITH_BIAS)
def test_the_same_experts_with_the_same_weights(key, name, biased):
    hold(FORMS[key], name, biased)


def test_ling_3_of_512_experts():
    settings = {"n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
    form = routers.variant(FORMS["deepseek_v3"], experts=512, k=8, settings=(settings,))
    hold(form, "BailingHybridTopkRouter", biased=True)


def hold(form: routers.Form, name: str, biased: bool) -> None:
    """With ties, of which torch keeps no order, both choose K largest; a weight that is 0 / 0 there is finite here."""
    for settings in form.settings:
        logits = given(form, biased)
        theirs, ours = routers.theirs(form, name, settings, logits), routers.ours(form, settings, logits)
        compared_NX = routers.compared(form, settings, logits)
        assert np.isfinite(ours.weight_NX).all()
        alike = (theirs.chosen_NX == ours.chosen_NX).all(-1)
        for n, row in enumerate(compared_NX):
            assert alike[n] or routers.has_tie(row, form, settings), (settings, logits.logits_NX[n])
            for chosen_NX in (theirs.chosen_NX, ours.chosen_NX) if not form.others else ():
                assert routers.is_valid(chosen_NX[n], row, form, settings), (settings, logits.logits_NX[n])
        defined = np.isfinite(theirs.weight_NX).all(-1)
        same = alike & defined
        assert same[:48].mean() > 0.5 and alike[:24].all()
        np.testing.assert_allclose(ours.weight_NX[same], theirs.weight_NX[same], rtol=2e-5, atol=2e-6)
        if not (biased or form.best or form.others):  # equal scores have equal weights, whoever has them
            sizes = (np.sort(decision.weight_NX[defined]) for decision in (ours, theirs))
            np.testing.assert_allclose(*sizes, rtol=2e-5, atol=2e-6)


ZAYA = {  # ours: theirs
    "proj_DP": "down_proj.weight",
    "proj_bias_P": "down_proj.bias",
    "carry_scale_P": "router_states_scale",
    "norm_scale_P": "router_mlp.norm.weight",
    "first_PP": "router_mlp.fc1.weight",
    "first_bias_P": "router_mlp.fc1.bias",
    "second_PP": "router_mlp.fc2.weight",
    "second_bias_P": "router_mlp.fc2.bias",
    "kernel_PX": "router_mlp.out_proj.weight",
}


@pytest.mark.parametrize("sharpness", [1.0, 100.0])
def test_zaya_hands_its_state_from_layer_to_layer(sharpness):
    """Two layers, whose logits are ordinary and beyond 100: experts, weights, skips, and the state."""
    config = SimpleNamespace(hidden_size=24, num_experts=8, num_experts_per_tok=1, router_hidden_size=12)
    config.rms_norm_eps = 1e-5
    router = strategies.get("zaya")
    moe = MoE(num_experts=8, num_experts_per_token=1, router="zaya", options=router.options(hidden=12))
    x_BTD = np.random.default_rng(0).normal(size=(2, 20, 24)).astype(np.float32)
    ones = jnp.ones((2, 20), jnp.int32)
    given = Inputs(x_BTD, ones, ones, ones, jax.random.split(jax.random.key(0), 2), jnp.int32(0), jnp.int32(0))
    carry, hidden, skipped = router.init_carry(moe, 2, 20), None, 0
    for layer in range(2):
        module = ZayaRouter(config, layer)
        torch.manual_seed(layer)
        with torch.no_grad():
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                tensor.normal_(mean=float("norm" in name or "scale" in name), std=0.3)
            module.router_mlp.out_proj.weight.mul_(5 * sharpness)
            module.balancing_biases.mul_(0.2)[-1] = 0.5 if sharpness == 1 else 1.0  # so that some skip
            logits, weights, experts, hidden = module(torch.from_numpy(x_BTD), hidden)
        named = dict(module.named_parameters())
        params = {ours: jnp.asarray(named[name].detach().numpy().T) for ours, name in ZAYA.items() if name in named}
        params.setdefault("carry_scale_P", jnp.ones(12))  # the first layer has none
        state = {"bias_X": jnp.asarray(module.balancing_biases.numpy())}
        routing = router.route(params, state, given._replace(layer=jnp.int32(layer), carry=carry), moe)
        carry = routing.carry
        np.testing.assert_allclose(carry["hidden_BTP"], hidden, rtol=1e-5, atol=1e-5)
        expected_NE = np.zeros((40, 8), np.float32)
        np.put_along_axis(expected_NE, experts.numpy(), weights.numpy(), axis=1)
        np.testing.assert_allclose(combine_matrix(routing.plan, 40, 8), expected_NE, rtol=2e-5 * sharpness, atol=1e-5)
        skips = np.asarray(routing.plan.ids) == 8
        assert np.all(weights.numpy()[skips] == 0)
        skipped += skips.sum()
        assert sharpness == 1 or logits.abs().max() > 100
    assert 0 < skipped < 80


def test_every_router_of_transformers_has_a_row():
    assert routers.found().keys() == {name for _, name in PAIRS} and {key for key, _ in PAIRS} == FORMS.keys()
    assert len(set(routers.found().values())) == 72
    assert all(form.strategy or form.note for form in FORMS.values())


def test_the_page_has_every_router():
    said = parity.PAGE.read_text(encoding="utf-8")
    assert said.endswith(parity.page_of_routers()), "`make parity` writes docs/parity.md"
