"""The model of a training step: parameters, memory, traffic and time, in closed form, each with its derivation.

Nothing is compiled and nothing is fitted to a row: shapes of the config, a `Device`, a `Layout` and the few constants
of `Assumptions` give everything. FLOPs of a token are `cost.flops.forward_flops`. Bytes and seconds, of one device,
unless a name says otherwise.

Letters, as in the code of the network: N tokens of a micro-batch on one device, D model, F hidden width, E experts,
K choices, V vocabulary, H query heads, h heads of keys and values, d channels of a head, L layers, R rows (a token for
one expert), M devices of the expert axis, P parameters; b bytes of a number in the compute dtype.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from frugalmoe.cost.flops import TRAIN_FACTOR, forward_flops
from frugalmoe.model import multi_token, pattern
from frugalmoe.model.attention import kinds
from frugalmoe.model.moe import OF_EXPERTS
from frugalmoe.model.transformer import structure
from frugalmoe.schema import Config, Model, Optim
from frugalmoe.train import optim

FLOAT32 = 4


class Device(NamedTuple):
    """What the model asks of an accelerator; `cost.catalogue` reads it from the device catalogue."""

    name: str
    platform: str  # gpu | tpu | cpu
    peak: Mapping[str, float]  # FLOP/s of dense products by precision: bf16, fp8, fp32
    memory: float  # bytes that a program may take
    bandwidth: float  # of its memory, bytes per second
    link: float  # to the devices of its node, bytes per second in one direction
    network: float  # to other nodes, likewise
    node: int  # devices that links join
    # Shares of the peak where they were measured, 0 where not: of products, of those of experts, of attention.
    matmul: float = 0.0
    grouped: float = 0.0
    attention: float = 0.0

    @property
    def nominal(self) -> float:
        """The peak that utilization is told by: of bf16, or of what there is."""
        return self.peak.get("bf16") or next(iter(self.peak.values()))


class Layout(NamedTuple):
    """How a step is spread: sizes of the mesh axes of `schema.Mesh`, and what a device computes at one time.

    What follows `remat` describes other codebases' runs, and so do `pipeline` and remat=hidden; ours have none of them.
    """

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    sequences: int = 1  # of a micro-batch, for each device of the axes that split batches
    micro_batches: int = 1  # of a step
    remat: str = "full"  # none | dots | hidden (gate and up alone are computed anew) | full
    virtual: int = 1  # pieces of the network that a device of a pipeline has (interleaved schedule)
    node_limit: int = 0  # a token travels to at most so many nodes, once to each (DeepEP); 0: a row for each choice
    gathered_once: bool = False  # a step, not a micro-batch: only the optimizer's state is spread (ZeRO-1)
    # Devices of `tensor` split tokens where they share neither heads nor hidden widths (sequence parallelism): norms,
    # what a pipeline sends, and, folded into the expert axis, routed experts, which stay whole (2504.14960).
    sequence_parallel: bool = False
    # `context` passes keys and values on from device to device beside attention's products (ring attention), over
    # devices that `tensor` leaves; ours lets queries, keys, values and outputs change places.
    ring: bool = False
    # Each operation between products is a kernel that reads and writes on its own (PyTorch that is not compiled).
    eager: bool = False
    # Of a pipeline: 1f1b | zero-bubble (ZB-H1, 2401.10241) | dualpipe (2412.19437: a device has stages i and p - 1 - i,
    # for half of the micro-batches each).
    schedule: str = "1f1b"
    even: bool = False  # as many layers in each stage of a pipeline, and the head beside those of the last one

    @property
    def shards(self) -> int:
        """Devices that split a batch."""
        return self.data * self.fsdp * self.expert

    @property
    def devices(self) -> int:
        return self.shards * self.tensor * self.context * self.pipeline

    @property
    def stored(self) -> int:
        """Devices over which each parameter is spread."""
        return self.fsdp * self.expert * self.tensor * self.context * self.pipeline

    @property
    def fold(self) -> int:
        """Devices of `tensor` that are further devices of the expert axis."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def batch_size(self) -> int:
        """Sequences of a step."""
        return self.sequences * self.micro_batches * self.shards


