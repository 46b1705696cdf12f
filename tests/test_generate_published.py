"""Sampling beside transformers: the tokens that it decodes from published models, and its rules of sampling.

Letters: B texts, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from published import CASES, randomized, save
from transformers.generation import logits_process as rules

from frugalmoe import sharding
from frugalmoe.convert import from_hf
from frugalmoe.generate import Sampled, Sampling
from frugalmoe.generate.sampling import Chooser, kept
from frugalmoe.train.weights import Weights

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.whole]  # transformers' own
NEW, LENGTHS = 12, (5, 1, 11)
FAMILIES = [
    "mixtral window, tied",
    "deepseek_v3 whole queries, no shared, yarn",
    "olmoe",
    "qwen2_moe",
    "glm4_moe",
    "ernie4_5_moe",
    "granitemoeshared",
    "llama",
    "phimoe",
    "llama4_text every other layer, no norm, no temperature",
    "llama4_text",
]
FAST = [*FAMILIES[:2], FAMILIES[-1]]  # a window that forgets, the compressed cache, chunks and a temperature


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in FAST else pytest.mark.slow) for c in FAMILIES])
def test_greedy_tokens_are_those_of_transformers(case, tmp_path):
    """Of prompts of different lengths in one batch of ours, each alone there."""
    model, rng = randomized(case), np.random.default_rng(1)
    found = from_hf.look(save(model, tmp_path / "model"), tmp_path / "run", tokenizer="bytes")
    prompts = [rng.integers(0, CASES[case]().vocab_size, length).astype(np.int32) for length in LENGTHS]
    mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        weights = Weights(*jax.tree.map(jnp.asarray, from_hf.read_arrays(found)))
        vocabulary = np.ones(found.config.model.vocab_size, bool)
        sampled = Sampled(found.config, weights, Sampling(temperature=0.0, max_tokens=NEW), vocabulary, len(prompts))
        ours_BT = np.array(list(sampled.of(prompts))).T
    for ours_T, prompt in zip(ours_BT, prompts):
        ids = torch.tensor(prompt[None]).long()
        settings = {
            "do_sample": False,
            "max_new_tokens": NEW,
            "pad_token_id": 0,
            "attention_mask": torch.ones_like(ids),
        }
        with torch.no_grad():
            theirs = model.generate(ids, **settings)[0, len(prompt) :]
        np.testing.assert_array_equal(ours_T, theirs)
    assert len(np.unique(ours_BT)) > 8, "a constant output would pass for the wrong reason"


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 10**6},
        {"top_p": 0.6},
        {"top_p": 1e-6},
        {"top_p": 1.0},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 9, "top_p": 0.8},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.1},
    ],
    ids=str,
)
def test_what_is_kept_is_what_transformers_keeps(fields, temperature):
    """With the same logits, of sizes from nearly equal to far apart."""
    wanted = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | fields
    rng = np.random.default_rng(0)
    logits_BV = (rng.normal(size=(6, 50)) * np.array([[0.01], [0.3], [1], [3], [10], [100]])).astype(np.float32)
    chain = [rules.TemperatureLogitsWarper(temperature)]
    chain += [rules.TopKLogitsWarper(wanted["top_k"])] if wanted["top_k"] else []
    chain += [rules.TopPLogitsWarper(wanted["top_p"])] if wanted["top_p"] < 1 else []
    chain += [rules.MinPLogitsWarper(wanted["min_p"])] if wanted["min_p"] else []
    expected = torch.tensor(logits_BV)
    for rule in chain:
        expected = rule(None, expected)
    settings = (*map(np.float32, (temperature, wanted["top_p"], wanted["min_p"])), np.int32(min(wanted["top_k"], 50)))
    sorts = [True] if wanted["top_k"] or wanted["top_p"] < 1 else [False, True]
    for each in sorts:
        np.testing.assert_allclose(kept(jnp.asarray(logits_BV), settings, sorts=each), expected, rtol=1e-6)


def test_equal_tokens_are_kept_or_left_out_together():
    logits_BV = jnp.array([[1.0, 2.0, 2.0, 2.0, 0.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    of = lambda **fields: np.isfinite(kept(logits_BV, settings_of(**fields), sorts=True)).tolist()
    equal = [False, True, True, True, False]
    assert of(top_k=2) == of(top_p=0.3) == of(min_p=0.9) == [equal, [True] * 5]


def settings_of(top_k=0, top_p=1.0, min_p=0.0, temperature=1.0):
    return np.float32(temperature), np.float32(top_p), np.float32(min_p), np.int32(top_k)


def test_tokens_come_as_often_as_they_are_likely():
    """4000 draws of five tokens at a temperature, one of them not allowed, one outside the nucleus."""
    draws, logits_V = 4000, np.log([0.5, 0.2, 0.05, 0.01, 0.24]).astype(np.float32)
    allowed_V = np.array([True, True, True, True, False])
    choose = Chooser(Sampling(temperature=1.0, top_p=0.97, seed=7), allowed_V)
    places = np.arange(draws) % 50, np.arange(draws) // 50
    found = np.asarray(choose(jnp.broadcast_to(logits_V, (draws, 5)), *places))
    share = np.bincount(found, minlength=5) / draws
    expected = np.array([0.5, 0.2, 0.05, 0, 0]) / 0.75
    assert share[3] == share[4] == 0
    assert (np.abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / draws) + 1e-9).all()
    again = np.asarray(choose(jnp.broadcast_to(logits_V, (3, 5)), *(place[[9, 3999, 700]] for place in places)))
    np.testing.assert_array_equal(again, found[[9, 3999, 700]], "a draw is a function of seed, number and position")
