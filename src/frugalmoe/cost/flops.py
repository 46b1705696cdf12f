"""FLOPs per token from shapes: 2 per weight that is multiplied, and the products of attention.

Convention of Kaplan et al. (2001.08361, section 2.1, table 1), with the attention products of a causal model counted
at their mean length. Norms, activations, softmax and the look-up of embeddings are left out.
"""

import math

import jax

from frugalmoe.model import depths, multi_token, pattern
from frugalmoe.model.attention import kinds
from frugalmoe.routing import strategies, threshold
from frugalmoe.schema import Model

TRAIN_FACTOR = 3  # a backward pass multiplies each weight twice: with the input's gradient and with the weight's


def forward_flops(model: Model, sequence_length: int, active_experts: float | None = None) -> dict[str, float]:
    """FLOPs of one token's forward pass, by part. `active_experts`: of a layer, where they are not K exactly.

    Mixture of depths is counted as it trains: a routed block costs a token the share of a sequence that passes. So is
    multi-token prediction, of which evaluation and generation need nothing.
    """
    moe, num_routed = model.moe, len(pattern.wrapped_layers(model))
    share = threshold.slots(sequence_length, model.mixture_of_depths.capacity) / sequence_length
    num_dense, num_moe = (_times(model, share, feed_forward) for feed_forward in pattern.FEED_FORWARDS)
    projections, products = _attention(model, sequence_length)
    active = moe.num_experts_per_token if active_experts is None else active_experts
    parts = {
        "attention projections": projections,
        "attention products": products,
        "dense feed-forward": num_dense * _feed_forward(model, model.dense_dim),
        "router": num_moe * 2 * _router_weights(model),
        "routed experts": num_moe * active * _feed_forward(model, moe.expert_dim),
        "shared experts": num_moe * _shared(model),
        "head": 2 * model.dim * model.vocab_size,
    }
    if num_routed:
        parts["mixture of depths"] = num_routed * depths.flops(model)
    if depth := model.multi_token_prediction.depth:
        parts["multi-token prediction"] = depth * (_module(model, sequence_length, active) + parts["head"])
    return parts


def _times(model: Model, share: float, feed_forward: str, attention: str | None = None) -> float:
    """Layers of a kind; a block that mixture of depths routes counts as the share of tokens that pass."""
    own = [k for k in pattern.layers(model) if k.feed_forward == feed_forward and attention in (None, k.attention)]
    return len(own) - sum(bool(kind.wrapper) for kind in own) * (1 - share)


def _attention(model: Model, sequence_length: int) -> tuple[float, float]:
    """FLOPs of the projections, and of the products with keys and values, of all layers."""
    passing = threshold.slots(sequence_length, model.mixture_of_depths.capacity)
    share, projections, products = passing / sequence_length, 0, 0
    for name in dict.fromkeys(kind.attention for kind in pattern.layers(model)):
        attention, options = kinds.get(name), kinds.options_of(model, name)
        routed = [bool(kind.wrapper) for kind in pattern.layers(model) if kind.attention == name]
        lengths = routed.count(False) * attention.seen(model, options, sequence_length)
        if passing:
            lengths += routed.count(True) * share * attention.seen(model, options, passing)
        per_token, per_key = attention.flops(model, options)
        times = sum(_times(model, share, feed_forward, name) for feed_forward in pattern.FEED_FORWARDS)
        projections += times * per_token
        products += per_key * lengths
    return projections, products


def _module(model: Model, sequence_length: int, active_experts: float) -> float:
    """FLOPs of a module of multi-token prediction: its block, and the matrix that joins two vectors to one."""
    kind = multi_token.kind(model)
    attention, options = kinds.get(kind.attention), kinds.options_of(model, kind.attention)
    per_token, per_key = attention.flops(model, options)
    block = per_token + per_key * attention.seen(model, options, sequence_length)
    if kind.feed_forward == "dense":
        block += _feed_forward(model, model.dense_dim)
    else:
        experts = active_experts * _feed_forward(model, model.moe.expert_dim)
        block += 2 * _router_weights(model) + experts + _shared(model)
    return block + 2 * 2 * model.dim**2


def _feed_forward(model: Model, hidden: int) -> int:
    """FLOPs of gate, up and down."""
    return 2 * 3 * model.dim * hidden


def _shared(model: Model) -> int:
    """FLOPs of a layer's shared experts and their gate."""
    moe = model.moe
    return moe.num_shared_experts * _feed_forward(model, moe.expert_dim) + 2 * model.dim * moe.shared_gate


def _router_weights(model: Model) -> int:
    """Entries of the strategy's matrices, each taken to be multiplied once per token."""
    router = strategies.get(model.moe.router)
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: [router.new_params(key, model.dim, model.moe, shared) for shared in (False, True)])
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes) if leaf.ndim >= 2)
