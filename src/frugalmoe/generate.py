"""Sampling from a trained run with a key-value cache.

Letters: B sequences (equal ones: one per data device), T tokens, D model, V vocabulary.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from frugalmoe import experts, sharding
from frugalmoe.config import Config
from frugalmoe.data.continuation import Continuation, until
from frugalmoe.data.tokenizer import Tokenizer
from frugalmoe.errors import UserError
from frugalmoe.fields import check_float, check_integer, check_seed
from frugalmoe.model import multi_token, pattern
from frugalmoe.model.attention.contract import PIECE
from frugalmoe.model.causality import leaking
from frugalmoe.model.moe import Context
from frugalmoe.model.transformer import empty_caches, structure
from frugalmoe.schema import Model
from frugalmoe.train.weights import Weights

_BUCKET = 32  # pieces of a prompt are padded to a multiple of this, so that few lengths are compiled
_PIECE = PIECE  # tokens of a prompt that are computed at one time: their scores against all tokens exist
_LONG = 2**16  # slots beyond which a cache with a window does not grow
_SLOTS = 1024  # of a cache at its start, at most: a full one is doubled, so that a token costs what is there already


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    temperature: float = 0.8  # 0: the most likely token
    top_p: float = 0.95  # sample from the smallest set of tokens that holds this probability (arXiv 1904.09751)
    max_tokens: int = 200
    seed: int = 0
    stop: tuple[str, ...] = ()

    def check(self) -> None:
        for name, ok, rule in (
            ("temperature", not self.temperature < 0, "must not be negative"),
            ("top_p", 0 < self.top_p <= 1, "must be in (0, 1]"),
            ("max_tokens", self.max_tokens > 0, "must be positive"),
            ("stop", all(self.stop), "must hold no empty text, at which nothing would begin"),
        ):
            if not ok:
                raise UserError(f"--{name.replace('_', '-')}={getattr(self, name)}: {rule}")
        check_float("--temperature", self.temperature)
        check_float("--top-p", self.top_p)
        check_integer("--max-tokens", self.max_tokens, least=1)
        check_seed("--seed", self.seed)


@dataclasses.dataclass
class Drafts:
    """Counts of the tokens that a module of multi-token prediction proposed, and of those that came to stand."""

    made: int = 0
    accepted: int = 0


def generate(
    config: Config,
    weights: Weights,
    prompt_ids: np.ndarray,
    sampling: Sampling,
    allowed_V: np.ndarray | None = None,
    drafts: Drafts | None = None,
) -> Iterator[int]:
    """Token ids one by one; the caller decides when to stop. A mesh must be in context.

    prompt_ids: at least one. allowed_V: bool, the ids that may be sampled; all by default. drafts: counts them; with it
    the first module of multi-token prediction proposes tokens, and the network checks two at a time. The tokens are the
    same, but for rounding. Raises `UserError` for a model whose evaluation does something else, or which has no such
    modules, and for more tokens than there is memory for.
    """
    sampling.check()
    if drafts is not None:
        _check_drafts(config.model)
    if parts := leaking(config.model, False, sharding.axis_size("expert")):
        raise UserError(
            f"{parts}: cannot be sampled token by token, because the experts of a token depend on later tokens in "
            "evaluation too (causal=leak)"
        )
    _check_slots(config)
    _check_memory(config.model, len(prompt_ids), sampling.max_tokens)
    if allowed_V is None:
        allowed_V = np.ones(config.model.vocab_size, bool)
    ids, end = np.asarray(prompt_ids, np.int32), len(prompt_ids) + sampling.max_tokens
    key, settings = jax.random.key(sampling.seed), (np.float32(sampling.temperature), np.float32(sampling.top_p))
    sample = lambda logits_V, position: int(_sample(logits_V, allowed_V, key, np.int32(position), *settings))
    if drafts is None:
        return _tokens(Decoding(config.model, weights, end), ids, end, sample)
    return _drafted(Drafting(config.model, weights, end), ids, end, sample, drafts)


def _tokens(decoding: "Decoding", ids: np.ndarray, end: int, sample: Callable[[Array, int], int]) -> Iterator[int]:
    for position in range(len(ids), end):
        token = sample(decoding.feed(ids), position)
        yield token
        ids = np.array([token], np.int32)


def _drafted(
    drafting: "Drafting", ids: np.ndarray, end: int, sample: Callable[[Array, int], int], drafts: Drafts
) -> Iterator[int]:
    """The same tokens (Leviathan et al. 2023, arXiv 2211.17192, with equal noise for a draft and its check).

    A position's noise is fixed by the seed, so that the network's token is the same whether a draft was there or not.
    """
    position, token = len(ids), sample(drafting.prompt(ids), len(ids))
    stand = drafting.count
    while True:
        yield token
        position += 1
        if position == end:
            return
        draft = sample(drafting.propose(stand, token), position)
        after_token_V, after_draft_V = drafting.check(np.array([token, draft], np.int32))
        token, stand, drafts.made = sample(after_token_V, position), 1, drafts.made + 1
        if token == draft:
            yield token
            drafts.accepted, position = drafts.accepted + 1, position + 1
            if position == end:
                return
            token, stand = sample(after_draft_V, position), 2


def _check_drafts(config: Model) -> None:
    depth, capacity = config.multi_token_prediction.depth, config.mixture_of_depths.capacity
    if not depth:
        raise UserError(f"--drafts: model.multi_token_prediction.depth={depth}: the model has no module to draft with")
    if capacity:
        rule = "a block that tokens skip cannot take back a draft"
        raise UserError(f"--drafts: model.mixture_of_depths.capacity={capacity}: {rule}")


def _check_slots(config: Config) -> None:
    """Evaluation counts an expert's slots over a whole row, of which a sampled text is only the beginning."""
    moe, routed = config.model.moe, pattern.has_experts(config.model)
    executor = experts.pick(moe, sharding.platform())
    if routed and executor.drops and (why := executor.drops.may(moe)):
        raise UserError(
            f"model.moe.executor={executor.name!r}: cannot be sampled token by token, because an expert's slots are "
            f"those of a whole row; with {why}, they may run out"
        )


