"""Multi-token prediction: the equations by transformers' own module, and how the modules take part in a step.

Letters: B sequences, T tokens, M modules, L MoE layers, E experts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import opened, relative_error
from published import B, T, V, fill, gradients_in_place, randomized, save, tokens
from test_train_step import DEPTHS, EVERY_LOSS, STATEFUL, batch, config_of, largest_difference, mesh_of, trained

from frugalmoe.convert import from_hf
from frugalmoe.data import Batch
from frugalmoe.data.tokenizer import ByteTokenizer
from frugalmoe.errors import UserError
from frugalmoe.generate import Drafts, Prompt, Sampled, Sampling, completions, decoding, generate
from frugalmoe.generate.texts import Drafted
from frugalmoe.model import multi_token
from frugalmoe.train import objective
from frugalmoe.train.objective import knobs
from frugalmoe.train.placing import put_batch
from frugalmoe.train.step import init, make_eval_step, make_gradient
from frugalmoe.train.weights import Weights

pytestmark = pytest.mark.whole

BFLOAT16 = {"model.compute_dtype": "bfloat16"}
MODULES = {"model.multi_token_prediction.depth": 2}


def test_tokens_ahead_end_with_their_document_and_with_the_row():
    """Documents of 3 and 2 tokens, then padding; a second row without padding."""
    tokens = np.array([[5, 6, 7, 8, 9, 4], [1, 2, 3, 4, 5, 6]], np.int32)
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]], np.int32)
    with jax.set_mesh(mesh_of()):
        ahead = jax.jit(lambda *a: multi_token.look_ahead(*a, 3))(tokens, segments)
        np.testing.assert_array_equal(ahead[:, 0], [[6, 7, 0, 9, 0, 0], [7, 0, 0, 0, 0, 0], [0] * 6])
        np.testing.assert_array_equal(ahead[:, 1], [[2, 3, 4, 5, 6, 0], [3, 4, 5, 6, 0, 0], [4, 5, 6, 0, 0, 0]])


def their_layers(theirs, depth: int) -> list[torch.nn.Module]:
    from transformers.modeling_layers import MtpLayer

    decoder, norm, last = type(theirs.model.layers[-1]), type(theirs.model.norm), len(theirs.model.layers) - 1
    layers = [MtpLayer(theirs.config, decoder, norm, last) for _ in range(depth)]
    for layer in layers:
        fill(layer)
    return layers


def their_losses(theirs, layers, ids) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross-entropy of the next token, the mean over modules of that of the tokens further ahead)."""
    ce = lambda logits, targets: torch.nn.functional.cross_entropy(logits.reshape(-1, V), targets.reshape(-1))
    hidden = theirs.model(input_ids=ids, use_cache=False).last_hidden_state
    first, further = ce(theirs.lm_head(hidden)[:, :-1], ids[:, 1:]), []
    for m, layer in enumerate(layers, 1):
        hidden = hidden[:, : T - m]
        positions = torch.arange(T - m)[None]
        mask = torch.full((T - m, T - m), float("-inf")).triu(1)[None, None]
        angles = theirs.model.rotary_emb(hidden, positions)
        hidden = layer(theirs.model.embed_tokens(ids[:, m:]), hidden, angles, mask, positions, None)
        further.append(ce(theirs.lm_head(hidden)[:, :-1], ids[:, m + 1 :]))
    return first, torch.stack(further).mean()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # transformers' own
def test_loss_and_gradients_are_those_of_transformers_modules(tmp_path):
    """Two modules behind GLM-4-MoE, read from files as they are released."""
    theirs, coefficient = randomized("glm4_moe"), 0.3
    layers = their_layers(theirs, 2)
    found, weights = opened(save(theirs, tmp_path / "theirs", layers), tmp_path / "run")
    assert found.config.model.multi_token_prediction.depth == 2 and len(found.repeats) == 4
    ids = tokens()
    theirs.zero_grad()
    first, further = their_losses(theirs, layers, torch.from_numpy(ids).long())
    (first + coefficient * further).backward()
    with gradients_in_place(theirs, *layers):
        _, expected = opened(save(theirs, tmp_path / "gradients", layers), tmp_path / "run")

    fields = {"data.sequence_length": T, "train.batch_size": B, "train.accumulate_steps": 1}
    losses = {"model.moe.losses": {}, "model.multi_token_prediction.coefficient": coefficient}
    flags = [f"{name}={value!r}" for name, value in (fields | losses).items()]
    config = from_hf.look(tmp_path / "theirs", tmp_path / "run", tokenizer="bytes", overrides=flags).config
    ones, places = np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    rows = Batch(ids, np.roll(ids, -1, axis=1), ones, places, places < T - 1, 0 * ones)
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        placed = put_batch(mesh, Batch(*(a[None] for a in rows)), "ABT")
        gradient = jax.jit(make_gradient(config))
        grads, sums, of_step = gradient(*weights, placed, np.int32(0), knobs(config))
        metrics = objective.metrics(sums, of_step, config)
    assert float(metrics["loss/mtp"]) == pytest.approx(further.item(), rel=1e-5)
    assert float(metrics["loss/ce"]) == pytest.approx(first.item(), rel=1e-5)
    assert float(metrics["loss/total"]) == pytest.approx(first.item() + coefficient * further.item(), rel=1e-5)
    errors = jax.tree.map(relative_error, grads, expected.params)
    assert max(jax.tree.leaves(errors)) < 1e-5, errors