class Assumptions(NamedTuple):
    """Constants of the time model that no shape gives. `docs/planner.md` has the origin and the effect of each."""

    matmul: float = 0.75  # share of the peak that a large product reaches
    # Likewise in fp8 with scales of tiles, whose sums are moved to float32 registers each 128 of the contracted axis.
    # Kernels published with DeepSeek-V3's reach 1,350 of 1,979 TFLOP/s at their best shapes (DeepGEMM, 2025-02), 0.68.
    # With one scale of a tensor a product has no such pauses, and reaches `matmul`.
    fp8: float = 0.6
    # Bytes that casting a factor to fp8 moves: 2 are read, and 1 is written in both orders, of which the backward
    # pass contracts the other. With one scale of a tensor its largest number is looked for first: 2 more.
    cast: float = 4.0
    tile: float = 128.0  # inputs and outputs of a product that are lost to the ends of a kernel's loops
    launch: float = 4e-4  # seconds of a layer's passes in which a GPU waits for its next kernel
    memory: float = 0.8  # share of the memory's bandwidth that reading and writing in order reaches
    attention: float = 0.5  # share of the peak of fused products of attention
    links: float = 0.8  # share of links and network that a collective reaches
    # Rows of the busiest device over the mean, where experts are spread over devices. Five published pairs of one run
    # with forced and with its own balance differ by 4 to 24%, 15% in the mean; experts are about 0.7 of such a step,
    # which is a guess.
    imbalance: float = 1.2
    hidden: float = 0.0  # share of the exchange of tokens that goes on beside computing, as far as that is longer
    sending: float = 20 / 132  # share of a GPU that such an exchange takes from it (DeepSeek-V3, section 3.2.2)
    # What is left on GPUs and NPUs of the sum of the parts, beside launches: waits, kernels that are not tuned, jitter.
    # It belongs to the software of a date; this is that of training runs of 2023 to 2025, near the median of those of
    # docs/planner.md. TPUs, whose programs are one kernel after the other in one stream, have nothing to tell.
    software: float = 0.85


ASSUMED = Assumptions()

# Parameters.


class Parameters(NamedTuple):
    """Counts, from shapes alone."""

    total: int
    experts: int  # of all routed experts
    embedding: int
    head: int  # 0 where it is the embedding
    layer: int  # of the largest layer
    layer_experts: int  # of them routed experts


@functools.lru_cache(64)
def parameters(model: Model) -> Parameters:
    """Returns the counts of a settled model. `total` and `embedding` are those of `count_parameters`.

    The largest layer is what a device gathers whole: attention, norms, router and feed-forward of one block.
    """
    _, params, _ = structure(model)
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    experts = layer = layer_experts = 0
    for name in ("dense_blocks", "moe_blocks"):
        if name not in params:
            continue
        feed_forward = name.removesuffix("_blocks")
        count = sum(kind.feed_forward == feed_forward for kind in pattern.layers(model))
        blocks = params[name]
        routed = size([leaf for key, leaf in blocks["moe"].items() if key in OF_EXPERTS]) if "moe" in blocks else 0
        experts += routed
        if size(blocks) // count > layer:
            layer, layer_experts = size(blocks) // count, routed // count
    if "multi_token" in params and "moe" in (block := params["multi_token"]["block"]):
        experts += size([leaf for key, leaf in block["moe"].items() if key in OF_EXPERTS])
    embedding = params["embed_VD"].size
    return Parameters(size(params), experts, embedding, 0 if model.tie_embeddings else embedding, layer, layer_experts)


@functools.lru_cache(64)
def flops_of_token(model: Model, sequence_length: int) -> Mapping[str, float]:
    """Returns `forward_flops`, once for each model: the search for a layout asks often."""
    return forward_flops(model, sequence_length)


@functools.lru_cache(64)
def _state(model: Model, optimizer: Optim) -> optim.Bytes:
    of_any_length = dataclasses.replace(optimizer, schedule="constant")
    return optim.bytes_of(Config(model=model, optim=of_any_length))


def train_flops(model: Model, sequence_length: int, remat: str = "none") -> float:
    """Returns FLOPs of a token's training step: forward, twice that backward, and with remat=full once more forward.

    Head and loss are computed three times in any case (`model.cross_entropy`), the products of attention are part of
    a kernel that computes its scores anew in its backward pass, which is not counted.
    """
    parts = flops_of_token(model, sequence_length)
    again = sum(value for name, value in parts.items() if name != "head") if remat == "full" else 0
    return TRAIN_FACTOR * sum(parts.values()) + again


# Memory.