def _check_memory(config: Model, prompt: int, new: int) -> None:
    """Keys and values may take a quarter of a device's memory: growing copies them, and the model has its part."""
    known = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    memory = known or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    size = lambda slots: _bytes(jax.eval_shape(lambda: empty_caches(config, 1, slots)))
    scores = 4 * 4 * config.num_heads * min(prompt, _PIECE)  # float32; they and their softmax, twice
    token = (size(2 * _LONG) - size(_LONG)) // _LONG  # of the kinds of attention that keep all tokens
    fixed = size(_LONG) - token * _LONG
    most = max(memory // 4 - fixed, 0) // (token + scores) - prompt
    if new > most:
        room = f"this device, with {memory / 1e9:.3g} GB, has room for {max(most, 0)}"
        raise UserError(f"--max-tokens={new}: {room} after a prompt of {prompt} tokens")


def _bytes(tree: Any) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


class Decoding:
    """The tokens of a text so far, as keys and values: whoever feeds it tokens gets the logits of the next one.

    In batches, for a mesh spreads sequences over devices: all are the same, one per device.
    """

    def __init__(self, config: Model, weights: Weights, most: int):
        """`most`: how many tokens will be fed in all."""
        self._weights, self._most = weights, most
        self._empty, self._widen, self._step = _steps(config, sharding.axis_size(*sharding.BATCH_AXES))
        self._slots, self._caches, self._length = 0, None, 0

    def feed(self, tokens: np.ndarray) -> Array:
        """int32 [T], at least one -> float32 logits [V] of what follows the last of them."""
        self._grow(self._length + len(tokens) + _BUCKET)
        for at in range(0, len(tokens), _PIECE):
            piece = tokens[at : at + _PIECE]
            numbers = np.int32(self._length), np.int32(len(piece))
            logits_V, self._caches = self._step(*self._weights, _padded(piece), self._caches, *numbers)
            self._length += len(piece)
        return logits_V

    def _grow(self, needed: int) -> None:
        before, most = self._slots, -(-max(self._most + _BUCKET, needed) // 256) * 256
        while self._slots < needed:
            self._slots = min(max(2 * self._slots, _SLOTS), most)
        if not before:
            self._caches = self._empty(self._slots)
        elif before < self._slots:
            self._caches = self._widen(self._caches, self._slots)


class Drafting(Decoding):
    """The same with the first module of multi-token prediction, which sees what follows each token of the network.

    What the network was fed last may turn out wrong: `propose` says how much of it stands, and the next tokens take the
    places of the rest.
    """

    def __init__(self, config: Model, weights: Weights, most: int):
        super().__init__(config, weights, most)
        batch = sharding.axis_size(*sharding.BATCH_AXES)
        self._empty, self._widen, self._check, self._propose = _draft_steps(config, batch)
        self._last, self._hidden_BTD = np.zeros(0, np.int32), None

    @property
    def count(self) -> int:
        """How many tokens the network was fed last."""
        return len(self._last)

    def prompt(self, tokens: np.ndarray) -> Array:
        """int32 [T], at least one -> float32 logits [V] of what follows the last of them."""
        for at in range(0, len(tokens), _PIECE):
            if at:
                self.propose(self.count, tokens[at])
            logits_2V = self.check(tokens[at : at + _PIECE])
        return logits_2V[1]

    def check(self, tokens: np.ndarray) -> Array:
        """int32 [T], at most `_PIECE` -> the network's logits [2, V] of what follows the last token but one, and it."""
        self._grow(self._length + len(tokens) + _BUCKET)
        self._last, span = tokens, (np.int32(self._length), np.int32(len(tokens)))
        logits_2V, self._hidden_BTD, self._caches = self._check(*self._weights, _padded(tokens), self._caches, span)
        return logits_2V

    def propose(self, stand: int, token: int) -> Array:
        """The module's logits [V] of what follows `token`, which follows the first `stand` of the last tokens."""
        following = np.append(self._last[1:stand], token).astype(np.int32)
        padded = np.pad(following, (0, self._hidden_BTD.shape[1] - stand))
        span = np.int32(self._length), np.int32(stand)
        logits_V, self._caches = self._propose(*self._weights, padded, self._hidden_BTD, self._caches, span)
        self._length += stand
        return logits_V


def _padded(piece: np.ndarray) -> np.ndarray:
    """Few lengths, so that few are compiled: 1, 2, and multiples of a bucket."""
    size = -(-len(piece) // _BUCKET) * _BUCKET if len(piece) > 2 else len(piece)
    return np.pad(piece, (0, size - len(piece)))


def _widen(empty: Callable[[int], Any], caches: Any, slots: int) -> Any:
    grown = lambda a, shape: jnp.pad(a, [(0, new - old) for old, new in zip(a.shape, shape.shape)])
    return jax.tree.map(grown, caches, jax.eval_shape(lambda: empty(slots)))


def _context(tokens_T: Array, start: Array, count: Array, batch: int) -> Context:
    """Of T tokens at positions start, start + 1, ... only the first `count` are real."""
    index_T = jnp.arange(tokens_T.shape[0], dtype=jnp.int32)
    rows = lambda a_T: sharding.reshard(jnp.broadcast_to(a_T, (batch, *a_T.shape)), "BT")
    keys_B = sharding.reshard(jnp.broadcast_to(jax.random.key(0), (batch,)), "B")
    segments_T = (index_T < count).astype(jnp.int32)
    return Context(rows(tokens_T), rows(segments_T), rows(start + index_T), keys_B, jnp.int32(0))


def _at(hidden_BTD: Array, index: Array) -> Array:
    """Hidden states [D] of one token; all sequences are the same."""
    hidden_TD = sharding.reshard(hidden_BTD, "...")[0]
    return jax.lax.dynamic_index_in_dim(hidden_TD, index, keepdims=False)


@functools.lru_cache(8)
def _steps(config: Model, batch: int):
    """Jitted `empty(slots)` and `widen(caches, slots)`, which return caches, and `step`: logits [V] and caches."""
    graphdef, _, _ = structure(config)
    empty = functools.partial(empty_caches, config, batch)

    def step(params, router_state, tokens_T: Array, caches, start: Array, count: Array):
        model = nnx.merge(graphdef, params, router_state)
        out = model(_context(tokens_T, start, count, batch), caches, start)
        return model.logits(_at(out.hidden_BTD, count - 1)), out.caches

    widen = functools.partial(_widen, empty)
    return jax.jit(empty, static_argnums=0), jax.jit(widen, static_argnums=1), jax.jit(step, donate_argnums=3)


@functools.lru_cache(8)
def _draft_steps(config: Model, batch: int):
    """As `_steps`, of caches of the network and of the module: `empty`, `widen`, `check` and `propose`.

    A span is the first position of the tokens and how many of them are real.
    """
    graphdef, _, _ = structure(config)

    def empty(slots: int):
        return empty_caches(config, batch, slots), multi_token.empty_cache(config, batch, slots)

    def check(params, router_state, tokens_T: Array, caches, span: tuple[Array, Array]):
        model, (start, count) = nnx.merge(graphdef, params, router_state), span
        out = model(_context(tokens_T, start, count, batch), caches[0], start)
        last_2D = jnp.stack([_at(out.hidden_BTD, jnp.maximum(count - n, 0)) for n in (2, 1)])
        return model.logits(last_2D), out.hidden_BTD, (out.caches, caches[1])

    def propose(params, router_state, ahead_T: Array, hidden_BTD: Array, caches, span: tuple[Array, Array]):
        model, (start, count) = nnx.merge(graphdef, params, router_state), span
        hidden_BTD, cache = model.draft(_context(ahead_T, start, count, batch), hidden_BTD, caches[1], start)
        return model.logits(_at(hidden_BTD, count - 1)), (caches[0], cache)

    widen = jax.jit(functools.partial(_widen, empty), static_argnums=1)
    return jax.jit(empty, static_argnums=0), widen, jax.jit(check, donate_argnums=3), jax.jit(propose, donate_argnums=4)


@jax.jit
def _sample(logits_V: Array, allowed_V: Array, key: Array, position: Array, temperature: Array, top_p: Array) -> Array:
    """The token of a position: the most likely one at temperature 0, else from the nucleus of probability `top_p`."""
    key = jax.random.fold_in(key, position)
    scaled_V = jnp.where(allowed_V, logits_V / jnp.maximum(temperature, 1e-6), -jnp.inf)
    sorted_V, token_V = jax.lax.sort((-scaled_V, jnp.arange(scaled_V.size, dtype=jnp.int32)), num_keys=1)
    p_V = jax.nn.softmax(-sorted_V)
    inside_V = jnp.cumsum(p_V) - p_V < top_p  # the first token is always inside
    drawn = jax.random.categorical(key, jnp.where(inside_V, -sorted_V, -jnp.inf))
    return token_V[jnp.where(temperature > 0, drawn, 0)]


def stream(
    config: Config,
    weights: Weights,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    drafts: Drafts | None = None,
) -> Iterator[str]:
    """Pieces of text as they come to stand; ends at the end-of-document token, a stop text or the limit.

    The text is that of a document which begins with the prompt. No id is sampled that shows nothing: what pads the
    vocabulary, and special tokens other than that end. Raises `UserError` as `generate`, before the first piece.
    """
    ids = _prompt_ids(config, tokenizer, prompt)
    allowed_V = np.arange(config.model.vocab_size) < tokenizer.size
    allowed_V[list(tokenizer.silent)] = False
    allowed_V[tokenizer.eos] = True
    tokens = generate(config, weights, ids, sampling, allowed_V, drafts)
    return until(sampling.stop, _pieces(tokens, tokenizer, ids), prompt)


def _pieces(tokens: Iterator[int], tokenizer: Tokenizer, prompt_ids: np.ndarray) -> Iterator[str]:
    continuation = Continuation(tokenizer, prompt_ids)
    for token in itertools.takewhile(lambda token: token != tokenizer.eos, tokens):
        yield continuation.add(token)
    yield continuation.rest()


def _prompt_ids(config: Config, tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """What training put in front of a document, and the prompt.

    A run that put nothing there never learnt how documents begin: an empty prompt of it is their end, the token that
    it saw next to a beginning.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"--prompt: must be UTF-8; character {e.start} is a byte that is none") from None
    ids = tokenizer.encode(prompt)
    if config.data.document_start == "end_of_text" or not len(ids):
        ids = np.append(tokenizer.eos, ids)
    return ids.astype(np.int32)


def sample_text(config: Config, weights: Weights, tokenizer: Tokenizer, prompt: str = "The ") -> dict[str, str]:
    """A passage for the summary; empty, with the reason, where the router does not allow sampling."""
    try:
        return {"prompt": prompt, "text": "".join(stream(config, weights, tokenizer, prompt, Sampling()))}
    except UserError as e:
        return {"prompt": prompt, "text": "", "why": str(e)}