def test_modules_are_further_layers_of_a_step():
    """Their experts are counted, their losses added, their router state moves; each token has its place in one module.

    A module's tokens are those whose token ahead is in the same document of the row.
    """
    state, reports = trained(MODULES | STATEFUL | EVERY_LOSS | {"model.moe.options.update_rate": 0.01}, steps=1)
    m = reports[0].metrics
    segments = batch(0).segment_ids_BT
    tokens = [np.sum(segments > 0)] * 2
    tokens += [np.sum((segments[:, k:] == segments[:, :-k]) & (segments[:, k:] > 0)) for k in (1, 2)]
    np.testing.assert_array_equal(reports[0].counts_LE.sum(1), 2 * np.array(tokens))
    layers = 4  # two of the network and two modules
    auxiliary = 0.01 * m["loss/load_balance"] + 0.001 * m["loss/z"] + 0.01 * m["loss/sequence_balance"]
    language = m["loss/ce"] + 0.001 * m["loss/logit_z"] + 0.1 * m["loss/mtp"]
    np.testing.assert_allclose(m["loss/total"], language + layers * auxiliary, rtol=1e-5)
    bias_ME = state.router_state["multi_token"]["block"]["moe"]["router_state"]["bias_E"]
    counts_ME = reports[0].counts_LE[2:]
    np.testing.assert_allclose(bias_ME, 0.01 * np.sign(counts_ME.mean(1, keepdims=True) - counts_ME), rtol=1e-6)


@pytest.mark.parametrize(
    "otherwise",
    [
        {"train.accumulate_steps": 4},
        pytest.param({"model.remat": "full"}, marks=pytest.mark.slow),
        pytest.param({"train.accumulate_steps": 2, "model.remat": "dots"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_micro_batches_and_rematerialisation_change_nothing(otherwise):
    whole, whole_reports = trained(MODULES | STATEFUL)
    parts, parts_reports = trained(MODULES | STATEFUL | otherwise)
    np.testing.assert_array_equal(whole_reports[0].counts_LE, parts_reports[0].counts_LE)
    assert largest_difference(whole_reports, parts_reports) < 2e-4
    assert largest_difference(whole.params, parts.params) < 1e-4
    assert largest_difference(whole.router_state, parts.router_state) == 0


def test_evaluation_does_not_look_at_the_modules():
    """Held-out losses, routing and predictions are those of the network alone, to the bit."""
    mesh, found = mesh_of(), []
    with jax.set_mesh(mesh):
        state = init(config_of(MODULES | STATEFUL))
        for fields in (MODULES, {}):
            evaluate = jax.jit(make_eval_step(config_of(fields | STATEFUL), trace=True))
            alone = {name: tree for name, tree in state.params.items() if fields or name != "multi_token"}
            of_routers = {name: tree for name, tree in state.router_state.items() if fields or name != "multi_token"}
            found.append(jax.device_get(evaluate(alone, of_routers, put_batch(mesh, batch(0), "BT"))))
    assert jax.tree.all(jax.tree.map(np.array_equal, *found))


@pytest.mark.slow
def test_other_parameters_start_as_without_modules():
    with jax.set_mesh(mesh_of()):
        with_modules, without = init(config_of(MODULES)).params, init(config_of()).params
    del with_modules["multi_token"]
    assert jax.tree.all(jax.tree.map(np.array_equal, with_modules, without))


@pytest.mark.slow
def test_documents_too_short_for_a_module_give_it_no_loss_and_no_gradient():
    """Documents of two tokens: module 2 has no target, module 1 none either, for it needs three."""
    config, mesh = config_of(MODULES), mesh_of()
    rows = batch(0)
    segments = np.tile(1 + np.arange(32, dtype=np.int32) // 2, (8, 1))
    mask = np.tile(np.arange(32) % 2 == 0, (8, 1))
    rows = rows._replace(segment_ids_BT=segments, positions_BT=np.tile(np.arange(32, dtype=np.int32) % 2, (8, 1)))
    rows = rows._replace(loss_mask_BT=mask)
    with jax.set_mesh(mesh):
        state = init(config)
        placed = put_batch(mesh, Batch(*(a[None] for a in rows)), "ABT")
        none = knobs(config)._replace(losses={name: np.float32(0) for name in config.model.moe.losses})
        gradient = jax.jit(make_gradient(config))
        gradients = gradient(state.params, state.router_state, placed, state.step, none)
    grads, sums, of_step = jax.device_get(gradients)
    assert float(objective.metrics(sums, of_step, config)["loss/mtp"]) == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads["multi_token"]))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("depth", -1, r"must be from 0 to 31"),
        ("depth", 32, r"must be from 0 to 31"),
        ("coefficient", -0.5, "must not be negative"),
        ("coefficient", float("inf"), "must"),
    ],
)
def test_values_that_cannot_be(field, value, rule):
    with pytest.raises(UserError, match=rf"model\.multi_token_prediction\.{field}=.*{rule}"):
        config_of({f"model.multi_token_prediction.{field}": value})


def that_draft(config) -> Weights:
    """A network whose module hands on the embedding."""
    state = init(config)
    own, dim = state.params["multi_token"]["project_ID"], config.model.dim
    state.params["multi_token"]["project_ID"] = jnp.zeros_like(own).at[:, :dim].set(jnp.eye(dim))
    return Weights(state.params, state.router_state)


@pytest.mark.parametrize("temperature", [0.0, 0.02])
@pytest.mark.parametrize("length", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 40])
def test_drafts_change_no_token(length, temperature):
    """Whatever the temperature: the noise of a position is that of its draft and of its check.

    Some drafts stand: a module that hands on the embedding is near a network whose blocks add little to it.
    """
    config = config_of(MODULES | STATEFUL)
    prompt = np.random.default_rng(length).integers(0, config.model.vocab_size, length)
    sampling, drafts = Sampling(temperature=temperature, max_tokens=48), Drafts()
    with jax.set_mesh(mesh_of()):
        weights = that_draft(config)
        plain = list(generate(config, weights, prompt, sampling))
        drafted = list(generate(config, weights, prompt, sampling, drafts=drafts))
    assert drafted == plain and len(plain) == 48
    assert drafts.made + drafts.accepted in (47, 48), "a token at the beginning, then one or two at each step"
    assert drafts.accepted and (drafts.accepted < drafts.made or not temperature)