class Memory(NamedTuple):
    """Bytes of one device, by part."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float  # what layers keep for the backward pass
    vocabulary: float  # embedding and head as they are used, their gradients, a chunk of logits
    layer: float  # one layer at work: its weights and their gradients, rows of tokens, what it computes anew
    copies: float  # of parameters in the compute dtype that the compiler keeps

    @property
    def total(self) -> float:
        return sum(self)


def bytes_of_number(model: Model) -> int:
    return jnp.dtype(model.compute_dtype).itemsize


def memory(config: Config, layout: Layout, platform: str) -> Memory:
    """Returns what a step needs of one device.

    State: parameters are float32, and so are their gradients, each spread over the devices of `Layout.stored`; an
    optimizer's state is spread likewise (AdamW has two numbers for each parameter, Muon one for each of a matrix).
    Where only that is spread, it has the float32 parameters too, and a device holds what it uses in the compute dtype.

    Activations: `kept_of_layer` for each token and layer; with a pipeline its first device keeps as many micro-batches
    as it has stages, each of 1 / pipeline of the layers: as much as one device would of one micro-batch. In v pieces
    it begins more before its first backward pass: 1 + (p - 1) / (p v) times as much (2205.05198, section 4.2.3).

    Vocabulary: where parameters are spread, a device gathers the D V numbers of embedding and head before their use and
    forms gradients as large, in the compute dtype, and that of the head in float32 while it is summed over chunks of
    tokens: 4 b + 4 bytes for each of D V. Of a chunk the logits, their exponentials and their gradients, float32.

    A layer at work: weights whole along `fsdp` and their gradients, in the compute dtype; the rows that experts
    compute (`rows`), and what one layer would keep without remat.

    On accelerators the head and a layer are not at work at one time: the larger of the two counts. On TPUs the order is
    such that embedding and head are not either, which leaves 3 b + 4 bytes, and XLA keeps there a copy of the experts
    that a device holds, in the compute dtype (docs/pods.md). XLA for CPUs has all at one time, with four copies more of
    gate and up of a dense feed-forward, for their gradients and for what products take turned around.
    """
    model, count, b = config.model, parameters(config.model), bytes_of_number(config.model)
    state = _state(model, config.optim)
    tokens = layout.sequences * config.data.sequence_length / layout.context
    kept = lambda kind, layout: kept_of_layer(model, kind, layout, platform)
    of_layers = sum(times * kept(kind, layout) for kind, times in _kinds(model).items())
    of_layers *= 1 + (layout.virtual > 1) * (layout.pipeline - 1) / layout.pipeline / layout.virtual
    everything = [kept(kind, layout._replace(remat="none")) for kind in _kinds(model)]
    vocabulary = _vocabulary(config, layout, platform, tokens)
    whole = (count.layer - count.layer_experts) / layout.tensor + count.layer_experts / layout.expert / layout.tensor
    gathered = layout.fsdp * layout.expert * layout.context > 1
    weights = 2 * b * whole if gathered or b < FLOAT32 else 0.0
    layer = weights + tokens * max(everything) + rows(config, layout, platform, tokens)
    if platform == "cpu":
        layer += tokens * 4 * b * max(2 * _hidden(model, kind) for kind in _kinds(model)) / layout.tensor
    copies = b * count.experts / layout.stored if platform == "tpu" and b < FLOAT32 else 0.0
    if platform != "cpu":
        vocabulary, layer = (vocabulary, 0.0) if vocabulary > layer else (0.0, layer)
    if layout.gathered_once:
        used = held(model, layout)
        of_state = (b * used, FLOAT32 * used, (state.parameters + state.optimizer) / layout.stored)
    else:
        of_state = tuple(size / layout.stored for size in state)
    return Memory(
        *of_state,
        tokens * of_layers,
        vocabulary,
        layer,
        copies,
    )


def held(model: Model, layout: Layout) -> float:
    """Returns the parameters that a device computes with: not spread over `fsdp`."""
    count = parameters(model)
    return (count.total - count.experts + count.experts / layout.expert) / layout.tensor / layout.pipeline


@functools.lru_cache(64)
def _kinds(model: Model) -> Mapping[pattern.BlockKind, int]:
    """How many blocks there are of each kind, those of multi-token prediction too."""
    modules = [multi_token.kind(model)] * model.multi_token_prediction.depth
    return collections.Counter([*pattern.layers(model), *modules])


def kept_of_layer(model: Model, kind: pattern.BlockKind, layout: Layout, platform: str) -> float:
    """Returns the bytes that a layer keeps of each of a device's tokens until its backward pass.

    full: the layer's input, b D, and the routing plan, an expert and a weight for each choice, 8 K.
    dots: also the results of products without a batch axis: queries, keys, values, what attention adds, gate and up
    of dense and shared feed-forwards and what they add, and the router's logits in float32. hidden: not gate and up.
    none: all that derivatives ask for. Of the width D: attention's and the experts' input, and what two norms keep: of
    16 bits their inputs alone, the rest is computed again (`model.layers`); of float32 also the normalized and the
    scaled one, and the sum between them, 7 arrays in all. Queries before and after rotation and the output of
    attention, H d each; keys and values; the log-sum-exp of each head; scores and probabilities of the router; of each
    choice places in three orders; gate and up. Of routed experts accelerators keep the products of gate and up, 2 F of
    each row that a device has room for (`experts.grouped`); CPUs compute them again (executors `blocks`). Other
    codebases (`Layout.gathered_once`) keep what each product reads, a row's D and its activation F, too.
    """
    b, plan = bytes_of_number(model), 8 * model.moe.num_experts_per_token * (kind.feed_forward == "moe")
    if layout.remat == "full":
        return b * model.dim + plan
    queries, keys = (width / layout.tensor for width in _widths(model, kind.attention))
    hidden = 2 * _hidden(model, kind) / layout.tensor
    scores = FLOAT32 * model.moe.num_experts * (kind.feed_forward == "moe")
    if layout.remat in ("dots", "hidden"):
        adds = model.dim * (1 + (hidden > 0))
        return b * (model.dim + queries + keys + hidden * (layout.remat == "dots") + adds) + scores + plan
    norms = 2 * b if b < FLOAT32 else 7 * FLOAT32
    own = (norms + 2 * b) * model.dim + b * (3 * queries + keys + 1.5 * hidden)
    if kind.feed_forward == "moe" and platform != "cpu":
        of_row = (2 + layout.gathered_once) * model.moe.expert_dim / layout.tensor + layout.gathered_once * model.dim
        own += b * of_row * _rows_of_token(model, layout)
    return own + FLOAT32 * model.num_heads / layout.tensor + 2 * scores + 3 * plan


def _widths(model: Model, name: str) -> tuple[float, float]:
    """Channels of all queries, and of all keys and values, of a token.

    Latent attention has heads of their own keys and values, whose widths its products tell: 2 H (qk + v) FLOPs a key.
    """
    heads = model.num_heads * model.head_dim
    if pattern.short(name) == "latent":
        options = kinds.options_of(model, name)
        return model.num_heads * (model.head_dim + options.rotary_dim), model.num_heads * (
            model.head_dim + options.rotary_dim + options.value_dim
        )
    return heads, 2 * model.num_kv_heads * model.head_dim


def _hidden(model: Model, kind: pattern.BlockKind) -> float:
    """Width of what every token passes: the dense feed-forward, or the shared experts."""
    return model.dense_dim if kind.feed_forward == "dense" else model.moe.num_shared_experts * model.moe.expert_dim


def _vocabulary(config: Config, layout: Layout, platform: str, tokens: float) -> float:
    model, b = config.model, bytes_of_number(config.model)
    count = parameters(model)
    gathered = layout.fsdp * layout.expert * layout.context > 1
    matrices = count.embedding / layout.tensor
    whole = 3 if platform == "tpu" else 3 + bool(count.head)
    of_matrices = matrices * (FLOAT32 + b * whole if gathered or b < FLOAT32 else FLOAT32)
    chunk = min(config.train.loss_chunk, tokens)
    return of_matrices + 3 * FLOAT32 * chunk * model.vocab_size / layout.tensor


def rows(config: Config, layout: Layout, platform: str, tokens: float) -> float:
    """Returns the bytes of rows that a MoE layer has at one time.

    On accelerators the kernels take R = K N rows (with an expert axis as many as `exchange_room` says, or all that may
    come: M times as many). Most exist where the backward pass (`experts.grouped`) has formed the gradient of gate and
    up: of width D the gathered tokens and the gradient of the output, of F that of gate and up, that of the activation
    and the weighted activation, 4 in all (gate and up count as kept); in the compute dtype, float32 only inside
    kernels. Where rows are exchanged, a device also has the tokens of all M devices (gathered), or the K N rows that it
    sends, their results and the gradients of these: 3 of width D. On CPUs a block of rows at a time is computed, and
    only sums over tokens exist: input and output and their gradients, float32.
    """
    model, b = config.model, bytes_of_number(config.model)
    moe = model.moe
    if not pattern.has_experts(model):
        return 0.0
    if platform == "cpu":
        return 4 * FLOAT32 * model.dim * tokens
    count = tokens * _rows_of_token(model, layout)
    sent = 3 * tokens * min(layout.expert, moe.num_experts_per_token) if layout.expert > 1 else 0.0
    return b * (count * (2 * model.dim + 4 * moe.expert_dim / layout.tensor) + sent * model.dim)


def _rows_of_token(model: Model, layout: Layout) -> float:
    """Rows that a device has room for, for each of its tokens."""
    moe = model.moe
    room = moe.exchange_room or min(layout.expert, moe.num_experts / moe.num_experts_per_token)
    return moe.num_experts_per_token * (max(room, 1.0) if layout.expert > 1 else 1.0)


# Traffic.


class Traffic(NamedTuple):
    """Bytes that a device sends in a step."""

    experts: float  # rows to their experts and back
    experts_far: float  # of them to other nodes
    parameters: float  # gathered, and gradients that are scattered
    parameters_of_experts: float  # of them those of routed experts, which other devices share
    gradients: float  # summed over groups of devices that each have all parameters (`data`)
    tensor: float  # sums over devices that share heads and hidden widths
    context: float  # whole sequences for attention


def traffic(config: Config, layout: Layout, node: int) -> Traffic:
    """Returns what a step sends.

    Experts: in a direction a device sends K N (M - 1) / M rows of D (experts/exchange.py), or, gathered, (M - 1) N:
    the fewer of the two. There and back, in the forward pass and in the backward pass, are 4 directions; with
    remat=full the way there is gone once more, 5. Rows to other nodes are those beyond the node's devices; with a limit
    of nodes a token goes once to each of at most so many other nodes.

    Parameters: a micro-batch gathers what a device uses whole, in the compute dtype, forward and again backward, and
    scatters gradients of the same size: 3 P b (n - 1) / n, where experts are spread over n = fsdp, the rest over
    n = fsdp * expert * context. `data` adds an all-reduce of what a device stores, once a step. Where only the
    optimizer's state is spread, parameters are gathered and gradients scattered once a step: 2 P b (n - 1) / n.

    Tensor: attention and feed-forward add up N D over t devices, forward and backward: 4 all-reduces of a layer, each
    2 (t - 1) / t; as many bytes where each is a scatter and a gather. Folded into the expert axis, routed experts need
    none: their layers have the 2 of attention. Context: queries, keys, values and outputs change places, (c - 1) / c of
    them, forward and backward. As a ring a device passes keys and values on c - 1 times, and backward both once more
    with their gradients: 3 (c - 1) of them.
    """
    model, count, b = config.model, parameters(config.model), bytes_of_number(config.model)
    tokens = layout.sequences * config.data.sequence_length / layout.context
    moe_layers = sum(times for kind, times in _kinds(model).items() if kind.feed_forward == "moe") / layout.pipeline
    layers = sum(_kinds(model).values()) / layout.pipeline
    directions = 5 if layout.remat == "full" else 4
    near, far = _rows_sent(model, layout, node)
    of_rows = directions * moe_layers * tokens / layout.fold * model.dim * b * layout.micro_batches
    used = (count.total - count.experts) / layout.tensor / layout.pipeline
    of_experts = count.experts / layout.expert / layout.tensor / layout.pipeline
    spread = layout.fsdp * layout.expert * layout.context
    of_experts *= (layout.fsdp - 1) / layout.fsdp
    gathered = used * (spread - 1) / spread + of_experts
    often = (2 if layout.gathered_once else 3 * layout.micro_batches) * b
    summed = 2 * (layout.data - 1) / layout.data * FLOAT32 * count.total / layout.stored
    t, c = layout.tensor, layout.context
    sums = 4 * layers - 2 * moe_layers * (layout.fold > 1) * (not model.moe.num_shared_experts)
    queries, keys = _widths(model, pattern.layers(model)[0].attention)
    passed = 3 * (c - 1) * keys if layout.ring else 2 * (c - 1) / c * (2 * queries + keys)
    return Traffic(
        of_rows * (near + far),
        of_rows * far,
        often * gathered,
        often * of_experts,
        summed,
        2 * (t - 1) / t * sums * tokens * model.dim * b * layout.micro_batches,
        passed * layers * tokens / t * b * layout.micro_batches,
    )


def _rows_sent(model: Model, layout: Layout, node: int) -> tuple[float, float]:
    """Rows of D that a device sends for each of its tokens in one direction: inside its node, and to others."""
    devices, choices = layout.expert * layout.fold, model.moe.num_experts_per_token
    if devices == 1 or not pattern.has_experts(model):
        return 0.0, 0.0
    inside = max(1, min(devices, node * layout.fold // (layout.tensor * layout.context)))
    if layout.node_limit:
        nodes = devices / inside
        reached = min(layout.node_limit, nodes * (1 - (1 - 1 / nodes) ** choices))
        return choices * (inside - 1) / inside, reached * (nodes - 1) / nodes
    per_device = min(choices / devices, 1.0)
    return per_device * (inside - 1), per_device * (devices - inside)


# Time.


class Times(NamedTuple):
    """Seconds of a step, by what a device waits for."""

    compute: float  # products
    memory: float  # what only reads and writes, the optimizer too
    exchange: float  # traffic that is not hidden
    bubble: float  # a pipeline's ends

    @property
    def total(self) -> float:
        return sum(self)


def product_seconds(
    device: Device, flops: float, moved: float, precision: str, assumed: Assumptions, narrow: float = math.inf
) -> float:
    """Returns the time of a product of `flops` that moves so many bytes of factors and result.

    Additive roofline: computing and moving overlap in a perfect kernel, and a large product then takes the longer of
    the two. Real ones come near the sum (waves that do not fill the device, factors read more than once), which is
    also smooth in the shapes: narrow experts, whose products move much for what they compute, lose gradually. A kernel
    fills and empties its pipeline along the axis that it contracts and in its last tile of outputs: where the narrower
    of a product's two widths is `narrow`, narrow / (narrow + tile) of the peak is left.
    """
    share = (device.matmul or assumed.matmul) * (1 / (1 + assumed.tile / narrow))
    if precision == "fp8":
        share *= assumed.fp8 / assumed.matmul
    return flops / (device.peak[precision] * share) + moved / (device.bandwidth * assumed.memory)


class _Pass(NamedTuple):
    """One micro-batch's forward pass on one device: what its parts are counted from."""

    model: Model
    layout: Layout
    device: Device
    assumed: Assumptions
    tokens: float
    flops: Mapping[str, float]  # of a token, by part
    high: str  # the precision of what stays out of fp8
    low: str  # and of projections, feed-forwards and experts

    @property
    def number(self) -> int:
        return bytes_of_number(self.model)

    @property
    def share(self) -> float:
        return 1 / self.layout.tensor / self.layout.pipeline

    @property
    def cast(self) -> float:
        """Bytes of a factor that is cast to fp8."""
        return self.assumed.cast if self.low == "fp8" else 0.0

    def product(
        self, name: str, read: float, written: float, precision: str, narrow: float = math.inf, more: float = 1.0
    ) -> float:
        """The seconds of a part's products, with `more` times its FLOPs; `read` and `written`: numbers of a whole
        micro-batch in all layers, before `tensor` and `pipeline` share them. Factors in fp8 are numbers of one byte.
        """
        moved = read * (1 if precision == "fp8" else self.number) + written * self.number
        flops = self.flops[name] * self.tokens * more
        return product_seconds(self.device, flops * self.share, moved * self.share, precision, self.assumed, narrow)

    @property
    def norm(self) -> int:
        """Numbers that a norm reads and writes of each of its own: 2. Without fusion in float32, two numbers each: the
        cast 3, squares 4, their mean 2, the product 4, the cast back 3, the scale 2.
        """
        return 18 if self.layout.eager else 2

    @property
    def rotation(self) -> int:
        """Likewise 2; without fusion the cast 3, halves turned around 4, two products 6 each, the sum 6, the cast 3."""
        return 28 if self.layout.eager else 2

    @property
    def gating(self) -> int:
        """Likewise of gate and up to hidden, of each hidden number: 3; without fusion SiLU 2 and the product 3."""
        return 5 if self.layout.eager else 3

    def stream(self, moved: float) -> float:
        """The seconds of reading and writing so many bytes on this device."""
        return moved / (self.device.bandwidth * self.assumed.memory)


