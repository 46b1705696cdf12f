"""What a step's kernels are for, and the least that each of these items needs: `of_program` beside `ideal`.

The ideal step reads and writes what no fusion can spare, on one device, with A micro-batches of N tokens:

| item | bytes |
|---|---|
| products of a matrix of W weights, forward | 4 W (the float32 parameter, once), input and output of each product |
| backward | 4 W once, twice the inputs and outputs; its gradient: 4 W written, 8 W in each later micro-batch |
| activations, norms, rotations, casts | none: they are a part of the products before or behind |
| rows of the residual stream | each half of a block reads and writes it once, forward and backward |
| combine, and the backward pass of dispatch | K N rows read, N written; what they gather is a product's input |
| router | its input read, N E float32 scores written and read, forward and backward |
| embedding | N rows read and written, and their gradients |
| head | 4 W twice (logits; gradient of the input), N V numbers in the compute dtype written once and read twice |
| optimizer | 28 for each parameter: parameter, gradient and two moments read, all but the gradient written |
| copies, casts, fills, what is kept for the backward pass beside the inputs of products | none |

FLOPs are those of `cost.flops`, three times the forward pass: what is computed again is none of them. Kernels: each
product is one, forward and twice backward, with one more for norm, rotation, choice, sort, combine, residual sum and
the like where they stand between products; an update for each parameter array.

Letters: A micro-batches of a step, N tokens, D model, F expert hidden, E experts, K choices, V vocabulary.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from rich import box
from rich.table import Table

from frugalmoe.aot import traffic
from frugalmoe.aot.traffic import Kernel
from frugalmoe.cost.flops import TRAIN_FACTOR, forward_flops
from frugalmoe.model import pattern
from frugalmoe.model.transformer import structure
from frugalmoe.schema import Config


class Item(NamedTuple):
    """A part of a step, on one device."""

    kernels: float = 0
    flops: float = 0
    bytes: float = 0

    def plus(self, other: "Item") -> "Item":
        """The sum of two parts."""
        return Item(*(a + b for a, b in zip(self, other)))


_OF_KIND = {"collective": "collectives", "cast": "casts", "move": "copies and transposes", "fill": "fills with zeros"}
_OF_SCOPE = {
    "attention": "attention",
    "feed_forward": "dense and shared experts",
    "router": "router",
    "dispatch": "dispatch and combine",
    "combine": "dispatch and combine",
    "embedding": "embedding",
    "head": "head and loss",
    "optimizer": "optimizer",
}
PRODUCTS, ROWS, OTHER = "expert products", "expert rows between products", "others"
KEPT, SUMS = "kept for the backward pass", "sums of gradients"
ITEMS = (PRODUCTS, ROWS, *dict.fromkeys(_OF_SCOPE.values()), KEPT, SUMS, OTHER, *_OF_KIND.values())


def name_of(kernel: Kernel) -> str:
    """The item that a kernel belongs to. What does nothing but move, cast or fill has an item of its own; so has what
    puts arrays into stacks over layers.
    """
    if "dynamic_update_index_in_dim" in kernel.source:  # in stacks over layers
        return SUMS if "transpose(" in kernel.source else KEPT
    if kernel.kind in _OF_KIND:
        return _OF_KIND[kernel.kind]
    if kernel.scope == "experts":
        return PRODUCTS if kernel.flops else ROWS
    return _OF_SCOPE.get(kernel.scope, OTHER)


def of_program(kernels: Sequence[Kernel]) -> dict[str, Item]:
    """Every item of a program, in the order of `ITEMS`."""
    found = dict.fromkeys(ITEMS, Item())
    for kernel in kernels:
        name = name_of(kernel)
        found[name] = found[name].plus(Item(kernel.launches, kernel.flops, kernel.bytes))
    return found


def ideal(config: Config) -> dict[str, Item]:
    """The least of each item, of a step on one device; see above. The config must be settled."""
    model, train, moe = config.model, config.train, config.model.moe
    micro = train.accumulate_steps
    tokens = train.batch_size // micro * config.data.sequence_length
    b = jax.numpy.dtype(model.compute_dtype).itemsize
    layers = pattern.layers(model)
    num_moe = sum(kind.feed_forward == "moe" for kind in layers)
    num_dense = len(layers) - num_moe
    rows, dim, hidden = moe.num_experts_per_token * tokens, model.dim, moe.expert_dim
    of_heads = model.num_heads * model.head_dim
    queries_keys_values = of_heads + 2 * model.num_kv_heads * model.head_dim
    shared = moe.num_shared_experts * hidden

    weights = _weights(config)
    gradient = 4 + 8 * (micro - 1)  # bytes of a gradient over all micro-batches
    matrices = lambda name: weights.get(name, 0) * (8 * micro + gradient)
    stream = 4 * b * tokens * dim * micro * len(layers)  # of halves of blocks: read, written, forward and backward
    thrice = TRAIN_FACTOR * b * micro  # bytes of a number that goes into or comes out of a product, forward
    chain = lambda hidden: 2 * dim + 3 * hidden  # numbers of a row, of gate and up, and of down
    of_attention = 2 * (dim + queries_keys_values + of_heads)
    routed_blocks, blocks = num_moe * micro, len(layers) * micro
    step = TRAIN_FACTOR * tokens * micro
    flops = {name: step * n for name, n in forward_flops(model, config.data.sequence_length).items()}
    feed_forward = num_dense * chain(model.dense_dim) + (num_moe * chain(shared) if shared else 0)
    found = {
        PRODUCTS: Item(
            6 * routed_blocks,
            flops["routed experts"],
            matrices("routed") + num_moe * thrice * rows * chain(hidden),
        ),
        "attention": Item(
            blocks * (7 + 10),
            flops["attention projections"] + flops["attention products"],
            matrices("attention") + stream + len(layers) * thrice * tokens * of_attention,
        ),
        "dense and shared experts": Item(
            micro * 9 * num_dense + routed_blocks * (8 if shared else 1),
            flops["dense feed-forward"] + flops["shared experts"],
            matrices("feed_forward") + stream + thrice * tokens * feed_forward,
        ),
        "router": Item(
            5 * routed_blocks,
            flops["router"],
            matrices("router") + routed_blocks * tokens * (3 * b * dim + 4 * 4 * moe.num_experts),
        ),
        "dispatch and combine": Item(3 * routed_blocks, 0, routed_blocks * 2 * b * (rows + tokens) * dim),
        "embedding": Item(2 * micro, 0, micro * tokens * dim * 2 * (4 + b)),
        "head and loss": Item(
            5 * micro,
            flops["head"],
            matrices("head") + micro * tokens * b * (3 * model.vocab_size + 2 * dim),
        ),
        "optimizer": Item(weights["arrays"], 0, 28 * weights["all"]),
    }
    return {name: found.get(name, Item()) for name in ITEMS}


def tables(text: str, config: Config) -> list:
    """Returns what people read of a program's traffic: its items beside the least that they need, its largest kernels.

    Raises ValueError where the text does not say how often a loop runs.
    """
    kernels = traffic.kernels(text)
    found, least = of_program(kernels), ideal(config)
    columns = ("kernels", "TFLOP", "GB")
    table = Table("item of a step", *columns, *(f"least {name}" for name in columns), box=box.SIMPLE_HEAD)
    for name, row in cells(found, least):
        table.add_row(name, *row)
    largest = Table("largest kernels", "times", "GB read", "GB written", "for", box=box.SIMPLE_HEAD)
    for kernel in sorted(kernels, key=lambda kernel: -kernel.bytes)[:16]:
        source = kernel.source.removeprefix("jit(train_step)/")[-60:]
        sizes = (f"{size / 1e9:.2f}" for size in (kernel.read, kernel.written))
        largest.add_row(kernel.name, f"{kernel.launches:,}", *sizes, source)
    return [table, largest]


def cells(found: Mapping[str, Item], least: Mapping[str, Item]) -> list[tuple[str, list[str]]]:
    """Returns the cells of a table of items: kernels, TFLOP and GB, as they are and at least; a sum at the end."""
    sides = [dict(side) for side in (found, least)]
    for side in sides:
        side["all"] = functools.reduce(Item.plus, side.values())
    shown = lambda item: [f"{item.kernels:,.0f}", f"{item.flops / 1e12:,.2f}", f"{item.bytes / 1e9:,.2f}"]
    return [(name, shown(sides[0][name]) + shown(sides[1][name])) for name in sides[0] if any(sides[0][name])]


def _weights(config: Config) -> Mapping[str, int]:
    """Numbers of each item's matrices, of all parameters, and how many arrays these are."""
    _, params, _ = structure(config.model)
    found = {"all": 0, "arrays": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [str(getattr(key, "key", key)) for key in path]
        found["all"] += leaf.size
        found["arrays"] += 1
        item = _of_path(names)
        found[item] = found.get(item, 0) + leaf.size
    if config.model.tie_embeddings:
        found["head"] = found["embedding"]
    return found


def _of_path(names: list[str]) -> str:
    if names[0].startswith(("embed", "head")):
        return "embedding" if names[0].startswith("embed") else "head"
    if "attention" in names:
        return "attention"
    if "router" in names:
        return "router"
    return "routed" if "moe" in names and "shared" not in names else "feed_forward"
