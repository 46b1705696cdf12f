"""Our strategies decide as the router modules of `transformers` do: experts and weights, at all sizes and with ties.

Letters: N tokens, X choices.
"""

import numpy as np
import parity
import pytest
import routers
from routers import FORMS, PAIRS

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own
HELD = [pair for pair in PAIRS if FORMS[pair[0]].strategy]


def given(form: routers.Form, biased: bool) -> routers.Logits:
    """Ordinary logits, logits of +-100 among them and alone, and rows full of ties."""
    rng, choices = np.random.default_rng(0), form.experts + form.others
    ordinary = rng.normal(size=(24, choices)) * 2
    far = np.where(rng.random((24, choices)) < 0.4, rng.choice([-100.0, 100.0], (24, choices)), ordinary)
    signs = rng.choice([-100.0, 100.0], (8, choices))
    tied = rng.integers(-2, 3, (24, choices))
    level = np.repeat([[form.low], [-3.0], [1.0], [100.0]], choices, axis=1)
    logits_NX = np.concatenate([ordinary, far, signs, tied, level]).astype(np.float32)
    bias_X = rng.normal(size=choices) * 0.3 * (biased and bool(form.bias)) * (np.arange(choices) < form.experts)
    return routers.Logits(logits_NX, bias_X.astype(np.float32))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("key, name", HELD)
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
        if (
            not logits.bias_X.any() and not form.best and not form.others
        ):  # equal scores have equal weights, whoever has them
            sizes = (np.sort(decision.weight_NX[defined]) for decision in (ours, theirs))
            np.testing.assert_allclose(*sizes, rtol=2e-5, atol=2e-6)


def test_every_router_of_transformers_has_a_row():
    assert routers.found().keys() == {name for _, name in PAIRS} and {key for key, _ in PAIRS} == FORMS.keys()
    assert len(set(routers.found().values())) == 72
    assert all(form.strategy or form.note for form in FORMS.values())


def test_the_page_has_every_router():
    said = parity.PAGE.read_text(encoding="utf-8")
    assert said.endswith(parity.page_of_routers()), "`make parity` writes docs/parity.md"
