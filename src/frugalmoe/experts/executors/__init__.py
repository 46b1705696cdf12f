"""Executors of a routing plan, one file each. A new file in this folder is a new executor; nothing else is edited.

`lax.ragged_dot` is not among them: on CPUs, on most TPUs and on GPUs it is a masked dense product, E times the work.
"""

from frugalmoe.experts.contract import Executor
from frugalmoe.found import Kind
from frugalmoe.schema import MoE

BY_PLATFORM = ("auto", "grouped")  # choices of model.moe.executor that each platform takes its own executor for
_KIND = Kind(__name__, "EXECUTOR", Executor, "model.moe.executor", "executor", BY_PLATFORM)
names, get, broken, sound = _KIND.names, _KIND.get, _KIND.broken, _KIND.sound


def pick(config: MoE, platform: str) -> Executor:
    """The executor that a config means on a platform. Raises `UserError` for one that is not there."""
    if config.executor not in BY_PLATFORM:
        return get(config.executor)
    able = [get(name) for name in sound()]
    own = [e for e in able if platform in e.default_on] or [e for e in able if "*" in e.default_on]
    return own[0]