def forward_seconds(
    config: Config, layout: Layout, device: Device, precision: str = "bf16", assumed: Assumptions = ASSUMED
) -> dict[str, tuple[float, float]]:
    """Returns (products, reading and writing) of one micro-batch's forward pass on one device, by part.

    Of a product of N rows, I inputs and J outputs: 2 N I J FLOPs, and N I + I J numbers that are read and N J that are
    written. fp8 is for the projections, feed-forwards and experts, as DeepSeek-V3 has it (2412.19437 section 3.3):
    their inputs are written once more in one byte, which products then read. In a dense model these are nearly all.

    What only reads and writes, in numbers of a token and layer, beside what the parts say: two norms 4 D, two additions
    6 D, once for each device that shares heads unless these split the tokens (`Layout.sequence_parallel`). Operations
    that are not fused (`Layout.eager`) take more: `_Pass.norm`.
    """
    high = "bf16" if "bf16" in device.peak else next(iter(device.peak))
    low = precision if precision in device.peak else high
    tokens = layout.sequences * config.data.sequence_length / layout.context
    flops = flops_of_token(config.model, config.data.sequence_length)
    p = _Pass(config.model, layout, device, assumed, tokens, flops, high, low)
    numbers = (2 * p.norm + 6) * p.model.dim
    around = len(pattern.layers(p.model)) * tokens * numbers * p.number / layout.pipeline / layout.fold
    return (
        _attention_seconds(p)
        | {"norms and residual": (0.0, p.stream(around)), "head": _head_seconds(p)}
        | _feed_forward_seconds(p)
        | (_expert_seconds(p) if pattern.moe_layers(p.model) else {})
    )


