"""The logits of what follows texts that grow, with caches of keys and values.

Texts are rows of a batch, each with a length of its own: the tokens that a row is given go behind those it has, and
rows that are given fewer, or none, are padded with tokens that nothing sees. Shapes are few, so that few are compiled.

Letters: B sequences, T tokens, D model, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from frugalmoe import experts, sharding
from frugalmoe.config import Config
from frugalmoe.errors import UserError
from frugalmoe.model import multi_token, pattern
from frugalmoe.model.attention.contract import PIECE
from frugalmoe.model.block import Layer
from frugalmoe.model.causality import leaking, parts
from frugalmoe.model.moe import Context
from frugalmoe.model.transformer import (
    Transformer,
    bytes_of_caches,
    declarations,
    empty_caches,
    structure,
    to_logits,
)
from frugalmoe.schema import Model
from frugalmoe.train import memory
from frugalmoe.train.weights import Weights

_SHORTEST = 32  # pieces of a prompt are padded to a power of two from this on
_PIECE = PIECE  # tokens of a prompt that are computed at one time: their scores against all tokens exist
_TOGETHER = 4096  # tokens of all prompts of a batch that are computed at one time, if there are not more rows
_LONG = 2**16  # slots beyond which a cache with a window does not grow
_SLOTS = 1024  # of a cache at its start, at most: a full one is doubled, so that a token costs what is there already
_NO_TOKEN = np.zeros(0, np.int32)


@dataclasses.dataclass
class Drafts:
    """Counts of the tokens that a module of multi-token prediction proposed, and of those that came to stand."""

    made: int = 0
    accepted: int = 0


def check(config: Config, rows: int, prompt: int, new: int) -> None:
    """Raises `UserError` for a model that does something else in evaluation, for texts that depend on each other, and
    for more tokens than there is memory for. prompt: tokens of the longest. new: tokens of each text.
    """
    devices = sharding.axis_size("expert")
    if found := leaking(config.model, False, devices):
        raise UserError(
            f"{found}: cannot be sampled token by token, because the experts of a token depend on later tokens in "
            "evaluation too (causal=leak)"
        )
    of_batch = [part for part, level in parts(config.model, False, devices).items() if level == "batch"]
    if of_batch and rows > 1:
        rule = "must be 1, because the experts of a token depend on the other texts of a batch (causal=batch)"
        raise UserError(f"--batch-size={rows}: with {' and '.join(of_batch)} it {rule}")
    _check_slots(config)
    _check_memory(config.model, rows, prompt, new)


def check_drafts(config: Model) -> None:
    """Raises `UserError` for a model that cannot draft tokens."""
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


def _check_memory(config: Model, rows: int, prompt: int, new: int) -> None:
    """Keys and values may take a quarter of a device's memory: growing copies them, and the model has its part."""
    device = memory.of_device()
    size = functools.partial(bytes_of_caches, config, rows)
    scores = 4 * 4 * config.num_heads * rows * min(prompt, _piece(rows))  # float32; they and their softmax, twice
    token = (size(2 * _LONG) - size(_LONG)) // _LONG  # of the kinds of attention that keep all tokens
    fixed = size(_LONG) - token * _LONG
    most = max(device // 4 - fixed, 0) // (token + scores) - prompt
    if new > most:
        room = f"this device, with {device / 1e9:.3g} GB, has room for {max(most, 0)}"
        texts = f" of {rows} texts at one time (--batch-size)" if rows > 1 else ""
        raise UserError(f"--max-tokens={new}: {room} after a prompt of {prompt} tokens{texts}")


def _piece(rows: int) -> int:
    """Tokens of each row that are computed at one time: a power of two."""
    return min(_PIECE, max(_SHORTEST, 1 << (max(_TOGETHER // rows, 1).bit_length() - 1)))


class Decoding:
    """Texts so far, as keys and values: whoever feeds them tokens gets the logits of the next ones.

    A mesh must be in context; it spreads rows over devices, so that there may be a few more than asked for.
    """

    def __init__(self, config: Model, weights: "Weights | Ready", most: int, rows: int = 1):
        """`most`: how many tokens a row will be fed in all. `rows`: how many texts."""
        devices = sharding.axis_size(*sharding.BATCH_AXES)
        self._rows, self._most, self._piece = -(-rows // devices) * devices, most, _piece(rows)
        self._ready = weights if isinstance(weights, Ready) else ready(config, weights)
        self._least = 2 if _slow_alone(config, self._rows) else 1
        self._empty, self._widen, self._step = _steps(config, self._rows)
        self._slots, self._caches, self._length_B = 0, None, np.zeros(self._rows, np.int32)
        self._logits_BV = np.zeros((self._rows, config.vocab_size), np.float32)

    def feed(self, tokens: Sequence[np.ndarray]) -> Array:
        """int32 [T] for each row, none for the rest -> float32 logits [B, V] of what follows the last token of each.

        Where a row gets no token, its logits are those of before. They are gone when the next tokens are fed.
        """
        tokens = [*tokens, *[_NO_TOKEN] * (self._rows - len(tokens))]
        for at in range(0, max(map(len, tokens)), self._piece):
            pieces = [row[at : at + self._piece] for row in tokens]
            count_B = np.array([len(piece) for piece in pieces], np.int32)
            size = max(_padded_size(int(count_B.max())), self._least)
            self._put(np.stack([np.pad(piece, (0, size - len(piece))) for piece in pieces]).astype(np.int32), count_B)
        return self._logits_BV

    def advance(self, token_B: Array, live_B: np.ndarray) -> Array:
        """The same for one token of each row that is live."""
        self._put(jnp.pad(token_B[:, None], ((0, 0), (0, self._least - 1))), live_B.astype(np.int32))
        return self._logits_BV

    def _put(self, tokens_BT: Array, count_B: np.ndarray) -> None:
        self._grow(int(self._length_B.max()) + tokens_BT.shape[1])
        state = (self._caches, self._logits_BV)
        self._caches, self._logits_BV = self._step(self._ready, state, tokens_BT, self._length_B, count_B)
        self._length_B = self._length_B + count_B  # a new array: the step may still read the old one

    def _grow(self, needed: int) -> None:
        before, most = self._slots, -(-max(self._most, needed) // 256) * 256
        while self._slots < needed:
            self._slots = min(max(2 * self._slots, _SLOTS), most)
        if not before:
            self._caches = self._empty(self._slots)
        elif before < self._slots:
            self._caches = self._widen(self._caches, self._slots)


class Drafting(Decoding):
    """Texts with the first module of multi-token prediction, which sees what follows each token of the network.

    What the network was fed last may turn out wrong: `propose` says how much of it stands in each row, and the row's
    next tokens take the places of the rest. A row is left as it is where it is given no token, or none of it stands.
    """

    def __init__(self, config: Model, weights: "Weights | Ready", most: int, rows: int = 1):
        super().__init__(config, weights, most, rows)
        self._empty, self._widen, self._check, self._propose = _draft_steps(config, self._rows)
        self.count_B = np.zeros(self._rows, np.int32)  # how many tokens the network was fed last
        self._last_BT, self._hidden_BTD = np.zeros((self._rows, 0), np.int32), None

    def prompt(self, prompts: Sequence[np.ndarray]) -> Array:
        """int32 [T] for each row, none for the rest -> float32 logits [B, V] of what follows the last token of each.

        All come to their end together: the hidden states of their last pieces are what a module goes on from.
        """
        prompts = [*prompts, *[_NO_TOKEN] * (self._rows - len(prompts))]
        pieces = [np.split(tokens, range(self._piece, len(tokens), self._piece)) for tokens in prompts]
        rounds = max(map(len, pieces))
        pieces = [[_NO_TOKEN] * (rounds - len(row)) + row for row in pieces]
        for number in range(rounds):
            if number:
                self.propose(self.count_B, np.array([row[number][0] if len(row[number]) else 0 for row in pieces]))
            of_round = [row[number] for row in pieces]
            size = _padded_size(max(map(len, of_round)))
            tokens_BT = np.stack([np.pad(row, (0, size - len(row))) for row in of_round])
            logits_2BV = self.check(tokens_BT, np.array([*map(len, of_round)]))
        return logits_2BV[1]

    def check(self, tokens_BT: np.ndarray, count_B: np.ndarray) -> Array:
        """At most a piece -> the network's logits [2, B, V] of what follows the last token but one of each row, and it.

        tokens_BT: int32, of which the first `count` of each row are real.
        """
        self._grow(int(self._length_B.max()) + tokens_BT.shape[1])
        self._last_BT, self.count_B = tokens_BT.astype(np.int32), count_B.astype(np.int32)
        numbers = (self._length_B, self.count_B)
        logits_2BV, self._hidden_BTD, self._caches = self._check(self._ready, self._last_BT, self._caches, *numbers)
        return logits_2BV

    def propose(self, stand_B: np.ndarray, token_B: np.ndarray) -> Array:
        """The module's logits [B, V] of what follows `token`, which follows the first `stand` of a row's last ones."""
        stand_B, ahead_BT = stand_B.astype(np.int32), np.roll(self._last_BT, -1, axis=1)
        ahead_BT[np.arange(self._rows), np.maximum(stand_B - 1, 0)] = token_B
        numbers = (self._length_B, stand_B)
        logits_BV, self._caches = self._propose(self._ready, ahead_BT, self._hidden_BTD, self._caches, *numbers)
        self._length_B = self._length_B + stand_B
        return logits_BV


def _slow_alone(config: Model, rows: int) -> bool:
    """Whether one row at a time is slow: XLA's product for CPUs of one row turns all weights into float32 before it,
    that of two has bfloat16 as it is.
    """
    return rows == 1 and config.compute_dtype == "bfloat16" and sharding.platform() == "cpu"


def _padded_size(size: int) -> int:
    """Few sizes, so that few are compiled: 1, 2, and powers of two."""
    return size if size <= 2 else max(_SHORTEST, 1 << (size - 1).bit_length())


class Ready(NamedTuple):
    """What the steps compute with."""

    weights: Weights
    layers: tuple[Layer, ...] | None  # None: they are taken out of the stacks inside each step
    head_DV: Array | None
    bias_V: Array | None  # of logits


def ready(config: Model, weights: Weights) -> Ready:
    """Weights for decoding: on a CPU, layers one by one, in the memory of the stacks where they are of the same dtype.

    A step would copy every layer's parameters out of their stacks (measured: 7 times the time of a token). Programs for
    accelerators read them in place.
    """
    leaves = jax.tree.leaves(weights)
    alone = all(isinstance(a, Array) and a.is_fully_addressable and len(a.devices()) == 1 for a in leaves)
    if sharding.platform() != "cpu" or not alone:
        return Ready(weights, None, None, None)
    dtype, device = config.compute_dtype, leaves[0].devices().copy().pop()

    def entry(stack: nnx.Variable, number: int) -> nnx.Variable:
        part = np.asarray(stack[...])[number]
        if isinstance(stack, nnx.Param) and sharding.declaration(stack).role == "matrix":
            part = part.astype(dtype, copy=False)
        return stack.replace(jax.device_put(part, device, may_alias=True))

    model = _model(config, weights)
    # What steps take from these, they would convert whole for every token, or copy out of a stack.
    taken = {"embed_VD": weights.params["embed_VD"].astype(dtype)}
    if config.multi_token_prediction.depth:
        taken["multi_token"] = _first_module(config, weights.params["multi_token"])
    return Ready(weights._replace(params=weights.params | taken), model.layers(entry), model.head(), model.head_bias())


def _first_module(config: Model, modules: dict) -> dict:
    """Of multi-token prediction, a stack of one with matrices in compute dtype."""

    def first(path: tuple, a: Array) -> Array:
        of_matrix = sharding.declared(path, declarations(config)).role == "matrix"
        return a[:1].astype(config.compute_dtype) if of_matrix else a[:1]

    return jax.tree_util.tree_map_with_path(first, {"multi_token": modules})["multi_token"]


def _model(config: Model, weights: Weights) -> Transformer:
    return nnx.merge(structure(config)[0], *weights)


def _opened(config: Model, ready: Ready) -> tuple[Transformer, tuple[Layer, ...], Callable[[Array], Array]]:
    """Inside jit: the model, its layers, and what makes float32 logits of hidden states."""
    model = _model(config, ready.weights)
    if ready.layers is None:
        return model, model.layers(lambda stack, number: stack.replace(stack[...][number])), model.logits

    def logits(hidden_BD: Array) -> Array:
        rows = len(hidden_BD)
        if _slow_alone(config, rows):
            hidden_BD = jnp.pad(hidden_BD, ((0, 1), (0, 0)))
        return to_logits(hidden_BD, ready.head_DV, ready.bias_V)[:rows]

    return model, ready.layers, logits


def _widen(empty: Callable[[int], Any], caches: Any, slots: int) -> Any:
    grown = lambda a, shape: jnp.pad(a, [(0, new - old) for old, new in zip(a.shape, shape.shape)])
    return jax.tree.map(grown, caches, jax.eval_shape(lambda: empty(slots)))


def _context(tokens_BT: Array, start_B: Array, count_B: Array) -> Context:
    """Of T tokens of a row at positions start, start + 1, ... only the first `count` are real."""
    batch, time = tokens_BT.shape
    index_T = jnp.arange(time, dtype=jnp.int32)
    segments_BT = (index_T < count_B[:, None]).astype(jnp.int32)
    rows = (sharding.reshard(a_BT, "BT") for a_BT in (tokens_BT, segments_BT, start_B[:, None] + index_T))
    keys_B = sharding.reshard(jnp.broadcast_to(jax.random.key(0), (batch,)), "B")
    return Context(*rows, keys_B, jnp.int32(0))


def _at(hidden_BTD: Array, index_B: Array) -> Array:
    """Hidden states [B, D] of one token of each row."""
    hidden_BTD = sharding.reshard(hidden_BTD, "...")
    return jnp.take_along_axis(hidden_BTD, index_B[:, None, None], axis=1)[:, 0]


@functools.lru_cache(8)
def _steps(config: Model, batch: int):
    """Jitted `empty(slots)` and `widen(caches, slots)`, which return caches, and `step`: caches and logits [B, V]."""
    empty = functools.partial(empty_caches, config, batch)

    def step(ready: Ready, state: tuple, tokens_BT: Array, start_B: Array, count_B: Array):
        (model, layers, logits), (caches, logits_BV) = _opened(config, ready), state
        start = sharding.reshard(start_B, "B")
        hidden_BTD, caches = model.decode(layers, _context(tokens_BT, start_B, count_B), caches, start)
        new_BV = sharding.reshard(logits(_at(hidden_BTD, jnp.maximum(count_B - 1, 0))), "..")
        return caches, jnp.where(count_B[:, None] > 0, new_BV, logits_BV)

    widen = functools.partial(_widen, empty)
    return jax.jit(empty, static_argnums=0), jax.jit(widen, static_argnums=1), jax.jit(step, donate_argnums=1)


@functools.lru_cache(8)
def _draft_steps(config: Model, batch: int):
    """As `_steps`, of caches of the network and of the module: `empty`, `widen`, `check` and `propose`."""

    def empty(slots: int):
        return empty_caches(config, batch, slots), multi_token.empty_cache(config, batch, slots)

    def check(ready: Ready, tokens_BT: Array, caches, start_B: Array, count_B: Array):
        model, layers, logits = _opened(config, ready)
        start, context = sharding.reshard(start_B, "B"), _context(tokens_BT, start_B, count_B)
        hidden_BTD, new = model.decode(layers, context, caches[0], start)
        last_but_one_BD, last_BD = (_at(hidden_BTD, jnp.maximum(count_B - n, 0)) for n in (2, 1))
        logits_NV = logits(jnp.concatenate([last_but_one_BD, last_BD]))
        return logits_NV.reshape(2, batch, -1), hidden_BTD, (new, caches[1])

    def propose(ready: Ready, ahead_BT: Array, hidden_BTD: Array, caches, start_B: Array, count_B: Array):
        model, _, logits = _opened(config, ready)
        start, context = sharding.reshard(start_B, "B"), _context(ahead_BT, start_B, count_B)
        hidden_BTD, cache = model.draft(context, hidden_BTD, caches[1], start)
        return logits(_at(hidden_BTD, jnp.maximum(count_B - 1, 0))), (caches[0], cache)

    widen = jax.jit(functools.partial(_widen, empty), static_argnums=1)
    return jax.jit(empty, static_argnums=0), widen, jax.jit(check, donate_argnums=2), jax.jit(propose, donate_argnums=3)
