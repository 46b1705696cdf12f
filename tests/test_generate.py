"""Sampling with a cache equals recomputing the whole sequence for every token, or is refused.

Letters: B sequences, T tokens, V vocabulary.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_train_step import DEPTHS, WITH_DEPTHS, config_of, mesh_of, router
from tokenizers import Tokenizer, decoders, models

from frugalmoe import cli, sharding
from frugalmoe.commands.generate import unescaped
from frugalmoe.data.tokenizer import ByteTokenizer, JsonTokenizer
from frugalmoe.errors import UserError
from frugalmoe.generate import (
    Decoding,
    Sampled,
    Sampling,
    completions,
    decoding,
    generate,
    sample_text,
    stream,
    text_prompt,
    texts,
)
from frugalmoe.model.attention.kinds import window
from frugalmoe.model.moe import Context
from frugalmoe.model.transformer import structure
from frugalmoe.routing import strategies
from frugalmoe.schema import MoE
from frugalmoe.train.step import init
from frugalmoe.train.weights import Weights

pytestmark = pytest.mark.whole


def causal(name: str) -> bool:
    strategy = strategies.get(name)
    return strategy.causality(MoE(options=strategy.options()), train=False) == "safe"


CAUSAL = [name for name in strategies.names() if causal(name)]
BYTES = {"model.vocab_size": 320, "model.init_std": 0.2}  # weights large enough that tokens differ


def weights_of(config) -> Weights:
    state = init(config)
    return Weights(state.params, state.router_state)


WINDOW = {"model.attention": "window", "model.attention_options.window.window": 5}
ATTENTION = {  # each kind alone is held to the law of its cache
    "mixed": WINDOW | {"model.attention": "window,latent,grouped", "model.num_layers": 5},
    "window of depths": DEPTHS | WINDOW,
}
MODELS = [
    *(pytest.param(router(n), id=n, marks=[] if n == "topk_softmax" else pytest.mark.slow) for n in CAUSAL),
    WITH_DEPTHS,
    *(pytest.param(fields, id=name, marks=pytest.mark.slow) for name, fields in ATTENTION.items()),
]


@pytest.mark.parametrize("fields", MODELS)
def test_cached_tokens_equal_recomputed_ones(fields):
    """Greedy tokens after a prompt, against the argmax of a forward pass over all tokens so far, without a cache."""
    config = config_of(fields | BYTES)
    mesh = mesh_of()
    prompt = np.arange(5, 12).astype(np.int32)
    with jax.set_mesh(mesh):
        weights = weights_of(config)
        produced = list(generate(config, weights, prompt, Sampling(temperature=0.0, max_tokens=20)))
        graphdef, _, _ = structure(config.model)
        tokens_T = np.concatenate([prompt, produced]).astype(np.int32)

        @jax.jit
        def logits(weights, tokens_BT):
            model = nnx.merge(graphdef, *weights)
            position_BT = sharding.reshard(jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape), "BT")
            keys_B = sharding.reshard(jax.random.key(config.train.seed)[None], "B")
            context = Context(tokens_BT, jnp.ones_like(tokens_BT), position_BT, keys_B, jnp.int32(0))
            return model.logits(model(context).hidden_BTD)[0]

        logits_TV = logits(weights, sharding.put(mesh, tokens_T[None], "BT"))
    expected = np.argmax(logits_TV, axis=-1)[len(prompt) - 1 : -1]
    np.testing.assert_array_equal(produced, expected)
    assert len(set(produced)) > 3, "a constant output would pass for the wrong reason"


EVERY_EXPERT = {"model.moe.executor": "capacity", "model.moe.capacity_factor": 8.0}  # slots for all tokens
AUTO = {"model.moe.executor": "auto"}
OTHERS = [{"model.moe.executor": name} for name in ("dense", "grouped", "blocks")]
# Without state and with it, with a carry over layers, with as many experts as there are, with blocks that tokens skip.
ROUTERS = [router(name) for name in ("topk_softmax", "sigmoid_bias", "moe_plus_plus", "expert_threshold", "top_p")]
PAIRS = [
    pytest.param(
        {**fields, **executor},
        id=f"{fields['model.moe.router']}-{executor['model.moe.executor']}",
        marks=() if fields == ROUTERS[0] and executor == EVERY_EXPERT else pytest.mark.slow,
    )
    for fields in (*ROUTERS, DEPTHS)
    for executor in (AUTO, EVERY_EXPERT, *(OTHERS if fields == ROUTERS[0] else ()))
]


PAIRS += [
    pytest.param(fields | {"model.attention_options.window.window": 9} if "window" in name else fields, id=name)
    for name, fields in ATTENTION.items()
]


@pytest.mark.parametrize("fields", PAIRS)
def test_decoding_computes_the_logits_of_evaluation(fields, monkeypatch):
    """Token by token after a prompt that comes in pieces, in a cache that grows, against a padded row of evaluation."""
    monkeypatch.setattr(decoding, "_PIECE", 32)
    monkeypatch.setattr(decoding, "_SLOTS", 64)
    monkeypatch.setattr(window, "PIECE", 32)  # a ring of 41 slots
    config, mesh, real, length = config_of(fields | BYTES), mesh_of(), 87, 96
    tokens_T = np.random.default_rng(0).integers(0, 320, length).astype(np.int32)
    with jax.set_mesh(mesh):
        weights = weights_of(config)
        graphdef, _, _ = structure(config.model)

        @jax.jit
        def evaluated(weights, tokens_BT):
            model = nnx.merge(graphdef, *weights)
            segments_BT = sharding.reshard((jnp.arange(length) < real)[None].astype(jnp.int32), "BT")
            position_BT = sharding.reshard(jnp.arange(length)[None], "BT")
            keys_B = sharding.reshard(jax.random.key(0)[None], "B")
            context = Context(tokens_BT, segments_BT, position_BT, keys_B, jnp.int32(0))
            return model.logits(model(context).hidden_BTD)[0]

        expected_TV = np.asarray(evaluated(weights, sharding.put(mesh, tokens_T[None], "BT")))
        one = Decoding(config.model, weights, real)
        for begin, end in ((0, 7), (7, 79), *((t, t + 1) for t in range(79, real))):
            logits_V = one.feed([tokens_T[begin:end]])[0]
            np.testing.assert_allclose(logits_V, expected_TV[end - 1], rtol=2e-4, atol=2e-5, err_msg=str(end))


LENGTHS = (3, 71, 1, 40)  # of prompts in one batch: the second comes in pieces, while the others get nothing
BATCHES = {
    "sigmoid_bias": router("sigmoid_bias"),
    "mixed": ATTENTION["mixed"] | {"model.attention_options.window.window": 9, "model.num_layers": 3},
    "window of depths": ATTENTION["window of depths"] | {"model.attention_options.window.window": 9},
}


@pytest.mark.parametrize(
    "fields",
    [pytest.param(f, id=n, marks=pytest.mark.slow if n == "window of depths" else []) for n, f in BATCHES.items()],
)
def test_a_text_is_in_a_batch_what_it_is_alone(fields, monkeypatch):
    """Greedy and sampled, for prompts of different lengths, when others have ended, and in a batch that is not full."""
    monkeypatch.setattr(decoding, "_PIECE", 32)
    monkeypatch.setattr(window, "PIECE", 32)
    config, rng = config_of(fields | BYTES), np.random.default_rng(0)
    prompts = [rng.integers(0, 320, length).astype(np.int32) for length in LENGTHS]
    every = np.ones(320, bool)
    with jax.set_mesh(mesh_of()):
        weights = weights_of(config)
        for temperature in (0.0, 1.0):
            sampling = Sampling(temperature=temperature, max_tokens=24, seed=5)
            alone = Sampled(config, weights, sampling, every, 1)
            single = np.array([[step[0] for step in alone.of([p], n)] for n, p in enumerate(prompts)])
            assert np.unique(single, axis=0).shape == single.shape and len(np.unique(single)) > 20
            together, found = Sampled(config, weights, sampling, every, 5), []
            for n, step in enumerate(together.of(prompts)):
                found.append(step)
                together.live = np.array([True, n < 3, True, n < 9])
            found_BT = np.array(found).T
            np.testing.assert_array_equal(found_BT[[0, 2]], single[[0, 2]])
            np.testing.assert_array_equal(found_BT[1, :4], single[1, :4])
            np.testing.assert_array_equal(found_BT[3, :10], single[3, :10])


OF_TEXTS = """
import json, sys, warnings
import jax, numpy as np
from test_generate import BYTES, weights_of
from test_train_step import config_of
from frugalmoe import sharding
from frugalmoe.generate import Drafts, Sampled, Sampling
from frugalmoe.generate.texts import Drafted
warnings.simplefilter("error")
config = config_of(BYTES | json.loads(sys.argv[1]))
prompts, greedy = [np.arange(3, 3 + n, dtype=np.int32) for n in (7, 1, 30)], Sampling(temperature=0.0, max_tokens=9)
for axes in ({}, {"data": 2, "fsdp": 2, "tensor": 2}):
    with jax.set_mesh(sharding.make_mesh(dict.fromkeys(sharding.AXES, 1) | axes)):
        rest = (config, weights_of(config), greedy, np.ones(320, bool), 3)
        tokens = [step.tolist() for step in Sampled(*rest).of(prompts)]
        drafted = [[*text] for step in Drafted(*rest, Drafts()).of(prompts) for text in [step[2]]] if axes else []
        print(json.dumps([[*zip(*tokens)], sum(drafted, [])]))