def _attention_seconds(p: _Pass) -> dict[str, tuple[float, float]]:
    """Projections: rotation, and a norm where there is one, of queries and keys. Products of queries and keys run at
    `Assumptions.attention` of the peak and move queries, keys, values and output once.
    """
    model, tokens, layers = p.model, p.tokens, len(pattern.layers(p.model))
    queries, keys = _widths(model, pattern.layers(model)[0].attention)
    weights = p.flops["attention projections"] / 2
    around = p.rotation + p.norm * (model.qk_norm != "none")
    turned = around * (queries + keys / 2) * p.number + p.cast * (model.dim + queries)
    rate = p.device.peak[p.high] * (p.device.attention or p.assumed.attention)
    return {
        "attention projections": (
            p.product(
                "attention projections",
                layers * tokens * (model.dim + queries) + weights,
                layers * tokens * (queries + keys + model.dim),
                p.low,
            ),
            p.stream(layers * tokens * turned * p.share),
        ),
        "attention products": (
            p.flops["attention products"] * tokens * p.share / rate,
            p.stream(layers * tokens * (2 * queries + keys) * p.number * p.share),
        ),
    }


def _head_seconds(p: _Pass) -> tuple[float, float]:
    """The loss reads and writes 6 V numbers of a token in float32."""
    model, tokens = p.model, p.tokens
    work = p.product("head", (tokens + model.vocab_size) * model.dim, tokens * model.vocab_size, p.high)
    return work, p.stream(6 * FLOAT32 * tokens * model.vocab_size * p.share)


