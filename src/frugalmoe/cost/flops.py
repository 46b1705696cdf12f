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
    moe, of_layers = model.moe, pattern.layers(model)
    passing = threshold.slots(sequence_length, model.mixture_of_depths.capacity)
    share, num_routed = passing / sequence_length, len(pattern.wrapped_layers(model))

    def times(feed_forward: str, attention: str | None = None) -> float:
        """Layers of a kind, a routed one for its share."""
        own = [k for k in of_layers if k.feed_forward == feed_forward and attention in (None, k.attention)]
        return len(own) - sum(bool(kind.wrapper) for kind in own) * (1 - share)

    num_dense, num_moe = map(times, pattern.FEED_FORWARDS)
    projections = products = 0
    for name in dict.fromkeys(kind.attention for kind in of_layers):
        attention, options = kinds.get(name), kinds.options_of(model, name)
        routed = [bool(kind.wrapper) for kind in of_layers if kind.attention == name]
        lengths = routed.count(False) * attention.seen(model, options, sequence_length)
        if passing:
            lengths += routed.count(True) * share * attention.seen(model, options, passing)
        per_token, per_key = attention.flops(model, options)
        projections += sum(times(feed_forward, name) for feed_forward in pattern.FEED_FORWARDS) * per_token
        products += per_key * lengths
    active = moe.num_experts_per_token if active_experts is None else active_experts
    feed_forward = lambda hidden: 2 * 3 * model.dim * hidden  # gate, up, down
    parts = {
        "attention projections": projections,
        "attention products": products,
        "dense feed-forward": num_dense * feed_forward(model.dense_dim),
        "router": num_moe * 2 * _router_weights(model),
        "routed experts": num_moe * active * feed_forward(moe.expert_dim),
        "shared experts": num_moe * _shared(model),
        "head": 2 * model.dim * model.vocab_size,
    }
    if num_routed:
        parts["mixture of depths"] = num_routed * depths.flops(model)
    if depth := model.multi_token_prediction.depth:
        kind = multi_token.kind(model)
        attention, options = kinds.get(kind.attention), kinds.options_of(model, kind.attention)
        per_token, per_key = attention.flops(model, options)
        block = per_token + per_key * attention.seen(model, options, sequence_length)
        if kind.feed_forward == "dense":
            block += feed_forward(model.dense_dim)
        else:
            block += 2 * _router_weights(model) + active * feed_forward(moe.expert_dim) + _shared(model)
        parts["multi-token prediction"] = depth * (block + 2 * 2 * model.dim**2 + parts["head"])
    return parts


def _shared(model: Model) -> int:
    """Of a layer's shared experts and their gate."""
    moe = model.moe
    return moe.num_shared_experts * 6 * model.dim * moe.expert_dim + 2 * model.dim * moe.shared_gate


def _router_weights(model: Model) -> int:
    """Entries of the strategy's matrices, each taken to be multiplied once per token."""
    router = strategies.get(model.moe.router)
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: [router.new_params(key, model.dim, model.moe, shared) for shared in (False, True)])
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes) if leaf.ndim >= 2)