"""
ON_DEVICES = {
    "model.attention": "grouped,latent",
    "model.attention_options.grouped.sinks": True,
    "model.num_layers": 2,
    "model.num_dense_layers": 0,
    "model.multi_token_prediction.depth": 1,
}


@pytest.mark.slow
def test_devices_that_share_heads_sample_as_one():
    """Eight devices, of which two hold the heads of a text: with sinks, of latent attention, and with drafts."""
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", OF_TEXTS, json.dumps(ON_DEVICES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (one, _), (eight, drafted) = map(json.loads, done.stdout.splitlines())
    assert eight == one and drafted == one[2] and len(set(one[2])) > 3


LARGE = {"vocab_size": 16384, "dim": 64, "num_layers": 1, "num_dense_layers": 0, "compute_dtype": "bfloat16"}
LARGE = {f"model.{name}": value for name, value in LARGE.items()} | {"model.moe.expert_dim": 1024}


def test_a_token_in_bfloat16_copies_neither_experts_nor_the_vocabulary():
    """XLA for CPUs turned both into float32 for every token: 20 times the work of a text."""
    config = config_of(BYTES | LARGE)
    with jax.set_mesh(mesh_of()):
        text = Decoding(config.model, weights_of(config), 40)
        text.feed([np.arange(2, dtype=np.int32)])
        state, one = (text._caches, text._logits_BV), np.ones(1, np.int32)
        step = text._step.lower(text._ready, state, np.zeros((1, 2), np.int32), text._length_B, one).compile()
    of_layer, of_words = 8 * 64 * 3 * 1024 * 2, 16384 * 64 * 2  # bytes
    assert step.memory_analysis().temp_size_in_bytes < min(of_layer, of_words) / 2


def test_a_lone_text_in_bfloat16_is_what_it_is_among_others():
    """Its steps compute a second row, of nothing: the logits are those of a batch, but for rounding."""
    config = config_of(BYTES | {"model.compute_dtype": "bfloat16", "model.num_layers": 2})
    prompt, live = np.arange(7, dtype=np.int32), np.ones(1, bool)
    with jax.set_mesh(mesh_of()):
        weights = weights_of(config)
        alone, among = (Decoding(config.model, weights, 40, rows) for rows in (1, 3))
        found = [[alone.feed([prompt])[0]], [among.feed([prompt, prompt[:3], prompt[2:]])[0]]]
        for token in (3, 300, 77, 3):
            token_B = jnp.full(3, token, jnp.int32)
            found[0].append(alone.advance(token_B[:1], live)[0])
            found[1].append(among.advance(token_B, np.ones(3, bool))[0])
    alone_SV, among_SV = np.array(found)
    assert alone._least == 2 and among._least == 1 and np.std(alone_SV[-1] - alone_SV[-2]) > 0.5 * np.std(alone_SV)
    np.testing.assert_allclose(alone_SV, among_SV, atol=0.03 * np.abs(among_SV).max())


def test_texts_of_many_prompts_are_those_of_each(monkeypatch):
    """In order, in batches of which the last is not full; each says what ended it, and computing ends with the last."""
    config, one = config_of(BYTES), ByteTokenizer()
    texts_, steps = ["ab", "", "the moon and " * 4, "x", "日本"], []
    with jax.set_mesh(mesh_of()):
        weights = weights_of(config)
        prompts = [text_prompt(config, one, text) for text in texts_]
        sampling = Sampling(temperature=0.7, max_tokens=40, seed=3)
        whole = list(completions(config, weights, one, prompts, sampling, batch_size=2))
        assert [text.ended for text in whole] == ["length"] * 5 and {text.tokens for text in whole} == {40}
        assert whole[0].text == "".join(stream(config, weights, one, "ab", sampling))
        stops = [text.text[4:6] for text in whole]
        sampling, ended = dataclasses.replace(sampling, stop=tuple(stops)), []
        watched = Decoding.advance
        monkeypatch.setattr(Decoding, "advance", lambda *args: steps.append(1) or watched(*args))
        cut = list(completions(config, weights, one, prompts, sampling, batch_size=2, ended=lambda: ended.append(1)))
    for before, after in zip(whole, cut):
        assert after.ended == "stop" and before.text.startswith(after.text) and len(after.text) <= 4
        assert not any(stop in after.text for stop in stops)
    assert len(ended) == 5 and len(steps) < 3 * 30


def test_a_text_may_end_at_each_token_that_ends_one():
    config, one = config_of(BYTES), letters()
    with jax.set_mesh(mesh_of()):
        weights, hot = weights_of(config), Sampling(temperature=1e4, top_p=1.0, max_tokens=200, seed=1)
        prompts = [text_prompt(config, one, "abc")] * 8
        for ends in ((one.eos,), (one.eos, 13), (one.eos, 13, 1)):
            one.ends = ends
            found = list(completions(config, weights, one, prompts, hot, batch_size=8))
            assert {text.ended for text in found} == {"end"}
            assert all(len(text.text) == text.tokens - 1 and ("a" in text.text) <= (13 not in ends) for text in found)


def test_a_router_that_looks_at_other_texts_samples_one_at_a_time(tmp_path):
    (tmp_path / "looks.py").write_text(
        "import dataclasses as d\nfrom frugalmoe.routing.strategies import topk_softmax as t\n"
        "ROUTER = d.replace(t.ROUTER, about=d.replace(t.ROUTER.about, causal='batch'))\n"
    )
    config, one = config_of({"model.moe.router": str(tmp_path / "looks.py")} | BYTES), ByteTokenizer()
    with jax.set_mesh(mesh_of()):
        prompts, rest = [text_prompt(config, one, "ab")] * 2, (Sampling(),)
        rule = r"^--batch-size=2: with model\.moe\.router='.*' it must be 1, because .* \(causal=batch\)$"
        with pytest.raises(UserError, match=rule):
            completions(config, Weights({}, {}), one, prompts, *rest, batch_size=2)
        completions(config, Weights({}, {}), one, prompts, *rest, batch_size=1)


def test_a_capacity_that_may_drop_is_refused():
    """What is dropped depends on the length of the row, which a text that is being sampled does not have."""
    fields = {"model.moe.executor": "capacity", "model.moe.capacity_factor": 3.9, "model.moe.num_experts_per_token": 2}
    config, weights = config_of(fields | BYTES), Weights({}, {})
    with jax.set_mesh(mesh_of()):
        with pytest.raises(UserError, match=r"^model\.moe\.executor='capacity': cannot be sampled .*3\.9, below 4,"):
            generate(config, weights, np.zeros(3, np.int32), Sampling())
        assert "cannot be sampled" in sample_text(config, weights, ByteTokenizer())["why"]
        dense = config_of(fields | BYTES | {"model.num_dense_layers": 3, "model.dense_dim": 64})
        generate(dense, weights, np.zeros(3, np.int32), Sampling())  # no expert, no slot


@pytest.mark.parametrize("start", ["end_of_text", "none"])
def test_a_prompt_begins_as_documents_did_in_training(start):
    config = config_of(BYTES | {"data.document_start": start})
    greedy = Sampling(temperature=0.0, max_tokens=12)
    with jax.set_mesh(mesh_of()):
        weights, one = weights_of(config_of(BYTES)), ByteTokenizer()
        after = lambda ids: bytes(generate(config, weights, np.array(ids), greedy, np.arange(320) < 256)).decode(
            errors="replace"
        )
        front = [one.eos] if start == "end_of_text" else []
        assert "".join(stream(config, weights, one, "ab", greedy)) == after([*front, *b"ab"])
        assert "".join(stream(config, weights, one, "", greedy)) == after([one.eos])


def letters() -> JsonTokenizer:
    """Ids 0 .. 30: specials, a gap of ten ids, and a letter each."""
    names = {"<pad>": 0, "<s>": 1, "</s>": 2, **{letter: n for n, letter in enumerate("abcdefghijklmnopqr", 13)}}
    tokenizer = Tokenizer(models.WordLevel(names, "<pad>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    return JsonTokenizer(tokenizer.to_str(), "</s>", "test")


def test_only_ids_that_show_text_are_sampled(monkeypatch):
    """No padding of the vocabulary, which ended a sample; no special, which shows nothing; the end of a document."""
    config, one, seen = config_of(BYTES), letters(), []
    assert one.silent == (0, 1, 2, *range(3, 13)) and one.size == 31

    def watched(*args):
        for token in generate(*args):
            seen.append(token)
            yield token

    monkeypatch.setattr(texts, "generate", watched)
    with jax.set_mesh(mesh_of()):
        weights = weights_of(config)
        for seed in range(16):
            sampling = Sampling(temperature=1e4, top_p=1.0, max_tokens=60, seed=seed)
            before = len(seen)
            text = "".join(stream(config, weights, one, "abc", sampling))
            tokens = seen[before:]
            ended = tokens[-1] == one.eos
            assert len(text) == len(tokens) - ended and (ended or len(tokens) == 60)
    assert set(seen) == {one.eos, *range(13, 31)}


@pytest.mark.slow
def test_seeds_differ_and_repeat_and_top_p_zero_limit_is_greedy():
    config = config_of(BYTES)
    prompt = np.arange(4, dtype=np.int32)
    with jax.set_mesh(mesh_of()):
        weights = weights_of(config)
        draw = lambda **kw: list(generate(config, weights, prompt, Sampling(max_tokens=12, **kw)))
        assert draw(temperature=1.0, seed=1) == draw(temperature=1.0, seed=1) != draw(temperature=1.0, seed=2)
        assert draw(temperature=1.0, top_p=1e-6, seed=3) == draw(temperature=0.0)


def test_streamed_pieces_join_to_the_text_and_stop_texts_end_it():
    config = config_of(BYTES)
    with jax.set_mesh(mesh_of()):
        weights, tokenizer = weights_of(config), ByteTokenizer()
        run = lambda **kw: list(
            stream(config, weights, tokenizer, "ab", Sampling(temperature=0.0, max_tokens=40, **kw))
        )
        whole = "".join(run())
        stop = whole[6:8]
        assert "".join(run(stop=(stop,))) == whole[: whole.index(stop)]


def test_a_stop_text_may_begin_in_the_prompt():
    config = config_of(BYTES)
    with jax.set_mesh(mesh_of()):
        weights, one = weights_of(config), ByteTokenizer()
        run = lambda *stop: "".join(
            stream(config, weights, one, "ab", Sampling(temperature=0.0, max_tokens=20, stop=stop))
        )
        whole = run()
        assert run("b" + whole[0]) == "" and run("ab") == whole[: (whole + "ab").index("ab")]


def test_more_tokens_than_memory_has_room_for_are_refused():
    config = config_of(BYTES)
    with jax.set_mesh(mesh_of()):
        weights, prompt = weights_of(config), np.zeros(5, np.int32)
        rule = r"^--max-tokens=2147483647: this device, with .* GB, has room for \d+ after a prompt of 5 tokens$"
        with pytest.raises(UserError, match=rule):
            generate(config, weights, prompt, Sampling(max_tokens=2**31 - 1))
        model = dataclasses.replace(config.model, num_layers=10**4, num_kv_heads=10**6)
        with pytest.raises(UserError, match="room for 0 after"):
            generate(dataclasses.replace(config, model=model), weights, prompt, Sampling(max_tokens=1))


BAD = [
    ("--max-tokens=0", "--max-tokens=0: must be positive"),
    ("--max-tokens=99999999999", "--max-tokens=99999999999: must be from 1 to 2147483647"),
    ("--temperature=nan", "--temperature=nan: must be 0 or from"),
    ("--temperature=inf", "--temperature=inf: must be 0 or from"),
    ("--temperature=-0.1", "--temperature=-0.1: must not be negative"),
    ("--temperature=1e300", "--temperature=1e+300: must be 0 or from"),
    ("--top-p=nan", "--top-p=nan: must be in (0, 1]"),
    ("--top-p=1.1", "--top-p=1.1: must be in (0, 1]"),
    ("--top-p=0", "--top-p=0.0: must be in (0, 1]"),
    ("--top-k=-1", "--top-k=-1: must not be negative"),
    ("--top-k=99999999999", "--top-k=99999999999: must be from 0 to 2147483647"),
    ("--min-p=-0.1", "--min-p=-0.1: must be in [0, 1]"),
    ("--min-p=1.1", "--min-p=1.1: must be in [0, 1]"),
    ("--min-p=nan", "--min-p=nan: must be in [0, 1]"),
    ("--batch-size=0", "--batch-size=0: must be positive"),
    ("--context=0", "--context=0: must be positive"),
    ("--step=-1", "--step=-1: must be a whole number, or best"),
    ("--step=first", "--step=first: must be a whole number, or best"),
    ("--output=x.txt", "--output=x.txt: must end with .jsonl or .ndjson"),
    ("--output=none/x.jsonl", "--output=none/x.jsonl: must be a file in a directory that is there"),
    ("--prompts=none.txt", "--prompts=none.txt: No such file or directory"),
    ("--seed=-1", "--seed=-1: must be"),
    ("--seed=4294967296", "--seed=4294967296: must be"),
    ("--seed=99999999999999999999", "--seed=99999999999999999999: must be"),
    ("--stop=", "must hold no empty text"),
    ("--stop=\\", "--stop=\\: \\ is no escape; write \\\\ for a backslash"),
    ("--stop=a\\d", "\\d is no escape"),
    ("--stop=\\N{x}", "\\N{x} is no escape"),
    ("--stop=\\N", "\\N is no escape"),
    ("--stop=\\x4", "\\x is no escape"),
    ("--stop=\\U00110000", "\\U00110000 is no escape"),
    ("--stop=\\ud83d", "of a surrogate both halves"),
    ("--stop=\udcff", "must be UTF-8"),  # how an argument's byte 0xff arrives
]


@pytest.mark.parametrize("flag, message", BAD, ids=[flag.encode("ascii", "replace").decode() for flag, _ in BAD])
def test_bad_flags_are_one_line(flag, message, capsys):
    assert cli.main(["generate", "nowhere", flag]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out


def test_escapes_of_stop_texts_are_those_of_text_in_any_script():
    for written, meant in {
        "。": "。",
        "\\n\\n": "\n\n",
        "日\\t本": "日\t本",
        "\\\\n": "\\n",
        "\\u3002\\x41\\101": "。AA",
        "\\N{IDEOGRAPHIC FULL STOP}": "。",
        "\\ud83d\\ude00\\U0001F600": "😀😀",
        "\\'\\\"": "'\"",
        "é{x}%": "é{x}%",
    }.items():
        assert unescaped(written) == meant


def test_a_prompt_that_is_not_text_is_one_line():
    config = config_of(BYTES)
    with jax.set_mesh(mesh_of()), pytest.raises(UserError, match=r"^--prompt: must be UTF-8; character 2 is a byte"):
        stream(config, weights_of(config), ByteTokenizer(), "ab\udcff", Sampling())


def test_a_router_that_sees_the_future_cannot_be_sampled():
    config = config_of(router("expert_choice") | {"model.moe.options.evaluate": "choice"} | BYTES)
    with jax.set_mesh(mesh_of()):
        state = init(config)
        with pytest.raises(UserError, match=r"expert_choice.*causal=leak"):
            next(generate(config, Weights(state.params, state.router_state), np.zeros(3, np.int32), Sampling()))
        assert "cannot be sampled" in sample_text(config, state, ByteTokenizer())["why"]
