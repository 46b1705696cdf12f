"""FLOPs per token from shapes: 2 per weight that is multiplied, and the products of attention.

Convention of Kaplan et al. (2001.08361, section 2.1, table 1), with the attention products of a causal model counted
at their mean length. Norms, activations, softmax and the look-up of embeddings are left out.
"""

import math

import jax

from frugalmoe.model.depths import predictor_hidden, routed_layers
from frugalmoe.routing import strategies, threshold
from frugalmoe.schema import Model

TRAIN_FACTOR = 3  # a backward pass multiplies each weight twice: with the input's gradient and with the weight's


def forward_flops(model: Model, sequence_length: int, active_experts: float | None = None) -> dict[str, float]:
    """FLOPs of one token's forward pass, by part. `active_experts`: of a layer, where they are not K exactly.

    Mixture of depths is counted as it trains: a routed block costs a token the share of a sequence that passes.
    """
    moe, (routed_dense, routed_moe) = model.moe, map(len, routed_layers(model))
    passing, num_routed = threshold.slots(sequence_length, model.mixture_of_depths.capacity), routed_dense + routed_moe
    share = passing / sequence_length
    num_dense = model.num_dense_layers - routed_dense * (1 - share)
    num_moe = model.num_layers - model.num_dense_layers - routed_moe * (1 - share)
    active = moe.num_experts_per_token if active_experts is None else active_experts
    heads, kv_heads, width = model.num_heads, model.num_kv_heads, model.head_dim
    lengths = (model.num_layers - num_routed) * (sequence_length + 1) / 2 + num_routed * share * (passing + 1) / 2
    feed_forward = lambda hidden: 2 * 3 * model.dim * hidden  # gate, up, down
    parts = {
        "attention projections": (num_dense + num_moe) * 2 * model.dim * width * (2 * heads + 2 * kv_heads),
        "attention products": 2 * 2 * heads * width * lengths,
        "dense feed-forward": num_dense * feed_forward(model.dense_dim),
        "router": num_moe * 2 * _router_weights(model),
        "routed experts": num_moe * active * feed_forward(moe.expert_dim),
        "shared experts": num_moe * moe.num_shared_experts * feed_forward(moe.expert_dim),
        "head": 2 * model.dim * model.vocab_size,
    }
    if num_routed:
        hidden = predictor_hidden(model.dim)
        parts["mixture of depths"] = num_routed * 2 * (model.dim + model.dim * hidden + hidden)
    return parts


def _router_weights(model: Model) -> int:
    """Entries of the strategy's matrices, each taken to be multiplied once per token."""
    router = strategies.get(model.moe.router)
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: [router.new_params(key, model.dim, model.moe, shared) for shared in (False, True)])
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes) if leaf.ndim >= 2)