def _feed_forward_seconds(p: _Pass) -> dict[str, tuple[float, float]]:
    """Each feed-forward that every token passes reads gate and up and writes what is hidden (`_Pass.gating`)."""
    model, tokens, moe, found = p.model, p.tokens, p.model.moe, {}
    moe_layers = len(pattern.moe_layers(model))
    for name, hidden, count in (
        ("dense feed-forward", model.dense_dim, len(pattern.layers(model)) - moe_layers),
        ("shared experts", moe.num_shared_experts * moe.expert_dim, moe_layers),
    ):
        if hidden and count:
            read = count * (tokens * (model.dim + hidden) + 3 * model.dim * hidden)
            written = count * tokens * (2 * hidden + model.dim)
            narrow = min(hidden / p.layout.tensor, model.dim)
            more = count * tokens * (p.gating * hidden * p.number + p.cast * (model.dim + hidden)) * p.share
            found[name] = (p.product(name, read, written, p.low, narrow), p.stream(more))
    return found


def _expert_seconds(p: _Pass) -> dict[str, tuple[float, float]]:
    """Routed experts: K N rows are spread over the experts of a device, each with its own matrices; the busiest device
    is waited for. With a capacity all have as many slots, filled or not, and all are computed.

    Rows pass through memory, in numbers of D of a token. On one device they are gathered, weighted and added up: 3 K
    + 1, and 2 K more where weighting and adding are kernels of their own (`Layout.eager`). Spread over devices they
    are put in the order of devices (K + 1), sent and received (2 K), put in the order of experts (2 K), and all of
    that once more on the way back: 10 K + 2. Where a token goes once to each node and is copied there by what sends
    it, the orders of devices need no pass: 6 K + 2. Scores of the router are 6 E numbers in float32.
    """
    model, tokens, moe, layout = p.model, p.tokens, p.model.moe, p.layout
    layers, choices = len(pattern.moe_layers(model)), moe.num_experts_per_token
    spread = layout.expert * layout.fold > 1
    filled = moe.capacity_factor if moe.executor == "capacity" else p.assumed.imbalance if spread else 1.0
    rows = choices * tokens * filled
    used = min(moe.num_experts / layout.expert, choices * tokens * layout.expert)
    work = p._replace(device=p.device._replace(matmul=p.device.grouped or p.device.matmul)).product(
        "routed experts",
        layers * (rows * (model.dim + moe.expert_dim) + used * 3 * model.dim * moe.expert_dim),
        layers * rows * (2 * moe.expert_dim + model.dim),
        p.low,
        min(moe.expert_dim / layout.tensor * layout.fold, model.dim),
        filled,
    )
    passes = (6 if layout.node_limit else 10) * choices + 2 if spread else (3 + 2 * layout.eager) * choices + 1
    order = passes * model.dim * p.number * tokens / layout.pipeline / layout.fold
    gates = rows * (p.gating * moe.expert_dim * p.number + p.cast * (model.dim + moe.expert_dim)) * p.share
    scores = 6 * FLOAT32 * moe.num_experts * tokens / layout.pipeline / layout.fold
    router = p.product("router", 2 * layers * tokens * model.dim, 0.0, p.high)
    return {
        "routed experts": (work, p.stream(layers * (order + gates))),
        "router": (router, p.stream(layers * scores)),
    }


