"""One softmax gate for all layers: `topk_softmax` whose matrix W is shared, so that layers agree on who does what.

Omni-router (Gu et al., 2507.05724, section 3): z = W x with the same W in every MoE layer; its gradient is the sum of
the layers'. Options, weights and losses are those of `topk_softmax`; Omni-router itself has one expert per token,
weighted by its probability (softmax='before', renormalize=False).
"""

from frugalmoe.routing import losses
from frugalmoe.routing.contract import About, Router, linear_init_with_bias
from frugalmoe.routing.strategies import topk_softmax

ROUTER = Router(
    about=About(
        year=2025,
        paper="Gu et al., Omni-Router: Sharing Routing Decisions in Sparse Mixture-of-Experts, 2507.05724, section 3",
        score="softmax",
        selection="K largest logits of one gate for all layers",
        weights="softmax probabilities, renormalized over the K or as they are",
        balance="auxiliary loss",
        weight_sum=topk_softmax.weight_sum,
        losses=losses.GATE_LOSSES,
    ),
    route=topk_softmax.route,
    options=topk_softmax.Options,
    init_shared=linear_init_with_bias,
    check=topk_softmax.check,
)