LENGTHS = (1, 71, 2, 40)  # the second comes in three pieces, before whose last but one the others begin


@pytest.mark.parametrize("fields", [STATEFUL, pytest.param(STATEFUL | BFLOAT16, marks=pytest.mark.slow)])
def test_drafts_change_no_token_of_texts_that_are_drafted_together(fields, monkeypatch):
    """Texts of different lengths, of which different numbers of drafts stand, and of which some end before others."""
    monkeypatch.setattr(decoding, "_PIECE", 32)
    config, rng = config_of(MODULES | fields | {"model.vocab_size": 320}), np.random.default_rng(0)
    prompts, every = [rng.integers(0, 320, n).astype(np.int32) for n in LENGTHS], np.ones(320, bool)
    with jax.set_mesh(mesh_of()):
        weights = that_draft(config)
        for temperature in (0.0, 0.02):
            sampling, drafts = Sampling(temperature=temperature, max_tokens=24, seed=5), Drafts()
            plain_BT = np.array(list(Sampled(config, weights, sampling, every, 5).of(prompts, 7))).T
            drafted, found, steps = Drafted(config, weights, sampling, every, 5, drafts), [[] for _ in prompts], []
            for step in drafted.of(prompts, 7):
                steps.append([*map(len, step)])
                for text, tokens in zip(found, step):
                    text += tokens
                drafted.live = np.array([True, len(found[1]) < 4, True, True])
            assert 4 <= len(found[1]) <= 5 and found[1] == plain_BT[1, : len(found[1])].tolist()
            assert [found[0], *found[2:]] == plain_BT[[0, 2, 3]].tolist()
            assert any({1, 2} <= set(step) for step in steps), "no step in which the texts differ"
            assert 0 < drafts.accepted < drafts.made
        both, texts = (None, Drafts()), [Prompt(prompt, "") for prompt in (*prompts, prompts[1])]
        rest = (weights, ByteTokenizer(), texts, sampling)
        written = [list(completions(config, *rest, batch_size=5, drafts=counted)) for counted in both]
    assert written[0] == written[1] and both[1].accepted and len({text.text for text in written[0]}) == 5


def test_what_cannot_draft_says_so():
    with jax.set_mesh(mesh_of()):
        for fields, message in (
            ({}, r"--drafts: model\.multi_token_prediction\.depth=0: the model has no module to draft with"),
            (MODULES | DEPTHS, r"--drafts: model\.mixture_of_depths\.capacity=0\.4: .* cannot take back a draft"),
        ):
            config = config_of(fields)
            with pytest.raises(UserError, match=message):
                generate(config, None, np.zeros(1, np.int32), Sampling(), drafts=Drafts())