FEED_FORWARDS = ("dense feed-forward", "shared experts", "routed experts")


def _times(layout: Layout, name: str) -> float:
    """How often a step does a forward pass's work: backward twice, and what remat computes anew.

    Of a feed-forward without its hidden values gate and up are computed once more, 2 of its 3 products.
    """
    again = {"full": float(name != "head"), "hidden": 2 / 3 * (name in FEED_FORWARDS)}
    return TRAIN_FACTOR + again.get(layout.remat, 0.0)


def step_seconds(
    config: Config, layout: Layout, device: Device, precision: str = "bf16", assumed: Assumptions = ASSUMED
) -> Times:
    """Returns the time of one step.

    A micro-batch is one forward pass, a backward pass of twice its products and its reading and writing, and what is
    computed anew: with remat=full the forward pass of all layers. Modules of multi-token prediction are blocks and
    heads more, at the cost of the network's mean block. A pipeline of p stages with m micro-batches is idle for
    `idle_ends` of m + `idle_ends`, and goes at the speed of its slowest stage (`slowest_stage`). The optimizer reads
    parameter, gradient and two moments and writes three of them: 28 bytes of each parameter that a device stores.
    With several micro-batches each reads and writes sums of gradients in float32, where a product of the backward
    pass writes the compute dtype otherwise.
    """
    parts = forward_seconds(config, layout, device, precision, assumed)
    model, depth = config.model, config.model.multi_token_prediction.depth
    more = lambda name: 1 + (depth if name == "head" else depth / model.num_layers)
    of_step = {name: _times(layout, name) * more(name) * layout.micro_batches for name in parts}
    compute = sum(of_step[name] * part[0] for name, part in parts.items())
    reading = sum(of_step[name] * part[1] for name, part in parts.items())
    head = of_step["head"] * sum(parts["head"])
    uneven = slowest_stage(layout, model.num_layers + depth, compute + reading - head, head)
    stored = parameters(model).total / layout.stored
    moved = 7 * FLOAT32 * stored
    if layout.micro_batches > 1:
        summed = held(model, layout) if layout.gathered_once else stored
        moved += (2 * FLOAT32 - bytes_of_number(model)) * summed * layout.micro_batches
    reading += moved / (device.bandwidth * assumed.memory)
    attending = of_step["attention products"] * parts["attention products"][0]
    if layout.expert * layout.fold > 1:
        compute, reading = (part / (1 - assumed.sending * assumed.hidden) for part in (compute, reading))
    if device.platform in ("gpu", "npu"):
        reading += assumed.launch * (model.num_layers + depth) / layout.pipeline * layout.micro_batches
        compute, reading = compute / assumed.software, reading / assumed.software
    exchange = exchange_seconds(config, layout, device, compute + reading, assumed, attending)
    busy = compute + reading + exchange
    ends = idle_ends(layout)
    waiting = (uneven - 1) * (compute + reading)
    return Times(compute, reading, exchange, (busy + waiting) * ends / layout.micro_batches + waiting)


