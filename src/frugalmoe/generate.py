"""Sampling from a trained run with a key-value cache.

Letters: B sequences (equal ones: one per data device), T prompt tokens, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from frugalmoe import sharding
from frugalmoe.config import Config
from frugalmoe.config.schema import Model
from frugalmoe.data.tokenizer import Tokenizer
from frugalmoe.errors import UserError
from frugalmoe.files import read_json
from frugalmoe.model.causality import leaking
from frugalmoe.model.moe import Context
from frugalmoe.model.transformer import structure

_PROMPT_BUCKET = 32  # prompts are padded to a multiple of this, so that few lengths are compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    temperature: float = 0.8  # 0: the most likely token
    top_p: float = 0.95  # sample from the smallest set of tokens that holds this probability (arXiv 1904.09751)
    max_tokens: int = 200
    seed: int = 0
    stop: tuple[str, ...] = ()

    def check(self) -> None:
        for name, ok, rule in (
            ("temperature", self.temperature >= 0, "must not be negative"),
            ("top_p", 0 < self.top_p <= 1, "must be in (0, 1]"),
            ("max_tokens", self.max_tokens > 0, "must be positive"),
        ):
            if not ok:
                raise UserError(f"--{name.replace('_', '-')}={getattr(self, name)}: {rule}")


class Weights(NamedTuple):
    params: dict
    router_state: dict


def generate(config: Config, weights: Weights, prompt_ids: np.ndarray, sampling: Sampling) -> Iterator[int]:
    """Yields token ids one by one; the caller decides when to stop. A mesh must be in context."""
    if parts := leaking(config.model, False, sharding.axis_size("expert")):
        raise UserError(
            f"{parts}: cannot be sampled token by token, because the experts of a token depend on later tokens in "
            "evaluation too (causal=leak)"
        )
    length = len(prompt_ids)
    padded = -(-length // _PROMPT_BUCKET) * _PROMPT_BUCKET
    slots = -(-(padded + sampling.max_tokens) // 256) * 256
    prompt = np.zeros(padded, np.int32)
    prompt[:length] = prompt_ids
    prefill, decode = _steps(config.model, slots, sharding.axis_size(*sharding.BATCH_AXES))
    key = jax.random.key(sampling.seed)
    settings = (jnp.float32(sampling.temperature), jnp.float32(sampling.top_p))
    token, caches = prefill(*weights, prompt, jnp.int32(length), key, *settings)
    for position in range(length, length + sampling.max_tokens):
        yield int(token)
        token, caches = decode(*weights, token, caches, jnp.int32(position), key, *settings)


@functools.lru_cache(8)
def _steps(config: Model, slots: int, batch: int):
    """Jitted `prefill` and `decode`; each returns the next token (int32 []) and the caches."""
    graphdef, _, _ = structure(config)

    def run(model, tokens_T: Array, caches, start: Array, count: Array):
        """Hidden states of T tokens at positions start, start + 1, ...; only the first `count` are real."""
        index_T = jnp.arange(tokens_T.shape[0], dtype=jnp.int32)
        rows = lambda a_T: sharding.reshard(jnp.broadcast_to(a_T, (batch, *a_T.shape)), "BT")
        keys_B = sharding.reshard(jnp.broadcast_to(jax.random.key(0), (batch,)), "B")
        segments_T = (index_T < count).astype(jnp.int32)
        context = Context(rows(tokens_T), rows(segments_T), rows(start + index_T), keys_B, jnp.int32(0))
        return model(context, caches, start)

    def pick(model, hidden_BTD, index, position, key, temperature, top_p):
        hidden_D = jax.lax.dynamic_index_in_dim(sharding.reshard(hidden_BTD, "...")[0], index, keepdims=False)
        return _sample(model.logits(hidden_D), jax.random.fold_in(key, position), temperature, top_p)

    def prefill(params, router_state, tokens_T, length, key, temperature, top_p):
        model = nnx.merge(graphdef, params, router_state)
        place = lambda a: sharding.reshard(a, ".B" + "." * (a.ndim - 2))
        caches = jax.tree.map(place, model.empty_caches(batch, slots))
        out = run(model, tokens_T, caches, jnp.int32(0), length)
        return pick(model, out.hidden_BTD, length - 1, length, key, temperature, top_p), out.caches

    def decode(params, router_state, token, caches, position, key, temperature, top_p):
        model = nnx.merge(graphdef, params, router_state)
        out = run(model, token[None], caches, position, jnp.int32(1))
        return pick(model, out.hidden_BTD, jnp.int32(0), position + 1, key, temperature, top_p), out.caches

    return jax.jit(prefill), jax.jit(decode, donate_argnums=3)


def _sample(logits_V: Array, key: Array, temperature: Array, top_p: Array) -> Array:
    """One token: the most likely one at temperature 0, else from the nucleus of probability `top_p`."""
    scaled_V = logits_V / jnp.maximum(temperature, 1e-6)
    sorted_V, token_V = jax.lax.sort((-scaled_V, jnp.arange(scaled_V.size, dtype=jnp.int32)), num_keys=1)
    p_V = jax.nn.softmax(-sorted_V)
    inside_V = jnp.cumsum(p_V) - p_V < top_p  # the first token is always inside
    drawn = jax.random.categorical(key, jnp.where(inside_V, -sorted_V, -jnp.inf))
    return token_V[jnp.where(temperature > 0, drawn, 0)]


def stream(config: Config, weights: Weights, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> Iterator[str]:
    """Yields pieces of text as they become complete; ends at the end-of-document token, a stop text or the limit."""
    ids = np.concatenate([[tokenizer.eos], tokenizer.encode(prompt)]).astype(np.int32)
    produced: list[int] = []
    sent, held = 0, max((len(s) for s in sampling.stop), default=1) - 1
    text = ""
    for token in generate(config, weights, ids, sampling):
        if token == tokenizer.eos or token >= tokenizer.size:
            break
        produced.append(token)
        text = tokenizer.decode(produced)
        cut = min((at for s in sampling.stop if (at := text.find(s)) >= 0), default=-1)
        if cut >= 0:
            yield text[sent:cut]
            return
        if text.endswith("\ufffd"):  # a character whose bytes are not all there yet
            continue
        ready = max(len(text) - held, sent)
        yield text[sent:ready]
        sent = ready
    yield text[sent:]


def load(run: Path, step: int | None = None) -> tuple[Config, Weights, Tokenizer, jax.sharding.Mesh]:
    """The config, weights and tokenizer of a run directory's checkpoint, the newest by default, on one device."""
    from frugalmoe.config import resolve
    from frugalmoe.data.tokenizer import load_from
    from frugalmoe.train import checkpoint
    from frugalmoe.train.step import abstract

    if not (run / "config.json").is_file():
        raise UserError(f"{run}: not a run directory (it holds no config.json)")
    config = resolve(read_json(run / "config.json"))
    tokenizer = load_from(run / "tokenizer")
    if not config.model.vocab_size:
        size = -(-tokenizer.size // 64) * 64
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
    mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])
    with checkpoint.open_manager(run, config.checkpoint) as manager, jax.set_mesh(mesh):
        if manager.latest_step() is None:
            raise UserError(f"{run}: holds no checkpoint yet")
        if step is None:
            step = manager.latest_step()
        elif step not in manager.all_steps():
            raise UserError(f"{run}: no checkpoint of step {step}; valid: {sorted(manager.all_steps())}")
        state = checkpoint.restore(manager, step, abstract(config), ("params", "router_state"))
    return config, Weights(state.params, state.router_state), tokenizer, mesh


def sample_text(config: Config, state: Any, tokenizer: Tokenizer, prompt: str = "The ") -> dict[str, str]:
    """A passage for the summary; empty, with the reason, where the router does not allow sampling."""
    try:
        weights = Weights(state.params, state.router_state)
        return {"prompt": prompt, "text": "".join(stream(config, weights, tokenizer, prompt, Sampling()))}
    except UserError as e:
        return {"prompt": prompt, "text": "", "why": str(e)}
