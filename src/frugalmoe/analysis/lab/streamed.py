"""A published model evaluated a layer at a time: every batch passes a layer before the next one is read from its files.

In memory are one layer, the hidden states of all tokens, and what was seen of each. The embedding comes first, norm and
head last.

Letters: B sequences, T time, D model, L MoE layers.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax import Array
from rich.progress import track

from frugalmoe.config import Config
from frugalmoe.convert import plan
from frugalmoe.convert.from_hf import Found, read_array, read_layer
from frugalmoe.data.batches import Batch
from frugalmoe.model import pattern
from frugalmoe.model.block import Block, Place, Stream, apply_block, prepare
from frugalmoe.model.moe import Context, Routed
from frugalmoe.model.transformer import declarations, split, structure
from frugalmoe.train import objective
from frugalmoe.train.step import EVAL_SEED, Evaluated, predicted_tokens


class Input(NamedTuple):
    """A batch of an evaluation, on the mesh."""

    batch: Batch
    first_row: Array


def note(inputs: list[Input]) -> Callable[..., Evaluated]:
    """Returns an `eval_step` that computes nothing: it appends what it was given."""

    def eval_step(params: dict, router_state: dict, batch: Batch, first_row: Array) -> Evaluated:
        inputs.append(Input(batch, first_row))
        return Evaluated(np.zeros(batch.tokens_BT.shape, np.float32), {}, {}, None, None, None)

    return eval_step


def evaluate(found: Found, config: Config, inputs: Sequence[Input], progress: bool = False) -> list[Evaluated]:
    """Returns what `make_eval_step(config, trace=True)` makes of each batch, on the mesh in context."""
    model, first, last = config.model, *_ends(config, found.tokenizer.size)
    own = _parameters(found, ("embed_VD",))
    streams = [Stream(first(own, one.batch)) for one in inputs]
    routed: list[list[Routed]] = [[] for _ in inputs]
    layers = list(zip(pattern.layers(model), plan.places(model)))  # modules that predict further ahead come behind
    for kind, place in track(layers, "reading and passing layers", disable=not progress):
        arrays, run = _block(found, place), _passed(config, kind)
        for i, (one, stream) in enumerate(zip(inputs, streams)):
            streams[i], seen = run(*arrays, stream, one, jnp.int32(place.index))
            if seen is not None:
                routed[i].append(jax.device_get(seen))
        del arrays
    if not model.tie_embeddings:
        del own["embed_VD"]
    of_end = ("final_norm", "head_DV", "head_bias_V")
    own |= _parameters(found, *(path for path in found.plan.arrays if path[0] in of_end))
    return [
        last(own, one.batch, stream, jax.tree.map(lambda *of_layers: np.stack(of_layers), *seen))
        for one, stream, seen in zip(inputs, streams, routed)
    ]


def _parameters(found: Found, *paths: plan.Path) -> dict:
    """Parameters that are no layer's, as the network names them."""
    return plan.tree({path: read_array(found, path) for path in paths})


def _block(found: Found, place: plan.Place) -> tuple[dict, dict]:
    """(parameters, router state) of a layer. Matrices have the dtype that they are used in; the rest is float32."""
    model, own = found.config.model, {}
    declared = declarations(model)
    for path in found.plan.arrays:
        name, index = place.within(path)
        if name is None:
            continue
        matrix = path in declared and declared[path].role == "matrix"
        dtype = np.dtype(ml_dtypes.bfloat16 if matrix and model.compute_dtype == "bfloat16" else np.float32)
        own[name] = jnp.asarray(read_layer(found, path, index, dtype))
    is_state = {path: plan.is_state(path) for path in own}
    return tuple(
        plan.tree({path: a for path, a in own.items() if is_state[path] is wanted}) for wanted in (False, True)
    )


@functools.lru_cache(8)
def _passed(config: Config, kind: pattern.BlockKind) -> Callable[..., tuple[Stream, Routed | None]]:
    """(parameters, router state, stream, input, number among the layers of its kind) -> (stream, what it routed)."""
    block = nnx.eval_shape(lambda: Block(jax.random.key(0), config.model, kind))
    graphdef, _, _ = split(block)

    def passed(params: dict, state: dict, stream: Stream, one: Input, layer: Array) -> tuple[Stream, Routed | None]:
        context = _context(one)
        prepared = prepare(context.positions_BT, config.model, (kind.attention,))
        out = apply_block(nnx.merge(graphdef, params, state).parts, kind, stream, context, prepared, Place(layer))
        return out.stream, out.routed

    return jax.jit(passed, donate_argnums=2)


def _context(one: Input) -> Context:
    return objective.context(one.batch, one.first_row, jnp.int32(0), EVAL_SEED, train=False, trace=True)


def _ends(config: Config, vocabulary: int) -> tuple[Callable, Callable]:
    """(parameters, batch) -> what the first layer is given, and (parameters, batch, stream, routed) -> `Evaluated`."""
    graphdef, shapes, state = structure(config.model)  # of parameters that an end does not use, it has the shapes

    @jax.jit
    def first(own: dict, batch: Batch) -> Array:
        return nnx.merge(graphdef, shapes | own, state).embed(batch.tokens_BT)

    @jax.jit
    def losses(own: dict, batch: Batch, stream: Stream) -> tuple[Array, Array]:
        model = nnx.merge(graphdef, shapes | own, state)
        hidden_BTD = model.final_norm(stream.x_BTD)
        _, ce_BT, _ = objective.token_losses(model, hidden_BTD, batch.targets_BT, batch.loss_mask_BT, config)
        return ce_BT * batch.loss_mask_BT, predicted_tokens(model, hidden_BTD, config, vocabulary)

    def last(own: dict, batch: Batch, stream: Stream, routed: Routed) -> Evaluated:
        ce_BT, predicted_BT = losses(own, batch, stream)
        return Evaluated(ce_BT, routed.stats, {}, routed.selected_BTE, routed.plan, predicted_BT)

    return first, last