def idle_ends(layout: Layout) -> float:
    """Returns for how many micro-batches a stage waits in a step, with backward passes of two forward passes F.

    1F1B in v pieces (p - 1) / v. What is waited for is filled with weights' gradients, W = F, in the other schedules:
    ZB-H1 (p - 1) (F + F - W) / 3 F, DualPipe (p / 2 - 1) (3 F + 2 F - 3 W) / 3 F (table 2 of 2412.19437).
    """
    p = layout.pipeline
    of_schedule = {"1f1b": (p - 1) / layout.virtual, "zero-bubble": (p - 1) / 3, "dualpipe": 2 / 3 * (p / 2 - 1)}
    return of_schedule[layout.schedule]


def slowest_stage(layout: Layout, layers: int, blocks: float, head: float) -> float:
    """Returns the time of a pipeline's slowest stage over that of the mean one; `blocks`, `head`: seconds of a mean
    stage. The p stages have whole layers, and the last one the head: with k layers there it takes k c + p head, the
    others at least ceil((layers - k) / (p - 1)) c. k is the best one, or layers / p (`Layout.even`). Where a device
    has two stages (dualpipe), their sum counts.
    """
    p = layout.pipeline // 2 if layout.schedule == "dualpipe" else layout.pipeline
    if p == 1:
        return 1.0
    of_layer = p * blocks / layers
    last = [math.ceil(layers / p)] if layout.even else range(layers // p + 1)
    slowest = min(max(k * of_layer + p * head, math.ceil((layers - k) / (p - 1)) * of_layer) for k in last)
    return slowest / (blocks + head)


def exchange_seconds(
    config: Config,
    layout: Layout,
    device: Device,
    computing: float,
    assumed: Assumptions = ASSUMED,
    attending: float = 0.0,
) -> float:
    """Returns how long a step waits for other devices, which compute for `computing` seconds, and of these for
    `attending` the products of attention.

    Rows inside a node and to other nodes go over different wires at one time. Collectives of an axis run at the speed
    of links where all devices that it joins are of one node. Else a ring enters and leaves each node once, and as many
    rings as the axis has devices in a node share the data: what a device receives comes over links, and of it 1 / g
    over its own line to other nodes, so that the speed is that of links or g times that of the network. Axes that are
    innermost in the mesh are nearest: context, tensor, expert, fsdp, data; with a ring tensor is, and then context.

    What goes on beside computing is waited for only beyond it: parameters, gathered while the layer before computes,
    and the share `Assumptions.hidden` of the rows have `computing`, a ring has `attending`. Sums of `tensor` are
    waited for. A pipeline sends its D numbers of a token once for each piece of the network, forward and backward; of
    devices that split a token's sequence each its part.
    """
    sent = traffic(config, layout, device.node)
    link, network = device.link * assumed.links, device.network * assumed.links

    def speed(devices: int, apart: int) -> float:
        """Of a collective over devices of which each is so many apart from the next."""
        own = max(1, device.node // apart)  # of a node
        return link if devices * apart <= device.node else min(link, own * network)

    rows = max((sent.experts - sent.experts_far) / link, sent.experts_far / network) * assumed.imbalance
    inner = layout.tensor * layout.context
    shared = sent.parameters - sent.parameters_of_experts
    gathers = shared / speed(layout.context * layout.expert * layout.fsdp, layout.tensor)
    gathers += sent.parameters_of_experts / speed(layout.fsdp, inner * layout.expert)
    gathers += sent.gradients / speed(layout.data, inner * layout.expert * layout.fsdp)
    if layout.ring:
        passing = sent.context / (link if inner <= device.node else network)
        near = sent.tensor / speed(layout.tensor, 1) + max(0.0, passing - attending)
    else:
        near = sent.tensor / speed(layout.tensor, layout.context) + sent.context / speed(layout.context, 1)
    if layout.pipeline > 1:
        tokens = layout.sequences * config.data.sequence_length / layout.context * layout.micro_batches
        sends = 2 * layout.virtual * tokens * config.model.dim * bytes_of_number(config.model)
        near += sends / layout.fold / network
    waited = (1 - assumed.hidden) * rows + max(0.0, assumed.hidden * rows - computing)
    return waited + near + max(0.0, gathers - computing)


def utilization(config: Config, layout: Layout, device: Device, seconds: float) -> float:
    """Returns the model FLOPs of a step over what the devices could do in it at their bf16 peak; remat is not counted.

    The convention of DeepSeek-V3, Megatron-Core and PaLM but for the causal count of attention (docs/planner.md).
    """
    tokens = layout.batch_size * config.data.sequence_length
    flops = tokens * train_flops(config.model, config.data.sequence_length)
    return flops / (seconds * layout.devices * device.nominal)


def tokens_per_second(config: Config, layout: Layout, seconds: float) -> float:
    """Returns those of all devices."""
    return layout.batch_size * config.data.sequence_length / seconds
