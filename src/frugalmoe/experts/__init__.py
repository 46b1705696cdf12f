"""A layer's experts: `execute` makes of a routing plan what they output, wherever the devices of the mesh hold them.

`exchange` brings tokens to their experts, `here` runs what a device has of them with one of the `executors`.
"""

from frugalmoe.experts import executors
from frugalmoe.experts.activations import ACTIVATIONS
from frugalmoe.experts.contract import Biases, Stack, refusal
from frugalmoe.experts.exchange import execute, execute_slots
from frugalmoe.experts.executors import pick
from frugalmoe.experts.executors.capacity import ORDERS
from frugalmoe.experts.here import execute_here, execute_in_stack, takes_stacks

__all__ = [
    "ACTIVATIONS",
    "ORDERS",
    "Biases",
    "Stack",
    "execute",
    "execute_here",
    "execute_in_stack",
    "execute_slots",
    "executors",
    "pick",
    "refusal",
    "takes_stacks",
]
