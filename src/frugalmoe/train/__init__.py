"""Training. The package can be called: `frugalmoe.train(config, workdir)` is its function `train`, for a package and a
function of one name cannot both be attributes of `frugalmoe`.
"""

import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from frugalmoe.config import Config
    from frugalmoe.train.origin import Origin


def train(
    config: "Config",
    workdir: str | Path,
    *,
    resume: str = "auto",
    fresh: bool = False,
    origin: "Origin | None" = None,
) -> dict[str, Any]:
    """Trains, or continues, the run in a directory and returns its summary; as `frugalmoe train` does, without report.

    Raises `UserError` for input that cannot be run; nothing is written then. See `frugalmoe.train.loop.train`.
    """
    import jax

    from frugalmoe.config import resolve
    from frugalmoe.train import loop, preflight

    config, workdir = resolve(config), Path(workdir)
    preflight.check(config, workdir, num_devices=jax.device_count(), resume=resume, fresh=fresh, origin=origin)
    return loop.train(config, workdir, resume=resume, fresh=fresh, origin=origin)


class _Callable(types.ModuleType):
    __call__ = staticmethod(train)


sys.modules[__name__].__class__ = _Callable
