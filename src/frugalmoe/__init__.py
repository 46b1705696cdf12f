"""frugalmoe: train, ablate and cost mixture-of-experts language models on the hardware a team can afford.

    config = frugalmoe.load_config("quickstart:laptop", {"model.moe.router": "hash"})
    frugalmoe.train(config, "runs/hash")
    frugalmoe.load_run("runs/hash").metrics

What `__all__` names is imported when it is asked for: `import frugalmoe` alone loads neither JAX nor NumPy.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from frugalmoe.ablate.study import Study
    from frugalmoe.analysis.stored.runs import load_run
    from frugalmoe.config.load import load as load_config
    from frugalmoe.schema import Config
    from frugalmoe.train import train

__version__ = "0.1.0"
__all__ = ["Config", "Study", "load_config", "load_run", "train"]

_HOME = {
    "Config": ("frugalmoe.schema", "Config"),
    "Study": ("frugalmoe.ablate.study", "Study"),
    "load_config": ("frugalmoe.config.load", "load"),
    "load_run": ("frugalmoe.analysis.stored.runs", "load_run"),
    "train": ("frugalmoe.train", None),  # the package itself, which is called as its function `train`
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOME[name]
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return [*globals(), *__all__]
