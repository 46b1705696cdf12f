"""One table from shape letters to mesh axes, and arrays on the mesh by their letters.

`LETTERS` is the legend of the whole package: a letter in the name of an array, in a declaration or in a docstring has
this one meaning, and a docstring's own "Letters:" repeats the few that its file uses.

| axis | what is spread over it |
|---|---|
| data | sequences |
| fsdp | sequences; parameters, gradients and optimizer state (ZeRO-3, Rajbhandari et al. 1910.02054) |
| expert | sequences; experts, whose tokens are exchanged |
| tensor | heads, the hidden width of feed-forwards, the vocabulary (Megatron, Shoeybi et al. 1909.08053) |
| context | tokens of a sequence; parameters as for fsdp |

An axis is used once per array, by the first letter that may have it, and an axis of one device by none: the same
program runs on one device, and its arrays have no sharding at all.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from frugalmoe.sharding.mesh import AXES, BATCH_AXES, axis_size, make_mesh

LETTERS = {
    "A": "micro-batches of a step",
    "B": "batch: sequences, or rows of a batch",
    "T": "time: tokens of a sequence, queries",
    "t": "tokens of one chunk of T",
    "N": "tokens of all sequences, B*T; of a part of the batch where that is said",
    "V": "vocabulary: token ids",
    "D": "model: channels of the residual stream",
    "F": "hidden channels of a feed-forward, as of an expert",
    "2": "a pair: gate and up of a feed-forward; x and v of a constant expert",
    "L": "layers, as the MoE ones",
    "H": "query heads",
    "h": "key-value heads: heads of keys and values",
    "d": "channels of a head, as of its query and its key",
    "e": "channels of a head's value, where they are others",
    "n": "channels of a head without rotation",
    "r": "channels of a head with rotation: rotated",
    "E": "experts",
    "K": "choices of a token: slots, experts per token",
    "X": "choices that there are: the experts, then what is no expert, E + Z",
    "Z": "choices that are no experts: zero-cost, identity, null, constant",
    "C": "capacity: slots that tokens fill, of an expert, a routed block, a cache; keys that a query may see",
    "Q": "slots, or samples, of an expert in all sequences, B*C; tensors that islands exchange",
    "P": "channels inside: of a router's projection, latent space, hidden layer or GRU; of attention's latent",
    "W": "gates of a recurrent router, 3P",
    "R": "rows of any origin, as those sorted by expert",
    "c": "slots of one chunk of C",
    "M": "devices of an axis; contributions of islands",
    "G": "groups: of experts, layers, sequences, tokens (pools, chunks), rows (tiles), slots; domains",
    "g": "members of one group: experts, tokens, rows of a block, query heads with the same keys and values",
    "S": "steps of a run: logged ones, checkpoints, batches",
    "U": "units that are resampled, documents or seeds",
    "Y": "draws: bootstrap samples, shuffles",
    "I": "any axis of two axes, the contracted one of a product; outputs, parameters, places, candidates, values ...",
    "J": "the other axis of two axes, the produced one of a product",
    ".": "any axis, never spread",
}
_AXES_OF_LETTER = {
    "B": BATCH_AXES,
    "T": ("context",),
    "E": ("expert",),
    "H": ("tensor",),
    "h": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
}
STORED = ("fsdp", "expert", "context")  # of D, or else P, of a parameter: a layer gathers it for the time of its use


def spec(letters: str, stored: bool = False, mesh: Mesh | None = None) -> P:
    """`spec("BTD")` -> P(("data", "fsdp"), "context", None) on a mesh with these three axes larger than 1.

    stored: as a parameter is kept between its uses. mesh: by default the one in context.
    """
    free, entries = {axis for axis in AXES if axis_size(axis, mesh=mesh) > 1}, []
    for letter in letters:
        wanted = STORED if stored and letter in "DP" else _AXES_OF_LETTER.get(letter, ())
        taken = tuple(axis for axis in wanted if axis in free)
        free -= set(taken)
        entries.append(taken[0] if len(taken) == 1 else taken or None)
    return P(*entries)


def put(mesh: Mesh, array: Array, letters: str, shape: tuple[int, ...] | None = None) -> Array:
    """An array of the host on the mesh; of an array of `shape` it may be no more than this process's devices hold."""
    wanted = NamedSharding(mesh, spec(letters, mesh=mesh))
    return jax.make_array_from_process_local_data(wanted, array, shape or array.shape)


def own_indices(mesh: Mesh, shape: tuple[int, ...], letters: str, letter: str) -> np.ndarray:
    """Returns the indices along a dimension that this process's devices hold, sorted."""
    dim = letters.index(letter)
    held = NamedSharding(mesh, spec(letters, mesh=mesh)).addressable_devices_indices_map(shape).values()
    return np.unique([np.arange(shape[dim])[slices[dim]] for slices in held])


def fetch(tree: Any) -> Any:
    """Arrays whole on the host, of whatever devices and processes hold them; every process must call it."""
    return jax.device_get(tree) if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def fits_one_device(tree: Any) -> bool:
    """Whether arrays take at most a quarter of its memory, where that is known: as much is in use, and for copying."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) <= limit / 4


@contextmanager
def one_device(tree: Any) -> Iterator[Any]:
    """Arrays whole on one device of this process, and a mesh of that device alone in context. As `fetch`."""
    if jax.sharding.get_mesh().size == 1:
        yield tree
        return
    whole, mesh = fetch(tree), make_mesh(dict.fromkeys(AXES, 1), jax.local_devices()[:1])
    with jax.set_mesh(mesh):
        yield jax.tree.map(lambda a: put(mesh, a, "." * a.ndim), whole)


def reshard(array: Array, letters: str) -> Array:
    """Inside jit: gives an array the sharding of its letters."""
    return jax.sharding.reshard(array, spec(letters))
