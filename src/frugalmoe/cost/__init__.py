"""What a model costs, from its shapes alone."""

from frugalmoe.cost.flops import TRAIN_FACTOR, forward_flops

__all__ = ["TRAIN_FACTOR", "forward_flops"]
